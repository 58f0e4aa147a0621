"""The payment's state table, row by row: what every answer and every cancellation means."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from enum import Enum

import pytest

from chassis.errors import InvalidInputError
from chassis.money import Money
from payment_svc.domain.attempt import (
    ATTEMPT_TRANSITIONS,
    AttemptState,
    CaptureMethod,
    IllegalTransitionError,
)
from payment_svc.domain.outcomes import (
    Absent,
    Authorized,
    Captured,
    Declined,
    Invalid,
    Outcome,
    Refunded,
    RetrySameKey,
    Submitted,
    Unknown,
    Voided,
)
from payment_svc.domain.payment import (
    PAYMENT_TRANSITIONS,
    RESOLVE_AFTER_SECONDS,
    Payment,
    PaymentState,
    Task,
    Told,
)
from payment_svc.domain.refund import REFUND_TRANSITIONS, RefundState
from tests.builders import NOON, eur
from tests.payments import (
    LEASE_SECONDS,
    REFERENCE,
    a_captured_payment,
    a_failed_payment,
    a_payment,
    a_payment_id,
    a_refunded_payment,
    an_authorized_payment,
    an_unknown_payment,
    answered,
    cancelled,
    taken,
)


def told(payment: Payment) -> list[Told]:
    """What a change is told as."""
    return [announcement.told for announcement in payment.announcements]


def a_cancelled_capture() -> Payment:
    """Captured, cancelled: a refund is due."""
    return cancelled(a_captured_payment())


def a_cancelled_authorization() -> Payment:
    """Authorized, cancelled: a void is due."""
    return cancelled(an_authorized_payment())


# --- beginning and taking -----------------------------------------------------------


def test_a_payment_begins_pending_with_a_charge_due_at_once() -> None:
    """Nothing has happened yet, and somebody is to send the charge."""
    payment = a_payment()

    assert (payment.state, payment.attempt.state) == (PaymentState.PENDING, AttemptState.NEW)
    assert (payment.due, payment.due_in_seconds) == (Task.CHARGE, 0.0)
    assert payment.attempt.provider_key == f"pa_{payment.attempt.attempt_id}"


@pytest.mark.parametrize("minor_units", [0, -1])
def test_an_amount_that_is_not_positive_is_refused(minor_units: int) -> None:
    """There is nothing to charge."""
    with pytest.raises(InvalidInputError):
        a_payment(amount=Money("EUR", minor_units))


def test_taking_a_charge_marks_it_as_sent_before_anybody_sends_it() -> None:
    """From here on it may have had its effect, so its key and time are on record."""
    payment = taken(a_payment())

    assert (payment.state, payment.attempt.state) == (PaymentState.PROCESSING, AttemptState.SENT)
    assert payment.attempt.sent_time == NOON
    assert (payment.in_hand, payment.fence) == (Task.CHARGE, 1)


def test_what_is_taken_is_to_be_resolved_once_its_lease_ends() -> None:
    """A lease that runs out leaves an unknown outcome, never a second charge."""
    payment = taken(a_payment())

    assert (payment.due, payment.due_in_seconds) == (Task.RESOLVE, LEASE_SECONDS)


def test_taking_a_charge_whose_lease_ran_out_makes_its_outcome_unknown() -> None:
    """Whoever held it may have sent it."""
    payment = taken(taken(a_payment()))

    assert payment.state is PaymentState.OUTCOME_UNKNOWN
    assert payment.attempt.state is AttemptState.UNKNOWN
    assert (payment.in_hand, payment.fence) == (Task.RESOLVE, 2)


def test_taking_again_keeps_the_time_of_the_first_sending() -> None:
    """The age of the key at the provider counts from the first use."""
    first = taken(a_payment())
    held = first.settled(Task.CHARGE, RetrySameKey(1.0), new_id=a_payment_id, at=NOON)

    again = held.taken(at=NOON + timedelta(hours=1), lease_seconds=LEASE_SECONDS)

    assert again.attempt.sent_time == NOON


def test_nothing_can_be_taken_where_nothing_is_due() -> None:
    """A settled payment has no work."""
    with pytest.raises(ValueError, match="nothing is due"):
        taken(a_captured_payment())


# --- what came of a charge ----------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "state", "attempt", "tells"),
    [
        (Captured(REFERENCE), PaymentState.CAPTURED, AttemptState.CAPTURED, [Told.SUCCEEDED]),
        (
            Authorized(REFERENCE),
            PaymentState.AUTHORIZED,
            AttemptState.AUTHORIZED,
            [Told.AUTHORIZED],
        ),
        (Declined("expired_card"), PaymentState.FAILED, AttemptState.DECLINED, [Told.FAILED]),
        (Invalid("no_such_method"), PaymentState.FAILED, AttemptState.FAILED, [Told.FAILED]),
        (Unknown("timeout"), PaymentState.OUTCOME_UNKNOWN, AttemptState.UNKNOWN, []),
        (RetrySameKey(3.0), PaymentState.PROCESSING, AttemptState.SENT, []),
    ],
)
@pytest.mark.parametrize("begin", [a_payment, an_unknown_payment])
def test_an_answer_about_a_charge_moves_the_payment(
    begin: object, outcome: Outcome, state: PaymentState, attempt: AttemptState, tells: list[Told]
) -> None:
    """The same answers mean the same, at first and after the outcome was unknown."""
    unknown = begin is an_unknown_payment
    payment = answered(an_unknown_payment() if unknown else a_payment(), outcome)

    if unknown and isinstance(outcome, RetrySameKey):
        state, attempt = PaymentState.OUTCOME_UNKNOWN, AttemptState.UNKNOWN
    assert (payment.state, payment.attempt.state) == (state, attempt)
    assert told(payment) == tells


def test_a_capture_takes_the_whole_amount_and_keeps_the_reference() -> None:
    """What was asked for is what was taken."""
    payment = answered(a_payment(), Captured(REFERENCE))

    assert (payment.captured, payment.refunded) == (eur(2500), eur(0))
    assert payment.attempt.provider_reference == REFERENCE
    assert payment.due is None


def test_a_decline_keeps_the_providers_reason() -> None:
    """Order and customer are told why."""
    payment = answered(a_payment(), Declined("insufficient_funds"))

    assert payment.failure_reason == "insufficient_funds"
    assert payment.due is None


def test_a_call_to_be_made_again_is_due_after_the_delay_that_was_asked_for() -> None:
    """Under the same key, by whoever comes first."""
    payment = answered(a_payment(), RetrySameKey(3.0))

    assert (payment.due, payment.due_in_seconds) == (Task.CHARGE, 3.0)


def test_an_unknown_outcome_is_asked_about_ever_later() -> None:
    """2 s, 10 s, 30 s, 2 min, 10 min, then hourly for ever, give or take a fifth."""
    payment = answered(a_payment(), Unknown("timeout"))
    pauses = [payment.due_in_seconds]
    for _ in range(7):
        payment = answered(payment, Absent())
        pauses.append(payment.due_in_seconds)

    for seconds, expected in zip(pauses, [*RESOLVE_AFTER_SECONDS, 3600, 3600], strict=True):
        assert seconds == pytest.approx(expected, rel=0.2)
    assert payment.due is Task.RESOLVE


def test_what_was_lost_together_is_not_asked_about_together() -> None:
    """An outage that ends meets no herd of questions, an hour later neither."""
    lost = [answered(a_payment(), Unknown("timeout")) for _ in range(20)]

    assert len({payment.due_in_seconds for payment in lost}) > 10


@pytest.mark.parametrize("outcome", [Captured(REFERENCE), Unknown("timeout"), RetrySameKey(1.0)])
def test_an_answer_settles_what_was_taken_and_nothing_after_that(outcome: Outcome) -> None:
    """The fence rises, so that the same answer told twice counts once."""
    held = taken(a_payment())

    settled = held.settled(Task.CHARGE, outcome, new_id=a_payment_id, at=NOON)

    assert settled.fence == held.fence + 1


def test_a_charge_that_was_voided_elsewhere_is_told_as_voided() -> None:
    """Somebody let it go at the provider while we did not know what it was."""
    payment = answered(an_unknown_payment(), Voided())

    assert payment.state is PaymentState.VOIDED
    assert told(payment) == [Told.VOIDED]


def test_a_charge_that_was_put_off_and_is_found_voided_is_over() -> None:
    """Too old to be sent, it was asked about; somebody had let it go at the provider."""
    payment = answered(answered(a_payment(), RetrySameKey()), Voided())

    assert payment.state is PaymentState.VOIDED
    assert told(payment) == [Told.VOIDED]


def test_an_authorization_found_again_is_not_told_twice() -> None:
    """Its void's answer was lost, and the provider says that the amount is still reserved."""
    payment = answered(a_cancelled_authorization(), Unknown("timeout"))
    assert payment.state is PaymentState.OUTCOME_UNKNOWN

    payment = answered(payment, Authorized(REFERENCE))

    assert payment.state is PaymentState.AUTHORIZED
    assert told(payment) == []
    assert payment.due is Task.VOID


