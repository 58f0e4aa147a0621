"""Group commit: what arrives while a flush is in flight shares the next one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from chassis.errors import ConflictError, OverloadedError, UnavailableError
from chassis.group_commit import GroupCommit
from tests.eventually import eventually


class Flushes:
    """A flush that a test holds up and lets go, and what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.in_flight = 0
        self.refused: dict[str, Exception] = {}
        self.failing: dict[str, Exception] = {}

    async def __call__(self, jobs: Sequence[str]) -> Sequence[str | Exception]:
        """Answers each job in capitals, or the error that is its own."""
        assert self.in_flight == 0, "two flushes at once"
        self.in_flight += 1
        self.batches.append(list(jobs))
        try:
            await self.gate.wait()
            for job in jobs:
                if job in self.failing:
                    raise self.failing[job]
            return [self.refused.get(job) or job.upper() for job in jobs]
        finally:
            self.in_flight -= 1


@pytest.fixture
def flushes() -> Flushes:
    """A flush that lets everything through."""
    return Flushes()


@pytest.fixture
def commit(flushes: Flushes) -> GroupCommit[str, str]:
    """Batches of four at the most, ten waiting at the most."""
    return GroupCommit("test", flushes, batch_max=4, waiting_max=10)


def submitted(commit: GroupCommit[str, str], *jobs: str) -> list[asyncio.Task[str]]:
    """Callers that wait for their jobs."""
    return [asyncio.create_task(commit.submit(job)) for job in jobs]


async def all_of(callers: list[asyncio.Task[str]]) -> list[object]:
    """What each caller hears, within a time."""
    async with asyncio.timeout(5):
        return list(await asyncio.gather(*callers, return_exceptions=True))


async def test_a_lone_job_is_done_at_once(commit: GroupCommit[str, str], flushes: Flushes) -> None:
    """Nobody waits for company."""
    assert await commit.submit("a") == "A"
    assert await commit.submit("b") == "B"
    assert flushes.batches == [["a"], ["b"]]


async def test_what_arrives_during_a_flush_shares_the_next(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """One flush at a time, as large as what has gathered, and no larger than allowed."""
    flushes.gate.clear()
    callers = submitted(commit, "a")
    await eventually(lambda: flushes.batches)
    callers += submitted(commit, *"bcdefg")
    await asyncio.sleep(0)
    flushes.gate.set()
    assert await all_of(callers) == list("ABCDEFG")
    assert flushes.batches == [["a"], list("bcde"), list("fg")]


async def test_each_job_hears_of_its_own_refusal(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """An error among the answers belongs to one job; its neighbours are done."""
    refusal = ConflictError("CONCURRENT_CHANGE", "somebody was first")
    flushes.refused = {"b": refusal}
    assert await all_of(submitted(commit, "a", "b", "c")) == ["A", refusal, "C"]
    assert flushes.batches == [["a", "b", "c"]]


async def test_a_bad_job_does_not_fail_its_neighbours(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """A batch that fails is done again, each job alone."""
    flushes.failing = {"b": ZeroDivisionError("b cannot be done")}
    assert await all_of(submitted(commit, "a", "b", "c")) == ["A", flushes.failing["b"], "C"]
    assert flushes.batches == [["a", "b", "c"], ["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    "outage",
    [
        UnavailableError("DEPENDENCY_UNAVAILABLE", "the database is away"),
        OverloadedError("OVERLOADED", "every database connection is in use"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_outage_fails_a_batch_as_a_whole(
    commit: GroupCommit[str, str], flushes: Flushes, outage: Exception
) -> None:
    """Each job alone would only wait for the same outage, or connection, again."""
    flushes.failing = {"b": outage}
    assert await all_of(submitted(commit, "a", "b", "c")) == [outage] * 3
    assert flushes.batches == [["a", "b", "c"]]


async def test_it_goes_on_after_a_failure(commit: GroupCommit[str, str], flushes: Flushes) -> None:
    """What failed is over with its batch."""
    flushes.failing = {"a": UnavailableError("DEPENDENCY_UNAVAILABLE", "away")}
    await all_of(submitted(commit, "a"))
    assert await commit.submit("b") == "B"


async def test_a_caller_who_gives_up_before_the_flush_is_not_done(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """Its place is given to the next."""
    flushes.gate.clear()
    first, gone, last = submitted(commit, "a", "b", "c")
    del gone
    callers = [first, last]
    await eventually(lambda: flushes.batches)
    waiting = submitted(commit, "d", "e")
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    flushes.gate.set()
    assert await all_of([*callers, waiting[1]]) == ["A", "C", "E"]
    assert flushes.batches == [["a", "b", "c"], ["e"]]


async def test_a_caller_who_gives_up_during_the_flush_changes_nothing_for_others(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """The job is done, nobody hears of it, and the neighbours get their answers."""
    flushes.gate.clear()
    callers = submitted(commit, "a", "b")
    await eventually(lambda: flushes.batches)
    callers[0].cancel()
    await asyncio.sleep(0)
    flushes.gate.set()
    gone, stayed = await all_of(callers)
    assert isinstance(gone, asyncio.CancelledError)
    assert stayed == "B"


async def test_a_refusal_that_nobody_hears_is_no_accident(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """The caller gave up and the flush failed: the next caller is served all the same."""
    flushes.gate.clear()
    flushes.failing = {"a": ZeroDivisionError()}
    (caller,) = submitted(commit, "a")
    await eventually(lambda: flushes.batches)
    caller.cancel()
    await asyncio.sleep(0)
    flushes.gate.set()
    assert await commit.submit("b") == "B"


async def test_too_many_waiting_are_refused(
    commit: GroupCommit[str, str], flushes: Flushes
) -> None:
    """Shed at once with a wait to keep, while those who wait are served."""
    flushes.gate.clear()
    callers = submitted(commit, "a")
    await eventually(lambda: flushes.batches)
    callers += submitted(commit, *"bcdefghijk")
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError) as caught:
        await commit.submit("l")
    assert caught.value.retry_after_seconds
    flushes.gate.set()
    assert await all_of(callers) == list("ABCDEFGHIJK")


async def test_a_flush_that_answers_too_little_fails_its_callers(
    flushes: Flushes,
) -> None:
    """A mistake of ours leaves nobody waiting for ever."""

    async def forgetful(jobs: Sequence[str]) -> Sequence[str | Exception]:
        return []

    commit: GroupCommit[str, str] = GroupCommit("test", forgetful)
    heard = await all_of(submitted(commit, "a", "b"))
    assert [type(answer) for answer in heard] == [ValueError, ValueError]
