"""The helper that every other test waits with."""

import asyncio
import time

import pytest

from tests.eventually import eventually


async def test_an_answer_that_is_true_at_once_is_returned_at_once() -> None:
    """A probe that agrees costs no waiting."""
    started = time.monotonic()
    assert await eventually(lambda: "here", within_seconds=5) == "here"
    assert time.monotonic() - started < 1


async def test_a_probe_is_asked_again_until_it_agrees() -> None:
    """A probe may answer no, raise or assert before it answers yes."""
    answers = iter([None, ValueError("not yet"), AssertionError("no"), [1, 2]])

    async def probe() -> object:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert await eventually(probe, within_seconds=5) == [1, 2]


async def test_a_condition_decides_when_an_answer_is_good_enough() -> None:
    """`until` judges answers that are all true."""
    counts = iter(range(1, 100))
    assert await eventually(lambda: next(counts), within_seconds=5, until=lambda n: n >= 3) == 3


async def test_the_failure_says_what_was_seen_last() -> None:
    """A test that waited in vain tells what it saw instead."""
    with pytest.raises(AssertionError, match=r"an order to be paid.*last seen: 'PENDING'"):
        await eventually(
            lambda: "PENDING",
            within_seconds=0.05,
            until=lambda state: state == "PAID",
            describe="an order to be paid",
        )


async def test_the_failure_carries_the_probes_last_error() -> None:
    """The error of a probe that kept raising is the cause of the failure."""

    def probe() -> bool:
        message = "connection refused"
        raise OSError(message)

    with pytest.raises(AssertionError, match="last seen: OSError: connection refused") as caught:
        await eventually(probe, within_seconds=0.05)
    assert isinstance(caught.value.__cause__, OSError)


async def test_a_probe_that_hangs_is_abandoned() -> None:
    """A deadline holds even when the probe never answers."""
    started = time.monotonic()
    with pytest.raises(AssertionError, match="never answered"):
        await eventually(lambda: asyncio.sleep(60), within_seconds=0.1)
    assert time.monotonic() - started < 5
