"""What every consumer does with a batch, whichever broker it came from.

A `Handling` gives deliveries to the service's handler under a time limit, keeps a bad
message from failing its neighbours, and turns verdicts into what the broker has to do
with each message (`Disposal`): forget it, put it aside for a while, or bury it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import structlog

from chassis.broker import (
    DELIVERY_LIMIT_EXCEEDED,
    Ack,
    BrokerUnavailableError,
    ConsumerStuckError,
    DeadLetter,
    Delivery,
    Handler,
    Limits,
    Retry,
    Verdict,
    metrics,
)

ERROR_DETAIL_BYTES_MAX: Final = 1024
ERROR_CLASS_CHARACTERS_MAX: Final = 100

# How many failures in a row end the one-by-one replay of a failed batch: by then it is not
# the message that is bad but something that all of them need.
_REPLAY_FAILURES_MAX: Final = 3

_RECONNECT_SECONDS_MIN: Final = 0.05
_RECONNECT_SECONDS_MAX: Final = 5.0

_log = structlog.get_logger("broker")


@dataclass(frozen=True, slots=True)
class Forget:
    """The message is settled and leaves the queue."""


@dataclass(frozen=True, slots=True)
class SetAside:
    """The message comes again, as its next attempt, after the delay of a tier."""

    tier: int
    """Index into `Limits.retry_tiers_seconds`."""


@dataclass(frozen=True, slots=True)
class Bury:
    """The message becomes a dead letter."""

    error_class: str
    error_detail: str


Disposal: TypeAlias = Forget | SetAside | Bury

_FORGET: Final = Forget()


def _cut(text: str, bytes_max: int) -> str:
    # NUL has no place in a PostgreSQL text, and half a character in neither.
    return text.replace("\0", "�").encode()[:bytes_max].decode(errors="ignore")


class Handling:
    """Runs one consumer's handler.

    Args:
        consumer: For logs and metrics.
        handle: The service's handler.
        limits: Its time limit, the retry tiers and the delivery limit.
    """

    def __init__(self, consumer: str, handle: Handler, limits: Limits) -> None:
        self.consumer = consumer
        self._handle = handle
        self._limits = limits
        self._seconds = metrics.HANDLER_SECONDS.labels(consumer)
        self._sizes = metrics.BATCH_SIZE.labels(consumer)
        self._redelivered = metrics.REDELIVERED.labels(consumer)
        self._failed = metrics.HANDLER_FAILED.labels(consumer)
        self._settled = {
            Forget: metrics.CONSUMED.labels(consumer, "ack"),
            SetAside: metrics.CONSUMED.labels(consumer, "retry"),
            Bury: metrics.CONSUMED.labels(consumer, "dead_letter"),
        }

    async def dispose(self, deliveries: Sequence[Delivery]) -> list[Disposal]:
        """Hands a batch to the handler and answers what becomes of each delivery.

        The batch is either all first deliveries or a single one. Never raises but when the
        calling task is cancelled.
        """
        again = sum(1 for delivery in deliveries if delivery.delivery_count)
        if again:
            self._redelivered.inc(again)
            if deliveries[0].delivery_count > self._limits.delivery_limit:
                # It ends the process that handles it, so nobody handles it any more.
                disposals: list[Disposal] = [
                    Bury(
                        DELIVERY_LIMIT_EXCEEDED,
                        f"taken {delivery.delivery_count} times and never settled",
                    )
                    for delivery in deliveries
                ]
                return self._counted(disposals)
        verdicts = await self._verdicts(deliveries)
        return self._counted(
            [
                self._disposal(delivery, verdict)
                for delivery, verdict in zip(deliveries, verdicts, strict=True)
            ]
        )

    async def _verdicts(self, deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
        failure = await self._call(deliveries)
        if not isinstance(failure, Retry):
            return failure
        if len(deliveries) == 1:
            return [failure]
        answers: list[Verdict] = []
        failures = 0
        for delivery in deliveries:
            if failures == _REPLAY_FAILURES_MAX:
                answers.append(failure)
                continue
            alone = await self._call([delivery])
            if isinstance(alone, Retry):
                failure = alone
                failures += 1
                answers.append(alone)
            else:
                failures = 0
                answers.extend(alone)
        return answers

    async def _call(self, deliveries: Sequence[Delivery]) -> Sequence[Verdict] | Retry:
        """The handler's verdicts, or the one `Retry` that its failure amounts to."""
        self._sizes.observe(len(deliveries))
        began = time.perf_counter()
        seconds_max = self._limits.handler_seconds_max
        clock = asyncio.timeout(seconds_max)
        try:
            async with clock:
                verdicts = await self._handle(deliveries)
            if len(verdicts) != len(deliveries):
                raise TypeError(
                    f"the handler answered {len(verdicts)} verdicts on {len(deliveries)} deliveries"
                )
        except asyncio.CancelledError as error:
            if cancelled_by_caller():
                raise
            # Some library's own cancellation, which is that library's failure.
            return self._failure(error, deliveries)
        except Exception as error:  # noqa: BLE001 - the consumer's edge: any failure is a verdict
            late = TimeoutError(f"the handler took longer than {seconds_max:g} s")
            return self._failure(late if clock.expired() else error, deliveries)
        else:
            return verdicts
        finally:
            self._seconds.observe(time.perf_counter() - began)

    def _failure(self, error: BaseException, deliveries: Sequence[Delivery]) -> Retry:
        self._failed.inc()
        _log.warning(
            "handler.failed",
            consumer=self.consumer,
            deliveries=len(deliveries),
            event_ids=[str(delivery.message.event_id) for delivery in deliveries[:5]],
            exc_info=error,
        )
        return Retry(f"{type(error).__name__}: {error}", error_class=type(error).__name__)

    def _disposal(self, delivery: Delivery, verdict: Verdict) -> Disposal:
        match verdict:
            case Ack():
                return _FORGET
            case Retry(reason, error_class):
                attempt = delivery.message.attempt
                if attempt < len(self._limits.retry_tiers_seconds):
                    return SetAside(attempt)
                return bury(error_class, reason)
            case DeadLetter(error_class, detail):
                return bury(error_class, detail)

    def _counted(self, disposals: list[Disposal]) -> list[Disposal]:
        forgotten = 0
        for disposal in disposals:
            if disposal is _FORGET:
                forgotten += 1
            else:
                self._settled[type(disposal)].inc()
        if forgotten:
            self._settled[Forget].inc(forgotten)
        return disposals


