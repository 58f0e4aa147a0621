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

**Schema changes** are the numbered steps in `_SCHEMA`, carried out by `declare` under a
lock, each once. They only add, because the previous release works on the same tables
during a roll-out. Alembic serves the services' own databases; here are three steps at
most, and no service should carry the migrations of a broker that it may not use.

docs/adr/0013 says why this is no library, and what it costs.
"""

from __future__ import annotations

import asyncio
import json
import random
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

import asyncpg
import structlog

from chassis.broker import (
    Broker,
    BrokerUnavailableError,
    DeadLetterRecord,
    Delivery,
    Handler,
    Limits,
    Message,
    PublishOutcome,
    Subscription,
)
from chassis.broker.handling import (
    Bury,
    Forget,
    Handling,
    Recovery,
    SetAside,
    beside,
    cancelled_by_caller,
    forward,
)
from chassis.broker.metrics import RECONNECTED, count_published

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Row = asyncpg.Record
else:
    Connection = asyncpg.Connection
    Row = asyncpg.Record

CONNECT_SECONDS: Final = 5.0
STATEMENT_SECONDS: Final = 5.0

_CHANNEL: Final = "mesh_broker"
_SCHEMA_LOCK: Final = 6_011_957_268
_DUE_ROWS_MAX: Final = 500
_DUE_FALLBACK_SECONDS: Final = 5.0

_log = structlog.get_logger("broker")

# What a broken or unwilling server makes asyncpg raise; its internal error is what a statement
# meets that begins while asyncpg is only just learning that the connection is dead.
_TROUBLE: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)

# The server's word that the statement took no effect, unlike a connection that broke.
_CONNECTION_ENDED: Final = (
    asyncpg.PostgresConnectionError,
    asyncpg.AdminShutdownError,
    asyncpg.CrashShutdownError,
)

_SCHEMA: Final[tuple[str, ...]] = (
    """
    CREATE TABLE mesh_broker.queue (
        id smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        consumer text NOT NULL UNIQUE
    );
    CREATE TABLE mesh_broker.binding (
        type text NOT NULL,
        queue_id smallint NOT NULL REFERENCES mesh_broker.queue,
        PRIMARY KEY (type, queue_id)
    );
    CREATE TABLE mesh_broker.message (
        queue_id smallint NOT NULL,
        id bigint GENERATED ALWAYS AS IDENTITY,
        leased_until timestamptz NOT NULL DEFAULT '-infinity',
        owner bigint NOT NULL DEFAULT 0,
        deliveries smallint NOT NULL DEFAULT 0,
        attempt smallint NOT NULL,
        event_id uuid NOT NULL,
        enqueue_time timestamptz NOT NULL DEFAULT now(),
        first_death_time timestamptz,
        type text NOT NULL,
        headers text NOT NULL,
        body bytea STORAGE EXTERNAL NOT NULL,
        PRIMARY KEY (queue_id, id)
    ) WITH (
        -- Every row is changed once, by its claim: half of a page is kept for that.
        fillfactor = 50,
        toast_tuple_target = 8160,
        -- Every row is soon dead: clear by number, at every round, and do not give pages back
        -- to the file system only to ask for them again.
        autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
    );
    CREATE TABLE mesh_broker.delayed (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        queue_id smallint NOT NULL,
        due_time timestamptz NOT NULL,
        attempt smallint NOT NULL,
        event_id uuid NOT NULL,
        first_death_time timestamptz NOT NULL,
        type text NOT NULL,
        headers text NOT NULL,
        body bytea STORAGE EXTERNAL NOT NULL
    ) WITH (autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);
    CREATE INDEX delayed_due ON mesh_broker.delayed (queue_id, due_time);
    CREATE TABLE mesh_broker.dead_letter (
        queue_id smallint NOT NULL,
        id bigint GENERATED ALWAYS AS IDENTITY,
        attempt smallint NOT NULL,
        event_id uuid NOT NULL,
        first_death_time timestamptz NOT NULL,
        death_time timestamptz NOT NULL DEFAULT now(),
        error_class text NOT NULL,
        error_detail text NOT NULL,
        type text NOT NULL,
        headers text NOT NULL,
        body bytea NOT NULL,
        PRIMARY KEY (queue_id, id)
    );
    """,
)

_DECLARE_QUEUES = """
INSERT INTO mesh_broker.queue (consumer)
SELECT consumer FROM unnest($1::text[]) AS n(consumer)
WHERE NOT EXISTS (SELECT FROM mesh_broker.queue AS q WHERE q.consumer = n.consumer)
"""

_DECLARE_BINDINGS = """
INSERT INTO mesh_broker.binding (type, queue_id)
SELECT n.type, q.id
FROM unnest($1::text[], $2::text[]) AS n(type, consumer)
JOIN mesh_broker.queue AS q USING (consumer)
ON CONFLICT DO NOTHING
"""

# Answers the types among the published ones that nobody subscribes to.
_PUBLISH = f"""
WITH inserted AS (
    INSERT INTO mesh_broker.message (queue_id, event_id, type, headers, body, attempt)
    SELECT b.queue_id, m.event_id, m.type, m.headers, m.body, m.attempt
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::smallint[])
         WITH ORDINALITY AS m(event_id, type, headers, body, attempt, position)
    JOIN mesh_broker.binding AS b USING (type)
    ORDER BY m.position
    RETURNING queue_id
), woken AS (
    SELECT pg_notify('{_CHANNEL}', string_agg(DISTINCT queue_id::text, ','))
    FROM inserted HAVING count(*) > 0
)
SELECT (SELECT count(*) FROM woken) AS woken, array(
    SELECT DISTINCT t FROM unnest($2::text[]) AS t
    WHERE NOT EXISTS (SELECT FROM mesh_broker.binding AS b WHERE b.type = t)
) AS unroutable
"""

# Settles the previous batch and claims the next one in one round trip.
#
# $1 queue, $2 owner, $3 most rows, $4 settled ids, $5 first id to look at, $6 lease seconds.
# Rows that were taken before go alone: were they claimed in company, each death of a process
# that one poisonous row causes would count against its neighbours too, until all of them
# exceeded the delivery limit together.
_SETTLE_AND_CLAIM = """
WITH settled AS (
    DELETE FROM mesh_broker.message
    WHERE queue_id = $1 AND id = ANY($4::bigint[]) AND owner = $2
), ready AS MATERIALIZED (
    SELECT id, deliveries FROM mesh_broker.message
    WHERE queue_id = $1 AND id >= $5 AND leased_until < now() AND id <> ALL($4::bigint[])
    ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED
), edge AS (
    SELECT min(id) AS first, min(id) FILTER (WHERE deliveries > 0) AS again FROM ready
)
UPDATE mesh_broker.message
SET owner = $2, deliveries = deliveries + 1,
    leased_until = now() + make_interval(secs => $6::float8)
