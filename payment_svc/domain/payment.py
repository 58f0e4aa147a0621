"""The payment: the money side of one order, and what every answer means for it.

A payment is asked for by its order's creation, and undone by its order's cancellation.
At any time at most one thing is to be asked of the provider for it: `due` says what, and
whoever takes it (`taken`) holds it under a fence until `settled`, or until its lease runs
out. A lease that runs out is work of its own: the outcome is then unknown, so what is due
next is to RESOLVE it by asking, before anything else may happen.

What came of asking:

| payment          | outcome                 | next            | told as           | due next |
|------------------|-------------------------|-----------------|-------------------|----------|
| PENDING          | taken                   | PROCESSING      |                   | RESOLVE¹ |
| PROCESSING       | captured                | CAPTURED        | PaymentSucceeded  | REFUND²  |
| PROCESSING       | authorized              | AUTHORIZED      | PaymentAuthorized | VOID²    |
| PROCESSING       | declined, invalid       | FAILED          | PaymentFailed     |          |
| PROCESSING, old³ | voided                  | VOIDED          | PaymentVoided     |          |
| PROCESSING, old³ | absent                  | OUTCOME_UNKNOWN |                   | RESOLVE  |
| PROCESSING       | retry with the same key | PROCESSING      |                   | CHARGE   |
| PROCESSING       | unknown, lease ran out  | OUTCOME_UNKNOWN |                   | RESOLVE  |
| OUTCOME_UNKNOWN  | captured, declined, …   | as above        | as above          | as above |
| OUTCOME_UNKNOWN  | authorized, as before   | AUTHORIZED      |                   | VOID²    |
| OUTCOME_UNKNOWN  | voided                  | VOIDED          | PaymentVoided     |          |
| OUTCOME_UNKNOWN  | absent, unknown         | OUTCOME_UNKNOWN |                   | RESOLVE  |
| AUTHORIZED, void | voided                  | VOIDED          | PaymentVoided     |          |
| AUTHORIZED, void | captured                | CAPTURED        | PaymentSucceeded  | REFUND   |
| AUTHORIZED, void | unknown, refused        | OUTCOME_UNKNOWN |                   | RESOLVE  |
| CAPTURED, refund | refunded                | CAPTURED        | RefundSucceeded   |          |
| CAPTURED, refund | declined, invalid       | CAPTURED        | RefundFailed      |          |
| CAPTURED, refund | submitted, unknown      | CAPTURED        |                   | RESOLVE  |

¹ when the lease ends; ² if the order was cancelled meanwhile; ³ put off for so long that
its key may be forgotten, and therefore asked about instead of being sent.

What a cancellation does. The order waits for one of PaymentFailed, PaymentVoided,
RefundSucceeded (RefundFailed calls a person), and every row ends in exactly one of them:

| payment                    | at once                 | and in the end              |
|----------------------------|-------------------------|-----------------------------|
| none yet                   | refused, comes again    |                             |
| PENDING                    | VOIDED: called off      | PaymentVoided, now          |
| PROCESSING, OUTCOME_UNKNOWN| marked; nothing is known| by the outcome, table above |
| AUTHORIZED                 | marked, void due        | PaymentVoided               |
| CAPTURED                   | marked, refund due      | RefundSucceeded or -Failed  |
| FAILED, VOIDED, EXPIRED    | marked                  | told already: nothing more  |
| cancelled before           | nothing                 |                             |

In the row of FAILED the order has met, or will meet, the PaymentFailed that was told
when the payment failed; a second one would be a second answer to one question.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum
from typing import Any, assert_never
from uuid import UUID

from chassis.errors import InvalidInputError
from chassis.money import Money
from payment_svc.domain.attempt import (
    ATTEMPT_TRANSITIONS,
    Attempt,
    AttemptState,
    ChargeTerms,
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
from payment_svc.domain.refund import Refund, RefundState

RESOLVE_AFTER_SECONDS = (2.0, 10.0, 30.0, 120.0, 600.0, 3600.0)
"""How long to wait before asking about an unknown outcome, give or take a fifth: the
first time, the second, and so on; the last for ever after (docs/reliability.md)."""


class PaymentState(Enum):
    """Where a payment stands; the values are the proto's `Payment.State`."""

    PENDING = 1
    REQUIRES_ACTION = 2
    PROCESSING = 3
    AUTHORIZED = 4
    PARTIALLY_CAPTURED = 5
    CAPTURED = 6
    VOIDED = 7
    EXPIRED = 8
    FAILED = 9
    OUTCOME_UNKNOWN = 10


