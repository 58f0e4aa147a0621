"""A refund: captured money on its way back, under a provider key of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import Enum
from typing import Any
from uuid import UUID

from chassis.money import Money
from payment_svc.domain.attempt import RESEND_MARGIN, IllegalTransitionError


class RefundState(Enum):
    """Where a refund stands; the values are the proto's `Refund.State`."""

    PENDING = 1
    SUBMITTED = 2
    SUCCEEDED = 3
    FAILED = 4
    OUTCOME_UNKNOWN = 5


REFUND_TRANSITIONS: Mapping[RefundState, frozenset[RefundState]] = {
    RefundState.PENDING: frozenset({RefundState.SUBMITTED}),
    RefundState.SUBMITTED: frozenset(
        {RefundState.SUCCEEDED, RefundState.FAILED, RefundState.OUTCOME_UNKNOWN}
    ),
    RefundState.OUTCOME_UNKNOWN: frozenset(
        {RefundState.SUBMITTED, RefundState.SUCCEEDED, RefundState.FAILED}
    ),
    RefundState.SUCCEEDED: frozenset(),
    RefundState.FAILED: frozenset(),
}
"""Where a refund may go from where it stands. A final state is never left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refund:
    """Money that is given back.

    Attributes:
        provider_key: What makes the provider give it back once however often it is
            asked; committed before the provider hears of it.
        provider_reference: The provider's id of the refund, once it has named one.
        asked: How often asking about it has left things as they were.
        sent_time: When it was first about to be sent.
    """

    refund_id: UUID
    provider_key: str
    amount: Money
    reason: str
    state: RefundState
    create_time: datetime
    provider_reference: str = ""
    failure_reason: str = ""
    asked: int = 0
    sent_time: datetime | None = None

    @classmethod
    def new(cls, *, refund_id: UUID, amount: Money, reason: str, at: datetime) -> Refund:
        """A refund that has not been sent."""
        return cls(
            refund_id=refund_id,
            provider_key=f"pr_{refund_id}",
            amount=amount,
            reason=reason,
            state=RefundState.PENDING,
            create_time=at,
        )

    @property
    def open(self) -> bool:
        """Whether it may still go through or fail."""
        return bool(REFUND_TRANSITIONS[self.state])

    def moved(self, target: RefundState, **changes: Any) -> Refund:
        """The refund in another state, with further changes; the same state is no move.

        Raises:
            IllegalTransitionError: The state cannot be left for the new one.
        """
        if target is not self.state and target not in REFUND_TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"refund {self.refund_id}", self.state, target)
        return replace(self, state=target, **changes)

    def may_be_resent(self, *, at: datetime, key_ttl: timedelta) -> bool:
        """Whether a refund that the provider does not know may be sent again."""
        return (
            not self.provider_reference
            and self.sent_time is not None
            and at - self.sent_time < key_ttl - RESEND_MARGIN
        )
