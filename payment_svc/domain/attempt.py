"""An attempt: one charge at the provider, under one key, with frozen terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from chassis.money import Money

RESEND_MARGIN = timedelta(hours=1)
"""How long before a provider forgets a key we stop sending it again: past that moment
the same request would be a second charge (docs/reliability.md)."""


class IllegalTransitionError(RuntimeError):
    """A state cannot be left for another: a fault in this service, never a caller's."""

    def __init__(self, what: str, state: Enum, target: Enum) -> None:
        super().__init__(f"{what} is {state.name} and cannot become {target.name}")


class CaptureMethod(Enum):
    """When the money is taken; the values are the proto's `CaptureMethod`."""

    AUTOMATIC = 1
    MANUAL = 2


class AttemptState(Enum):
    """Where a charge stands at the provider, as far as we know."""

    NEW = "NEW"
    """Not sent by anyone."""
    SENT = "SENT"
    """Sent, or about to be: from here on it may have had its effect."""
    UNKNOWN = "UNKNOWN"
    """Sent, and the answer is lost; the provider has to be asked."""
    AUTHORIZED = "AUTHORIZED"
    CAPTURED = "CAPTURED"
    DECLINED = "DECLINED"
    FAILED = "FAILED"
    """The provider refused our request as malformed."""
    VOIDING = "VOIDING"
    """The reservation is being let go."""
    VOIDED = "VOIDED"


ATTEMPT_TRANSITIONS: Mapping[AttemptState, frozenset[AttemptState]] = {
    AttemptState.NEW: frozenset({AttemptState.SENT, AttemptState.VOIDED}),
    AttemptState.SENT: frozenset(
        {
            AttemptState.AUTHORIZED,
            AttemptState.CAPTURED,
            AttemptState.DECLINED,
            AttemptState.FAILED,
            AttemptState.VOIDED,
            AttemptState.UNKNOWN,
        }
    ),
    AttemptState.UNKNOWN: frozenset(
        {
            AttemptState.AUTHORIZED,
            AttemptState.CAPTURED,
            AttemptState.DECLINED,
            AttemptState.FAILED,
            AttemptState.VOIDED,
        }
    ),
    AttemptState.AUTHORIZED: frozenset({AttemptState.VOIDING, AttemptState.CAPTURED}),
    AttemptState.VOIDING: frozenset(
        {AttemptState.VOIDED, AttemptState.CAPTURED, AttemptState.UNKNOWN}
    ),
    AttemptState.CAPTURED: frozenset(),
    AttemptState.DECLINED: frozenset(),
    AttemptState.FAILED: frozenset(),
    AttemptState.VOIDED: frozenset(),
}
"""Where an attempt may go from where it stands. A final state is never left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChargeTerms:
    """What is charged, and how.

    Frozen with the attempt, so that sending its key again sends the same request.
    """

    amount: Money
    payment_method: str
    capture_method: CaptureMethod


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One charge.

    Attributes:
        seq: Counts the attempts of one payment from 1.
        provider_key: What makes the provider charge once however often it is asked;
            made from our own id and committed before the provider hears of it.
        provider_reference: The provider's id of the charge, once it has named one.
        failure_reason: The provider's code, where it said no.
        asked: How often asking about it has left things as they were.
        sent_time: When it was first about to be sent; its key is no older at the
            provider than that.
    """

    attempt_id: UUID
    seq: int
    provider_key: str
    terms: ChargeTerms
    state: AttemptState
    provider_reference: str = ""
    failure_reason: str = ""
    asked: int = 0
    sent_time: datetime | None = None

    @classmethod
    def new(cls, *, attempt_id: UUID, seq: int, terms: ChargeTerms) -> Attempt:
        """An attempt that has not been sent."""
        return cls(
            attempt_id=attempt_id,
            seq=seq,
            provider_key=f"pa_{attempt_id}",
            terms=terms,
            state=AttemptState.NEW,
        )

    @property
    def void_key(self) -> str:
        """The provider key under which the reservation is let go."""
        return f"pv_{self.attempt_id}"

    def moved(self, target: AttemptState, **changes: Any) -> Attempt:
        """The attempt in another state, with further changes; the same state is no move.

        Raises:
            IllegalTransitionError: The state cannot be left for the new one.
        """
        if target is not self.state and target not in ATTEMPT_TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"attempt {self.attempt_id}", self.state, target)
        return replace(self, state=target, **changes)

    def may_be_resent(self, *, at: datetime, key_ttl: timedelta) -> bool:
        """Whether a charge that the provider does not know may be sent again.

        Only under the same key, only while the provider surely remembers it, and not
        when the provider has already named a charge for it.
        """
        return (
            not self.provider_reference
            and self.sent_time is not None
            and at - self.sent_time < key_ttl - RESEND_MARGIN
        )
