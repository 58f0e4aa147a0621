"""The worker: does what it is handed and what it finds, and leaves nothing half begun."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chassis.errors import UnavailableError
from chassis.worker import Worker
from tests.eventually import eventually

NEVER = 3600.0
"""Poll so rarely that a test never meets it, but for the poll at the start."""

OFTEN = 0.01


class Rows:
    """Rows that somebody must act on, and what became of them.

    Claimed rows are gone until their lease ends (`release`); rows that were acted on
    are gone for good.
    """

    def __init__(self, *waiting: int) -> None:
        self.waiting = list(waiting)
        self.claims = 0
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun = 0
        self.most_at_once = 0
        self.broken: set[int] = set()
        self.away: Exception | None = None

    async def claim(self, limit: int) -> Sequence[int]:
        """Claims at most so many."""
        self.claims += 1
        if self.away is not None:
            raise self.away
        taken, self.waiting = self.waiting[:limit], self.waiting[limit:]
        return taken

    async def perform(self, items: Sequence[int]) -> None:
        """Acts on rows, as soon as the gate is open; not on broken ones."""
        self.begun += 1
        self.most_at_once = max(self.most_at_once, self.begun)
        try:
            await self.gate.wait()
            if self.broken.intersection(items):
                raise RuntimeError(f"{items} cannot be done")
            self.batches.append(list(items))
        finally:
            self.begun -= 1

    @property
    def done(self) -> list[int]:
        """Everything that was acted on, in order."""
        return [item for batch in self.batches for item in batch]


def worker(rows: Rows, **changes: Any) -> Worker[int]:
    """A worker on these rows, which polls only once unless it is told otherwise."""
    settings: dict[str, Any] = {"poll_seconds": NEVER, **changes}
    return Worker("test", claim=rows.claim, perform=rows.perform, **settings)


@asynccontextmanager
async def running(on: Worker[int]) -> AsyncIterator[asyncio.Event]:
    """Runs a worker and stops it in order; yields what tells it to stop."""
    stopping = asyncio.Event()
    task = asyncio.create_task(on.run(stopping))
    await eventually(lambda: on.running or task.done())
    try:
        yield stopping
    finally:
        stopping.set()
        async with asyncio.timeout(5):
            await task


async def test_what_is_offered_is_done_without_being_claimed() -> None:
    """The writer's transaction has claimed it already."""
    rows = Rows()
    at_work = worker(rows)
    async with running(at_work):
        await eventually(lambda: rows.claims == 1)
        at_work.offer([1, 2, 3])
        await eventually(lambda: rows.done == [1, 2, 3])
        at_work.offer([4])
        await eventually(lambda: rows.done == [1, 2, 3, 4])
    assert rows.claims == 1


async def test_what_nobody_holds_is_found_by_looking() -> None:
    """Rows of a dead process, and those whose time has come again."""
    rows = Rows(1)
    async with running(worker(rows, poll_seconds=OFTEN)):
        await eventually(lambda: rows.done == [1])
        rows.waiting.append(2)
        await eventually(lambda: rows.done == [1, 2])


async def test_a_full_batch_is_followed_by_the_next_without_a_pause() -> None:
    """A backlog in the table is worked off at full speed."""
    rows = Rows(*range(25))
    async with running(worker(rows, batch_max=10)):
        await eventually(lambda: len(rows.done) == 25)
    assert [len(batch) for batch in rows.batches] == [10, 10, 5]


async def test_offers_are_done_in_batches_of_a_bounded_size() -> None:
    """However much is handed over at once."""
    rows = Rows()
    at_work = worker(rows, batch_max=4)
    async with running(at_work):
        at_work.offer(range(10))
        await eventually(lambda: len(rows.done) == 10)
    assert [len(batch) for batch in rows.batches] == [4, 4, 2]


async def test_one_round_at_a_time_keeps_the_order() -> None:
    """What came first is done before the next is begun."""
    rows = Rows()
    at_work = worker(rows, batch_max=1)
    async with running(at_work):
        at_work.offer(range(20))
        await eventually(lambda: len(rows.done) == 20)
    assert rows.done == list(range(20))
    assert rows.most_at_once == 1


async def test_several_rounds_run_at_once_and_no_more_than_allowed() -> None:
    """Slow work does not hold up other work, within bounds."""
    rows = Rows()
    rows.gate.clear()
    at_work = worker(rows, batch_max=1, rounds_max=3)
    async with running(at_work):
        at_work.offer(range(10))
        await eventually(lambda: rows.begun == 3)
        rows.gate.set()
        await eventually(lambda: len(rows.done) == 10)
    assert rows.most_at_once == 3


async def test_work_that_comes_without_end_does_not_keep_it_from_looking() -> None:
    """A row that a dead process left is found, however busy this one is."""
    rows = Rows()
    at_work = worker(rows, poll_seconds=OFTEN, batch_max=1)
    endless = Rows.perform

    async def and_offer_another(items: Sequence[int]) -> None:
        await endless(rows, items)
        at_work.offer([0])

    at_work._perform = and_offer_another
    async with running(at_work) as stopping:
        at_work.offer([0])
        await eventually(lambda: len(rows.done) > 3)
        rows.waiting.append(7)
        try:
            await eventually(lambda: 7 in rows.done, within_seconds=2)
        finally:
            at_work._perform = rows.perform
            stopping.set()