# --- cancellation -------------------------------------------------------------------


def test_a_payment_that_nobody_has_sent_is_called_off_at_once() -> None:
    """PENDING: nothing was taken, nothing will be."""
    payment = cancelled(a_payment())

    assert (payment.state, payment.attempt.state) == (PaymentState.VOIDED, AttemptState.VOIDED)
    assert told(payment) == [Told.VOIDED]
    assert payment.due is None


@pytest.mark.parametrize(
    ("outcome", "state", "tells", "due"),
    [
        (Captured(REFERENCE), PaymentState.CAPTURED, [Told.SUCCEEDED], Task.REFUND),
        (Authorized(REFERENCE), PaymentState.AUTHORIZED, [Told.AUTHORIZED], Task.VOID),
        (Declined("card_declined"), PaymentState.FAILED, [Told.FAILED], None),
        (Invalid("no_such_method"), PaymentState.FAILED, [Told.FAILED], None),
    ],
)
@pytest.mark.parametrize("unknown", [False, True])
def test_a_cancellation_before_the_outcome_waits_for_it(
    outcome: Outcome, state: PaymentState, tells: list[Told], due: Task | None, unknown: bool
) -> None:
    """PROCESSING and OUTCOME_UNKNOWN: what has happened is undone, what has not is not."""
    waiting = an_unknown_payment() if unknown else a_payment()
    held = taken(waiting)
    marked = cancelled(held)
    assert (marked.state, marked.announcements) == (held.state, ())
    assert (marked.due, marked.fence) == (held.due, held.fence)
    assert held.in_hand is not None

    payment = marked.settled(held.in_hand, outcome, new_id=a_payment_id, at=NOON)

    assert (payment.state, told(payment), payment.due) == (state, tells, due)


