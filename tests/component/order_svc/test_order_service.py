"""The order service as its callers meet it: what it answers, keeps, and tells others."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc
import pytest

from chassis.events import Event
from meshctl.servers.throwaway import throwaway_valkey
from ordermesh.common.v1.money_pb2 import Money
from ordermesh.order.v1 import order_events_pb2
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.payment.v1 import payment_events_pb2
from tests.builders import NOON, a_create_order_request, a_line_message
from tests.component.order_svc.app import OrderApp, identity, running
from tests.eventually import eventually
from tests.refusals import refused

Order = pb.Order
PAYMENT = "merchants/default/payments/1"


# --- CreateOrder and GetOrder ---------------------------------------------------------


async def test_an_order_is_answered_as_it_was_placed(app: OrderApp) -> None:
    """With what the server adds: name, totals, states, etag, times."""
    order = await app.create(
        a_create_order_request(
            lines=[a_line_message("TEA"), a_line_message("CUP", quantity=1, minor_units=999)],
            client_order_ref="web-1001",
            labels={"campaign": "spring"},
            discount=Money(currency_code="EUR", minor_units=500),
        )
    )
    collection, _, order_id = order.name.rpartition("/")
    assert collection == "merchants/default/orders"
    assert UUID(order_id).version == 7
    assert (order.state, order.payment_state) == (Order.AWAITING_PAYMENT, Order.NONE)
    assert order.fulfillment_state == Order.UNFULFILLED
    assert (order.subtotal.minor_units, order.total.minor_units) == (3499, 2999)
    assert [line.amount.minor_units for line in order.lines] == [2500, 999]
    assert order.capture_method == pb.AUTOMATIC
    assert (order.client_order_ref, order.etag) == ("web-1001", '"1"')
    assert order.create_time == order.update_time
    assert not order.HasField("settlement")


async def test_an_order_is_read_as_soon_as_it_is_placed(app: OrderApp) -> None:
    """The very same, by its name, and in the list."""
    order = await app.create()
    assert await app.get(order.name) == order
    assert list((await app.list_orders()).orders) == [order]


async def test_an_order_is_told_to_others_whole(app: OrderApp) -> None:
    """What payment needs to charge and notification to write, and whose call it was."""
    order = await app.create(a_create_order_request(client_order_ref="web-1"))
    (event,) = await app.until_heard("OrderCreated")
    assert (event.aggregate, event.version, event.merchant) == (order.name, 1, "default")
    assert event.correlation_id == "corr-call"
    created: Any = event.payload
    assert created == order_events_pb2.OrderCreated(
        order=order.name,
        amount=order.total,
        payment_method="pm_card_visa",
        capture_method=pb.AUTOMATIC,
        customer=order.customer,
        lines=order.lines,
        client_order_ref="web-1",
        create_time=order.create_time,
    )


async def test_fifty_identical_requests_place_one_order(app: OrderApp) -> None:
    """All are answered the same bytes, and all but one are told that it is a replay."""
    request = a_create_order_request()
    raw: Any = app.channel.unary_unary("/ordermesh.order.v1.OrderService/CreateOrder")

    async def create() -> tuple[bytes, bool]:
        call = raw(request.SerializeToString(), metadata=identity(request.parent))
        answer: bytes = await call
        return answer, ("idempotency-replayed", "true") in tuple(await call.initial_metadata())

    answers = await asyncio.gather(*(create() for _ in range(50)))
    assert len({answer for answer, _ in answers}) == 1
    assert [replayed for _, replayed in answers].count(False) == 1
    assert await app.count("orders") == await app.count("outbox") == 1
    await app.until_heard("OrderCreated")


async def test_a_repeat_answers_as_before_when_the_order_has_moved_on(app: OrderApp) -> None:
    """The answer is the one that was given, not the order as it is now."""
    request = a_create_order_request()
    order = await app.create(request)
    await app.paid(order)
    await app.until(order, Order.CONFIRMED)
    assert await app.create(request) == order


async def test_the_same_key_by_header_is_the_same_request(app: OrderApp) -> None:
    """However it comes in."""
    key = str(uuid4())
    order = await app.create(a_create_order_request(request_id=key))
    again = await app.create(a_create_order_request(request_id=""), ("idempotency-key", key))
    assert again == order


async def test_one_key_of_two_merchants_is_two_requests(app: OrderApp) -> None:
    """Nobody reads another's answer."""
    key = str(uuid4())
    ours = await app.create(a_create_order_request(request_id=key))
    theirs = await app.create(a_create_order_request(request_id=key, merchant="acme"))
    assert ours.name.startswith("merchants/default/")
    assert theirs.name.startswith("merchants/acme/")


