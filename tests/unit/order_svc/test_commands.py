"""The handlers: what they decide, what they ask of others, and in which order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chassis.errors import ConflictError, InvalidInputError, RuleViolationError, UnavailableError
from chassis.money import Money
from chassis.testing import FrozenClock, SequentialIds
from order_svc.commands import (
    Answer,
    CancelOrderHandler,
    CreateOrderHandler,
    RecordPayments,
    RecordPaymentsHandler,
    capture_method_of,
)
from order_svc.domain.order import Announcement, CaptureMethod, Order, OrderState, Rate
from order_svc.messages import order_resource
from order_svc.testing import InMemoryOrders
from tests.builders import (
    NOON,
    a_basket,
    a_cancel_order,
    a_create_order,
    a_line,
    a_merchant,
    a_placement,
    a_rate,
    a_report,
    a_request_key,
    an_order,
    an_order_id,
    eur,
)

MERCHANTS = {
    "default": a_merchant(),
    "acme": a_merchant(id="acme", settlement_currency="USD"),
}


class Rates:
    """Rates as a test sets them; None plays a service that is away."""

    def __init__(self, rate: Rate | None) -> None:
        self.now = rate
        self.asked: list[tuple[str, str]] = []

    async def rate(self, base: str, quote: str) -> Rate:
        """The rate of any pair."""
        self.asked.append((base, quote))
        if self.now is None:
            raise UnavailableError("RATE_UNAVAILABLE", "the rates are away")
        return self.now


class Placing:
    """A `CreateOrderHandler` and everything around it."""

    def __init__(self, rate: Rate | None = None) -> None:
        self.store = InMemoryOrders()
        self.rates = Rates(rate)
        self.clock = FrozenClock(NOON)
        self.place = CreateOrderHandler(
            store=self.store,
            rates=self.rates,
            merchants=MERCHANTS,
            new_id=SequentialIds(),
            now=self.clock,
        )

    @property
    def placed(self) -> list[Order]:
        """Every order there is."""
        return list(self.store.orders.values())


ACME = a_create_order(merchant="acme", request=a_request_key(merchant="acme"))


# --- CreateOrder ----------------------------------------------------------------------


async def test_an_order_is_placed_and_answered() -> None:
    """One order, one event, and the answer is its resource."""
    placing = Placing()
    answer = await placing.place(a_create_order())
    (order,) = placing.placed
    assert answer == Answer(order_resource(order))
    assert order.create_time == NOON
    assert placing.store.announced == [(order.name, 1, Announcement.CREATED)]


async def test_an_order_in_the_merchants_own_currency_needs_no_rate() -> None:
    """Nobody is asked, so nobody can be away."""
    placing = Placing(rate=None)
    await placing.place(a_create_order())
    assert placing.rates.asked == []
    assert placing.placed[0].settlement is None


async def test_an_order_in_another_currency_pins_the_rate() -> None:
    """The rate is kept with the order, so that refunds use it too."""
    placing = Placing(a_rate("1.0837"))
    await placing.place(ACME)
    settlement = placing.placed[0].settlement
    assert placing.rates.asked == [("EUR", "USD")]
    assert settlement is not None
    assert settlement.amount == Money("USD", 2709)  # 2709.25
    assert settlement.rate == a_rate("1.0837")


async def test_no_order_is_placed_without_its_rate() -> None:
    """A rate is never guessed."""
    placing = Placing(rate=None)
    with pytest.raises(UnavailableError) as caught:
        await placing.place(ACME)
    assert caught.value.reason == "RATE_UNAVAILABLE"
    assert placing.placed == []


async def test_a_repeated_request_answers_even_when_rates_are_away() -> None:
    """What was done needs nothing more to be told again."""
    placing = Placing(a_rate("1.1"))
    first = await placing.place(ACME)
    placing.rates.now = None
    assert await placing.place(ACME) == Answer(first.resource, replayed=True)
    assert len(placing.placed) == 1


async def test_a_repeated_request_answers_the_first_rate() -> None:
    """The answer is the one that was given, whatever the rate is by now."""
    placing = Placing(a_rate("1.1"))
    first = await placing.place(ACME)
    placing.rates.now = a_rate("1.2")
    assert (await placing.place(ACME)).resource == first.resource


async def test_bad_input_is_told_before_anyone_is_asked_for_a_rate() -> None:
    """The caller hears of their mistake, not of an outage behind it."""
    placing = Placing(rate=None)
    twice = a_basket(a_line("TEA"), a_line("TEA"))
    with pytest.raises(InvalidInputError) as caught:
        await placing.place(replace(ACME, basket=twice))
    assert caught.value.reason == "DUPLICATE_SKU"
    with pytest.raises(RuleViolationError) as mismatch:
        await placing.place(replace(ACME, expected_total=eur(2400)))
    assert mismatch.value.reason == "TOTAL_MISMATCH"
    assert placing.rates.asked == []


async def test_a_failed_placement_may_be_repeated_under_its_id() -> None:
    """Nothing is remembered of a request that was not done."""
    placing = Placing(rate=None)
    with pytest.raises(UnavailableError):
        await placing.place(ACME)
    placing.rates.now = a_rate()
    assert not (await placing.place(ACME)).replayed


async def test_another_total_than_expected_places_nothing() -> None:
    """FAILED_PRECONDITION, and the computed total is told."""
    placing = Placing()
    with pytest.raises(RuleViolationError) as caught:
        await placing.place(a_create_order(expected_total=eur(2400)))
    assert caught.value.metadata["computed"] == "2500"
    assert placing.placed == []


async def test_an_id_that_was_used_for_something_else_places_nothing() -> None:
    """Not even where a rate would have to be asked for."""
    placing = Placing(a_rate())
    await placing.place(ACME)
    other = replace(ACME, request=replace(ACME.request, fingerprint=b"else".ljust(32)))
    with pytest.raises(InvalidInputError) as caught:
        await placing.place(other)
    assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
    assert len(placing.rates.asked) == 1


# --- CancelOrder ----------------------------------------------------------------------


async def kept_order(store: InMemoryOrders) -> Order:
    """An order that awaits its payment."""
    order = an_order()
    await store.place(a_placement(order))
    return order


async def test_a_cancellation_is_asked_for() -> None:
    """CANCELLING, with the caller's reason, and payment is told."""
    store = InMemoryOrders()
    order = await kept_order(store)
    await CancelOrderHandler(store=store, now=FrozenClock(NOON))(a_cancel_order(order.order_id))
    changed = store.orders[order.name]
    assert (changed.state, changed.cancel_reason) == (OrderState.CANCELLING, "changed my mind")
    assert store.announced[-1] == (order.name, 2, Announcement.CANCELLATION_REQUESTED)