def test_a_cancelled_authorization_is_let_go() -> None:
    """AUTHORIZED: a void is due, and ends in PaymentVoided."""
    payment = a_cancelled_authorization()
    assert (payment.due, payment.due_in_seconds) == (Task.VOID, 0.0)
    assert payment.attempt.state is AttemptState.VOIDING

    payment = answered(payment, Voided())

    assert (payment.state, payment.attempt.state) == (PaymentState.VOIDED, AttemptState.VOIDED)
    assert told(payment) == [Told.VOIDED]
    assert payment.due is None


def test_a_void_that_comes_too_late_becomes_a_refund() -> None:
    """The amount was taken meanwhile, so it is given back."""
    payment = answered(a_cancelled_authorization(), Captured(REFERENCE))

    assert payment.state is PaymentState.CAPTURED
    assert told(payment) == [Told.SUCCEEDED]
    assert payment.due is Task.REFUND


@pytest.mark.parametrize("outcome", [Unknown("timeout"), Invalid("not_voidable"), Absent()])
def test_a_void_that_does_not_succeed_asks_what_there_is(outcome: Outcome) -> None:
    """It says nothing of the money, so nothing is said of it."""
    payment = answered(a_cancelled_authorization(), outcome)

    assert (payment.state, payment.attempt.state) == (
        PaymentState.OUTCOME_UNKNOWN,
        AttemptState.UNKNOWN,
    )
    assert told(payment) == []
    assert payment.due is Task.RESOLVE


