"""The payment worker: asks the provider, outside of any transaction, and settles what came.

Work arrives already taken: handed over by the transaction that made it due, or found by
looking for what nobody holds. Two workers share the code: one charges, lets go and gives
back; the other resolves, that is, asks what became of a call whose answer was lost.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from time import monotonic

import structlog
from prometheus_client import Counter, Histogram
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    retry_if_result,
    stop_before_delay,
    wait_random_exponential,
)
from tenacity.stop import stop_base

from chassis.context import CallContext, entered
from chassis.errors import ConflictError, OverloadedError, UnavailableError
from chassis.group_commit import GroupCommit
from chassis.ids import Now
from chassis.periodic import pause
from chassis.worker import Worker
from payment_svc.commands import (
    Answer,
    Leases,
    PaymentStore,
    Work,
    work_of,
)
from payment_svc.domain.attempt import Attempt
from payment_svc.domain.outcomes import (
    Absent,
    Authorized,
    Captured,
    Declined,
    Invalid,
    Outcome,
    Refunded,
    RetrySameKey,
    Unknown,
    Voided,
)
from payment_svc.domain.payment import Payment, Task
from payment_svc.domain.refund import Refund
from payment_svc.gateways import Charge, PaymentGateway, RefundRequest, VoidRequest

BEGIN_SECONDS = 3.0
"""How long taken work may wait for its turn and still be asked about twice in its lease."""

SETTLE_SECONDS = 2.0
"""What of a lease is kept for settling, so that an answer never comes too late by it."""

RETRY_SECONDS = 0.2
"""Upper bound of the first pause before the same call is made again; it doubles."""

RETRY_SECONDS_MAX = 5.0
"""Upper bound of any pause within a lease, and the pause before the next lease."""

AHEAD = 32
"""How many pieces of work may wait for each call that may be in flight."""

_log = structlog.get_logger("worker")
_OUTCOMES = Counter(
    "mesh_payment_outcomes_total",
    "What came of asking the provider, by what was asked.",
    ["task", "outcome"],
)
_SECONDS = Histogram(
    "mesh_payment_provider_seconds",
    "Time from asking the provider to its answer, by what was asked.",
    ["task"],
    buckets=(0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
# Looking a label up costs more than counting does.
_SECONDS_OF = {task: _SECONDS.labels(task.name) for task in Task}
_WENT_WELL: dict[tuple[Task, type[Outcome]], Counter] = {
    (task, kind): _OUTCOMES.labels(task.name, kind.__name__)
    for task in Task
    for kind in (Authorized, Captured, Voided, Refunded)
}


class PaymentWorker:
    """Asks one provider, a bounded number of times at once.

    Args:
        tasks: What this worker does, of all that may be due.
        gateway: The provider.
        store: Where work is found that nobody holds.
        settle: Records answers, all of a batch or none of it.
        leases: Takes what was found.
        now: The time, to tell how old a provider key is.
        timeout_seconds: How long to wait for one answer of the provider.
        concurrency: Calls in flight at once.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        *,
        gateway: PaymentGateway,
        store: PaymentStore,
        settle: Callable[[Sequence[Answer]], Awaitable[None]],
        leases: Leases,
        now: Now,
        timeout_seconds: float,
        concurrency: int,
        poll_seconds: float = 0.5,
    ) -> None:
        self._tasks = tasks
        self._gateway = gateway
        self._store = store
        self._settle_batch = settle
        self._leases = leases
        self._now = now
        self._timeout_seconds = timeout_seconds
        self._slots = asyncio.Semaphore(concurrency)
        self._ahead = concurrency * AHEAD
        self._in_hand = 0
        self._stopping = asyncio.Event()
        self._settlements: GroupCommit[Answer, None] = GroupCommit(f"settle-{name}", self._settle)
        self._worker: Worker[Work] = Worker(
            name,
            claim=self._claim,
            perform=self._perform,
            # A round lasts as long as its slowest call, so calls in flight may each be one
            # of another round, and as many rounds more may be settling meanwhile.
            rounds_max=2 * concurrency,
            poll_seconds=poll_seconds,
            backlog_max=2 * self._ahead,
        )

    @property
    def room(self) -> int:
        """How much work it can take on now; nothing while it does not run, or is to end."""
        if self._stopping.is_set() or not self._worker.running:
            return 0
        return self._ahead - self._in_hand

    def offer(self, work: Sequence[Work]) -> None:
        """Takes work on that a committed transaction has taken for this process."""
        if work:
            self._in_hand += len(work)
            self._worker.offer(work)

    async def run(self, stopping: asyncio.Event) -> None:
        """Works until told to stop, and gives back what was not begun by then."""
        self._stopping = stopping
        await self._worker.run(stopping)

    async def run_once(self) -> int:
        """Takes one batch that nobody holds, does it, and says how much it was."""
        return await self._worker.run_once()

    async def _claim(self, limit: int) -> list[Work]:
        limit = min(limit, self._ahead - self._in_hand)
        if limit <= 0:
            return []
        lease_ends = self._leases.ends()
        work = work_of(await self._store.take(self._tasks, limit, self._leases.taken), lease_ends)
        self._in_hand += len(work)
        return work

    async def _perform(self, work: Sequence[Work]) -> None:
        try:
            done = await asyncio.gather(
                *(self._perform_one(piece) for piece in work), return_exceptions=True
            )
        finally:
            self._in_hand -= len(work)
        # One piece's fault is no other's; its lease brings it to whoever resolves.
        faults = [error for error in done if isinstance(error, Exception)]
        if faults:
            raise ExceptionGroup("work that was not settled", faults)

    async def _perform_one(self, work: Work) -> None:
        with entered(work.context):
            async with self._slots:
                outcome = await self._outcome_of(work)
            _count_outcome(work, outcome)
            await self._settled(Answer(work=work, outcome=outcome))

    async def _outcome_of(self, work: Work) -> Outcome:
        if not self._may_ask(work):
            # Nobody has been asked: given back, another process can do it at once.
            return RetrySameKey()
        with _SECONDS_OF[work.task].time():
            if work.task is Task.VOID:
                return await self._asked(work, lambda: self._gateway.void(void_of(work.payment)))
            # What was put off for so long that its key may be forgotten is only asked about.
            if work.task is Task.RESOLVE or not self._may_be_sent(work):
                return await self._resolved(work)
            return await self._sent(work)

    async def _resolved(self, work: Work) -> Outcome:
        """Asks for what is known; sends again, under the same key, what is not known there.

        Sending again is safe while the provider remembers the key: should the first
        request arrive after all, the two are one.
        """
        payment = work.payment
        found: Outcome
        if payment.open_refund is None:
            found = await self._asked(work, lambda: self._gateway.find(charge_of(payment)))
        else:
            found = await self._asked(work, lambda: self._gateway.find_refund(refund_of(payment)))
        if not isinstance(found, Absent):
            return found
        if not self._may_be_sent(work):
            key = _sendable(payment).provider_key
            _log.error("outcome.lost", payment=payment.name, provider_key=key)
            return found
        if not self._may_ask(work):
            return RetrySameKey()
        answer = await self._sent(work)
        if isinstance(answer, Declined | Invalid) and not self._gateway.stores_errors:
            # The first request may be on its way still, and would not be refused for this one.
            return Unknown(f"refused when sent again: {answer.code}")
        return answer

    async def _sent(self, work: Work) -> Outcome:
        payment = work.payment
        if payment.open_refund is None:
            return await self._asked(work, lambda: self._gateway.charge(charge_of(payment)))
        return await self._asked(work, lambda: self._gateway.refund(refund_of(payment)))

    def _may_be_sent(self, work: Work) -> bool:
        return _sendable(work.payment).may_be_resent(at=self._now(), key_ttl=self._gateway.key_ttl)

    async def _asked(self, work: Work, ask: Callable[[], Awaitable[Outcome]]) -> Outcome:
        outcome = await self._in_time(ask)
        if not isinstance(outcome, RetrySameKey):
            return outcome
        # Rare, so that only this pays for the retrying machinery.
        return await self._asked_again(work, ask, outcome)

    async def _asked_again(
        self, work: Work, ask: Callable[[], Awaitable[Outcome]], told: RetrySameKey
    ) -> Outcome:
        """Makes the same call again and again, as long as lease and process last."""
        jitter = wait_random_exponential(multiplier=RETRY_SECONDS, max=RETRY_SECONDS_MAX)
        answers: list[Outcome] = [told]

        async def call() -> Outcome:
            nonlocal told
            # The first call was made already, and its answer is what brought us here.
            if answers:
                return answers.pop()
            # The pause was cut short by the process's end, or outlasted the lease (SIGSTOP).
            if not self._may_ask(work):
                return told
            outcome = await self._in_time(ask)
            if isinstance(outcome, RetrySameKey):
                told = outcome
            return outcome

        retrying = AsyncRetrying(
            retry=retry_if_result(lambda outcome: isinstance(outcome, RetrySameKey)),
            wait=lambda state: max(told.delay_seconds, jitter(state)),
            stop=stop_before_delay(max(self._remaining(work), 0.0)) | _StopWhenSet(self._stopping),
            sleep=self._pause,
            retry_error_callback=lambda _: RetrySameKey(max(told.delay_seconds, RETRY_SECONDS_MAX)),
        )
        outcome: Outcome = await retrying(call)
        return outcome

    async def _in_time(self, ask: Callable[[], Awaitable[Outcome]]) -> Outcome:
        try:
            async with asyncio.timeout(self._timeout_seconds):
                return await ask()
        except TimeoutError:
            return Unknown(f"no answer within {self._timeout_seconds} s")

    async def _settled(self, answer: Answer) -> None:
        """Records an answer; tries again while it is ours to record, also while stopping."""
        try:
            await self._settlements.submit(answer)
        except (ConflictError, OverloadedError, UnavailableError):
            retrying = AsyncRetrying(
                retry=retry_if_exception_type((ConflictError, OverloadedError, UnavailableError)),
                wait=wait_random_exponential(multiplier=RETRY_SECONDS, max=RETRY_SECONDS_MAX),
                stop=stop_before_delay(max(answer.work.lease_ends - monotonic(), 0.0)),
                reraise=True,
            )
            await retrying(self._settlements.submit, answer)

    async def _settle(self, answers: Sequence[Answer]) -> list[Exception | None]:
        # Answers about different orders share the transaction; none lends it its context.
        with entered(CallContext()):
            await self._settle_batch(answers)
        return [None] * len(answers)

    def _may_ask(self, work: Work) -> bool:
        """Whether this process may begin one more call for this work."""
        return not self._stopping.is_set() and self._remaining(work) > 0

    def _remaining(self, work: Work) -> float:
        """Seconds in which one more call may begin and still be settled in the lease."""
        return work.lease_ends - monotonic() - self._timeout_seconds - SETTLE_SECONDS

    async def _pause(self, seconds: float) -> None:
        """Sleeps, unless the process is told to stop."""
        await pause(seconds, self._stopping)


