"""Proto to domain and back: the only module that knows both.

The domain's enums share their numbers with the proto's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, TypeVar
from uuid import UUID

from google.protobuf.message import Message as ProtoMessage

from chassis.context import CallContext
from chassis.errors import InvalidInputError
from chassis.events import Event, EventTypes
from chassis.idempotency import fingerprint_of
from chassis.money import Money, UnknownCurrencyError, minor_unit_digits
from chassis.request_key import RequestKey
from chassis.settings import Merchant
from order_svc.commands import CancelOrder, CreateOrder, PaymentReport, capture_method_of
from order_svc.domain.order import (
    Address,
    Announcement,
    Basket,
    CaptureMethod,
    Customer,
    FulfillmentState,
    Order,
    OrderLine,
    OrderState,
    PaymentState,
    Rate,
    Settlement,
)
from order_svc.domain.saga import (
    PaymentAuthorized,
    PaymentCaptured,
    PaymentFact,
    PaymentFailed,
    PaymentVoided,
    RefundFailed,
    RefundSucceeded,
)
from ordermesh.common.v1 import money_pb2, postal_address_pb2
from ordermesh.order.v1 import order_events_pb2, order_service_pb2
from ordermesh.payment.v1 import payment_events_pb2

PAYMENT_EVENTS = EventTypes(
    [
        payment_events_pb2.PaymentAuthorized,
        payment_events_pb2.PaymentSucceeded,
        payment_events_pb2.PaymentFailed,
        payment_events_pb2.PaymentVoided,
        payment_events_pb2.RefundSucceeded,
        payment_events_pb2.RefundFailed,
    ]
)
"""What the order service listens to."""

P = TypeVar("P", bound=ProtoMessage)

UNANNOUNCED = frozenset({Announcement.PAYMENT_RECORDED})
"""Changes that stand in the timeline and are told to nobody: no service acts on them."""


# --- requests ---------------------------------------------------------------------


def create_order_from_proto(
    request: order_service_pb2.CreateOrderRequest, merchant: Merchant
) -> CreateOrder:
    """The command of a validated request.

    Raises:
        InvalidInputError: An amount is in a currency that nobody knows; validation knows
            only the form of its code.
        MoneyError: An amount does not fit, which validation rules out.
    """
    try:
        return _create_order(request, merchant)
    except UnknownCurrencyError as error:
        raise InvalidInputError.of_field(
            "CURRENCY_UNKNOWN",
            _field_in_currency(request, error.currency_code),
            f"{error.currency_code} is not a currency that orders can be placed in",
            given=error.currency_code,
        ) from error


def _create_order(request: order_service_pb2.CreateOrderRequest, merchant: Merchant) -> CreateOrder:
    order = request.order
    minor_unit_digits(order.currency_code)  # the order's own currency is told before a line's
    capture = (
        CaptureMethod(order.capture_method) if order.capture_method else capture_method_of(merchant)
    )
    return CreateOrder(
        request=RequestKey(
            merchant=merchant.id,
            method="CreateOrder",
            request_id=UUID(request.request_id),
            fingerprint=fingerprint_of(request),
        ),
        merchant=merchant.id,
        payment_method=request.payment_method,
        expected_total=(
            _money_from_proto(request.expected_total)
            if request.HasField("expected_total")
            else None
        ),
        basket=Basket(
            currency_code=order.currency_code,
            lines=tuple(
                OrderLine(
                    sku=line.sku,
                    title=line.title,
                    quantity=line.quantity,
                    unit_price=_money_from_proto(line.unit_price),
                )
                for line in order.lines
            ),
            customer=Customer(
                customer_id=order.customer.customer_id,
                email=order.customer.email,
                locale=order.customer.locale or "en",
            ),
            capture_method=capture,
            client_order_ref=order.client_order_ref,
            shipping_address=_address_from_proto(order, "shipping_address"),
            billing_address=_address_from_proto(order, "billing_address"),
            labels=dict(order.labels),
            discount=_optional_money(order, "discount"),
            shipping=_optional_money(order, "shipping"),
            tax=_optional_money(order, "tax"),
        ),
    )


def _field_in_currency(request: order_service_pb2.CreateOrderRequest, code: str) -> str:
    """Path of the first field that holds this currency code, as the caller wrote it."""
    order = request.order
    amounts = [("order", order.currency_code)]
    amounts += [
        (f"order.lines[{position}].unit_price", line.unit_price.currency_code)
        for position, line in enumerate(order.lines)
    ]
    amounts += [
        (f"order.{name}", getattr(order, name).currency_code)
        for name in ("discount", "shipping", "tax")
    ]
    amounts.append(("expected_total", request.expected_total.currency_code))
    return next(f"{path}.currency_code" for path, found in amounts if found == code)


def cancel_order_from_proto(request: order_service_pb2.CancelOrderRequest) -> CancelOrder:
    """The command of a validated request."""
    merchant, order_id = split_order_name(request.name)
    return CancelOrder(
        request=RequestKey(
            merchant=merchant,
            method="CancelOrder",
            request_id=UUID(request.request_id),
            fingerprint=fingerprint_of(request),
        ),
        merchant=merchant,
        order_id=order_id,
        reason=request.reason,
        etag=request.etag,
    )


def split_order_name(name: str) -> tuple[str, UUID]:
    """Merchant and id of a validated `merchants/{merchant}/orders/{order}`."""
    _, merchant, _, order_id = name.split("/")
    return merchant, UUID(order_id)


def _money_from_proto(money: money_pb2.Money) -> Money:
    return Money(money.currency_code, money.minor_units)


def _optional_money(order: order_service_pb2.Order, field: Any) -> Money | None:
    return _money_from_proto(getattr(order, field)) if order.HasField(field) else None


def _address_from_proto(order: order_service_pb2.Order, field: Any) -> Address | None:
    if not order.HasField(field):
        return None
    address = getattr(order, field)
    return Address(
        recipient=address.recipient,
        address_lines=tuple(address.address_lines),
        locality=address.locality,
        administrative_area=address.administrative_area,
        postal_code=address.postal_code,
        region_code=address.region_code,
    )


# --- the resource -----------------------------------------------------------------


def order_to_proto(order: Order) -> order_service_pb2.Order:
    """The resource, as callers read it."""
    basket = order.basket
    resource = order_service_pb2.Order(
        name=order.name,
        client_order_ref=basket.client_order_ref,
        customer=_customer_to_proto(basket.customer),
        currency_code=basket.currency_code,
        lines=_lines_to_proto(basket.lines),
        labels=basket.labels,
        capture_method=basket.capture_method.value,  # type: ignore[arg-type]
        subtotal=_money_to_proto(order.subtotal),
        total=_money_to_proto(order.total),
        state=order.state.value,  # type: ignore[arg-type]
        payment_state=order.payment_state.value,  # type: ignore[arg-type]
        fulfillment_state=order.fulfillment_state.value,  # type: ignore[arg-type]
        payment=order.payment,
        failure_reason=order.failure_reason,
        cancel_reason=order.cancel_reason,
        attention_reason=order.attention_reason,
        etag=order.etag,
    )
    for field in ("discount", "shipping", "tax"):
        if (amount := getattr(basket, field)) is not None:
            getattr(resource, field).CopyFrom(_money_to_proto(amount))
    for field in ("shipping_address", "billing_address"):
        if (address := getattr(basket, field)) is not None:
            getattr(resource, field).CopyFrom(
                postal_address_pb2.PostalAddress(
                    recipient=address.recipient,
                    address_lines=address.address_lines,
                    locality=address.locality,
                    administrative_area=address.administrative_area,
                    postal_code=address.postal_code,
                    region_code=address.region_code,
                )
            )
    if order.settlement is not None:
        resource.settlement.CopyFrom(_settlement_to_proto(order.settlement))
    resource.create_time.FromDatetime(order.create_time)
    resource.update_time.FromDatetime(order.update_time)
    return resource


def order_resource(order: Order) -> bytes:
    """The resource, serialized; equal orders give equal bytes."""
    return order_to_proto(order).SerializeToString(deterministic=True)


def _money_to_proto(money: Money) -> money_pb2.Money:
    return money_pb2.Money(currency_code=money.currency_code, minor_units=money.minor_units)


def _customer_to_proto(customer: Customer) -> order_service_pb2.Customer:
    return order_service_pb2.Customer(
        customer_id=customer.customer_id, email=customer.email, locale=customer.locale
    )


def _lines_to_proto(lines: Sequence[OrderLine]) -> list[order_service_pb2.OrderLine]:
    return [
        order_service_pb2.OrderLine(
            sku=line.sku,
            title=line.title,
            quantity=line.quantity,
            unit_price=_money_to_proto(line.unit_price),
            amount=_money_to_proto(line.amount),
        )
        for line in lines
    ]


def _settlement_to_proto(settlement: Settlement) -> order_service_pb2.Settlement:
    proto = order_service_pb2.Settlement(
        amount=_money_to_proto(settlement.amount),
        exchange_rate=str(settlement.rate.value),
        provider=settlement.rate.provider,
    )
    proto.as_of_time.FromDatetime(settlement.rate.as_of_time)
    return proto


# --- events -----------------------------------------------------------------------


def announcement_type(announcement: Announcement) -> str:
    """The full proto name of the event that a change is told as."""
    return f"ordermesh.order.v1.{announcement.value}"


def event_of(order: Order, *, event_id: UUID, context: CallContext) -> Event:
    """The event that tells of an order's present version."""
    return Event(
        event_id=event_id,
        merchant=order.merchant,
        aggregate=order.name,
        version=order.version,
        occur_time=order.update_time,
        payload=_payload_of(order),
        correlation_id=context.correlation_id,
        causation_id=context.causation_id,
        traceparent=context.traceparent,
    )


