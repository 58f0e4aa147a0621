"""PostgreSQL: one pool per process, short transactions, errors in our own terms.

SQLAlchemy Core describes tables and builds the queries, once, at import
(`Statement`); asyncpg runs them. That keeps the typed expressions and the migrations
and leaves out the per-call cost of an execution layer (docs/adr/0005).

Time limits live in the server, because a cancelled client leaves its statement
running: statements end after 5 s, waits for a lock after 2 s, and a transaction whose
client has gone silent after 10 s.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import asyncpg
import structlog
from prometheus_client import Gauge, Histogram
from sqlalchemy.dialects import postgresql
from sqlalchemy.sql import ClauseElement

from chassis.errors import ConflictError, OverloadedError, ServiceError, UnavailableError

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    PooledConnection = asyncpg.pool.PoolConnectionProxy[asyncpg.Record]
    Pool = asyncpg.Pool[asyncpg.Record]
else:
    Connection = asyncpg.Connection
    PooledConnection = asyncpg.pool.PoolConnectionProxy
    Pool = asyncpg.Pool

AnyConnection = Connection | PooledConnection

STATEMENT_SECONDS = 5
LOCK_SECONDS = 2
IDLE_IN_TRANSACTION_SECONDS = 10
CHECKOUT_SECONDS = 0.25
CONNECT_SECONDS = 5
_ROWS_AT_ONCE = 1000

_log = structlog.get_logger("database")
_TRANSACTION_SECONDS = Histogram(
    "mesh_database_transaction_seconds",
    "Time a transaction was open.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
_CONNECTIONS = Gauge("mesh_database_connections", "Open connections of the pool.")

_dialect: Any = postgresql.dialect(paramstyle="numeric_dollar")  # type: ignore[no-untyped-call]


class Statement:
    """A Core statement, compiled once into PostgreSQL's own text.

    Calling it with the values of its bind parameters gives what asyncpg takes:
    `await connection.fetch(*GET_ORDER(merchant="default", order_id=…))`.
    """

    __slots__ = ("_defaults", "_names", "text")

    def __init__(self, clause: ClauseElement) -> None:
        compiled = clause.compile(dialect=_dialect)
        self.text = str(compiled)
        self._names: tuple[str, ...] = tuple(compiled.positiontup or ())  # type: ignore[attr-defined]
        self._defaults: Mapping[str, Any] = dict(compiled.params)

    def __call__(self, **values: Any) -> tuple[Any, ...]:
        """The text and its arguments in order.

        Raises:
            TypeError: A value is given that the statement has no parameter for.
        """
        if unknown := values.keys() - set(self._names):
            raise TypeError(f"the statement has no parameter {sorted(unknown)}")
        defaults = self._defaults
        return (
            self.text,
            *(values[name] if name in values else defaults[name] for name in self._names),
        )


class _Connection(asyncpg.Connection):
    """A connection that goes back to the pool without asking the server to reset it.

    Nothing here sets session state outside of transactions, so the reset that
    asyncpg sends by default would be a round trip for nothing. A transaction that
    was left open by a cancelled task is still rolled back.
    """

    def get_reset_query(self) -> str:
        return ""


class Database:
    """A service's own database.

    Use `async with Database.opened(url, …) as database`.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(
        cls, url: str, *, application_name: str, pool_max: int = 10
    ) -> AsyncIterator[Database]:
        """Opens the pool, and closes it when the block ends.

        Raises:
            UnavailableError: The server does not answer.
        """
        with _in_our_terms():
            pool = await asyncpg.create_pool(
                url,
                min_size=1,
                max_size=pool_max,
                connection_class=_Connection,
                max_inactive_connection_lifetime=300,
                timeout=CONNECT_SECONDS,
                command_timeout=STATEMENT_SECONDS + 5,
                statement_cache_size=200,
                server_settings={
                    "application_name": application_name,
                    "statement_timeout": f"{STATEMENT_SECONDS}s",
                    "lock_timeout": f"{LOCK_SECONDS}s",
                    "idle_in_transaction_session_timeout": f"{IDLE_IN_TRANSACTION_SECONDS}s",
                    # Batches of one shape and few rows: the just-in-time compiler
                    # costs more than it saves.
                    "jit": "off",
                    # Every statement here goes by an index. One that was planned while
                    # its table was empty would scan it for as long as the plan is kept,
                    # which is until the first ANALYZE: a minute of growing scans.
                    "enable_seqscan": "off",
                },
            )
        try:
            yield cls(pool)
        finally:
            try:
                async with asyncio.timeout(5):
                    await pool.close()
            except TimeoutError:
                _log.warning("pool.terminated", reason="connections were still in use")
                pool.terminate()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[AnyConnection]:
        """A transaction: committed when the block ends, rolled back when it raises.

        No network call to anyone but the database belongs inside the block.

        Raises:
            ConflictError: A lock was not had in time, the server chose this transaction
                as the victim of a deadlock, or a migration came in between.
            OverloadedError: No connection came free within 250 ms.
            UnavailableError: The server is away or was too slow. When this comes
                out of the commit, whether it took effect is unknown.
        """
        with _in_our_terms():
            async with self._checked_out() as connection:
                with _TRANSACTION_SECONDS.time():
                    async with connection.transaction():
                        yield connection

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AnyConnection]:
        """A connection for single reading statements, without a transaction.

        Raises:
            OverloadedError: No connection came free within 250 ms.
            UnavailableError: The server is away or was too slow.
        """
        with _in_our_terms():
            async with self._checked_out() as connection:
                yield connection

    async def delete_all(self, statement: str) -> int:
        """Deletes rows a thousand at a time, so that nobody waits long; says how many.

        Args:
            statement: A DELETE bounded by `LIMIT $1`; asked again while it finds that many.

        Raises:
            OverloadedError: No connection came free within 250 ms.
            UnavailableError: The server is away or was too slow.
        """
        deleted = 0
        while True:
            async with self.reading() as connection:
                status = await connection.execute(statement, _ROWS_AT_ONCE)
            rows = int(status.rpartition(" ")[2])
            deleted += rows
            if rows < _ROWS_AT_ONCE:
                return deleted

    async def ping(self) -> None:
        """Asks the server for a sign of life; raises `UnavailableError` without one."""
        async with self.reading() as connection:
            await connection.execute("SELECT 1")

    @contextlib.asynccontextmanager
    async def _checked_out(self) -> AsyncIterator[PooledConnection]:
        try:
            connection = await self._pool.acquire(timeout=CHECKOUT_SECONDS)
        except TimeoutError:
            if (
                self._pool.get_idle_size() == 0
                and self._pool.get_size() >= self._pool.get_max_size()
            ):
                raise OverloadedError(
                    "OVERLOADED", "every database connection is in use", retry_after_seconds=0.2
                ) from None
            # A connection was being made and took too long: the server is slow or away.
            raise _unavailable("the database did not accept a connection in time") from None
        _CONNECTIONS.set(self._pool.get_size())
        try:
            yield connection
        finally:
            # Shielded, because a cancellation here would leak the connection.
            await asyncio.shield(self._pool.release(connection))


