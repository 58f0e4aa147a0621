"""Bad input over gRPC: each kind has its status, its enumerated reason and its field.

The same list is sent through the edge, over REST too, by the tests of the whole mesh.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import grpc
import pytest

from chassis.money import MINOR_UNITS_MAX
from ordermesh.common.v1.money_pb2 import Money
from ordermesh.order.v1 import order_service_pb2 as pb
from tests.builders import a_create_order_request, a_line_message
from tests.component.order_svc.app import OrderApp, identity
from tests.refusals import Refusal, refused

INVALID = grpc.StatusCode.INVALID_ARGUMENT
DENIED = grpc.StatusCode.PERMISSION_DENIED
NOT_FOUND = grpc.StatusCode.NOT_FOUND
PRECONDITION = grpc.StatusCode.FAILED_PRECONDITION

UNKNOWN_ORDER = f"merchants/default/orders/{uuid4()}"
MOST = MINOR_UNITS_MAX


def eur(minor_units: int) -> Money:
    """An amount of a request."""
    return Money(currency_code="EUR", minor_units=minor_units)


@dataclass(frozen=True)
class Bad:
    """An order that cannot be placed, and how it is refused."""

    code: grpc.StatusCode
    reason: str
    field: str
    order: dict[str, Any]


def invalid(field: str, **order: Any) -> Bad:
    """A field that breaks its own rule."""
    return Bad(INVALID, "INVALID_FIELD", field, order)


def out_of_range(field: str, **order: Any) -> Bad:
    """An amount that cannot be."""
    return Bad(INVALID, "AMOUNT_OUT_OF_RANGE", field, order)


CUSTOMER = {"customer_id": "cust-42", "email": "ada@example.com", "locale": "en"}
ADDRESS = {"recipient": "Ada", "address_lines": ["1"], "locality": "Wien", "region_code": "AT"}

BAD_ORDERS: dict[str, Bad] = {
    # missing fields
    "no customer id": invalid(
        "order.customer.customer_id", customer={**CUSTOMER, "customer_id": ""}
    ),
    "no mail": invalid("order.customer.email", customer={**CUSTOMER, "email": ""}),
    "no currency": invalid("order.currency_code", currency_code=""),
    "no lines": invalid("order.lines", lines=[]),
    "no sku": invalid("order.lines[0].sku", lines=[a_line_message("")]),
    "no quantity": invalid("order.lines[0].quantity", lines=[a_line_message(quantity=0)]),
    "no price": invalid("order.lines[0].unit_price", lines=[{"sku": "A", "quantity": 1}]),
    "no payment method": invalid("payment_method", payment_method=""),
    # malformed fields
    "a mail that is none": invalid("order.customer.email", customer={**CUSTOMER, "email": "ada"}),
    "a locale that is none": invalid(
        "order.customer.locale", customer={**CUSTOMER, "locale": "not a locale"}
    ),
    "a sku with spaces": invalid("order.lines[0].sku", lines=[a_line_message("a b")]),
    "a long sku": invalid("order.lines[0].sku", lines=[a_line_message("a" * 65)]),
    "a NUL in a title": invalid(
        "order.lines[0].title", lines=[{**a_line_message(), "title": "a\0b"}]
    ),
    "a NUL in an address": invalid(
        "order.shipping_address.recipient", shipping_address={**ADDRESS, "recipient": "a\0b"}
    ),
    "a country that is none": invalid(
        "order.billing_address.region_code", billing_address={**ADDRESS, "region_code": "Austria"}
    ),
    "a card number": invalid("payment_method", payment_method="4242424242424242"),
    "a label with a bad name": invalid('order.labels["A b"]', labels={"A b": "1"}),
    "too many labels": invalid("order.labels", labels={f"l{n}": "" for n in range(33)}),
    "a ref with spaces": invalid("order.client_order_ref", client_order_ref="a b"),
    "a capture method that is none": invalid("order.capture_method", capture_method=7),
    "a request id that is none": invalid("request_id", request_id="1"),
    # wrong currency
    "a currency that is none": invalid("order.currency_code", currency_code="euro"),
    "a currency that nobody knows": Bad(
        INVALID, "CURRENCY_UNKNOWN", "order.currency_code",
        {"currency_code": "XXX", "lines": [a_line_message(currency_code="XXX")]},
    ),
    "a price in a currency that nobody knows": Bad(
        INVALID, "CURRENCY_UNKNOWN", "order.lines[0].unit_price.currency_code",
        {"lines": [a_line_message(currency_code="XXX")]},
    ),
    "a price in another currency": Bad(
        INVALID, "CURRENCY_MISMATCH", "order.lines[1].unit_price.currency_code",
        {"lines": [a_line_message("A"), a_line_message("B", currency_code="USD")]},
    ),
    "tax in another currency": Bad(
        INVALID, "CURRENCY_MISMATCH", "order.tax.currency_code",
        {"tax": Money(currency_code="USD", minor_units=1)},
    ),
    "shipping without a currency": invalid("order.shipping.currency_code", shipping=Money()),
    # negative and overflowing amounts
    "a negative quantity": invalid("order.lines[0].quantity", lines=[a_line_message(quantity=-1)]),
    "too large a quantity": invalid(
        "order.lines[0].quantity", lines=[a_line_message(quantity=10_001)]
    ),
    "a negative price": out_of_range(
        "order.lines[0].unit_price.minor_units", lines=[a_line_message(minor_units=-1)]
    ),
    "a negative discount": out_of_range("order.discount.minor_units", discount=eur(-1)),
    "negative shipping": out_of_range("order.shipping.minor_units", shipping=eur(-1)),
    "negative tax": out_of_range("order.tax.minor_units", tax=eur(-1)),
    "nothing to pay": out_of_range("order.lines", lines=[a_line_message(minor_units=0)]),
    "a discount of everything": out_of_range("order.discount", discount=eur(2500)),
    "a price beyond the limit": invalid(
        "order.lines[0].unit_price.minor_units", lines=[a_line_message(minor_units=MOST + 1)]
    ),
    "the largest int64": invalid(
        "order.lines[0].unit_price.minor_units", lines=[a_line_message(minor_units=2**63 - 1)]
    ),
    "a line that overflows": out_of_range(
        "order.lines", lines=[a_line_message(quantity=10_000, minor_units=MOST)]
    ),
    "lines that overflow": out_of_range(
        "order.lines",
        lines=[a_line_message(sku, quantity=1, minor_units=MOST) for sku in "AB"],
    ),
    "tax that overflows": out_of_range(
        "order.tax", lines=[a_line_message(quantity=1, minor_units=MOST)], tax=eur(1)
    ),
    # the whole
    "101 lines": invalid("order.lines", lines=[a_line_message(f"S{n}") for n in range(101)]),
    "two lines of one sku": Bad(
        INVALID, "DUPLICATE_SKU", "order.lines[1].sku",
        {"lines": [a_line_message("A"), a_line_message("A")]},
    ),
}  # fmt: skip


async def test_every_bad_order_is_refused_with_its_reason_and_field(app: OrderApp) -> None:
    """One after the other, over one connection; nothing of any of them is kept."""
    wrong = []
    for case, bad in BAD_ORDERS.items():
        refusal = await refused(app.create(a_create_order_request(**bad.order)))
        seen = (refusal.code, refusal.reason, refusal.metadata.get("field"))
        if seen != (bad.code, bad.reason, bad.field) or bad.field not in refusal.fields:
            wrong.append((case, seen, refusal.fields))
    assert wrong == []
    for table in ("orders", "outbox", "requests", "order_history"):
        assert await app.count(table) == 0


async def test_a_hundred_lines_and_the_largest_total_are_no_bad_input(app: OrderApp) -> None:
    """The limits themselves are allowed."""
    lines = [a_line_message(f"S{n}", quantity=1, minor_units=MOST // 100) for n in range(100)]
    assert (await app.create(a_create_order_request(lines=lines))).total == eur(MOST)


async def test_a_total_that_does_not_fit_the_settlement_is_refused(app: OrderApp) -> None:
    """The largest total in EUR is too large in USD."""
    lines = [a_line_message(quantity=1, minor_units=MOST)]
    refusal = await refused(app.create(a_create_order_request(merchant="acme", lines=lines)))
    assert (refusal.code, refusal.reason) == (INVALID, "AMOUNT_OUT_OF_RANGE")
    assert refusal.fields == ["order.lines"]


async def test_another_total_than_expected_is_refused(app: OrderApp) -> None:
    """With what was computed."""
    request = a_create_order_request()
    request.expected_total.CopyFrom(eur(2400))
    refusal = await refused(app.create(request))
    assert (refusal.code, refusal.reason) == (PRECONDITION, "TOTAL_MISMATCH")
    assert refusal.metadata == {
        "field": "expected_total",
        "expected": "2400",
        "computed": "2500",
        "currency_code": "EUR",
    }
    request.expected_total.minor_units = 2500
    assert (await app.create(request)).total == eur(2500)


async def test_a_total_expected_in_another_currency_is_refused(app: OrderApp) -> None:
    """For its currency: no amount in it would be right."""
    request = a_create_order_request()
    request.expected_total.CopyFrom(Money(currency_code="USD", minor_units=2500))
    refusal = await refused(app.create(request))
    assert (refusal.code, refusal.reason) == (INVALID, "CURRENCY_MISMATCH")
    assert refusal.fields == ["expected_total.currency_code"]
    assert (refusal.metadata["expected"], refusal.metadata["given"]) == ("EUR", "USD")


async def test_an_order_that_is_missing_altogether_is_refused(app: OrderApp) -> None:
    """An empty request says what it lacks."""
    request = pb.CreateOrderRequest(
        parent="merchants/default", payment_method="pm_card_visa", request_id=str(uuid4())
    )
    refusal = await refused(app.create(request))
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["order"])


# --- merchants ------------------------------------------------------------------------


async def as_default(call: Callable[..., Awaitable[Any]], request: Any) -> Refusal:
    """How a call of the merchant `default` is refused."""
    return await refused(call(request, metadata=identity("merchants/default")))


@pytest.mark.parametrize("merchant", ["acme", "nobody"])
async def test_foreign_and_unknown_merchants_are_denied_alike_everywhere(
    app: OrderApp, merchant: str
) -> None:
    """By every method, before anything is read."""
    parent = f"merchants/{merchant}"
    name = f"{parent}/orders/{uuid4()}"
    refusals = [
        await as_default(app.orders.CreateOrder, a_create_order_request(merchant=merchant)),
        await as_default(app.orders.GetOrder, pb.GetOrderRequest(name=name)),
        await as_default(app.orders.ListOrders, pb.ListOrdersRequest(parent=parent)),
        await as_default(
            app.orders.CancelOrder, pb.CancelOrderRequest(name=name, request_id=str(uuid4()))
        ),
        await as_default(app.orders.ListOrderEvents, pb.ListOrderEventsRequest(parent=name)),
    ]
    for refusal in refusals:
        assert (refusal.code, refusal.reason) == (DENIED, "MERCHANT_DENIED")
        assert refusal.metadata == {"merchant": merchant}
        assert refusal.message == f"this caller may not act for merchant {merchant!r}"


async def test_an_order_of_another_merchant_is_as_if_it_were_not(app: OrderApp) -> None:
    """Its id under one's own name finds nothing, and shows nothing."""
    theirs = await app.create(a_create_order_request(merchant="acme"))
    mine = theirs.name.replace("acme", "default")
    refusal = await refused(app.get(mine))
    assert (refusal.code, refusal.reason) == (NOT_FOUND, "ORDER_NOT_FOUND")
    assert refusal.metadata == {"name": mine}