def test_a_cancelled_capture_is_given_back_in_full() -> None:
    """CAPTURED: a refund under a key of its own, of all that is left."""
    payment = a_cancelled_capture()

    (refund,) = payment.refunds
    assert (refund.amount, refund.state) == (eur(2500), RefundState.PENDING)
    assert refund.provider_key == f"pr_{refund.refund_id}"
    assert refund.reason == "changed my mind"
    assert (payment.due, payment.due_in_seconds) == (Task.REFUND, 0.0)


def test_a_refund_that_went_through_is_told_with_what_is_refunded() -> None:
    """RefundSucceeded ends the cancellation."""
    payment = answered(a_cancelled_capture(), Refunded("re_1"))

    assert payment.state is PaymentState.CAPTURED
    assert payment.refunded == eur(2500)
    assert payment.refunds[0].state is RefundState.SUCCEEDED
    assert payment.refunds[0].provider_reference == "re_1"
    assert told(payment) == [Told.REFUND_SUCCEEDED]
    assert payment.due is None


@pytest.mark.parametrize("outcome", [Declined("expired_card"), Invalid("amount_too_large")])
def test_a_refund_that_is_refused_calls_a_person(outcome: Declined | Invalid) -> None:
    """RefundFailed: nothing was given back, and nobody tries again by themselves."""
    payment = answered(a_cancelled_capture(), outcome)

    assert payment.refunded == eur(0)
    assert payment.refunds[0].failure_reason == outcome.code
    assert told(payment) == [Told.REFUND_FAILED]
    assert payment.due is None


def test_a_refund_under_way_is_asked_about_and_stays_submitted() -> None:
    """The provider has it: not knowing its end yet is not an unknown outcome."""
    payment = answered(a_cancelled_capture(), Submitted("re_1"))
    assert payment.due is Task.RESOLVE
    assert payment.due_in_seconds == pytest.approx(2.0, rel=0.2)

    payment = answered(payment, Unknown("timeout"))

    assert payment.refunds[0].state is RefundState.SUBMITTED
    assert payment.due is Task.RESOLVE
    assert payment.due_in_seconds == pytest.approx(10.0, rel=0.2)
    assert told(answered(payment, Refunded("re_1"))) == [Told.REFUND_SUCCEEDED]


def test_a_refund_whose_answer_is_lost_is_unknown_and_the_payment_stays_captured() -> None:
    """The money was taken, whatever became of its way back."""
    payment = answered(a_cancelled_capture(), Unknown("timeout"))

    assert payment.state is PaymentState.CAPTURED
    assert payment.refunds[0].state is RefundState.OUTCOME_UNKNOWN
    assert payment.due is Task.RESOLVE


def test_a_refund_whose_lease_ran_out_is_unknown() -> None:
    """Whoever held it may have sent it."""
    payment = taken(taken(a_cancelled_capture()))

    assert payment.refunds[0].state is RefundState.OUTCOME_UNKNOWN
    assert payment.in_hand is Task.RESOLVE