def _unavailable(message: str) -> UnavailableError:
    return UnavailableError(
        "DEPENDENCY_UNAVAILABLE",
        message,
        metadata={"dependency": "database"},
        retry_after_seconds=0.5,
    )


@contextlib.contextmanager
def _in_our_terms() -> Iterator[None]:
    """Turns what the driver raises into the error tree; leaves our own errors alone."""
    try:
        yield
    except ServiceError:
        raise
    except (
        asyncpg.LockNotAvailableError,
        asyncpg.DeadlockDetectedError,
        asyncpg.SerializationError,
        # A migration changed what the statement reads; the next try prepares it anew.
        asyncpg.InvalidCachedStatementError,
    ) as error:
        raise ConflictError(
            "CONCURRENT_CHANGE",
            "another change of the same data came first; repeat the call",
            retry_after_seconds=0.1,
        ) from error
    except asyncpg.QueryCanceledError as error:
        raise _unavailable("the database took too long") from error
    except (
        asyncpg.PostgresConnectionError,
        asyncpg.CannotConnectNowError,
        asyncpg.AdminShutdownError,
        asyncpg.CrashShutdownError,
        asyncpg.TooManyConnectionsError,
        asyncpg.InsufficientResourcesError,
        asyncpg.IdleInTransactionSessionTimeoutError,
        asyncpg.InterfaceError,
        # What a connection that dies in the middle of something may raise.
        asyncpg.InternalClientError,
        ConnectionError,
        OSError,
        TimeoutError,
    ) as error:
        _log.warning("database.unavailable", error=type(error).__name__, detail=str(error))
        raise _unavailable("the database does not answer") from error


def database_name(url: str) -> str:
    """The database that a URL names, for messages: never its password."""
    parts = urlsplit(url)
    return f"{parts.path.lstrip('/')} at {parts.hostname}:{parts.port}"