async def test_many_different_orders_at_once_are_all_placed(app: OrderApp) -> None:
    """Sharing transactions, losing none, mixing none up."""
    orders = await asyncio.gather(
        *(
            app.create(a_create_order_request(lines=[a_line_message(f"SKU-{n}", quantity=n)]))
            for n in range(1, 81)
        )
    )
    assert [order.lines[0].sku for order in orders] == [f"SKU-{n}" for n in range(1, 81)]
    assert len({order.name for order in orders}) == 80
    await app.until_heard(*["OrderCreated"] * 80)


async def test_a_client_order_ref_is_used_once(app: OrderApp) -> None:
    """The refusal names the order that holds it, and the key may be used again."""
    holder = await app.create(a_create_order_request(client_order_ref="web-1"))
    second = a_create_order_request(client_order_ref="web-1")
    refusal = await refused(app.create(second))
    assert refusal.code is grpc.StatusCode.ALREADY_EXISTS
    assert refusal.reason == "CLIENT_ORDER_REF_TAKEN"
    assert refusal.metadata == {"client_order_ref": "web-1", "name": holder.name}
    second.order.client_order_ref = "web-2"
    assert (await app.create(second)).client_order_ref == "web-2"


# --- settlement -----------------------------------------------------------------------


async def test_an_order_in_another_currency_pins_its_settlement(app: OrderApp) -> None:
    """Amount, rate, provider and moment; rounded half to even."""
    order = await app.create(a_create_order_request(merchant="acme"))
    assert order.settlement.amount == Money(currency_code="USD", minor_units=2709)
    assert (order.settlement.exchange_rate, order.settlement.provider) == ("1.0837", "ecb")
    assert order.settlement.as_of_time.ToDatetime() == NOON.replace(tzinfo=None)
    (asked,) = app.rates.asked
    assert asked.name == "exchangeRates/EUR-USD"
    assert asked.max_staleness.seconds == 4 * 86_400
    assert await app.get(order.name) == order


@pytest.mark.parametrize("rate", ["0", "-1", "NaN", "Infinity", "nonsense", ""])
async def test_a_rate_that_is_no_price_places_no_order(app: OrderApp, rate: str) -> None:
    """An order is never settled at zero, nor at a guess."""
    app.rates.rate = rate
    refusal = await refused(app.create(a_create_order_request(merchant="acme")))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "RATE_UNAVAILABLE")
    assert await app.count("orders") == 0


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.DEADLINE_EXCEEDED,
    ],
)
async def test_without_a_fresh_rate_an_order_has_to_wait(
    app: OrderApp, code: grpc.StatusCode
) -> None:
    """UNAVAILABLE with a wait; the same request succeeds later."""
    app.rates.error = code
    request = a_create_order_request(merchant="acme")
    refusal = await refused(app.create(request))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "RATE_UNAVAILABLE")
    assert refusal.metadata == {"rate": "exchangeRates/EUR-USD"}
    assert refusal.retry_after_seconds == 1.0
    app.rates.error = None
    assert (await app.create(request)).HasField("settlement")


async def test_a_currency_that_nobody_publishes_a_rate_for_is_refused(app: OrderApp) -> None:
    """Waiting would not help."""
    app.rates.error = grpc.StatusCode.NOT_FOUND
    refusal = await refused(app.create(a_create_order_request(merchant="acme")))
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "CURRENCY_UNKNOWN",
    )


async def test_a_repeat_needs_no_rate(app: OrderApp) -> None:
    """What was done is answered while the rates are away."""
    request = a_create_order_request(merchant="acme")
    order = await app.create(request)
    app.rates.error = grpc.StatusCode.UNAVAILABLE
    assert await app.create(request) == order


# --- ListOrders -----------------------------------------------------------------------


async def test_orders_are_listed_the_newest_first(app: OrderApp) -> None:
    """Only the merchant's own."""
    names = [(await app.create()).name for _ in range(3)]
    await app.create(a_create_order_request(merchant="acme"))
    assert [order.name for order in (await app.list_orders()).orders] == names[::-1]