def test_a_cancellation_after_a_decline_tells_nothing_new() -> None:
    """FAILED: PaymentFailed was told, and answers the order's question already."""
    payment = cancelled(a_failed_payment())

    assert payment.cancel_requested
    assert (told(payment), payment.due, payment.state) == ([], None, PaymentState.FAILED)


@pytest.mark.parametrize(
    "payment",
    [
        cancelled(a_payment()),
        a_cancelled_authorization(),
        a_cancelled_capture(),
        a_refunded_payment(),
    ],
)
def test_a_second_cancellation_changes_nothing(payment: Payment) -> None:
    """However often it is asked for, it happens once."""
    assert payment.cancelled(reason="again", new_id=a_payment_id, at=NOON) is None


# --- what must never be -------------------------------------------------------------


@pytest.mark.parametrize(
    "settled",
    [a_captured_payment(), a_failed_payment(), cancelled(a_payment()), a_refunded_payment()],
)
@pytest.mark.parametrize(
    "outcome", [Captured(REFERENCE), Authorized(REFERENCE), Unknown("late"), Voided()]
)
def test_a_final_state_is_never_left(settled: Payment, outcome: Outcome) -> None:
    """An answer that comes after it is a fault, and is raised as one."""
    with pytest.raises(IllegalTransitionError):
        settled.settled(Task.CHARGE, outcome, new_id=a_payment_id, at=NOON)


@pytest.mark.parametrize(
    ("payment", "outcome"),
    [(a_payment(), Refunded("re_1")), (a_cancelled_capture(), Captured(REFERENCE))],
)
def test_an_answer_to_another_question_is_refused(payment: Payment, outcome: Outcome) -> None:
    """A refund says nothing of a charge, nor a charge of a refund."""
    with pytest.raises(ValueError, match="is no answer about"):
        answered(payment, outcome)


@pytest.mark.parametrize(
    ("states", "table"),
    [
        (PaymentState, PAYMENT_TRANSITIONS),
        (AttemptState, ATTEMPT_TRANSITIONS),
        (RefundState, REFUND_TRANSITIONS),
    ],
)
def test_every_state_says_where_it_may_go(states: type[Enum], table: Mapping[Enum, object]) -> None:
    """A state that the table forgot could not even be asked about."""
    assert set(table) == set(states)


@pytest.mark.parametrize(
    ("age", "reference", "may"),
    [
        (timedelta(0), "", True),
        (timedelta(hours=22, minutes=59), "", True),
        (timedelta(hours=23), "", False),
        (timedelta(days=3), "", False),
        (timedelta(0), REFERENCE, False),
    ],
)
def test_a_key_is_sent_again_only_while_the_provider_surely_remembers_it(
    age: timedelta, reference: str, may: bool
) -> None:
    """An hour before it forgets is the last moment; and never once it named the charge."""
    payment = taken(a_payment())
    attempt = payment.attempt.moved(AttemptState.SENT, provider_reference=reference)

    assert attempt.may_be_resent(at=NOON + age, key_ttl=timedelta(hours=24)) is may


def test_a_charge_that_was_never_taken_was_never_sent() -> None:
    """There is no key at the provider to send again."""
    attempt = a_payment().attempt

    assert not attempt.may_be_resent(at=NOON, key_ttl=timedelta(hours=24))


def test_every_change_is_one_revision_further() -> None:
    """Readers tell states apart by it."""
    payment = a_payment(capture_method=CaptureMethod.MANUAL)
    revisions = [payment.revision]
    for change in (taken, cancelled):
        payment = change(payment)
        revisions.append(payment.revision)

    assert revisions == [1, 2, 3]


def test_the_time_of_change_never_runs_backwards() -> None:
    """Clocks of two processes differ; the resource's times do not show it."""
    payment = taken(a_payment())

    earlier = payment.settled(
        Task.CHARGE, Captured(REFERENCE), new_id=a_payment_id, at=NOON - timedelta(minutes=1)
    )

    assert earlier.update_time == NOON