WHERE queue_id = $1 AND id = ANY(array(
    SELECT id FROM ready, edge
    WHERE again IS NULL OR id < again OR (id = again AND id = first)))
RETURNING id, event_id, type, headers, body, attempt, deliveries
"""

_SETTLE = """
DELETE FROM mesh_broker.message
WHERE queue_id = $1 AND owner = $2 AND id = ANY($3::bigint[])
"""

_RENEW = """
UPDATE mesh_broker.message SET leased_until = now() + make_interval(secs => $4::float8)
WHERE queue_id = $1 AND owner = $2 AND id = ANY($3::bigint[])
"""

# $3 ids, $4 delays (NULL: a dead letter), $5 error classes, $6 error details.
_FAIL = """
WITH failed AS (
    SELECT * FROM unnest($3::bigint[], $4::float8[], $5::text[], $6::text[])
        AS f(id, delay, error_class, error_detail)
), gone AS (
    DELETE FROM mesh_broker.message
    WHERE queue_id = $1 AND owner = $2 AND id = ANY($3::bigint[])
    RETURNING id, attempt, event_id, first_death_time, type, headers, body
), set_aside AS (
    INSERT INTO mesh_broker.delayed
        (queue_id, due_time, attempt, event_id, first_death_time, type, headers, body)
    SELECT $1, now() + make_interval(secs => delay), attempt + 1, event_id,
           coalesce(first_death_time, now()), type, headers, body
    FROM gone JOIN failed USING (id) WHERE delay IS NOT NULL ORDER BY id
)
INSERT INTO mesh_broker.dead_letter
    (queue_id, attempt, event_id, first_death_time, error_class, error_detail,
     type, headers, body)