async def test_pages_are_stable_while_orders_are_placed(app: OrderApp) -> None:
    """Each order of the first moment is seen once, in order; a newer one on no later page."""
    names = [(await app.create()).name for _ in range(7)]
    seen: list[str] = []
    token = ""
    pages = 0
    while pages == 0 or token:
        page = await app.list_orders(page_size=3, page_token=token)
        seen += [order.name for order in page.orders]
        token = page.next_page_token
        pages += 1
        await app.create()
    assert seen == names[::-1]
    assert pages == 3


async def test_a_last_page_that_is_full_has_no_token(app: OrderApp) -> None:
    """Nobody asks for an empty page."""
    for _ in range(2):
        await app.create()
    page = await app.list_orders(page_size=2)
    assert (len(page.orders), page.next_page_token) == (2, "")


async def test_a_merchant_without_orders_has_an_empty_list(app: OrderApp) -> None:
    """Which is no error."""
    page = await app.list_orders("merchants/acme")
    assert (list(page.orders), page.next_page_token) == ([], "")


# --- CancelOrder ----------------------------------------------------------------------


async def test_a_cancellation_is_on_its_way_at_once(app: OrderApp) -> None:
    """CANCELLING until payment has answered, then CANCELLED; both are told."""
    order = await app.create()
    cancelling = await app.cancel(order.name, reason="changed my mind")
    assert (cancelling.state, cancelling.cancel_reason) == (Order.CANCELLING, "changed my mind")
    assert cancelling.etag == '"2"'
    assert await app.get(order.name) == cancelling
    events = await app.until_heard("OrderCreated", "OrderCancellationRequested")
    assert [event.version for event in events] == [1, 2]
    await app.told(payment_events_pb2.PaymentVoided(payment=PAYMENT, order=order.name))
    cancelled = await app.until(order, Order.CANCELLED)
    assert (cancelled.payment_state, cancelled.payment) == (Order.NONE, PAYMENT)
    await app.until_heard("OrderCreated", "OrderCancellationRequested", "OrderCancelled")


async def test_a_paid_order_is_cancelled_once_its_money_is_back(app: OrderApp) -> None:
    """Not before."""
    order = await app.create()
    await app.paid(order)
    await app.until(order, Order.CONFIRMED)
    assert (await app.cancel(order.name)).payment_state == Order.PAID
    await app.told(
        payment_events_pb2.RefundSucceeded(
            payment=PAYMENT,
            order=order.name,
            amount=order.total,
            refunded_total=order.total,
            captured_total=order.total,
        )
    )
    cancelled = await app.until(order, Order.CANCELLED)
    assert cancelled.payment_state == Order.REFUNDED


async def test_a_repeated_cancellation_answers_as_before(app: OrderApp) -> None:
    """Also after the order has been cancelled."""
    order = await app.create()
    key = str(uuid4())
    first = await app.cancel(order.name, request_id=key)
    await app.told(payment_events_pb2.PaymentVoided(payment=PAYMENT, order=order.name))
    await app.until(order, Order.CANCELLED)
    assert await app.cancel(order.name, request_id=key) == first


async def test_a_second_cancellation_answers_the_order_as_it_is(app: OrderApp) -> None:
    """It is on its way already."""
    order = await app.create()
    first = await app.cancel(order.name)
    assert await app.cancel(order.name) == first


async def test_a_cancellation_of_the_present_etag_passes_and_of_another_does_not(
    app: OrderApp,
) -> None:
    """Whoever decides on an old state has to look again."""
    order = await app.create()
    await app.paid(order)
    confirmed = await app.until(order, Order.CONFIRMED)
    refusal = await refused(app.cancel(order.name, etag=order.etag))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    assert refusal.metadata == {"name": order.name}
    assert (await app.cancel(order.name, etag=confirmed.etag)).state == Order.CANCELLING


async def test_an_order_that_failed_cannot_be_cancelled(app: OrderApp) -> None:
    """FAILED_PRECONDITION, with the state in the way."""
    order = await app.create()
    await app.told(
        payment_events_pb2.PaymentFailed(
            payment=PAYMENT, order=order.name, failure_reason="card_declined"
        )
    )
    failed = await app.until(order, Order.FAILED)
    assert failed.failure_reason == "card_declined"
    refusal = await refused(app.cancel(order.name))
    assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
    assert refusal.reason == "ILLEGAL_TRANSITION"
    assert refusal.metadata == {
        "name": order.name,
        "state": "FAILED",
        "requested": "CANCELLING",
    }
    assert refusal.states == [order.name]


# --- what payment reports -------------------------------------------------------------


