"""What is done again and again, and waiting that ends early when there is reason to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from chassis.errors import ServiceError

_log = structlog.get_logger("periodic")


async def pause(seconds: float, unless: asyncio.Event) -> None:
    """Sleeps for so many seconds, or until the event is set.

    Not `asyncio.wait_for`: in Python 3.11 it swallows a cancellation that arrives in
    the moment in which the inner wait ends.
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await unless.wait()


def repeatedly(
    seconds: float, act: Callable[[], Awaitable[object]]
) -> Callable[[asyncio.Event], Awaitable[None]]:
    """Acts now and then again every so many seconds, until told to stop.

    A database that is away is no reason to end the process: the next round comes.
    """

    async def run(stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                await act()
            except ServiceError as error:
                _log.warning("round.failed", reason=error.reason, detail=error.message)
            await pause(seconds, stopping)

    return run
