"""What holds for a payment in any order of events, answers, losses and crashes.

The machine plays everyone around one payment: workers that take what is due, hold it,
and come back early, late or never; a provider with books of its own, whose answers get
lost on the way; an order that is cancelled at any moment.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from payment_svc.domain.attempt import ATTEMPT_TRANSITIONS, CaptureMethod
from payment_svc.domain.outcomes import Absent, Outcome, RetrySameKey, Unknown
from payment_svc.domain.payment import Payment, PaymentState, Task, Told
from payment_svc.domain.refund import RefundState
from payment_svc.gateways import InProcessGateway
from payment_svc.worker import charge_of, refund_of, void_of
from tests.builders import NOON, eur
from tests.payments import LEASE_SECONDS, a_payment, a_payment_id

ENDS = {Told.FAILED, Told.VOIDED, Told.REFUND_SUCCEEDED, Told.REFUND_FAILED}
"""What ends a cancellation."""


def result_of(coroutine: Coroutine[Any, Any, Outcome]) -> Outcome:
    """What a gateway that never waits answers, without an event loop's cost."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        outcome: Outcome = done.value
        return outcome
    raise AssertionError("the gateway waited for something")


class OnePayment(RuleBasedStateMachine):
    """One payment, and all that may happen around it."""

    @initialize(
        payment_method=st.sampled_from(
            [
                "pm_card_visa",
                "pm_card_chargeDeclined",
                "pm_card_refundFail",
                "pm_card_pendingRefund",
                "pm_nobody_knows",
            ]
        ),
        capture_method=st.sampled_from(CaptureMethod),
    )
    def begin(self, payment_method: str, capture_method: CaptureMethod) -> None:
        """An order is placed."""
        self.gateway = InProcessGateway()
        self.payment = a_payment(payment_method=payment_method, capture_method=capture_method)
        self.held: list[Payment] = []
        self.told: list[Told] = []

    def save(self, payment: Payment) -> None:
        """What a transaction does: keeps the payment, tells its events."""
        assert payment.revision > self.payment.revision
        self.told += [announcement.told for announcement in payment.announcements]
        assert payment.events == len(self.told)
        self.payment = payment.announced()

    @precondition(lambda self: not self.payment.cancel_requested)
    @rule()
    def cancel(self) -> None:
        """The order is cancelled."""
        changed = self.payment.cancelled(reason="", new_id=a_payment_id, at=NOON)
        if changed is not None:
            self.save(changed)

    @precondition(lambda self: self.payment.cancel_requested)
    @rule()
    def cancel_again(self) -> None:
        """The order's cancellation is delivered a second time, under another event."""
        again = self.payment.cancelled(reason="", new_id=a_payment_id, at=NOON)
        assert again is None

    @precondition(lambda self: self.payment.due is not None)
    @rule()
    def take(self) -> None:
        """Somebody takes what is due; what is in hand is taken when its lease has run out."""
        self.save(self.payment.taken(at=NOON, lease_seconds=LEASE_SECONDS))
        self.held.append(self.payment)

    @precondition(lambda self: self.held)
    @rule(
        data=st.data(),
        answer_lost=st.booleans(),
        never_sent=st.booleans(),
        settled_twice=st.booleans(),
    )
    def perform(
        self, data: st.DataObject, answer_lost: bool, never_sent: bool, settled_twice: bool
    ) -> None:
        """Somebody asks the provider, in time or long after, and settles what came.

        Twice, when the connection was lost during the first commit.
        """
        position = data.draw(st.integers(0, len(self.held) - 1))
        work = self.held.pop(position)
        outcome = RetrySameKey(1.0) if never_sent else self.ask(work)
        if answer_lost and not never_sent:
            outcome = Unknown("lost")
        self.settle(work, outcome)
        if settled_twice:
            self.settle(work, outcome)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), sent=st.booleans())
    def crash(self, data: st.DataObject, sent: bool) -> None:
        """Somebody dies with work in hand, before or after asking."""
        work = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        if sent:
            self.ask(work)

    def ask(self, work: Payment) -> Outcome:
        """What a worker does with what it holds."""
        match work.in_hand:
            case Task.CHARGE:
                return result_of(self.gateway.charge(charge_of(work)))
            case Task.VOID:
                return result_of(self.gateway.void(void_of(work)))
            case Task.REFUND:
                return result_of(self.gateway.refund(refund_of(work)))
            case _:
                return self.resolve(work)

    def resolve(self, work: Payment) -> Outcome:
        """Asks, and sends again what the provider does not know."""
        refund = work.open_refund
        if refund is not None:
            found = result_of(self.gateway.find_refund(refund_of(work)))
            if isinstance(found, Absent) and refund.may_be_resent(
                at=NOON, key_ttl=self.gateway.key_ttl
            ):
                return result_of(self.gateway.refund(refund_of(work)))
            return found
        found = result_of(self.gateway.find(charge_of(work)))
        if isinstance(found, Absent) and work.attempt.may_be_resent(
            at=NOON, key_ttl=self.gateway.key_ttl
        ):
            return result_of(self.gateway.charge(charge_of(work)))
        return found

    def settle(self, work: Payment, outcome: Outcome) -> None:
        """What a transaction does with an answer: late ones count for nothing."""
        if work.fence == self.payment.fence:
            assert work.in_hand is not None
            self.save(self.payment.settled(work.in_hand, outcome, new_id=a_payment_id, at=NOON))

    @invariant()
    def the_provider_charges_at_most_once(self) -> None:
        """One key, one charge, whatever was sent how often."""
        assert len(self.gateway.ledger) <= 1

    @invariant()
    def money_is_conserved(self) -> None:
        """Nothing is given back that was not taken, here or in the provider's books."""
        assert eur(0) <= self.payment.refunded <= self.payment.captured <= self.payment.amount
        going = [r.amount for r in self.payment.refunds if r.state is not RefundState.FAILED]
        assert sum(amount.minor_units for amount in going) <= self.payment.captured.minor_units
        for entry in self.gateway.ledger.values():
            assert entry.refunded <= entry.captured

    @invariant()
    def what_is_open_is_due(self) -> None:
        """Nothing waits for nobody; what is over asks for nothing."""
        reserved = self.payment.state is PaymentState.AUTHORIZED and self.payment.due is None
        unfinished = bool(ATTEMPT_TRANSITIONS[self.payment.attempt.state]) and not reserved
        assert (self.payment.due is not None) == (
            unfinished or self.payment.open_refund is not None
        )
        assert not (reserved and self.payment.cancel_requested)

    @invariant()
    def nothing_is_told_twice(self) -> None:
        """Each kind of event at most once, and one end at most."""
        counts = Counter(self.told)
        assert all(count == 1 for count in counts.values())
        assert sum(counts[end] for end in ENDS) <= 1
        assert not (counts[Told.SUCCEEDED] and (counts[Told.FAILED] or counts[Told.VOIDED]))

    def teardown(self) -> None:
        """Left alone with a provider that answers, everything comes to its one end."""
        if not hasattr(self, "payment"):
            return
        for _ in range(10):
            if self.payment.due is None:
                break
            self.save(self.payment.taken(at=NOON, lease_seconds=LEASE_SECONDS))
            self.settle(self.payment, self.ask(self.payment))
        assert self.payment.due is None
        ends = [end for end in self.told if end in ENDS]
        if self.payment.cancel_requested:
            assert len(ends) == 1
        books = list(self.gateway.ledger.values())
        taken = sum(entry.captured.minor_units for entry in books)
        back = sum(entry.refunded.minor_units for entry in books)
        assert (self.payment.captured, self.payment.refunded) == (eur(taken), eur(back))


TestOnePayment = OnePayment.TestCase
TestOnePayment.settings = settings(max_examples=300, stateful_step_count=20, deadline=None)
