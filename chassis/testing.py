"""Doubles that services' tests may rely on: they pass the same tests as the real things.

The broker in memory is one too and stands with its kind, `chassis.broker.memory`.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import UUID

from chassis.ids import uuid7

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
"""When a `FrozenClock` stands, unless it is told otherwise."""


class FrozenClock:
    """A `chassis.ids.Now` that stands still until it is moved.

    Args:
        at: The time to tell, in UTC.

    Raises:
        ValueError: `at` has no time zone.
    """

    def __init__(self, at: datetime = EPOCH) -> None:
        if at.tzinfo is None:
            raise ValueError("a clock tells the time of some zone")
        self._at = at.astimezone(UTC)

    def __call__(self) -> datetime:
        """The time at which the clock stands."""
        return self._at

    def advance(self, seconds: float) -> None:
        """Moves the clock; back, when `seconds` is negative."""
        self._at += timedelta(seconds=seconds)


class SequentialIds:
    """A `chassis.ids.NewId` that makes the same rising UUIDv7s in every run.

    Args:
        start: Tells the ids of two makers in one test apart.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._made = 0

    def __call__(self) -> UUID:
        """The next id, a millisecond after the one before."""
        self._made += 1
        milliseconds = int(EPOCH.timestamp() * 1000) + self._made
        return uuid7(milliseconds, (self._start << 32 | self._made).to_bytes(10, "big"))
