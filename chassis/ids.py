"""Identifiers and time, both injected so that a schedule can be replayed.

Ids are UUIDv7 (RFC 9562, section 5.7): sortable by the millisecond of creation, so
that fresh rows land at one end of their index.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from uuid import UUID

NewId = Callable[[], UUID]
"""Makes an id that has never been made before."""

Now = Callable[[], datetime]
"""Tells the time, in UTC. Deadlines and leases use the database's clock instead."""


def now() -> datetime:
    """The time by this machine's clock, in UTC."""
    return datetime.now(UTC)


def new_id() -> UUID:
    """A fresh UUIDv7 of this machine's clock and the system's randomness."""
    return uuid7(time.time_ns() // 1_000_000, os.urandom(10))


def uuid7(unix_milliseconds: int, randomness: bytes) -> UUID:
    """The UUIDv7 of a time and ten random bytes (74 of their 80 bits are used).

    Raises:
        ValueError: `randomness` is not ten bytes long.
    """
    if len(randomness) != 10:
        raise ValueError(f"a UUIDv7 takes 10 random bytes, not {len(randomness)}")
    noise = int.from_bytes(randomness, "big")
    value = (unix_milliseconds & 0xFFFF_FFFF_FFFF) << 80
    value |= 0x7000 << 64
    value |= ((noise >> 62) & 0x0FFF) << 64
    value |= 0b10 << 62
    value |= noise & 0x3FFF_FFFF_FFFF_FFFF
    return UUID(int=value)
