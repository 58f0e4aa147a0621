"""Waiting that ends early, and what is done again and again."""

from __future__ import annotations

import asyncio
import time

from chassis.errors import UnavailableError
from chassis.periodic import pause, repeatedly


async def test_a_pause_ends_as_soon_as_its_event_is_set() -> None:
    """Nobody who is told to stop waits out the rest."""
    told = asyncio.Event()
    begun = time.monotonic()
    waiting = asyncio.create_task(pause(60, told))
    await asyncio.sleep(0)
    told.set()
    await waiting
    assert time.monotonic() - begun < 5


async def test_a_pause_ends_by_itself_without_its_event() -> None:
    """The time that was asked for is the longest it takes."""
    async with asyncio.timeout(5):
        await pause(0.01, asyncio.Event())


async def test_a_round_that_fails_is_followed_by_the_next() -> None:
    """A database that is away ends no process."""
    stopping = asyncio.Event()
    rounds = 0

    async def act() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            stopping.set()
        raise UnavailableError("DEPENDENCY_UNAVAILABLE", "away")

    async with asyncio.timeout(5):
        await repeatedly(0.001, act)(stopping)
    assert rounds == 3