async def test_rows_in_the_table_do_not_keep_it_from_what_it_was_handed() -> None:
    """The other way round: a long backlog does not starve fresh work."""
    rows = Rows(*range(100))
    rows.gate.clear()
    at_work = worker(rows, batch_max=1)
    async with running(at_work):
        await eventually(lambda: rows.begun == 1)
        at_work.offer([1000])
        rows.gate.set()
        await eventually(lambda: len(rows.done) == 101)
    assert rows.done.index(1000) <= 2


async def test_what_was_begun_is_finished_before_it_ends() -> None:
    """A stop never leaves a round half done."""
    rows = Rows()
    rows.gate.clear()
    at_work = worker(rows)
    stopping = asyncio.Event()
    task = asyncio.create_task(at_work.run(stopping))
    await eventually(lambda: at_work.running)
    at_work.offer([1])
    await eventually(lambda: rows.begun == 1)
    stopping.set()
    await asyncio.wait([task], timeout=0.05)
    assert not task.done()
    rows.gate.set()
    async with asyncio.timeout(5):
        await task
    assert rows.done == [1]


async def test_what_was_handed_over_is_done_before_it_ends() -> None:
    """Others would have to wait out its lease."""
    rows = Rows()
    rows.gate.clear()
    at_work = worker(rows, batch_max=2)
    async with running(at_work) as stopping:
        at_work.offer(range(7))
        await eventually(lambda: rows.begun == 1)
        stopping.set()
        rows.gate.set()
    assert rows.done == list(range(7))


async def test_nothing_is_claimed_after_it_was_told_to_stop() -> None:
    """Rows that nobody holds are for those who go on."""
    rows = Rows()
    at_work = worker(rows, poll_seconds=OFTEN, batch_max=1)
    async with running(at_work) as stopping:
        await eventually(lambda: rows.claims > 0)
        rows.gate.clear()
        at_work.offer([1, 2, 3])
        await eventually(lambda: rows.begun == 1)
        stopping.set()
        rows.waiting.append(9)
        rows.gate.set()
    assert (rows.done, rows.waiting) == ([1, 2, 3], [9])


async def test_it_says_whether_it_takes_offers() -> None:
    """Who writes rows claims them for it only while it runs."""
    at_work = worker(Rows())
    said = [at_work.running]
    async with running(at_work):
        said.append(at_work.running)
    said.append(at_work.running)
    assert said == [False, True, False]


async def test_offers_beyond_its_bound_are_left_in_the_table() -> None:
    """Memory is bounded; what does not fit is found by looking, later."""
    rows = Rows()
    rows.gate.clear()
    at_work = worker(rows, batch_max=1, backlog_max=3)
    async with running(at_work):
        at_work.offer([0])
        await eventually(lambda: rows.begun == 1)
        at_work.offer(range(1, 10))
        at_work.offer([10])
        rows.gate.set()
    assert rows.done == [0, 1, 2, 3]


async def test_a_round_that_fails_leaves_its_rows_and_does_not_stop_the_work() -> None:
    """They are claimed again when their lease has run out."""
    rows = Rows(1)
    rows.broken = {1}
    at_work = worker(rows, poll_seconds=OFTEN)
    async with running(at_work):
        await eventually(lambda: rows.claims > 1)
        at_work.offer([2])
        await eventually(lambda: rows.done == [2])
        rows.broken.clear()
        rows.waiting.append(1)
        await eventually(lambda: rows.done == [2, 1])


async def test_a_database_that_is_away_is_waited_for() -> None:
    """Looking fails, and is tried again."""
    rows = Rows(1)
    rows.away = UnavailableError("DEPENDENCY_UNAVAILABLE", "the database is away")
    async with running(worker(rows, poll_seconds=OFTEN)):
        await eventually(lambda: rows.claims > 2)
        rows.away = None
        await eventually(lambda: rows.done == [1])


async def test_a_fault_of_ours_in_looking_ends_it() -> None:
    """The process is to be started afresh, not to go on as if it worked."""
    rows = Rows()
    rows.away = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        await worker(rows).run(asyncio.Event())


async def test_cancelling_it_cancels_what_was_begun() -> None:
    """Nothing goes on behind the back of whoever closes the database next."""
    rows = Rows()
    rows.gate.clear()
    at_work = worker(rows, rounds_max=2, batch_max=1)
    task = asyncio.create_task(at_work.run(asyncio.Event()))
    await eventually(lambda: at_work.running)
    at_work.offer([1, 2])
    await eventually(lambda: rows.begun == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rows.begun == 0
    assert rows.done == []


async def test_one_batch_can_be_done_by_hand() -> None:
    """For tools and tests: claim, act, say how many."""
    rows = Rows(1, 2, 3)
    at_work = worker(rows, batch_max=2)
    assert [await at_work.run_once() for _ in range(3)] == [2, 1, 0]
    assert rows.batches == [[1, 2], [3]]


async def test_a_batch_done_by_hand_says_when_it_failed() -> None:
    """The caller hears of it."""
    rows = Rows(1)
    rows.broken = {1}
    with pytest.raises(RuntimeError, match="cannot be done"):
        await worker(rows).run_once()