async def test_a_payment_confirms_its_order(app: OrderApp) -> None:
    """And that is told, caused by the payment's event."""
    order = await app.create()
    event_id = await app.told(
        payment_events_pb2.PaymentSucceeded(payment=PAYMENT, order=order.name, amount=order.total)
    )
    confirmed = await app.until(order, Order.CONFIRMED)
    assert (confirmed.payment_state, confirmed.payment) == (Order.PAID, PAYMENT)
    assert confirmed.etag == '"2"'
    events = await app.until_heard("OrderCreated", "OrderConfirmed")
    assert events[1].causation_id == str(event_id)
    assert events[1].correlation_id == "corr-payment"


async def test_an_event_that_comes_twice_counts_once(app: OrderApp) -> None:
    """The broker promises to deliver at least once, not once."""
    order = await app.create()
    event = Event(
        event_id=uuid4(),
        merchant="default",
        aggregate=PAYMENT,
        version=1,
        occur_time=NOON,
        payload=payment_events_pb2.PaymentAuthorized(payment=PAYMENT, order=order.name),
    )
    for _ in range(3):
        await app.publish(event)
    await app.until(order, Order.CONFIRMED)
    await eventually(lambda: not app.broker.server.queues["order"].ready)
    assert (await app.get(order.name)).etag == '"2"'
    assert await app.count("inbox") == 1


async def test_a_report_that_is_none_is_put_with_the_dead_letters(app: OrderApp) -> None:
    """With its reason; those that came with it are handled."""
    order = await app.create()
    await app.told(payment_events_pb2.PaymentSucceeded(payment=PAYMENT, order="nonsense"))
    await app.paid(order)
    await app.until(order, Order.CONFIRMED)
    dead = await eventually(lambda: app.broker.dead_letters("order"))
    assert [letter.error_class for letter in dead] == ["INVALID_FIELD"]


# --- ListOrderEvents ------------------------------------------------------------------


async def test_a_timeline_tells_what_happened_and_why(app: OrderApp) -> None:
    """The oldest first, with state, correlation and cause of each change."""
    order = await app.create()
    event_id = await app.told(
        payment_events_pb2.PaymentAuthorized(payment=PAYMENT, order=order.name)
    )
    await app.until(order, Order.CONFIRMED)
    await app.paid(order)
    await eventually(
        lambda: app.get(order.name), until=lambda seen: seen.payment_state == Order.PAID
    )
    events = (await app.timeline(order.name)).events
    assert [event.type for event in events] == [
        "ordermesh.order.v1.OrderCreated",
        "ordermesh.order.v1.OrderConfirmed",
        "ordermesh.order.v1.OrderPaymentRecorded",
    ]
    assert [event.order_version for event in events] == [1, 2, 3]
    assert [event.payment_state for event in events] == [Order.NONE, Order.AUTHORIZED, Order.PAID]
    assert [event.correlation_id for event in events] == [
        "corr-call", "corr-payment", "corr-payment",
    ]  # fmt: skip
    assert events[1].causation_id == str(event_id)
    published = {event.version: str(event.event_id) for event in app.heard}
    assert events[0].event_id == published[1]
    assert events[0].occur_time == order.create_time


async def test_a_timeline_is_paged(app: OrderApp) -> None:
    """Each change on one page, in order."""
    order = await app.create()
    await app.cancel(order.name)
    await app.told(payment_events_pb2.PaymentVoided(payment=PAYMENT, order=order.name))
    await app.until(order, Order.CANCELLED)
    first = await app.timeline(order.name, page_size=2)
    rest = await app.timeline(order.name, page_size=2, page_token=first.next_page_token)
    versions = [event.order_version for event in [*first.events, *rest.events]]
    assert versions == [1, 2, 3]
    assert rest.next_page_token == ""


# --- with a cache ---------------------------------------------------------------------


async def test_a_cached_order_is_never_older_than_the_last_change(
    order_database: str, tmp_path: Path
) -> None:
    """Placed, read, paid, cancelled: each answer is the order as it is, cache or not."""
    async with (
        throwaway_valkey() as url,
        running(order_database, tmp_path, redis_url=url) as app,
    ):
        order = await app.create()
        assert await app.get(order.name) == order
        await app.paid(order)
        confirmed = await app.until(order, Order.CONFIRMED)
        assert await app.get(order.name) == confirmed
        cancelling = await app.cancel(order.name)
        assert await app.get(order.name) == cancelling
        async with app.database.reading() as connection:
            await connection.execute("DELETE FROM order_reads")
        assert await app.get(order.name) == cancelling, "read from the cache"
