"""The cache on a real Valkey: a copy by version, never the truth, and never a hold-up."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY
from redis.asyncio import Redis

from chassis.cache import Cache, Versioned, connect
from meshctl.processes import free_port
from meshctl.servers import Valkey
from meshctl.servers.throwaway import Throwaway, throwaway
from tests.eventually import eventually

Load = Callable[[], Awaitable[Versioned | None]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def valkey() -> AsyncIterator[Throwaway[Valkey]]:
    """A Valkey server for this module."""
    async with throwaway(Valkey) as held:
        yield held


@pytest_asyncio.fixture
async def redis(valkey: Throwaway[Valkey]) -> AsyncIterator[Redis]:
    """A client as a service has one; the server is empty."""
    client = connect(valkey.url)
    assert client is not None
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def cache(redis: Redis) -> Cache:
    """A cache of orders."""
    return Cache(redis, "order:", ttl_seconds=60)


class Source:
    """The truth behind a cache, and how often it was asked."""

    def __init__(self, found: Versioned | None) -> None:
        self.found = found
        self.asked = 0

    async def __call__(self) -> Versioned | None:
        """Loads."""
        self.asked += 1
        return self.found


ONE = Versioned(1, b"one")
TWO = Versioned(2, b"two")


async def never() -> Versioned | None:
    """A load that must not be needed."""
    raise AssertionError("asked the database")


async def seconds_of(call: Awaitable[object]) -> float:
    """How long a call takes."""
    began = time.monotonic()
    await call
    return time.monotonic() - began


def reads(outcome: str) -> float:
    """How many reads ended like this."""
    return REGISTRY.get_sample_value("mesh_cache_reads_total", {"outcome": outcome}) or 0


async def test_what_was_loaded_is_kept(cache: Cache) -> None:
    """The second reader does not ask the database."""
    source = Source(ONE)
    assert await cache.get_or_load("a", source) == ONE
    assert await cache.get_or_load("a", source) == ONE
    assert source.asked == 1


async def test_what_was_put_is_read(cache: Cache) -> None:
    """Writers put what they have committed, several at once."""
    await cache.put([("a", ONE), ("b", TWO)])
    assert await cache.get_or_load("a", never) == ONE
    assert await cache.get_or_load("b", never) == TWO


async def test_what_is_nowhere_is_not_kept_as_missing(cache: Cache) -> None:
    """It may be there a moment later."""
    source = Source(None)
    assert await cache.get_or_load("a", source) is None
    source.found = ONE
    assert await cache.get_or_load("a", source) == ONE


@pytest.mark.parametrize("value", [b"", b"\x00", bytes(range(256)) * 100])
async def test_any_bytes_are_kept_as_they_are(cache: Cache, value: bytes) -> None:
    """Also none at all."""
    await cache.put([("a", Versioned(7, value))])
    assert await cache.get_or_load("a", never) == Versioned(7, value)


@pytest.mark.parametrize(
    ("older", "newer"),
    [(1, 2), (9, 10), (127, 128), (255, 256), (500, 501), (65_535, 65_536), (2**31, 2**31 + 1),
     (2**40, 2**40 + 1)],
)  # fmt: skip
async def test_an_older_copy_never_replaces_a_newer_one(
    cache: Cache, older: int, newer: int
) -> None:
    """Whichever comes first, as numbers and not as strings."""
    old, new = Versioned(older, b"old"), Versioned(newer, b"new")
    await cache.put([("a", new)])
    await cache.put([("a", old)])
    await cache.put([("b", old)])
    await cache.put([("b", new)])
    assert await cache.get_or_load("a", never) == new
    assert await cache.get_or_load("b", never) == new


async def test_a_slow_reader_does_not_bring_back_what_a_writer_has_replaced(
    cache: Cache,
) -> None:
    """It read the old state before the change and puts it after."""

    async def slow() -> Versioned:
        await cache.put([("a", TWO)])  # meanwhile a writer commits
        return ONE

    assert await cache.get_or_load("a", slow) == ONE
    assert await cache.get_or_load("a", never) == TWO


async def test_the_same_version_is_put_again(cache: Cache) -> None:
    """A repair of a copy needs no new version."""
    await cache.put([("a", Versioned(1, b"damaged"))])
    await cache.put([("a", ONE)])
    assert await cache.get_or_load("a", never) == ONE


async def test_a_copy_has_an_end(cache: Cache, redis: Redis) -> None:
    """One that missed its update is not served for ever."""
    await cache.put([("a", ONE)])
    assert 0 < await redis.ttl("order:a") <= 60


async def test_kinds_do_not_meet(cache: Cache, redis: Redis) -> None:
    """Each has its prefix."""
    await cache.put([("a", ONE)])
    assert await Cache(redis, "payment:").get_or_load("a", Source(TWO)) == TWO
    assert await cache.get_or_load("a", never) == ONE


async def test_a_flushed_cache_is_filled_again(cache: Cache, redis: Redis) -> None:
    """Nothing in it is the truth."""
    await cache.put([("a", ONE)])
    await redis.flushall()
    assert await cache.get_or_load("a", Source(TWO)) == TWO


async def test_reads_are_counted_by_how_they_ended(cache: Cache) -> None:
    """For whoever wonders whether the cache is worth it."""
    hits, misses = reads("hit"), reads("miss")
    await cache.get_or_load("a", Source(ONE))
    await cache.get_or_load("a", never)
    assert (reads("hit"), reads("miss")) == (hits + 1, misses + 1)


async def test_without_a_cache_everything_is_loaded() -> None:
    """An empty URL is no cache, and no error."""
    assert connect("") is None
    cache, source = Cache(None, "order:"), Source(ONE)
    await cache.put([("a", TWO)])
    for _ in range(2):
        assert await cache.get_or_load("a", source) == ONE
    assert source.asked == 2


# --- trouble --------------------------------------------------------------------------


@pytest.fixture
def pause(monkeypatch: pytest.MonkeyPatch) -> float:
    """How long a cache that made trouble is left alone: shortened."""
    monkeypatch.setattr("chassis.cache.PAUSE_SECONDS", 0.3)
    return 0.3


async def test_a_cache_that_is_away_is_done_without() -> None:
    """Reads go to the database, puts are lost, and nobody hears of it."""
    client = connect(f"redis://127.0.0.1:{free_port()}/0")
    assert client is not None
    cache, source = Cache(client, "order:"), Source(ONE)
    await cache.put([("a", TWO)])
    assert await cache.get_or_load("a", source) == ONE
    await client.aclose()


async def test_a_cache_with_another_password_is_done_without(valkey: Throwaway[Valkey]) -> None:
    """A mistake of operators costs speed, not orders."""
    client = connect(valkey.url.replace(valkey.server.password, "wrong"))
    assert client is not None
    assert await Cache(client, "order:").get_or_load("a", Source(ONE)) == ONE
    await client.aclose()


async def test_a_cache_that_hangs_costs_a_call_a_tenth_of_a_second_and_the_next_nothing(
    cache: Cache, valkey: Throwaway[Valkey], pause: float
) -> None:
    """After trouble it is left alone for a while; then it is tried, and used again."""
    await cache.put([("a", ONE)])
    source = Source(TWO)
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        first = await seconds_of(cache.get_or_load("a", source))
        rest = await seconds_of(
            asyncio.gather(*(cache.get_or_load("a", source) for _ in range(100)))
        )
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    assert source.asked == 101
    assert first < 0.4, "a tenth of a second, and some for a busy machine"
    assert rest < first
    calls = source.asked

    async def is_used_again() -> bool:
        return await cache.get_or_load("a", source) == ONE

    await eventually(is_used_again, within_seconds=5)
    assert source.asked > calls, "left alone at first"


async def test_answers_that_come_too_late_are_not_taken_for_those_of_the_next_question(
    cache: Cache, valkey: Throwaway[Valkey], pause: float
) -> None:
    """A reader who gave up leaves nothing behind on the connection."""
    await cache.put([("a", ONE), ("b", TWO)])
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        await asyncio.gather(*(cache.get_or_load("a", Source(ONE)) for _ in range(5)))
    finally:
        os.kill(valkey.pid, signal.SIGCONT)

    async def is_used_again() -> bool:
        hits = reads("hit")
        await cache.get_or_load("b", Source(TWO))
        return reads("hit") > hits

    await eventually(is_used_again, within_seconds=5)
    for _ in range(20):
        assert await cache.get_or_load("b", never) == TWO
        assert await cache.get_or_load("a", never) == ONE


async def test_a_caller_who_is_cancelled_leaves_the_cache_in_order(
    cache: Cache, valkey: Throwaway[Valkey]
) -> None:
    """The call's deadline ended while Valkey was being asked."""
    await cache.put([("a", ONE), ("b", TWO)])
    os.kill(valkey.pid, signal.SIGSTOP)
    try:
        task = asyncio.create_task(cache.get_or_load("a", never))
        await asyncio.sleep(0)
        await asyncio.wait([task], timeout=0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    finally:
        os.kill(valkey.pid, signal.SIGCONT)
    for _ in range(5):
        assert await cache.get_or_load("b", never) == TWO


async def test_a_cache_that_comes_back_empty_is_used_again(pause: float) -> None:
    """Killed and restarted under the service: nothing to do for anybody."""
    source = Source(ONE)
    async with throwaway(Valkey) as valkey:
        client = connect(valkey.url)
        assert client is not None
        cache = Cache(client, "order:")
        await cache.put([("a", ONE)])
        await valkey.kill()
        assert await cache.get_or_load("a", source) == ONE
        await valkey.start()

        async def is_used_again() -> bool:
            before = source.asked
            await cache.get_or_load("a", source)
            return source.asked == before

        await eventually(is_used_again, within_seconds=5)
        await client.aclose()