SELECT $1, attempt, event_id, coalesce(first_death_time, now()), error_class, error_detail,
       type, headers, body
FROM gone JOIN failed USING (id) WHERE delay IS NULL ORDER BY id
"""

_RETURN_DUE = f"""
WITH due AS (
    DELETE FROM mesh_broker.delayed WHERE id = ANY(array(
        SELECT id FROM mesh_broker.delayed
        WHERE queue_id = $1 AND due_time <= now()
        ORDER BY due_time LIMIT {_DUE_ROWS_MAX} FOR UPDATE SKIP LOCKED))
    RETURNING id, due_time, attempt, event_id, first_death_time, type, headers, body
), returned AS (
    INSERT INTO mesh_broker.message
        (queue_id, attempt, event_id, first_death_time, type, headers, body)
    SELECT $1, attempt, event_id, first_death_time, type, headers, body
    FROM due ORDER BY due_time, id
    RETURNING 1
)
SELECT (SELECT count(*) FROM returned) AS returned,
       (SELECT extract(epoch FROM min(due_time) - now())::float8 FROM mesh_broker.delayed
        WHERE queue_id = $1 AND due_time > now()) AS next_seconds
"""

_DEAD_LETTERS = """
SELECT d.event_id, d.type, d.headers, d.body, d.attempt, d.error_class, d.error_detail,
       d.first_death_time, d.death_time