def _payload_of(order: Order) -> ProtoMessage:
    total = _money_to_proto(order.total)
    money_state: Any = order.payment_state.value
    match order.announcement:
        case Announcement.CREATED:
            created = order_events_pb2.OrderCreated(
                order=order.name,
                amount=total,
                payment_method=order.payment_method,
                capture_method=order.basket.capture_method.value,  # type: ignore[arg-type]
                customer=_customer_to_proto(order.basket.customer),
                lines=_lines_to_proto(order.basket.lines),
                client_order_ref=order.basket.client_order_ref,
            )
            if order.settlement is not None:
                created.settlement.CopyFrom(_settlement_to_proto(order.settlement))
            created.create_time.FromDatetime(order.create_time)
            return created
        case Announcement.CONFIRMED:
            return order_events_pb2.OrderConfirmed(
                order=order.name, payment=order.payment, amount=total, payment_state=money_state
            )
        case Announcement.FAILED:
            return order_events_pb2.OrderFailed(
                order=order.name,
                payment=order.payment,
                amount=total,
                failure_reason=order.failure_reason,
            )
        case Announcement.CANCELLATION_REQUESTED:
            return order_events_pb2.OrderCancellationRequested(
                order=order.name, payment=order.payment, reason=order.cancel_reason
            )
        case Announcement.CANCELLED:
            return order_events_pb2.OrderCancelled(
                order=order.name,
                payment=order.payment,
                amount=total,
                payment_state=money_state,
                reason=order.cancel_reason,
            )
        case Announcement.PAYMENT_RECORDED:
            return order_events_pb2.OrderPaymentRecorded(
                order=order.name, payment=order.payment, payment_state=money_state
            )


