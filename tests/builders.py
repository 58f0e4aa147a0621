"""What tests talk about, made in one line: a test names only what it is about.

Every builder answers something valid; keyword arguments change what a test cares for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from chassis.context import CallContext
from chassis.ids import uuid7
from chassis.money import Money
from chassis.request_key import RequestKey
from chassis.settings import Merchant
from order_svc.commands import CancelOrder, CreateOrder, PaymentReport, Placement
from order_svc.domain.order import (
    Address,
    Basket,
    CaptureMethod,
    Customer,
    Order,
    OrderLine,
    OrderState,
    PaymentState,
    Rate,
)
from order_svc.domain.saga import PaymentCaptured, PaymentFact
from ordermesh.order.v1 import order_service_pb2

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
"""When things happen in tests, unless they say otherwise."""

PAYMENT = "merchants/default/payments/018c0000-0000-7000-8000-000000000001"


def eur(minor_units: int) -> Money:
    """An amount in euro cents."""
    return Money("EUR", minor_units)


def an_order_id() -> UUID:
    """An id that no other order has."""
    return uuid7(int(NOON.timestamp() * 1000), uuid4().bytes[:10])


def a_merchant(**changes: Any) -> Merchant:
    """The merchant `default`, who settles in EUR and captures at once."""
    given = {
        "id": "default",
        "name": "Default",
        "email": "merchant@default.example",
        "settlement_currency": "EUR",
    }
    return Merchant(**{**given, **changes})


def merchants_file(folder: Path, *merchants: Merchant) -> Path:
    """Writes a file of merchants; `default` (EUR) and `acme` (USD) unless some are given."""
    listed = merchants or (
        a_merchant(),
        a_merchant(id="acme", name="Acme", settlement_currency="USD"),
    )
    path = folder / "merchants.json"
    path.write_text(json.dumps({"merchants": [merchant.model_dump() for merchant in listed]}))
    return path


def a_customer(**changes: Any) -> Customer:
    """Ada, who reads English."""
    return replace(Customer(customer_id="cust-42", email="ada@example.com", locale="en"), **changes)


def an_address(**changes: Any) -> Address:
    """Somewhere in Vienna."""
    return replace(
        Address(
            recipient="Ada Lovelace",
            address_lines=("Ringstraße 1", "Stiege 2"),
            locality="Wien",
            administrative_area="Wien",
            postal_code="1010",
            region_code="AT",
        ),
        **changes,
    )


def a_line(
    sku: str = "TEA-001", *, quantity: int = 2, unit_price: Money | None = None
) -> OrderLine:
    """Two packets of tea at 12.50 EUR."""
    return OrderLine(
        sku=sku,
        title="Darjeeling 100 g",
        quantity=quantity,
        unit_price=unit_price if unit_price is not None else eur(1250),
    )


def a_basket(*lines: OrderLine, **changes: Any) -> Basket:
    """A basket of these lines, or of one; 25.00 EUR in all."""
    return replace(
        Basket(
            currency_code="EUR",
            lines=lines or (a_line(),),
            customer=a_customer(),
            capture_method=CaptureMethod.AUTOMATIC,
        ),
        **changes,
    )


def a_rate(value: str = "1.1", **changes: Any) -> Rate:
    """What the European Central Bank said."""
    return replace(Rate(value=Decimal(value), provider="ecb", as_of_time=NOON), **changes)


def an_order(
    *,
    merchant: str = "default",
    order_id: UUID | None = None,
    basket: Basket | None = None,
    expected_total: Money | None = None,
    settlement_rate: Rate | None = None,
    settlement_currency: str = "EUR",
    placed_at: datetime = NOON,
    **changes: Any,
) -> Order:
    """An order just placed; further keywords replace what it then holds."""
    order = Order.place(
        merchant=merchant,
        order_id=order_id or an_order_id(),
        basket=basket or a_basket(),
        payment_method="pm_card_visa",
        expected_total=expected_total,
        settlement_rate=settlement_rate,
        settlement_currency=settlement_currency,
        placed_at=placed_at,
    )
    return replace(order, **changes)


def an_order_in(
    state: OrderState, payment_state: PaymentState = PaymentState.NONE, **changes: Any
) -> Order:
    """An order as it stands in a state, whatever led there."""
    return an_order(state=state, payment_state=payment_state, **changes)


def a_request_key(**changes: Any) -> RequestKey:
    """The key of a request that nobody made before."""
    return replace(
        RequestKey(
            merchant="default",
            method="CreateOrder",
            request_id=uuid4(),
            fingerprint=b"what was asked for".ljust(32),
        ),
        **changes,
    )


def a_placement(order: Order | None = None, request: RequestKey | None = None) -> Placement:
    """An order about to be written, under a request of its own."""
    order = order or an_order()
    return Placement(request=request or a_request_key(merchant=order.merchant), order=order)


def a_create_order(**changes: Any) -> CreateOrder:
    """The command to place the basket of `a_basket`."""
    return replace(
        CreateOrder(
            request=a_request_key(),
            merchant="default",
            basket=a_basket(),
            payment_method="pm_card_visa",
        ),
        **changes,
    )


def a_cancel_order(order_id: UUID, **changes: Any) -> CancelOrder:
    """The command to undo an order."""
    return replace(
        CancelOrder(
            request=a_request_key(method="CancelOrder"),
            merchant="default",
            order_id=order_id,
            reason="changed my mind",
        ),
        **changes,
    )


class ACause:
    """An event, as far as the records of what it causes need to know it."""

    def __init__(self, event_id: UUID | None = None, *, aggregate: str = PAYMENT) -> None:
        self.event_id = event_id or uuid4()
        self.aggregate = aggregate
        self.version = 1
        self.context = CallContext(
            correlation_id="corr-1",
            causation_id=str(self.event_id),
            traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        )


def a_report(
    order: Order, fact: PaymentFact | None = None, *, event_id: UUID | None = None
) -> PaymentReport:
    """What payment says of an order: that its money is taken, unless another fact is given."""
    return PaymentReport(
        merchant=order.merchant,
        order_id=order.order_id,
        fact=fact or PaymentCaptured(payment=PAYMENT),
        cause=ACause(event_id),
    )


def a_create_order_request(
    *,
    merchant: str = "default",
    request_id: str | None = None,
    lines: Sequence[Mapping[str, Any]] | None = None,
    payment_method: str = "pm_card_visa",
    **order: Any,
) -> order_service_pb2.CreateOrderRequest:
    """A request for one order of 25.00 EUR; further keywords are fields of its order."""
    fields = {
        "customer": {"customer_id": "cust-42", "email": "ada@example.com", "locale": "en"},
        "currency_code": "EUR",
        "lines": [a_line_message()] if lines is None else lines,
    }
    return order_service_pb2.CreateOrderRequest(
        parent=f"merchants/{merchant}",
        payment_method=payment_method,
        request_id=str(uuid4()) if request_id is None else request_id,
        order=order_service_pb2.Order(**{**fields, **order}),
    )


def a_line_message(
    sku: str = "TEA-001", *, quantity: int = 2, minor_units: int = 1250, currency_code: str = "EUR"
) -> dict[str, Any]:
    """A line of a request, as keywords of its message."""
    return {
        "sku": sku,
        "title": "Darjeeling 100 g",
        "quantity": quantity,
        "unit_price": {"currency_code": currency_code, "minor_units": minor_units},
    }