# --- orders that are not there --------------------------------------------------------


async def test_an_unknown_order_is_not_found_by_any_method(app: OrderApp) -> None:
    """Read, cancelled or followed."""
    for call in (
        app.get(UNKNOWN_ORDER), app.cancel(UNKNOWN_ORDER), app.timeline(UNKNOWN_ORDER),
    ):  # fmt: skip
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (NOT_FOUND, "ORDER_NOT_FOUND")
        assert refusal.metadata == {"name": UNKNOWN_ORDER}


@pytest.mark.parametrize(
    "name",
    [
        "merchants/default/orders/mine",
        f"merchants/default/orders/{str(uuid4()).upper()}",
        f"merchants/default/orders/{uuid4()}/lines/1",
        f"merchants/default/orders/{uuid4()}\n",
        "merchants/default",
        "orders/1",
        "",
    ],
)
async def test_a_name_that_is_none_is_refused(app: OrderApp, name: str) -> None:
    """Before anybody looks for it."""
    refusal = await as_default(app.orders.GetOrder, pb.GetOrderRequest(name=name))
    assert (refusal.code, refusal.reason) == (INVALID, "INVALID_FIELD")
    assert set(refusal.fields) == {"name"}


# --- idempotency keys -----------------------------------------------------------------


async def test_placing_and_cancelling_need_a_key(app: OrderApp) -> None:
    """Where money moves, a repeat must be safe."""
    order = await app.create()
    no_key = pb.CancelOrderRequest(name=order.name)
    for refusal in (
        await as_default(app.orders.CreateOrder, a_create_order_request(request_id="")),
        await as_default(app.orders.CancelOrder, no_key),
    ):
        assert (refusal.code, refusal.reason) == (INVALID, "IDEMPOTENCY_KEY_MISSING")
        assert refusal.fields == ["request_id"]