async def test_the_present_etag_lets_a_cancellation_pass() -> None:
    """The caller has seen the order as it is."""
    store = InMemoryOrders()
    order = await kept_order(store)
    await CancelOrderHandler(store=store, now=FrozenClock())(
        a_cancel_order(order.order_id, etag=order.etag)
    )
    assert store.orders[order.name].state is OrderState.CANCELLING


async def test_another_etag_stops_a_cancellation() -> None:
    """The caller decided on something that is no more; nothing is written or remembered."""
    store = InMemoryOrders()
    order = await kept_order(store)
    cancel = CancelOrderHandler(store=store, now=FrozenClock())
    stale = a_cancel_order(order.order_id, etag='"7"')
    with pytest.raises(ConflictError) as caught:
        await cancel(stale)
    assert caught.value.reason == "ETAG_MISMATCH"
    assert caught.value.metadata == {"name": order.name}
    assert store.orders[order.name] == order
    assert not (await cancel(replace(stale, etag=""))).replayed


async def test_cancelling_what_is_being_cancelled_answers_it_as_it_is() -> None:
    """A second caller wants what is on its way already."""
    store = InMemoryOrders()
    order = await kept_order(store)
    cancel = CancelOrderHandler(store=store, now=FrozenClock())
    first = await cancel(a_cancel_order(order.order_id))
    second = await cancel(a_cancel_order(order.order_id))
    assert second == Answer(first.resource)
    assert len(store.history) == 2


async def test_an_order_past_cancelling_refuses() -> None:
    """The state is named, and the request is not remembered."""
    store = InMemoryOrders()
    order = an_order(state=OrderState.FAILED)
    await store.place(a_placement(order))
    with pytest.raises(RuleViolationError) as caught:
        await CancelOrderHandler(store=store, now=FrozenClock())(a_cancel_order(order.order_id))
    assert caught.value.metadata["state"] == "FAILED"


# --- RecordPayments -------------------------------------------------------------------


async def test_what_payment_reports_moves_orders() -> None:
    """The time is the clock's, the decision the saga's."""
    store = InMemoryOrders()
    order = await kept_order(store)
    clock = FrozenClock(NOON)
    clock.advance(3)
    await RecordPaymentsHandler(store=store, now=clock)(RecordPayments(reports=[a_report(order)]))
    changed = store.orders[order.name]
    assert changed.state is OrderState.CONFIRMED
    assert changed.update_time == clock()


async def test_a_report_of_an_order_that_is_not_here_is_tried_again() -> None:
    """It may be on its way; a conflict tells the consumer to wait."""
    handler = RecordPaymentsHandler(store=InMemoryOrders(), now=FrozenClock())
    report = a_report(an_order(order_id=an_order_id()))
    with pytest.raises(ConflictError):
        await handler(RecordPayments(reports=[report]))


@pytest.mark.parametrize("method", CaptureMethod, ids=lambda method: method.name)
def test_a_merchants_own_capture_method_holds_unless_the_order_says(method: CaptureMethod) -> None:
    """The setting's word is the domain's, in small letters."""
    merchant = a_merchant(capture_method=method.name.lower())
    assert capture_method_of(merchant) is method
