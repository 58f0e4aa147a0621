"""Durable work: rows that someone must act on, claimed so that only one does.

The transaction that writes such a row may claim it for its own process at the same
time and hand it over in memory (`offer`), which spares the claim's round trip; a row
whose process dies is claimed by another once its lease has run out. `run` does what
was handed over, and polls for what nobody holds.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import structlog
from prometheus_client import Counter

from chassis.errors import ServiceError
from chassis.periodic import pause

T = TypeVar("T")

AFTER_FAILURE_SECONDS = 2.0

_log = structlog.get_logger("worker")
_DONE = Counter("mesh_work_done_total", "Pieces of durable work that were acted on.", ["worker"])
_FAILED = Counter(
    "mesh_work_failed_total",
    "Rounds of durable work that raised; their pieces are claimed again later.",
    ["worker"],
)


class Worker(Generic[T]):
    """Acts on claimed rows until it is told to stop.

    Args:
        name: For logs and metrics.
        claim: Claims at most so many rows that nobody holds.
        perform: Acts on a batch and records the outcome. When it raises, the rows
            stay as they are and are claimed again when their lease ends.
        batch_max: Rows given to `perform` at once.
        rounds_max: Calls of `perform` in flight at once; 1 keeps the order.
        poll_seconds: Time between looks for rows that nobody holds, varied by a
            fifth so that replicas do not march in step.
        backlog_max: Rows that may be handed over and not begun; more are left for
            the poll to find.
    """

    def __init__(
        self,
        name: str,
        *,
        claim: Callable[[int], Awaitable[Sequence[T]]],
        perform: Callable[[Sequence[T]], Awaitable[None]],
        batch_max: int = 64,
        rounds_max: int = 1,
        poll_seconds: float = 0.2,
        backlog_max: int = 1024,
    ) -> None:
        self.name = name
        self._claim = claim
        self._perform = perform
        self._batch_max = batch_max
        self._rounds_max = rounds_max
        self._poll_seconds = poll_seconds
        self._backlog_max = backlog_max
        self._backlog: deque[T] = deque()
        self._wake = asyncio.Event()
        self._rounds: set[asyncio.Task[None]] = set()
        self._running = False
        self._done = _DONE.labels(name)
        self._failed = _FAILED.labels(name)

    @property
    def running(self) -> bool:
        """Whether this process acts on what is offered; else do not claim for it."""
        return self._running

    def offer(self, items: Sequence[T]) -> None:
        """Hands over rows that the caller's committed transaction has claimed for us."""
        room = self._backlog_max - len(self._backlog)
        self._backlog.extend(items[:room])
        self._wake.set()

    async def run_once(self) -> int:
        """Claims one batch, acts on it, and answers how many rows that were."""
        items = await self._claim(self._batch_max)
        if items:
            await self._perform(items)
            self._done.inc(len(items))
        return len(items)

    async def run(self, stopping: asyncio.Event) -> None:
        """Acts on rows until `stopping` is set and what was begun has ended."""
        self._running = True
        stopped = asyncio.create_task(stopping.wait())
        stopped.add_done_callback(lambda _: self._wake.set())
        loop = asyncio.get_running_loop()
        next_poll = loop.time()
        try:
            while not stopping.is_set():
                # Looked for in its time, however much is handed over meanwhile.
                if loop.time() >= next_poll:
                    claimed = await self._claimed()
                    # Left alone for longer after a failure: the database may be away.
                    wait = AFTER_FAILURE_SECONDS if claimed is None else self._poll_seconds
                    if claimed is None or len(claimed) < self._batch_max:
                        next_poll = loop.time() + wait * random.uniform(0.8, 1.2)
                    if claimed:
                        await self._begin(claimed)
                if self._backlog:
                    await self._begin(self._handed_over())
                elif (idle := next_poll - loop.time()) > 0 and not stopping.is_set():
                    self._wake.clear()
                    await pause(idle, self._wake)
            self._running = False
            # What was handed over is done too: other processes would wait out its lease.
            while self._backlog:
                await self._begin(self._handed_over())
            if self._rounds:
                await asyncio.wait(self._rounds)
        finally:
            self._running = False
            stopped.cancel()
            # Left only when this was cancelled or failed: nothing may go on behind it.
            for begun in self._rounds:
                begun.cancel()
            await asyncio.gather(*self._rounds, return_exceptions=True)

    def _handed_over(self) -> list[T]:
        size = min(len(self._backlog), self._batch_max)
        return [self._backlog.popleft() for _ in range(size)]

    async def _claimed(self) -> Sequence[T] | None:
        try:
            return await self._claim(self._batch_max)
        except ServiceError as error:
            self._failed.inc()
            _log.warning("claim.failed", worker=self.name, reason=error.reason)
            return None

    async def _begin(self, items: Sequence[T]) -> None:
        """Begins a round, and waits until another one may begin."""
        task = asyncio.create_task(self._round(items))
        self._rounds.add(task)
        task.add_done_callback(self._rounds.discard)
        while len(self._rounds) >= self._rounds_max:
            await asyncio.wait(self._rounds, return_when=asyncio.FIRST_COMPLETED)

    async def _round(self, items: Sequence[T]) -> None:
        try:
            await self._perform(items)
        except Exception as error:  # noqa: BLE001 - the rows are claimed again later
            self._failed.inc()
            _log.warning(
                "work.failed",
                worker=self.name,
                error=type(error).__name__,
                detail=str(error),
                exc_info=not isinstance(error, ServiceError),
            )
        else:
            self._done.inc(len(items))
