"""A broker in a PostgreSQL database of its own, for a mesh without RabbitMQ.

The database is the broker's alone: a long transaction of a service then cannot keep dead
rows of the queue from being cleared, because PostgreSQL clears each database by itself.
All times are the database's. Connections are direct, not through a pooler that shares
them between clients, because consumers listen for notifications.

**Tables**, in the schema `mesh_broker`:

* `queue`, `binding`: who exists and which types go to whom;
* `message`: what is ready or being handled. Publishing a batch is one INSERT that joins
  the batch with the bindings. A consumer claims rows for a few seconds (`leased_until`)
  and renews the claim while its handler runs; if it dies, the claim runs out and another
  consumer claims them. Only unindexed columns change by that, and pages are left half
  empty, so that the changed row stays in its page and no index is touched (HOT).
* `delayed`: what waits for its next attempt. Consumers move rows that are due back into
  `message`, so that looking for ready rows never steps over waiting ones.
* `dead_letter`: what was given up. Kept until a person decides.

**Durability.** A publish is confirmed by a commit that has reached the disk. A consumer's
commits do not wait for the disk: one that is lost in a crash only leaves the message where
it was before, to be delivered again. A retry or a dead letter is one statement with the
removal from the queue, so that neither can happen without the other.

**Waking.** A publish sends one notification for its whole batch, which says which queues
have got something; a consumer that is handling a batch looks again anyway. Notifications
may be lost, so an idle consumer also looks every quarter of a second.

**Schema changes** are the numbered steps in `statements.SCHEMA`, carried out by `declare`
under a lock, each once. They only add, because the previous release works on the same
tables during a roll-out. Alembic serves the databases that services own; no service should
carry the migrations of a broker that it may not use.

docs/adr/0013 says why this is no library, and what it costs.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import asyncpg
import structlog

from chassis.broker import (
    BrokerUnavailableError,
    DeadLetterRecord,
    Handler,
    Limits,
    Message,
    PublishOutcome,
    Subscription,
)
from chassis.broker.handling import cancelled_by_caller, patiently
from chassis.broker.metrics import RECONNECTED, count_published
from chassis.broker.postgres.connection import (
    CONNECT_SECONDS,
    STATEMENT_SECONDS,
    TROUBLE,
    Connection,
    close_connection,
    declare,
    message_of,
    open_connection,
)
from chassis.broker.postgres.consumer import Consumer
from chassis.broker.postgres.statements import DEAD_LETTERS, PUBLISH

_log = structlog.get_logger("broker")

# PostgreSQL's own errors that, unlike its others, leave the fate of a statement open.
_CONNECTION_ENDED: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)


class PostgresBroker:
    """A connection to the queues in a database; see `chassis.broker.Broker`.

    Args:
        url: Of the broker's own database.
        name: The service's name, shown in `pg_stat_activity`.
        limits: The numbers of its behaviour.
    """

    def __init__(self, url: str, *, name: str, limits: Limits) -> None:
        self._url = url
        self._name = name
        self._limits = limits
        # One connection publishes everything: the relay sends batch after batch anyway.
        self._publisher: Connection | None = None
        self._publishing = asyncio.Lock()

    async def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """See `chassis.broker.Broker.declare`."""
        await patiently(lambda: self._declare(subscriptions), self._limits.declare_seconds_max)

    async def _declare(self, subscriptions: Sequence[Subscription]) -> None:
        async with self._borrowed() as connection:
            await declare(connection, subscriptions)

    async def ping(self) -> None:
        """See `chassis.broker.Broker.ping`."""
        async with self._borrowed() as connection:
            await connection.fetchval("SELECT 1")

    async def dead_letters(self, consumer: str, *, limit: int = 100) -> list[DeadLetterRecord]:
        """See `chassis.broker.Broker.dead_letters`."""
        async with self._borrowed() as connection:
            try:
                rows = await connection.fetch(DEAD_LETTERS, consumer, limit)
            except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                return []
        return [
            DeadLetterRecord(
                message=message_of(row),
                consumer=consumer,
                error_class=row["error_class"],
                error_detail=row["error_detail"],
                first_death_time=row["first_death_time"],
                death_time=row["death_time"],
            )
            for row in rows
        ]

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """See `chassis.broker.Broker.publish`."""
        bytes_max = self._limits.body_bytes_max
        fitting = [message for message in messages if len(message.body) <= bytes_max]
        answers = iter(await self._published(fitting) if fitting else [])
        outcomes = [
            next(answers) if len(message.body) <= bytes_max else PublishOutcome.REFUSED
            for message in messages
        ]
        count_published(outcomes)
        return outcomes

    async def _published(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        connection: Connection | None = None
        try:
            async with asyncio.timeout(self._limits.publish_seconds_max), self._publishing:
                to_send = await self._publisher_connection()
                arguments = (
                    [message.event_id for message in messages],
                    [message.type for message in messages],
                    [_headers(message) for message in messages],
                    [message.body for message in messages],
                    [message.attempt for message in messages],
                )
                # From here on it may have been sent.
                connection = to_send
                row = await connection.fetchrow(PUBLISH, *arguments)
        except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
            # Nothing was ever declared here, so nobody subscribes to anything.
            return [PublishOutcome.UNROUTABLE] * len(messages)
        except asyncpg.DataError as error:
            # The server, or asyncpg before it, says that one of the values is impossible.
            if len(messages) == 1:
                _log.error("publish.impossible", type=messages[0].type, reason=str(error))
                return [PublishOutcome.REFUSED]
            return [(await self._published([message]))[0] for message in messages]
        except asyncio.CancelledError:
            self._drop(connection)
            if cancelled_by_caller():
                raise
            return [PublishOutcome.UNKNOWN] * len(messages)
        except TROUBLE as error:
            outcome = self._outcome_of(error, sent=connection is not None)
            self._drop(connection)
            return [outcome] * len(messages)
        unroutable = set(row["unroutable"]) if row is not None else set()
        return [
            PublishOutcome.UNROUTABLE if message.type in unroutable else PublishOutcome.CONFIRMED
            for message in messages
        ]

    @staticmethod
    def _outcome_of(error: Exception, *, sent: bool) -> PublishOutcome:
        RECONNECTED.labels("publish").inc()
        said_no = isinstance(error, asyncpg.PostgresError) and not isinstance(
            error, _CONNECTION_ENDED
        )
        outcome = PublishOutcome.REFUSED if said_no or not sent else PublishOutcome.UNKNOWN
        _log.warning(
            "publish.failed", outcome=outcome.value, reason=f"{type(error).__name__}: {error}"
        )
        return outcome

    async def _publisher_connection(self) -> Connection:
        connection = self._publisher
        if connection is None or connection.is_closed():
            connection = self._publisher = await open_connection(
                self._url, application_name=f"{self._name} publish", durable=True
            )
        return connection

    def _drop(self, connection: Connection | None) -> None:
        """Gives up a publisher's connection whose state nobody knows."""
        if connection is not None:
            connection.terminate()
            if self._publisher is connection:
                self._publisher = None

    @asynccontextmanager
    async def _borrowed(self) -> AsyncIterator[Connection]:
        """The publisher's connection, for the rare calls that are no publishing."""
        connection: Connection | None = None
        try:
            async with asyncio.timeout(CONNECT_SECONDS + STATEMENT_SECONDS), self._publishing:
                connection = await self._publisher_connection()
                yield connection
        except TROUBLE as error:
            self._drop(connection)
            raise BrokerUnavailableError(f"{type(error).__name__}: {error}") from error

    async def consume(
        self, subscription: Subscription, handle: Handler, *, stopping: asyncio.Event
    ) -> None:
        """See `chassis.broker.Broker.consume`."""
        await Consumer(self._url, self._name, subscription, handle, self._limits, stopping).run()

    async def close(self) -> None:
        """See `chassis.broker.Broker.close`."""
        connection, self._publisher = self._publisher, None
        if connection is not None:
            await close_connection(connection)


def _headers(message: Message) -> str:
    return json.dumps(
        {name: value for name, value in message.headers.items() if not name.startswith("x-")}
    )
