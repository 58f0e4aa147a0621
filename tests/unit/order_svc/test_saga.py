"""The saga, row by row, and what holds whatever happens in whatever order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import RuleViolationError
from order_svc.domain.order import TRANSITIONS, Announcement, Order, OrderState, PaymentState
from order_svc.domain.saga import (
    CancellationRequested,
    Fact,
    PaymentAuthorized,
    PaymentCaptured,
    PaymentFact,
    PaymentFailed,
    PaymentVoided,
    RefundFailed,
    RefundSucceeded,
    on,
)
from tests.builders import NOON, PAYMENT, an_order, an_order_in, eur

AWAITING = OrderState.AWAITING_PAYMENT
CONFIRMED = OrderState.CONFIRMED
COMPLETED = OrderState.COMPLETED
FAILED = OrderState.FAILED
EXPIRED = OrderState.EXPIRED
CANCELLING = OrderState.CANCELLING
CANCELLED = OrderState.CANCELLED

NONE = PaymentState.NONE
AUTHORIZED = PaymentState.AUTHORIZED
PAID = PaymentState.PAID
PARTIALLY_REFUNDED = PaymentState.PARTIALLY_REFUNDED
REFUNDED = PaymentState.REFUNDED

authorized = PaymentAuthorized(payment=PAYMENT)
captured = PaymentCaptured(payment=PAYMENT)
failed = PaymentFailed(payment=PAYMENT, reason="card_declined")
voided = PaymentVoided(payment=PAYMENT)
refund_failed = RefundFailed(payment=PAYMENT, reason="expired_card")
cancellation = CancellationRequested(reason="changed my mind")


def refund_of(minor_units: int) -> RefundSucceeded:
    """So much of 25.00 EUR is given back in all."""
    return RefundSucceeded(
        payment=PAYMENT, refunded_total=eur(minor_units), captured_total=eur(2500)
    )


refunded = refund_of(2500)
partly_refunded = refund_of(1000)


@dataclass(frozen=True)
class Row:
    """A row of the saga's table."""

    state: OrderState
    money: PaymentState
    fact: Fact
    next_state: OrderState
    next_money: PaymentState
    told_as: Announcement
    attention: bool = False

    def __str__(self) -> str:
        return f"{self.state.name}-{self.money.name}-{type(self.fact).__name__}"


RECORDED = Announcement.PAYMENT_RECORDED
ASKED = Announcement.CANCELLATION_REQUESTED