def report_of(event: Event) -> PaymentReport:
    """What an event of the payment service says about an order's money.

    Raises:
        ValueError: The event names no order, or amounts that cannot be.
    """
    payload: Any = event.payload
    merchant, order_id = split_order_name(payload.order)
    return PaymentReport(merchant=merchant, order_id=order_id, fact=_fact_of(payload), cause=event)


def _fact_of(payload: Any) -> PaymentFact:
    match payload:
        case payment_events_pb2.PaymentAuthorized():
            return PaymentAuthorized(payment=payload.payment)
        case payment_events_pb2.PaymentSucceeded():
            return PaymentCaptured(payment=payload.payment)
        case payment_events_pb2.PaymentFailed():
            return PaymentFailed(payment=payload.payment, reason=payload.failure_reason)
        case payment_events_pb2.PaymentVoided():
            return PaymentVoided(payment=payload.payment)
        case payment_events_pb2.RefundSucceeded():
            refunded = _money_from_proto(payload.refunded_total)
            captured = _money_from_proto(payload.captured_total)
            if refunded.currency_code != captured.currency_code:
                raise ValueError(f"{refunded} cannot be a refund of {captured}")
            return RefundSucceeded(
                payment=payload.payment, refunded_total=refunded, captured_total=captured
            )
        case payment_events_pb2.RefundFailed():
            return RefundFailed(payment=payload.payment, reason=payload.failure_reason)
        case _:
            raise ValueError(f"{payload.DESCRIPTOR.full_name} says nothing about money")


# --- documents --------------------------------------------------------------------