PAYMENT_TRANSITIONS: Mapping[PaymentState, frozenset[PaymentState]] = {
    PaymentState.PENDING: frozenset({PaymentState.PROCESSING, PaymentState.VOIDED}),
    PaymentState.REQUIRES_ACTION: frozenset(
        {PaymentState.PROCESSING, PaymentState.FAILED, PaymentState.VOIDED}
    ),
    PaymentState.PROCESSING: frozenset(
        {
            PaymentState.REQUIRES_ACTION,
            PaymentState.AUTHORIZED,
            PaymentState.CAPTURED,
            PaymentState.VOIDED,
            PaymentState.FAILED,
            PaymentState.OUTCOME_UNKNOWN,
        }
    ),
    PaymentState.OUTCOME_UNKNOWN: frozenset(
        {
            PaymentState.AUTHORIZED,
            PaymentState.PARTIALLY_CAPTURED,
            PaymentState.CAPTURED,
            PaymentState.VOIDED,
            PaymentState.FAILED,
        }
    ),
    PaymentState.AUTHORIZED: frozenset(
        {
            PaymentState.PARTIALLY_CAPTURED,
            PaymentState.CAPTURED,
            PaymentState.VOIDED,
            PaymentState.EXPIRED,
            PaymentState.OUTCOME_UNKNOWN,
        }
    ),
    PaymentState.PARTIALLY_CAPTURED: frozenset(
        {PaymentState.CAPTURED, PaymentState.OUTCOME_UNKNOWN}
    ),
    PaymentState.CAPTURED: frozenset(),
    PaymentState.VOIDED: frozenset(),
    PaymentState.EXPIRED: frozenset(),
    PaymentState.FAILED: frozenset(),
}
"""Where a payment may go from where it stands. A final state is never left; money that
is given back changes `refunded`, not the state."""


class Task(Enum):
    """What may be due at the provider for a payment."""

    CHARGE = "CHARGE"
    VOID = "VOID"
    REFUND = "REFUND"
    RESOLVE = "RESOLVE"
    """Ask what became of whichever of the others was last sent."""


class Told(Enum):
    """What a change is told as: the payment service's events."""

    AUTHORIZED = "PaymentAuthorized"
    SUCCEEDED = "PaymentSucceeded"
    FAILED = "PaymentFailed"
    VOIDED = "PaymentVoided"
    REFUND_SUCCEEDED = "RefundSucceeded"
    REFUND_FAILED = "RefundFailed"