ROWS = [
    Row(AWAITING, NONE, authorized, CONFIRMED, AUTHORIZED, Announcement.CONFIRMED),
    Row(AWAITING, NONE, captured, CONFIRMED, PAID, Announcement.CONFIRMED),
    Row(AWAITING, NONE, failed, FAILED, NONE, Announcement.FAILED),
    Row(AWAITING, NONE, voided, FAILED, NONE, Announcement.FAILED),
    Row(AWAITING, NONE, cancellation, CANCELLING, NONE, ASKED),
    Row(AWAITING, NONE, refunded, AWAITING, REFUNDED, RECORDED, attention=True),
    Row(AWAITING, REFUNDED, captured, CONFIRMED, REFUNDED, Announcement.CONFIRMED),
    Row(
        AWAITING,
        PARTIALLY_REFUNDED,
        authorized,
        CONFIRMED,
        PARTIALLY_REFUNDED,
        Announcement.CONFIRMED,
    ),
    Row(CONFIRMED, AUTHORIZED, captured, CONFIRMED, PAID, RECORDED),
    Row(CONFIRMED, AUTHORIZED, voided, CONFIRMED, NONE, RECORDED, attention=True),
    Row(CONFIRMED, AUTHORIZED, failed, CONFIRMED, NONE, RECORDED, attention=True),
    Row(CONFIRMED, AUTHORIZED, cancellation, CANCELLING, AUTHORIZED, ASKED),
    Row(CONFIRMED, PAID, cancellation, CANCELLING, PAID, ASKED),
    Row(CONFIRMED, PAID, partly_refunded, CONFIRMED, PARTIALLY_REFUNDED, RECORDED),
    Row(CONFIRMED, PAID, refunded, CONFIRMED, REFUNDED, RECORDED),
    Row(CONFIRMED, PARTIALLY_REFUNDED, refunded, CONFIRMED, REFUNDED, RECORDED),
    Row(CONFIRMED, PAID, refund_failed, CONFIRMED, PAID, RECORDED, attention=True),
    Row(COMPLETED, PAID, partly_refunded, COMPLETED, PARTIALLY_REFUNDED, RECORDED),
    Row(COMPLETED, PAID, refunded, COMPLETED, REFUNDED, RECORDED),
    Row(COMPLETED, PAID, refund_failed, COMPLETED, PAID, RECORDED, attention=True),
    Row(CANCELLING, NONE, authorized, CANCELLING, AUTHORIZED, RECORDED),
    Row(CANCELLING, NONE, captured, CANCELLING, PAID, RECORDED),
    Row(CANCELLING, AUTHORIZED, captured, CANCELLING, PAID, RECORDED),
    Row(CANCELLING, NONE, failed, CANCELLED, NONE, Announcement.CANCELLED),
    Row(CANCELLING, NONE, voided, CANCELLED, NONE, Announcement.CANCELLED),
    Row(CANCELLING, AUTHORIZED, voided, CANCELLED, NONE, Announcement.CANCELLED),
    Row(CANCELLING, PAID, refunded, CANCELLED, REFUNDED, Announcement.CANCELLED),
    Row(CANCELLING, PAID, partly_refunded, CANCELLING, PARTIALLY_REFUNDED, RECORDED),
    Row(CANCELLING, PAID, refund_failed, CANCELLING, PAID, RECORDED, attention=True),
    Row(FAILED, NONE, authorized, FAILED, AUTHORIZED, RECORDED, attention=True),
    Row(FAILED, NONE, captured, FAILED, PAID, RECORDED, attention=True),
    Row(FAILED, AUTHORIZED, captured, FAILED, PAID, RECORDED, attention=True),
    Row(FAILED, AUTHORIZED, voided, FAILED, NONE, RECORDED, attention=True),
    Row(CANCELLED, NONE, captured, CANCELLED, PAID, RECORDED, attention=True),
    Row(CANCELLED, PAID, refunded, CANCELLED, REFUNDED, RECORDED),
    Row(CANCELLED, PAID, refund_failed, CANCELLED, PAID, RECORDED, attention=True),
    Row(CANCELLED, NONE, partly_refunded, CANCELLED, PARTIALLY_REFUNDED, RECORDED, attention=True),
    Row(EXPIRED, NONE, captured, EXPIRED, PAID, RECORDED, attention=True),
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_fact_moves_an_order_as_the_table_says(row: Row) -> None:
    """State, money, what it is told as, and whether a person must look."""
    order = an_order_in(row.state, row.money)
    moved = on(row.fact, order, at=NOON)
    assert moved is not None
    assert moved.state is row.next_state
    assert moved.payment_state is row.next_money
    assert moved.announcement is row.told_as
    assert bool(moved.attention_reason) is row.attention
    assert moved.version == order.version + 1


NOTHING: list[tuple[OrderState, PaymentState, Fact]] = [
    (AWAITING, REFUNDED, failed),
    (AWAITING, PARTIALLY_REFUNDED, voided),
    (CONFIRMED, AUTHORIZED, authorized),
    (CONFIRMED, PAID, captured),
    (CONFIRMED, PAID, authorized),
    (CONFIRMED, PAID, failed),
    (CONFIRMED, PAID, voided),
    (CONFIRMED, REFUNDED, refunded),
    (CONFIRMED, REFUNDED, partly_refunded),
    (CANCELLING, NONE, cancellation),
    (CANCELLING, PAID, captured),
    (CANCELLING, PAID, authorized),
    (CANCELLING, PAID, failed),
    (CANCELLING, PAID, voided),
    (CANCELLING, PARTIALLY_REFUNDED, partly_refunded),
    (CANCELLING, REFUNDED, failed),
    (CANCELLED, NONE, cancellation),
    (CANCELLED, REFUNDED, refunded),
    (CANCELLED, REFUNDED, partly_refunded),
    (CANCELLED, REFUNDED, captured),
    (CANCELLED, NONE, voided),
    (CANCELLED, NONE, failed),
    (FAILED, NONE, failed),
    (FAILED, PAID, captured),
    (FAILED, PAID, authorized),
    (COMPLETED, PAID, captured),
]


@pytest.mark.parametrize(
    ("state", "money", "fact"),
    NOTHING,
    ids=lambda part: part.name if hasattr(part, "name") else type(part).__name__,
)
def test_a_repeat_or_a_straggler_changes_nothing(
    state: OrderState, money: PaymentState, fact: Fact
) -> None:
    """What is known already, or contradicts money that has moved, makes no new version."""
    assert on(fact, an_order_in(state, money), at=NOON) is None


@pytest.mark.parametrize("state", [FAILED, CANCELLED], ids=lambda state: state.name)
def test_a_reservation_told_after_its_end_calls_nobody(state: OrderState) -> None:
    """The payment that was let go, or failed, holds nothing; another one may."""
    order = an_order_in(state, NONE, payment=PAYMENT)
    assert on(authorized, order, at=NOON) is None
    another = on(PaymentAuthorized(payment="merchants/default/payments/2"), order, at=NOON)
    assert another is not None
    assert (another.payment_state, bool(another.attention_reason)) == (AUTHORIZED, True)


@pytest.mark.parametrize(
    "state", [COMPLETED, FAILED, EXPIRED, OrderState.EXPIRING], ids=lambda state: state.name
)
def test_an_order_past_cancelling_says_so(state: OrderState) -> None:
    """A cancellation that cannot be is refused with both states."""
    with pytest.raises(RuleViolationError) as caught:
        on(cancellation, an_order_in(state), at=NOON)
    assert caught.value.reason == "ILLEGAL_TRANSITION"
    assert caught.value.metadata["state"] == state.name
    assert caught.value.metadata["requested"] == "CANCELLING"


def test_a_failed_order_keeps_the_reason_and_the_payment() -> None:
    """The customer is told why."""
    moved = on(failed, an_order(), at=NOON)
    assert moved is not None
    assert (moved.failure_reason, moved.payment) == ("card_declined", PAYMENT)


def test_a_charge_called_off_fails_an_order_as_voided() -> None:
    """A void has no reason of its own."""
    moved = on(voided, an_order(), at=NOON)
    assert moved is not None
    assert moved.failure_reason == "voided"


def test_a_cancellation_keeps_what_the_caller_gave() -> None:
    """The reason travels with the order and stays when it is cancelled."""
    asked = on(cancellation, an_order(), at=NOON)
    assert asked is not None
    done = on(voided, asked, at=NOON)
    assert done is not None
    assert (done.state, done.cancel_reason) == (CANCELLED, "changed my mind")


def test_money_taken_after_the_end_names_the_state_it_came_too_late_for() -> None:
    """Whoever looks knows what to give back."""
    moved = on(captured, an_order_in(CANCELLED), at=NOON)
    assert moved is not None
    assert moved.attention_reason == "money taken after CANCELLED"


def test_a_refund_of_more_than_was_captured_is_a_full_one() -> None:
    """There is no state beyond REFUNDED."""
    assert refund_of(2501).payment_state is REFUNDED
    assert refund_of(2499).payment_state is PARTIALLY_REFUNDED


# --- whatever happens -----------------------------------------------------------------

MONEY: list[PaymentFact] = [
    authorized,
    captured,
    failed,
    voided,
    partly_refunded,
    refund_of(2000),
    refunded,
    refund_failed,
]
FINAL = {state for state, targets in TRANSITIONS.items() if not targets}
sequences = st.lists(st.sampled_from([*MONEY, cancellation]), max_size=12)


def applied(fact: Fact, order: Order, seconds: int = 0) -> Order:
    """The order after a fact; a cancellation refused by rule leaves it as it is."""
    try:
        moved = on(fact, order, at=NOON + timedelta(seconds=seconds))
    except RuleViolationError:
        # Facts about money have happened: only a wish may be refused.
        assert isinstance(fact, CancellationRequested)
        assert CANCELLING not in TRANSITIONS[order.state]
        return order
    return order if moved is None else moved


@given(facts=sequences)
def test_every_sequence_of_facts_makes_versions_one_by_one(facts: list[Fact]) -> None:
    """Each change counts one, keeps what was ordered, and moves along the table alone."""
    order = an_order()
    for seconds, fact in enumerate(facts):
        before = order
        order = applied(fact, order, seconds)
        if order is before:
            continue
        assert order.version == before.version + 1
        assert order.state is before.state or order.state in TRANSITIONS[before.state]
        assert order.update_time >= before.update_time
        assert (order.name, order.basket, order.total) == (before.name, before.basket, before.total)


@given(facts=sequences)
def test_a_final_state_is_never_left(facts: list[Fact]) -> None:
    """Late money is recorded; it revives nothing."""
    order = an_order()
    ended: OrderState | None = None
    for fact in facts:
        order = applied(fact, order)
        if ended is not None:
            assert order.state is ended
        if order.state in FINAL:
            ended = order.state


@given(facts=sequences)
def test_an_ended_order_never_holds_money_unnoticed(facts: list[Fact]) -> None:
    """Captured and not given back while FAILED or CANCELLED: then somebody is called."""
    order = an_order()
    taken = given_back = False
    for fact in facts:
        order = applied(fact, order)
        taken = taken or fact == captured
        given_back = given_back or fact == refunded
        if order.state in (FAILED, CANCELLED):
            if taken and not given_back:
                assert order.attention_reason
            if order.payment_state in (AUTHORIZED, PAID, PARTIALLY_REFUNDED):
                assert order.attention_reason


@given(facts=sequences)
def test_what_is_refunded_stays_refunded(facts: list[Fact]) -> None:
    """Nothing that arrives late takes it back from the customer."""
    order = an_order()
    for fact in facts:
        before = order
        order = applied(fact, order)
        if before.payment_state is REFUNDED:
            assert order.payment_state is REFUNDED


@pytest.mark.parametrize(
    ("begun", "story"),
    [
        (AWAITING, [authorized, captured]),
        (AWAITING, [authorized, captured, partly_refunded, refunded]),
        (CANCELLING, [authorized, voided]),
        (CANCELLING, [authorized, failed]),
        (CANCELLING, [authorized, captured, refunded]),
        (CANCELLING, [captured, partly_refunded, refunded]),
        (CANCELLING, [captured, refund_failed]),
    ],
    ids=lambda part: part.name if isinstance(part, OrderState) else len(part),
)
def test_facts_that_overtake_each_other_come_to_the_same_end(
    begun: OrderState, story: list[PaymentFact]
) -> None:
    """What a payment reports may be delivered in any order."""
    ends = set()
    for order_of_delivery in permutations(story):
        order = an_order_in(begun)
        for fact in order_of_delivery:
            order = applied(fact, order)
        ends.add((order.state, order.payment_state))
    assert len(ends) == 1


@given(facts=sequences)
def test_a_full_refund_or_a_void_always_ends_a_cancellation(facts: list[Fact]) -> None:
    """CANCELLING is no trap: whatever came before, the payment's last word ends it."""
    order = an_order()
    for fact in facts:
        order = applied(fact, order)
    if order.state is CANCELLING:
        assert applied(refunded, order).state is CANCELLED
        if order.payment_state in (NONE, AUTHORIZED):
            assert applied(voided, order).state is CANCELLED


@given(facts=sequences)
def test_a_fact_told_twice_is_told_once(facts: list[Fact]) -> None:
    """Two events that say the same make one version; a refused refund is news every time."""
    order = an_order()
    for fact in facts:
        order = applied(fact, order)
        if fact != refund_failed:
            assert applied(fact, order) is order