def document_of(order: Order) -> str:
    """What an order holds beside its columns and its personal data, as JSON."""
    basket = order.basket
    document: dict[str, Any] = {
        "currency": basket.currency_code,
        "lines": [
            [line.sku, line.title, line.quantity, line.unit_price.minor_units]
            for line in basket.lines
        ],
        "capture": basket.capture_method.name,
        "payment_method": order.payment_method,
        "subtotal": order.subtotal.minor_units,
        "total": order.total.minor_units,
    }
    if basket.labels:
        document["labels"] = dict(basket.labels)
    for field in ("discount", "shipping", "tax"):
        if (amount := getattr(basket, field)) is not None:
            document[field] = amount.minor_units
    if order.settlement is not None:
        document["settlement"] = {
            "currency": order.settlement.amount.currency_code,
            "amount": order.settlement.amount.minor_units,
            "rate": str(order.settlement.rate.value),
            "provider": order.settlement.rate.provider,
            "as_of_time": order.settlement.rate.as_of_time.isoformat(),
        }
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False)


def address_document(address: Address | None) -> str | None:
    """An address as JSON, or None."""
    if address is None:
        return None
    return json.dumps(
        {
            "recipient": address.recipient,
            "address_lines": list(address.address_lines),
            "locality": address.locality,
            "administrative_area": address.administrative_area,
            "postal_code": address.postal_code,
            "region_code": address.region_code,
        },
        ensure_ascii=False,
    )


def order_from_row(row: Any) -> Order:
    """The order of a row of `orders` joined with `order_customers`.

    An order whose personal data has been erased has an empty customer.
    """
    document = json.loads(row["document"])
    currency = document["currency"]

    def money(field: str) -> Money | None:
        return Money(currency, document[field]) if field in document else None

    settled = document.get("settlement")
    return Order(
        merchant=row["merchant"],
        order_id=row["order_id"],
        version=row["version"],
        announcement=Announcement[row["announcement"]],
        basket=Basket(
            currency_code=currency,
            lines=tuple(
                OrderLine(
                    sku=sku, title=title, quantity=quantity, unit_price=Money(currency, price)
                )
                for sku, title, quantity, price in document["lines"]
            ),
            customer=Customer(
                customer_id=row["customer_id"] or "",
                email=row["email"] or "",
                locale=row["locale"] or "",
            ),
            capture_method=CaptureMethod[document["capture"]],
            client_order_ref=row["client_order_ref"] or "",
            shipping_address=_address_from_document(row["shipping_address"]),
            billing_address=_address_from_document(row["billing_address"]),
            labels=document.get("labels", {}),
            discount=money("discount"),
            shipping=money("shipping"),
            tax=money("tax"),
        ),
        subtotal=Money(currency, document["subtotal"]),
        total=Money(currency, document["total"]),
        settlement=(
            Settlement(
                amount=Money(settled["currency"], settled["amount"]),
                rate=Rate(
                    value=Decimal(settled["rate"]),
                    provider=settled["provider"],
                    as_of_time=datetime.fromisoformat(settled["as_of_time"]).astimezone(UTC),
                ),
            )
            if settled
            else None
        ),
        payment_method=document["payment_method"],
        state=OrderState[row["state"]],
        payment_state=PaymentState[row["payment_state"]],
        fulfillment_state=FulfillmentState[row["fulfillment_state"]],
        create_time=row["create_time"],
        update_time=row["update_time"],
        payment=row["payment"],
        failure_reason=row["failure_reason"],
        cancel_reason=row["cancel_reason"],
        attention_reason=row["attention_reason"],
    )


def _address_from_document(document: str | None) -> Address | None:
    if document is None:
        return None
    fields = json.loads(document)
    return Address(**{**fields, "address_lines": tuple(fields["address_lines"])})


def order_event_to_proto(row: Any) -> order_service_pb2.OrderEvent:
    """A row of `order_history` as an entry of the timeline."""
    event = order_service_pb2.OrderEvent(
        event_id=str(row["event_id"]),
        type=row["event_type"],
        order_version=row["version"],
        state=OrderState[row["state"]].value,  # type: ignore[arg-type]
        payment_state=PaymentState[row["payment_state"]].value,  # type: ignore[arg-type]
        correlation_id=row["correlation_id"],
        causation_id=row["causation_id"],
        trace_id=row["trace_id"],
    )
    event.occur_time.FromDatetime(row["occur_time"])
    return event