async def test_a_reused_key_is_refused_and_changes_nothing(app: OrderApp) -> None:
    """The first order stays as it is, and its repeat is still answered."""
    request = a_create_order_request()
    order = await app.create(request)
    other = a_create_order_request(
        request_id=request.request_id, lines=[a_line_message(minor_units=1)]
    )
    refusal = await refused(app.create(other))
    assert (refusal.code, refusal.reason) == (INVALID, "IDEMPOTENCY_KEY_REUSED")
    assert refusal.metadata == {"field": "request_id", "request_id": request.request_id}
    assert await app.create(request) == order
    assert await app.count("orders") == 1


async def test_a_cancellations_key_is_not_reused_for_another_order(app: OrderApp) -> None:
    """Nor for another reason."""
    one, two = await app.create(), await app.create()
    key = str(uuid4())
    await app.cancel(one.name, request_id=key, reason="a")
    for call in (
        app.cancel(two.name, request_id=key, reason="a"),
        app.cancel(one.name, request_id=key, reason="b"),
    ):
        assert (await refused(call)).reason == "IDEMPOTENCY_KEY_REUSED"
    assert (await app.get(two.name)).state == pb.Order.AWAITING_PAYMENT


# --- page tokens ----------------------------------------------------------------------


async def test_a_page_token_is_good_for_its_own_list_alone(app: OrderApp) -> None:
    """Another merchant's, another method's, an invented one: PAGE_TOKEN_INVALID."""
    orders = [await app.create() for _ in range(2)]
    await app.cancel(orders[0].name)
    of_orders = (await app.list_orders(page_size=1)).next_page_token
    of_events = (await app.timeline(orders[0].name, page_size=1)).next_page_token
    assert of_orders
    assert of_events
    for call in (
        app.list_orders(page_token="nonsense"),
        app.list_orders(page_token=of_orders[:-4] + "AAAA"),
        app.list_orders(page_token=of_events),
        app.list_orders("merchants/acme", page_token=of_orders),
        app.timeline(orders[0].name, page_token=of_orders),
        app.timeline(orders[1].name, page_token=of_events),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (INVALID, "PAGE_TOKEN_INVALID")
        assert refusal.fields == ["page_token"]


async def test_a_page_size_that_cannot_be_is_refused(app: OrderApp) -> None:
    """Less than nothing; more than is allowed is taken as the most."""
    refusal = await refused(app.list_orders(page_size=-1))
    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ["page_size"])
    assert list((await app.list_orders(page_size=10**6)).orders) == []


# --- bytes ----------------------------------------------------------------------------


async def test_an_oversized_body_is_refused(app: OrderApp) -> None:
    """Before any of it is decoded."""
    request = a_create_order_request(labels={"note": "x" * (1024 * 1024)})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await app.create(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_bytes_that_are_no_request_are_refused(app: OrderApp) -> None:
    """Text that is not UTF-8 among them."""
    raw: Any = app.channel.unary_unary("/ordermesh.order.v1.OrderService/CreateOrder")
    for noise in (b"\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd"):
        refusal = await refused(raw(noise, metadata=identity("merchants/default")))
        assert (refusal.code, refusal.reason) == (INVALID, "MALFORMED_REQUEST")