FROM mesh_broker.dead_letter AS d JOIN mesh_broker.queue AS q ON q.id = d.queue_id
WHERE q.consumer = $1 ORDER BY d.id LIMIT $2
"""

# The tables grow and empty too fast for the planner's statistics, and there is one good plan
# for each statement: by index, made once.
_PLANNING: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}


async def _connect(url: str, *, application_name: str, durable: bool) -> Connection:
    return await asyncpg.connect(
        url,
        timeout=CONNECT_SECONDS,
        command_timeout=STATEMENT_SECONDS * 2,
        server_settings={
            "application_name": application_name,
            # In the server, because a client that is gone leaves its statement running.
            "statement_timeout": f"{STATEMENT_SECONDS:g}s",
            "idle_in_transaction_session_timeout": f"{STATEMENT_SECONDS:g}s",
            "synchronous_commit": "on" if durable else "off",
            **_PLANNING,
        },
    )


async def _declare(connection: Connection, subscriptions: Sequence[Subscription]) -> None:
    async with connection.transaction():
        # Also keeps two declarations from waiting for each other in a circle.
        await connection.execute("SELECT pg_advisory_xact_lock($1)", _SCHEMA_LOCK)
        await connection.execute(
            "CREATE SCHEMA IF NOT EXISTS mesh_broker;"
            "CREATE TABLE IF NOT EXISTS mesh_broker.schema_step ("
            "number int PRIMARY KEY, done_time timestamptz NOT NULL DEFAULT now())"
        )
        done = await connection.fetchval(
            "SELECT coalesce(max(number), 0) FROM mesh_broker.schema_step"
        )
        for number, step in enumerate(_SCHEMA, 1):
            if number > done:
                await connection.execute(step)
                await connection.execute(
                    "INSERT INTO mesh_broker.schema_step (number) VALUES ($1)", number
                )
        await connection.execute(
            _DECLARE_QUEUES, sorted({subscription.consumer for subscription in subscriptions})
        )
        pairs = [
            (name, subscription.consumer)
            for subscription in subscriptions
            for name in subscription.types
        ]
        await connection.execute(
            _DECLARE_BINDINGS, [name for name, _ in pairs], [consumer for _, consumer in pairs]
        )


def _message(row: Row) -> Message:
    return Message(
        event_id=row["event_id"],
        type=row["type"],
        body=row["body"],
        headers=json.loads(row["headers"]),
        attempt=row["attempt"],
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

    async def __aenter__(self) -> Broker:
        """Connects to nothing yet."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        await self.close()

    async def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """See `chassis.broker.Broker.declare`."""
        async with self._borrowed() as connection:
            await _declare(connection, subscriptions)

    async def ping(self) -> None:
        """See `chassis.broker.Broker.ping`."""
        async with self._borrowed() as connection:
            await connection.fetchval("SELECT 1")

    async def dead_letters(self, consumer: str, *, limit: int = 100) -> list[DeadLetterRecord]:
        """See `chassis.broker.Broker.dead_letters`."""
        async with self._borrowed() as connection:
            try:
                rows = await connection.fetch(_DEAD_LETTERS, consumer, limit)
            except (asyncpg.UndefinedTableError, asyncpg.InvalidSchemaNameError):
                return []
        return [
            DeadLetterRecord(
                message=_message(row),
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
                row = await connection.fetchrow(_PUBLISH, *arguments)
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
        except _TROUBLE as error:
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
            connection = self._publisher = await _connect(
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
        except _TROUBLE as error:
            self._drop(connection)
            raise BrokerUnavailableError(f"{type(error).__name__}: {error}") from error

    async def consume(
        self, subscription: Subscription, handle: Handler, *, stopping: asyncio.Event
    ) -> None:
        """See `chassis.broker.Broker.consume`."""
        await _Consumer(self._url, self._name, subscription, handle, self._limits, stopping).run()

    async def close(self) -> None:
        """See `chassis.broker.Broker.close`."""
        connection, self._publisher = self._publisher, None
        if connection is not None:
            await _closed(connection)


def _headers(message: Message) -> str:
    return json.dumps(
        {name: value for name, value in message.headers.items() if not name.startswith("x-")}
    )


async def _closed(connection: Connection) -> None:
    try:
        await connection.close(timeout=2.0)
    except _TROUBLE as error:
        _log.debug("connection.lost_while_closing", reason=str(error))


class _Consumer:
    """One `consume` call: its claims, over as many connections as it takes."""

    def __init__(
        self,
        url: str,
        name: str,
        subscription: Subscription,
        handle: Handler,
        limits: Limits,
        stopping: asyncio.Event,
    ) -> None:
        self._url = url
        self._name = name
        self._subscription = subscription
        self._handling = Handling(subscription.consumer, handle, limits)
        self._limits = limits
        self._stopping = stopping
        self._recovery = Recovery(subscription.consumer, limits.stuck_seconds_max)
        self._owner = secrets.randbits(62)
        self._queue_id = 0
        self._wake = asyncio.Event()
        # asyncpg runs one statement at a time; the renewal of leases is a second user.
        self._using = asyncio.Lock()
        self._leased: list[int] = []
        # Handled, and not yet deleted: kept over a lost connection, so that the next one can
        # still settle them in time.
        self._settled: list[int] = []
        self._next_full_look = 0.0
        self._next_due = 0.0

    async def run(self) -> None:
        """Consumes until told to stop; see `chassis.broker.Broker.consume`."""
        async with beside(forward(self._stopping, self._wake)):
            while True:
                connection: Connection | None = None
                try:
                    connection = await _connect(
                        self._url, application_name=f"{self._name} consume", durable=False
                    )
                    await self._consume_over(connection)
                except _TROUBLE as error:
                    trouble = error
                else:
                    return
                finally:
                    if connection is not None:
                        await _closed(connection)
                if self._stopping.is_set():
                    return
                await self._recovery.pause(
                    reached=connection is not None, why=trouble, stopping=self._stopping
                )

    async def _consume_over(self, connection: Connection) -> None:
        await _declare(connection, [self._subscription])
        self._queue_id = await connection.fetchval(
            "SELECT id FROM mesh_broker.queue WHERE consumer = $1", self._subscription.consumer
        )
        await connection.add_listener(_CHANNEL, self._on_notification)
        self._next_due = 0.0
        first_id = 0
        async with beside(self._renew_leases(connection)):
            while True:
                self._wake.clear()
                if self._stopping.is_set():
                    if self._settled:
                        await self._settle(connection)
                    return
                if asyncio.get_running_loop().time() >= self._next_due:
                    await self._return_due(connection)
                rows = await self._claim(connection, first_id)
                self._recovery.consuming()
                if rows:
                    await self._handle(connection, rows)
                    first_id = self._first_id_after(rows)
                elif first_id:
                    first_id = 0
                else:
                    await self._rest()

    def _first_id_after(self, rows: Sequence[Row]) -> int:
        """Where the next look at the queue begins: 0, or the last batch while there is much.

        The entries of settled rows stay in the index until they are vacuumed, and a look steps
        over all of them. A consumer that is busy therefore begins where its last batch did, and
        looks from the start only now and then: for rows whose publisher was slow to commit, and
        for those that another consumer gave up.
        """
        now = asyncio.get_running_loop().time()
        if len(rows) < self._subscription.batch_size or now >= self._next_full_look:
            self._next_full_look = now + self._limits.poll_seconds
            return 0
        first: int = rows[0]["id"]
        return first

    def _on_notification(self, _connection: Any, _pid: int, _channel: str, payload: Any) -> None:
        if str(self._queue_id) in str(payload).split(","):
            self._wake.set()

    async def _rest(self) -> None:
        """Waits for a notification, the next poll, or what is due, whichever comes first."""
        poll = self._limits.poll_seconds * random.uniform(0.8, 1.2)
        until_due = self._next_due - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, min(poll, until_due))):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _claim(self, connection: Connection, first_id: int) -> list[Row]:
        async with self._using:
            rows = await connection.fetch(
                _SETTLE_AND_CLAIM,
                self._queue_id,
                self._owner,
                self._subscription.batch_size,
                self._settled,
                first_id,
                self._limits.lease_seconds,
            )
        self._settled = []
        rows.sort(key=_id_of)
        return rows

    async def _handle(self, connection: Connection, rows: Sequence[Row]) -> None:
        deliveries = [Delivery(_message(row), row["deliveries"] - 1) for row in rows]
        self._leased = [row["id"] for row in rows]
        try:
            disposals = await self._handling.dispose(deliveries)
        finally:
            self._leased = []
        failed: list[tuple[int, SetAside | Bury]] = []
        for row, disposal in zip(rows, disposals, strict=True):
            if isinstance(disposal, Forget):
                self._settled.append(row["id"])
            else:
                failed.append((row["id"], disposal))
        if failed:
            await self._fail(connection, failed)

    async def _fail(
        self, connection: Connection, failed: Sequence[tuple[int, SetAside | Bury]]
    ) -> None:
        tiers = self._limits.retry_tiers_seconds
        delays = [
            tiers[disposal.tier] if isinstance(disposal, SetAside) else None
            for _, disposal in failed
        ]
        buried = [disposal if isinstance(disposal, Bury) else None for _, disposal in failed]
        now = asyncio.get_running_loop().time()
        self._next_due = min([self._next_due, *(now + delay for delay in delays if delay)])
        async with self._using:
            await connection.execute(
                _FAIL,
                self._queue_id,
                self._owner,
                [message_id for message_id, _ in failed],
                delays,
                [bury and bury.error_class for bury in buried],
                [bury and bury.error_detail for bury in buried],
            )

    async def _settle(self, connection: Connection) -> None:
        async with self._using:
            await connection.execute(_SETTLE, self._queue_id, self._owner, self._settled)
        self._settled = []

    async def _return_due(self, connection: Connection) -> None:
        """Moves what is due back into the queue, and notes when to do so next.

        Other processes' rows are found by looking now and then; they look for them too.
        """
        async with self._using:
            row = await connection.fetchrow(_RETURN_DUE, self._queue_id)
        wait = _DUE_FALLBACK_SECONDS
        if row is not None:
            if row["returned"] == _DUE_ROWS_MAX:
                wait = 0.0
            elif row["next_seconds"] is not None:
                wait = min(wait, row["next_seconds"])
        self._next_due = asyncio.get_running_loop().time() + wait

    async def _renew_leases(self, connection: Connection) -> None:
        """Keeps the claim on what is being handled, should that take long."""
        while True:
            await asyncio.sleep(self._limits.lease_seconds / 3)
            if not self._leased:
                continue
            try:
                async with self._using:
                    await connection.execute(
                        _RENEW,
                        self._queue_id,
                        self._owner,
                        self._leased,
                        self._limits.lease_seconds,
                    )
            except _TROUBLE as error:
                # The consumer itself meets the broken connection as soon as it uses it.
                _log.warning("lease.not_renewed", reason=f"{type(error).__name__}: {error}")
                return


def _id_of(row: Row) -> int:
    identity: int = row["id"]
    return identity
