"""Concurrent independent writes share one transaction.

The processor time of a small write is mostly round trips and the commit, so a
coalescer flushes at once when it is idle and gathers what arrives while a flush is in
flight: no added wait when there is little to do, large batches when there is much
(docs/adr/0006). One bad job never fails its neighbours: when a batch fails, each of
its jobs is run again alone.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from prometheus_client import Histogram

from chassis.errors import OverloadedError, UnavailableError

J = TypeVar("J")
R = TypeVar("R")

_BATCH = Histogram(
    "mesh_group_commit_jobs",
    "Jobs that shared one transaction.",
    ["name"],
    buckets=(1, 2, 4, 8, 16, 32, 64),
)


class GroupCommit(Generic[J, R]):
    """Runs jobs in batches, one batch at a time.

    Args:
        name: For metrics.
        flush: Does a batch in one transaction and answers, in the jobs' order, a
            result or the error that belongs to that job alone. When it raises, the
            whole batch is taken as not done.
        batch_max: Jobs in a batch at the most.
        waiting_max: Jobs that may wait; one more is refused.
    """

    def __init__(
        self,
        name: str,
        flush: Callable[[Sequence[J]], Awaitable[Sequence[R | Exception]]],
        *,
        batch_max: int = 64,
        waiting_max: int = 1024,
    ) -> None:
        self._flush = flush
        self._batch_max = batch_max
        self._waiting_max = waiting_max
        self._waiting: deque[tuple[J, asyncio.Future[R]]] = deque()
        self._flusher: asyncio.Task[None] | None = None
        self._observe = _BATCH.labels(name).observe

    async def submit(self, job: J) -> R:
        """Does the job together with whatever else is waiting, and answers its result.

        When the caller is cancelled before its batch begins, the job is not done;
        after that it is done and nobody hears of it.

        Raises:
            OverloadedError: Too many jobs wait already.
            Exception: What the flush answered for this job, or raised.
        """
        if len(self._waiting) >= self._waiting_max:
            raise OverloadedError(
                "OVERLOADED", "too many writes are waiting", retry_after_seconds=0.5
            )
        done: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._waiting.append((job, done))
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush_all())
        return await done

    async def _flush_all(self) -> None:
        try:
            while self._waiting:
                batch: list[tuple[J, asyncio.Future[R]]] = []
                while self._waiting and len(batch) < self._batch_max:
                    waiting = self._waiting.popleft()
                    if not waiting[1].done():  # else its caller has given up
                        batch.append(waiting)
                if batch:
                    self._observe(len(batch))
                    await self._settle(batch)
        finally:
            self._flusher = None

    async def _settle(self, batch: Sequence[tuple[J, asyncio.Future[R]]]) -> None:
        try:
            results = await self._flush([job for job, _ in batch])
            if len(results) != len(batch):
                raise ValueError(f"{len(results)} answers to {len(batch)} jobs")
        except (UnavailableError, OverloadedError) as error:
            # Each job alone would only wait for the same outage, or connection, again.
            for _, done in batch:
                _fail(done, error)
        except Exception as error:  # noqa: BLE001 - each job hears of its own
            if len(batch) == 1:
                _fail(batch[0][1], error)
                return
            for alone in batch:
                await self._settle([alone])
        except BaseException:
            for _, done in batch:
                done.cancel()
            raise
        else:
            for (_, done), result in zip(batch, results, strict=True):
                if isinstance(result, Exception):
                    _fail(done, result)
                elif not done.done():
                    done.set_result(result)


def _fail(done: asyncio.Future[R], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)