def bury(error_class: str, detail: str) -> Bury:
    """A `Bury` whose texts have the length that every broker can carry."""
    return Bury(
        _cut(error_class, ERROR_CLASS_CHARACTERS_MAX) or "Unknown",
        _cut(detail, ERROR_DETAIL_BYTES_MAX),
    )


def handed_over_together(deliveries: Sequence[Delivery]) -> int:
    """How many of these, from the first on, go to the handler in one call.

    Those that arrive for the first time go together; one that was taken before goes alone.
    """
    if deliveries[0].delivery_count:
        return 1
    for position, delivery in enumerate(deliveries):
        if delivery.delivery_count:
            return position
    return len(deliveries)


def cancelled_by_caller() -> bool:
    """Whether the current task is being cancelled, and not just something it awaits.

    aiormq ends what waits for a broken connection with `CancelledError`; taken for a
    cancellation it would end the consumer or the relay without a word.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


class Recovery:
    """How a consumer comes back: pauses with full jitter, and an end to hopeless trying.

    A broker that is away is waited for without end, since the service can do its other work
    meanwhile; one that answers and yet cannot be consumed from points to something that a new
    process may not have.
    """

    def __init__(self, consumer: str, stuck_seconds_max: float) -> None:
        self._consumer = consumer
        self._stuck_seconds_max = stuck_seconds_max
        self._failures = 0
        self._stuck_since: float | None = None

    def consuming(self) -> None:
        """Notes that the consumer consumes."""
        self._failures = 0
        self._stuck_since = None

    async def pause(self, *, reached: bool, why: Exception, stopping: asyncio.Event) -> None:
        """Waits before the next try, or until told to stop.

        Args:
            reached: The broker answered, and consuming failed all the same.
            why: What failed.
            stopping: Ends the pause.

        Raises:
            ConsumerStuckError: It has been like that for too long.
        """
        now = time.monotonic()
        if not reached:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > self._stuck_seconds_max:
            raise ConsumerStuckError(
                f"consumer {self._consumer} cannot consume though its broker answers"
            ) from why
        metrics.RECONNECTED.labels("consume").inc()
        _log.warning(
            "consumer.interrupted",
            consumer=self._consumer,
            reason=f"{type(why).__name__}: {why}",
            broker_answers=reached,
        )
        pause = _pause_seconds(self._failures)
        self._failures += 1
        try:
            async with asyncio.timeout(pause):
                await stopping.wait()
        except TimeoutError:
            return


async def patiently(declare: Callable[[], Awaitable[None]], seconds_max: float) -> None:
    """Declares; while the broker is away, again and again with full jitter, up to a time.

    Services declare before they do anything else. One that gave up at once would be started
    over and over by its supervisor, and at last no more, for an outage of the broker that it
    could have waited out.

    Raises:
        BrokerUnavailableError: The broker is still away.
    """
    deadline = time.monotonic() + seconds_max
    failures = 0
    while True:
        try:
            return await declare()
        except BrokerUnavailableError as error:
            left = deadline - time.monotonic()
            if left <= 0:
                raise
            _log.warning("declare.waiting", reason=str(error), seconds_left=round(left, 1))
        await asyncio.sleep(min(left, _pause_seconds(failures)))
        failures += 1


def _pause_seconds(failures: int) -> float:
    ceiling = min(_RECONNECT_SECONDS_MAX, 0.2 * 2 ** min(failures, 10))
    return random.uniform(_RECONNECT_SECONDS_MIN, ceiling)


@asynccontextmanager
async def beside(*coroutines: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs coroutines beside the block and ends them with it.

    Unlike a task group it lets the block's own exception out as it is; the coroutines report
    their troubles by other means than raising, and if one raises all the same, that is logged.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in coroutines]
    for task in tasks:
        task.add_done_callback(_log_failure)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("beside.failed", exc_info=error)


async def forward(source: asyncio.Event, target: asyncio.Event) -> None:
    """Sets `target` when `source` is set: so that one wait serves for several events."""
    await source.wait()
    target.set()