@dataclass(frozen=True, slots=True)
class Announcement:
    """One event that a change is told as; `refund` where it is about one."""

    told: Told
    refund: Refund | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Payment:
    """The payment of one order, at one revision. Changes make a new one.

    Attributes:
        attempt: The latest charge; what came before it is kept, and is over.
        revision: Rises with every change; names the state for readers (etag).
        events: How many events have told of it; their versions have no gaps.
        fence: Rises whenever somebody takes what is due, and when their answer is
            settled; an answer under an older fence comes from somebody whose lease has
            run out, or comes a second time, and counts for nothing.
        due: What has to be asked of the provider next, if anything.
        due_in_seconds: When, counted from the moment of saving; None leaves the time
            as it was saved before.
        in_hand: What the taker of this very revision is to do; not saved.
        announcements: What has changed since it was read, as events; not saved here.
    """

    merchant: str
    payment_id: UUID
    order_id: UUID
    provider: str
    attempt: Attempt
    state: PaymentState
    captured: Money
    refunded: Money
    create_time: datetime
    update_time: datetime
    refunds: tuple[Refund, ...] = ()
    failure_reason: str = ""
    cancel_requested: bool = False
    cancel_reason: str = ""
    revision: int = 1
    events: int = 0
    fence: int = 0
    due: Task | None = None
    due_in_seconds: float | None = None
    in_hand: Task | None = None
    announcements: tuple[Announcement, ...] = ()

    @classmethod
    def begin(
        cls,
        *,
        merchant: str,
        payment_id: UUID,
        order_id: UUID,
        attempt_id: UUID,
        provider: str,
        terms: ChargeTerms,
        at: datetime,
    ) -> Payment:
        """A payment that nobody has sent anywhere yet: PENDING, with a charge due.

        Raises:
            InvalidInputError: The amount is not positive.
        """
        if terms.amount.minor_units <= 0:
            raise InvalidInputError.of_field(
                "INVALID_FIELD", "amount", "is not positive, so there is nothing to charge"
            )
        nothing = Money.zero(terms.amount.currency_code)
        return cls(
            merchant=merchant,
            payment_id=payment_id,
            order_id=order_id,
            provider=provider,
            attempt=Attempt.new(attempt_id=attempt_id, seq=1, terms=terms),
            state=PaymentState.PENDING,
            captured=nothing,
            refunded=nothing,
            create_time=at,
            update_time=at,
            due=Task.CHARGE,
            due_in_seconds=0.0,
        )

    @property
    def name(self) -> str:
        """The resource name, `merchants/{merchant}/payments/{payment}`."""
        return f"merchants/{self.merchant}/payments/{self.payment_id}"

    @property
    def order(self) -> str:
        """The order's resource name, `merchants/{merchant}/orders/{order}`."""
        return f"merchants/{self.merchant}/orders/{self.order_id}"

    @property
    def etag(self) -> str:
        """Names this very revision (AIP-154)."""
        return f'"{self.revision}"'

    @property
    def amount(self) -> Money:
        """What is to be paid."""
        return self.attempt.terms.amount

    @property
    def open_refund(self) -> Refund | None:
        """The refund that is under way, if any; there is never more than one."""
        return next((refund for refund in self.refunds if refund.open), None)

    def announced(self) -> Payment:
        """The payment once its announcements have been told."""
        return replace(self, announcements=()) if self.announcements else self

    def cancelled(self, *, reason: str, new_id: Callable[[], UUID], at: datetime) -> Payment | None:
        """What its order's cancellation makes of it; None when it was cancelled before."""
        if self.cancel_requested:
            return None
        changes: dict[str, Any] = {}
        told = None
        match self.state:
            case PaymentState.PENDING:
                told = Announcement(Told.VOIDED)
                changes = self._over(PaymentState.VOIDED, AttemptState.VOIDED)
            case PaymentState.AUTHORIZED:
                changes = _void_due(self.attempt)
            case PaymentState.CAPTURED:
                changes = self._refund_due(self.captured, reason, new_id, at)
            case _:
                pass  # the outcome decides, or has decided already
        return self._changed(at, told, cancel_requested=True, cancel_reason=reason, **changes)

    def taken(self, *, at: datetime, lease_seconds: float) -> Payment:
        """Takes what is due: from now on its holder alone may do it, until the lease ends.

        Raises:
            ValueError: Nothing is due.
        """
        changes: dict[str, Any] = {}
        attempt, refund = self.attempt, self.open_refund
        match self.due:
            case Task.CHARGE:
                changes["state"] = self._moved(PaymentState.PROCESSING)
                changes["attempt"] = attempt.moved(
                    AttemptState.SENT, sent_time=attempt.sent_time or at
                )
            case Task.VOID:
                changes["attempt"] = attempt.moved(AttemptState.VOIDING)
            case Task.REFUND if refund is not None:
                changes["refunds"] = self._refunds_with(
                    refund.moved(RefundState.SUBMITTED, sent_time=refund.sent_time or at)
                )
            case Task.RESOLVE if refund is not None:
                # A provider that has named the refund has it: that much is known.
                if not refund.provider_reference:
                    changes["refunds"] = self._refunds_with(
                        refund.moved(RefundState.OUTCOME_UNKNOWN)
                    )
            case Task.RESOLVE:
                changes["state"] = self._moved(PaymentState.OUTCOME_UNKNOWN)
                changes["attempt"] = attempt.moved(AttemptState.UNKNOWN)
            case _:
                raise ValueError(f"nothing is due for {self.name} that could be taken")
        return self._changed(
            at,
            fence=self.fence + 1,
            in_hand=self.due,
            due=Task.RESOLVE,
            due_in_seconds=lease_seconds,
            **changes,
        )

    def settled(
        self, task: Task, outcome: Outcome, *, new_id: Callable[[], UUID], at: datetime
    ) -> Payment:
        """What an answer of the provider makes of it.

        Args:
            task: What had been taken.
            outcome: What came of it.
            new_id: Makes the id of a refund, where one becomes due.
            at: The time by our clock.

        Raises:
            IllegalTransitionError: Nothing is open, or the answer contradicts the state.
            ValueError: The answer is to another kind of question.
        """
        if not ATTEMPT_TRANSITIONS[self.attempt.state] and self.open_refund is None:
            raise IllegalTransitionError(self.name, self.state, task)
        fence = self.fence + 1
        if isinstance(outcome, RetrySameKey):
            return self._changed(at, fence=fence, due=task, due_in_seconds=outcome.delay_seconds)
        refund = self.open_refund
        if refund is not None:
            told, changes = self._refund_settled(refund, outcome)
        else:
            told, changes = self._charge_settled(outcome, new_id, at)
        return self._changed(
            at, told, fence=fence, **{"due": None, "due_in_seconds": None, **changes}
        )

    def _charge_settled(
        self, outcome: Outcome, new_id: Callable[[], UUID], at: datetime
    ) -> tuple[Announcement | None, dict[str, Any]]:
        attempt = self.attempt
        voiding = attempt.state is AttemptState.VOIDING
        match outcome:
            case Authorized(reference):
                told_before = bool(attempt.provider_reference)
                attempt = attempt.moved(AttemptState.AUTHORIZED, provider_reference=reference)
                changes = {
                    "state": self._moved(PaymentState.AUTHORIZED),
                    **(_void_due(attempt) if self.cancel_requested else {"attempt": attempt}),
                }
                return None if told_before else Announcement(Told.AUTHORIZED), changes
            case Captured(reference):
                changes = {
                    "state": self._moved(PaymentState.CAPTURED),
                    "attempt": attempt.moved(AttemptState.CAPTURED, provider_reference=reference),
                    "captured": self.amount,
                }
                if self.cancel_requested:
                    changes |= self._refund_due(self.amount, self.cancel_reason, new_id, at)
                return Announcement(Told.SUCCEEDED), changes
            case Voided():
                return Announcement(Told.VOIDED), self._over(
                    PaymentState.VOIDED, AttemptState.VOIDED
                )
            case Declined(code) if not voiding:
                return Announcement(Told.FAILED), self._over(
                    PaymentState.FAILED, AttemptState.DECLINED, code
                )
            case Invalid(code) if not voiding:
                return Announcement(Told.FAILED), self._over(
                    PaymentState.FAILED, AttemptState.FAILED, code
                )
            case Unknown() | Absent() | Invalid() | Declined():
                # A refusal to let go says that something else is there than we think.
                return None, {
                    "state": self._moved(PaymentState.OUTCOME_UNKNOWN),
                    "attempt": attempt.moved(AttemptState.UNKNOWN, asked=attempt.asked + 1),
                    "due": Task.RESOLVE,
                    "due_in_seconds": _pause(attempt.asked, attempt.attempt_id),
                }
            case Submitted() | Refunded() | RetrySameKey():
                raise ValueError(f"{outcome} is no answer about a charge")
            case _:
                assert_never(outcome)

    def _refund_settled(
        self, refund: Refund, outcome: Outcome
    ) -> tuple[Announcement | None, dict[str, Any]]:
        asked = refund.asked + 1
        match outcome:
            case Refunded(reference):
                refund = refund.moved(RefundState.SUCCEEDED, provider_reference=reference)
                return Announcement(Told.REFUND_SUCCEEDED, refund), {
                    "refunds": self._refunds_with(refund),
                    "refunded": self.refunded + refund.amount,
                }
            case Declined(code) | Invalid(code):
                refund = refund.moved(RefundState.FAILED, failure_reason=code)
                return Announcement(Told.REFUND_FAILED, refund), {
                    "refunds": self._refunds_with(refund)
                }
            case Submitted(reference):
                waiting = refund.moved(
                    RefundState.SUBMITTED, provider_reference=reference, asked=asked
                )
            case Unknown() | Absent() if refund.provider_reference:
                # What the provider has named stays submitted, however it answers today.
                waiting = refund.moved(RefundState.SUBMITTED, asked=asked)
            case Unknown() | Absent():
                waiting = refund.moved(RefundState.OUTCOME_UNKNOWN, asked=asked)
            case Authorized() | Captured() | Voided() | RetrySameKey():
                raise ValueError(f"{outcome} is no answer about a refund")
            case _:
                assert_never(outcome)
        return None, {
            "refunds": self._refunds_with(waiting),
            "due": Task.RESOLVE,
            "due_in_seconds": _pause(refund.asked, refund.refund_id),
        }

    def _refund_due(
        self, captured: Money, reason: str, new_id: Callable[[], UUID], at: datetime
    ) -> dict[str, Any]:
        """A refund of all that is captured and neither given back nor about to be."""
        held = [refund.amount for refund in self.refunds if refund.state is not RefundState.FAILED]
        amount = captured - Money.total(held, captured.currency_code)
        if not amount:
            return {}
        refund = Refund.new(refund_id=new_id(), amount=amount, reason=reason, at=at)
        return {"refunds": (*self.refunds, refund), "due": Task.REFUND, "due_in_seconds": 0.0}

    def _refunds_with(self, changed: Refund) -> tuple[Refund, ...]:
        return tuple(
            changed if refund.refund_id == changed.refund_id else refund for refund in self.refunds
        )

    def _over(
        self, state: PaymentState, attempt: AttemptState, failure_reason: str = ""
    ) -> dict[str, Any]:
        return {
            "state": self._moved(state),
            "attempt": self.attempt.moved(attempt, failure_reason=failure_reason),
            "failure_reason": failure_reason,
            "due": None,
            "due_in_seconds": None,
        }

    def _moved(self, target: PaymentState) -> PaymentState:
        if target is not self.state and target not in PAYMENT_TRANSITIONS[self.state]:
            raise IllegalTransitionError(self.name, self.state, target)
        return target

    def _changed(self, at: datetime, told: Announcement | None = None, **changes: Any) -> Payment:
        """One revision further; whatever was in hand is so no longer, unless given."""
        changes.setdefault("in_hand", None)
        if told is not None:
            changes["events"] = self.events + 1
            changes["announcements"] = (*self.announcements, told)
        return replace(
            self, revision=self.revision + 1, update_time=max(at, self.update_time), **changes
        )


def _void_due(attempt: Attempt) -> dict[str, Any]:
    return {
        "attempt": attempt.moved(AttemptState.VOIDING),
        "due": Task.VOID,
        "due_in_seconds": 0.0,
    }


def _pause(asked: int, subject: UUID) -> float:
    # What was lost in the same outage is not asked about at the same moment for ever: the
    # id's random end moves each by a fifth at most.
    share = (subject.int & 0xFFFF) / 0xFFFF
    return RESOLVE_AFTER_SECONDS[min(asked, len(RESOLVE_AFTER_SECONDS) - 1)] * (0.8 + 0.4 * share)
