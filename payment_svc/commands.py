"""What changes payments: the commands, their handlers, and what those need of storage.

Nothing here asks the provider. A handler decides what is to be asked and commits that;
the worker asks, and comes back with the answer as another command.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias
from uuid import UUID

from chassis.context import CallContext, Cause
from chassis.ids import NewId, Now
from chassis.mediator import Command
from payment_svc.domain.attempt import ChargeTerms
from payment_svc.domain.outcomes import Outcome
from payment_svc.domain.payment import Payment, Task

PaymentKey: TypeAlias = tuple[str, UUID]
"""Merchant and payment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderPlaced:
    """An order that is to be charged, and the event that says so."""

    merchant: str
    order_id: UUID
    terms: ChargeTerms
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class CancellationAsked:
    """An order that is to be undone, and the event that says so."""

    merchant: str
    order_id: UUID
    reason: str
    cause: Cause


OrderNews: TypeAlias = OrderPlaced | CancellationAsked


@dataclass(frozen=True, slots=True, kw_only=True)
class FollowOrders(Command[None]):
    """Begin and undo payments as their orders say; the whole batch or nothing."""

    news: Sequence[OrderNews]


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """A payment as it was saved, and the context in which it goes on."""

    payment: Payment
    context: CallContext


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Something to ask the provider, held by this process alone until its lease ends.

    Attributes:
        task: What to do.
        payment: The payment as it was when the work was taken.
        context: The context to do it in.
        lease_ends: When to have settled it, by this process's monotonic clock. It ends
            a little before the database thinks so, never after.
    """

    task: Task
    payment: Payment
    context: CallContext
    lease_ends: float

    @property
    def key(self) -> PaymentKey:
        """Which payment it is about."""
        return (self.payment.merchant, self.payment.payment_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a piece of work."""

    work: Work
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class SettlePayments(Command[None]):
    """Record what the provider answered; the whole batch or nothing.

    An answer to work that somebody else has taken over meanwhile counts for nothing.
    """

    answers: Sequence[Answer]


class PaymentStore(Protocol):
    """Keeps payments; every method is one transaction."""

    async def follow(
        self,
        news: Sequence[OrderNews],
        begin: Callable[[OrderPlaced], Payment],
        cancel: Callable[[CancellationAsked, Payment], Payment | None],
    ) -> list[Held]:
        """Applies news of orders in their order, each once however often it is delivered.

        An order has one payment: where it has one already, `begin` is in vain. Answers
        what was written, each payment as it now is.

        Raises:
            ConflictError: An order is to be cancelled whose payment is not here (yet).
        """
        ...

    async def take(
        self, tasks: Sequence[Task], limit: int, taken: Callable[[Payment], Payment]
    ) -> list[Held]:
        """Takes payments for which one of `tasks` is due now, the longest due first.

        Those that somebody else is changing at this moment are passed over.
        """
        ...

    async def settle(
        self, answers: Sequence[Answer], settled: Callable[[Answer, Payment], Payment]
    ) -> list[Held]:
        """Writes what answers make of their payments, as they are by now.

        Answers whose work is no longer theirs (the fence has risen) are left out.
        Answers what was written.
        """
        ...


class WorkQueue(Protocol):
    """Where this process takes work on that it has just claimed in a transaction."""

    @property
    def room(self) -> int:
        """How much work it can take on now; nothing while it does not run."""
        ...

    def offer(self, work: Sequence[Work]) -> None:
        """Takes work on that has been committed as taken by this process."""
        ...


class Leases:
    """Takes what is due for this process: the one place that knows how long a lease is.

    Args:
        lease_seconds: How long taken work is nobody else's.
        now: The time, for records.
        monotonic: The process's monotonic clock, in seconds.
    """

    def __init__(self, *, lease_seconds: float, now: Now, monotonic: Callable[[], float]) -> None:
        self._lease_seconds = lease_seconds
        self._now = now
        self._monotonic = monotonic

    def ends(self) -> float:
        """When a lease ends that is taken from now on; ask before the transaction."""
        return self._monotonic() + self._lease_seconds

    def taken(self, payment: Payment) -> Payment:
        """The payment, with what is due for it taken."""
        return payment.taken(at=self._now(), lease_seconds=self._lease_seconds)


class FollowOrdersHandler:
    """Begins and undoes payments as their orders say."""

    def __init__(
        self,
        *,
        store: PaymentStore,
        queue: WorkQueue,
        leases: Leases,
        provider: str,
        new_id: NewId,
        now: Now,
    ) -> None:
        self._store = store
        self._queue = queue
        self._leases = leases
        self._provider = provider
        self._new_id = new_id
        self._now = now

    async def __call__(self, command: FollowOrders) -> None:
        """Writes what follows, and hands what is to be asked to this process's worker."""
        lease_ends = self._leases.ends()
        take = _Taker(self._queue, self._leases)
        # What is cancelled in the same batch is not taken before that is known.
        cancelled = {
            (news.merchant, news.order_id)
            for news in command.news
            if isinstance(news, CancellationAsked)
        }

        def begin(news: OrderPlaced) -> Payment:
            payment = Payment.begin(
                merchant=news.merchant,
                payment_id=self._new_id(),
                order_id=news.order_id,
                attempt_id=self._new_id(),
                provider=self._provider,
                terms=news.terms,
                at=self._now(),
            )
            return payment if (news.merchant, news.order_id) in cancelled else take(payment)

        def cancel(news: CancellationAsked, payment: Payment) -> Payment | None:
            changed = payment.cancelled(reason=news.reason, new_id=self._new_id, at=self._now())
            return take(changed) if changed is not None else None

        written = await self._store.follow(command.news, begin, cancel)
        self._queue.offer(work_of(written, lease_ends))


class SettlePaymentsHandler:
    """Records what the provider answered."""

    def __init__(
        self,
        *,
        store: PaymentStore,
        queue: WorkQueue,
        leases: Leases,
        new_id: NewId,
        now: Now,
    ) -> None:
        self._store = store
        self._queue = queue
        self._leases = leases
        self._new_id = new_id
        self._now = now

    async def __call__(self, command: SettlePayments) -> None:
        """Writes what follows; what is to be asked next goes to this process's worker."""
        lease_ends = self._leases.ends()
        take = _Taker(self._queue, self._leases)

        def settled(answer: Answer, payment: Payment) -> Payment:
            return take(
                payment.settled(
                    answer.work.task, answer.outcome, new_id=self._new_id, at=self._now()
                )
            )

        written = await self._store.settle(command.answers, settled)
        self._queue.offer(work_of(written, lease_ends))


class _Taker:
    """Takes what is due at once, as long as the queue has room for it."""

    def __init__(self, queue: WorkQueue, leases: Leases) -> None:
        self._room = queue.room
        self._leases = leases

    def __call__(self, payment: Payment) -> Payment:
        at_once = payment.due not in (None, Task.RESOLVE) and payment.due_in_seconds == 0
        if not at_once or self._room <= 0:
            return payment
        self._room -= 1
        return self._leases.taken(payment)


def work_of(written: Sequence[Held], lease_ends: float) -> list[Work]:
    """The work among payments that were just written as taken."""
    return [
        Work(
            task=held.payment.in_hand,
            payment=held.payment.announced(),
            context=held.context,
            lease_ends=lease_ends,
        )
        for held in written
        if held.payment.in_hand is not None
    ]