class _StopWhenSet(stop_base):
    """tenacity's `stop_when_event_set`, for an event of asyncio."""

    def __init__(self, event: asyncio.Event) -> None:
        self._event = event

    def __call__(self, retry_state: RetryCallState) -> bool:
        return self._event.is_set()


def lease_seconds_for(timeout_seconds: float) -> float:
    """The shortest lease in which an outcome can be resolved.

    That takes two calls, each for as long as the provider may need: asking, and sending
    again. A longer lease only makes a payment wait longer when its process has died.
    """
    return BEGIN_SECONDS + 2 * timeout_seconds + SETTLE_SECONDS


def _sendable(payment: Payment) -> Attempt | Refund:
    """What goes to the provider under a key that it remembers for a time."""
    return payment.open_refund or payment.attempt


def charge_of(payment: Payment) -> Charge:
    """The latest attempt, as the provider knows it."""
    attempt = payment.attempt
    return Charge(
        key=attempt.provider_key,
        terms=attempt.terms,
        order=payment.order,
        reference=attempt.provider_reference,
    )


def void_of(payment: Payment) -> VoidRequest:
    """The request to let the latest attempt's reservation go."""
    return VoidRequest(key=payment.attempt.void_key, charge=charge_of(payment))


def refund_of(payment: Payment) -> RefundRequest:
    """The request to give back what is to be given back.

    Raises:
        ValueError: Nothing is.
    """
    refund = payment.open_refund
    if refund is None:
        raise ValueError(f"{payment.name} has no refund under way")
    return RefundRequest(key=refund.provider_key, charge=charge_of(payment), amount=refund.amount)


def _count_outcome(work: Work, outcome: Outcome) -> None:
    """Counts an outcome, and says what went otherwise than well."""
    went_well = _WENT_WELL.get((work.task, type(outcome)))
    if went_well is not None:
        went_well.inc()
        return
    _OUTCOMES.labels(work.task.name, type(outcome).__name__).inc()
    payment = work.payment.name
    match outcome:
        case Declined(code):
            _log.info("declined", payment=payment, task=work.task.name, code=code)
        case Invalid(code):
            _log.error("refused", payment=payment, task=work.task.name, code=code)
        case Unknown(detail):
            _log.warning("outcome.unknown", payment=payment, task=work.task.name, detail=detail)
        case RetrySameKey():
            _log.info("put.off", payment=payment, task=work.task.name)
        case _:
            pass
