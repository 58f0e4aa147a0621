"""Redis (or Valkey) in front of read tables: a copy by version, never the truth.

Every value carries the version of what it copies, and a script on the server keeps
the newer of two, so a slow reader cannot put an old state over a new one. Writers put
what they have just committed. When Redis is away, reads go to the database and puts
are lost; a copy that missed its put is served for `ttl_seconds` at the longest.
Trouble costs a call 100 ms at most, and after it Redis is left alone for a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from prometheus_client import Counter
from redis.asyncio import BlockingConnectionPool, Redis
from redis.exceptions import RedisError

TIMEOUT_SECONDS = 0.1
PAUSE_SECONDS = 1.0
_VERSION_BYTES = 8

_log = structlog.get_logger("cache")
_READS = Counter("mesh_cache_reads_total", "Reads through the cache, by outcome.", ["outcome"])
_HIT, _MISS, _AWAY = (_READS.labels(outcome) for outcome in ("hit", "miss", "away"))

# KEYS are the cache's keys; ARGV is the time to live and then one value per key. The
# version is a big-endian number in front of the value. Numbers are compared, not strings:
# those the server compares by the rules of its locale, for which 127 may come after 128.
_PUT = """
for i, key in ipairs(KEYS) do
  local new = ARGV[i + 1]
  local old = redis.call('GETRANGE', key, 0, 7)
  if #old < 8 or struct.unpack('>I8', old) <= struct.unpack('>I8', new) then
    redis.call('SET', key, new, 'EX', ARGV[1])
  end
end
"""


@dataclass(frozen=True, slots=True)
class Versioned:
    """A value and the version of what it copies."""

    version: int
    value: bytes


class Cache:
    """A cache of one kind of resource.

    Args:
        redis: The client, or None to run without a cache.
        prefix: In front of every key, so that kinds do not meet.
        ttl_seconds: How long a copy may be served that missed an update.
    """

    def __init__(self, redis: Redis | None, prefix: str, *, ttl_seconds: int = 60) -> None:
        self._redis = redis
        self._prefix = prefix
        self._ttl_seconds = ttl_seconds
        self._away_until = 0.0
        self._put_script = redis.register_script(_PUT) if redis is not None else None

    async def get_or_load(
        self, key: str, load: Callable[[], Awaitable[Versioned | None]]
    ) -> Versioned | None:
        """The copy under `key`, or what `load` finds, which is then kept; None if nothing."""
        copy = await self._get(key)
        if copy is not None:
            return copy
        loaded = await load()
        if loaded is not None:
            await self.put([(key, loaded)])
        return loaded

    async def put(self, items: Sequence[tuple[str, Versioned]]) -> None:
        """Keeps copies, each unless a newer one is there; in one round trip."""
        if self._put_script is None or not items or self._is_away():
            return
        keys = [self._prefix + key for key, _ in items]
        values: list[Any] = [
            item.version.to_bytes(_VERSION_BYTES, "big") + item.value for _, item in items
        ]
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await self._put_script(keys=keys, args=[self._ttl_seconds, *values])
        except (RedisError, OSError, TimeoutError) as error:
            self._leave_alone(error)

    async def _get(self, key: str) -> Versioned | None:
        if self._redis is None or self._is_away():
            return None
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                raw: Any = await self._redis.get(self._prefix + key)
        except (RedisError, OSError, TimeoutError) as error:
            self._leave_alone(error)
            return None
        if raw is None:
            _MISS.inc()
            return None
        _HIT.inc()
        return Versioned(int.from_bytes(raw[:_VERSION_BYTES], "big"), raw[_VERSION_BYTES:])

    def _is_away(self) -> bool:
        if asyncio.get_running_loop().time() < self._away_until:
            _AWAY.inc()
            return True
        return False

    def _leave_alone(self, error: BaseException) -> None:
        _AWAY.inc()
        _log.warning("cache.away", error=type(error).__name__, detail=str(error))
        self._away_until = asyncio.get_running_loop().time() + PAUSE_SECONDS


def connect(url: str, *, connections_max: int = 20) -> Redis | None:
    """A client for a URL, or None for an empty one. Close it with `aclose`.

    Nothing is sent until it is used: a cache that is away does not keep a service
    from starting.
    """
    if not url:
        return None
    pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
        url,
        max_connections=connections_max,
        timeout=TIMEOUT_SECONDS,
        socket_timeout=TIMEOUT_SECONDS * 5,
        socket_connect_timeout=TIMEOUT_SECONDS * 5,
    )
    return Redis.from_pool(pool)
