"""Waiting for what happens soon: a probe is asked again until it agrees or time is up.

A test never sleeps and hopes. It says what it waits for, and when that does not come,
the failure says what was seen last.
"""

import asyncio
import inspect
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar, overload

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.005
LONGEST_PAUSE_SECONDS = 0.2
_SOON_PAUSE_SECONDS = 0.02


@overload
async def eventually(
    probe: Callable[[], Awaitable[T]],
    within_seconds: float = 10.0,
    *,
    until: Callable[[T], object] = bool,
    describe: str = "",
) -> T: ...


@overload
async def eventually(
    probe: Callable[[], T],
    within_seconds: float = 10.0,
    *,
    until: Callable[[T], object] = bool,
    describe: str = "",
) -> T: ...


async def eventually(
    probe: Callable[[], T] | Callable[[], Awaitable[T]],
    within_seconds: float = 10.0,
    *,
    until: Callable[[T], object] = bool,
    describe: str = "",
) -> T:
    """Asks `probe` until its answer satisfies `until`, and returns that answer.

    A probe is a function or a coroutine function without arguments. One that raises is
    asked again like one that answers no, so a probe may simply assert; a probe that
    hangs is abandoned when the time is up.

    Args:
        probe: what to ask.
        within_seconds: how long to go on asking.
        until: when an answer is good enough; by default, when it is true.
        describe: what is waited for, in words, for the failure's message.

    Raises:
        AssertionError: when the time is up, with the last answer or error.
    """
    started = time.monotonic()
    deadline = started + within_seconds
    pause_seconds = FIRST_PAUSE_SECONDS
    asked = 0
    seen = "nothing: the probe never answered"
    cause: Exception | None = None
    while True:
        asked += 1
        try:
            # At least a moment, so that a spent deadline still allows one honest answer.
            async with asyncio.timeout(max(deadline - time.monotonic(), FIRST_PAUSE_SECONDS)):
                given = probe()
                answer = await given if inspect.isawaitable(given) else given
        except TimeoutError as error:
            if time.monotonic() < deadline:  # the probe's own time-out, not ours
                seen, cause = f"{type(error).__name__}: {error}", error
            else:
                seen += " (and the last probe did not answer in time)"
        # A probe may fail in any way while what it asks for is not there yet; the last
        # failure is raised below as the cause.
        except Exception as error:  # noqa: BLE001
            seen, cause = f"{type(error).__name__}: {error}", error
        else:
            if until(answer):
                return answer
            seen, cause = repr(answer), None
        left_seconds = deadline - time.monotonic()
        if left_seconds <= 0:
            break
        await asyncio.sleep(min(pause_seconds, left_seconds))
        pause_seconds = min(pause_seconds * 1.5, LONGEST_PAUSE_SECONDS)
    waited_seconds = time.monotonic() - started
    message = (
        f"{describe or _name_of(probe)} did not come true within {waited_seconds:.1f} s "
        f"(asked {asked} times); last seen: {seen}"
    )
    raise AssertionError(message) from cause


def soon(probe: Callable[[], object], within_seconds: float = 10.0, *, describe: str) -> float:
    """Waits like `eventually`, where nothing else runs in the meantime; says how long it took.

    Raises:
        AssertionError: when the time is up.
    """
    started = time.monotonic()
    while not probe():
        waited_seconds = time.monotonic() - started
        assert waited_seconds < within_seconds, f"{describe}: not within {within_seconds} s"
        time.sleep(_SOON_PAUSE_SECONDS)
    return time.monotonic() - started


def _name_of(probe: Callable[[], object]) -> str:
    """A probe's name and where it stands."""
    code = getattr(probe, "__code__", None)
    name = getattr(probe, "__qualname__", repr(probe))
    return name if code is None else f"{name} (line {code.co_firstlineno})"
