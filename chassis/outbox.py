"""The outbox: an event is published if, and only if, the change it tells of is committed.

A change writes its event's row in its own transaction; the relay publishes rows and
marks them sent once the broker has confirmed. The rules are those of
docs/reliability.md: rows are found by their status, never by a cursor; a claim is
committed before anything is published, so no transaction waits for the broker; an
unknown outcome is published again under the same event id; events of one aggregate go
out in the order of their versions, because a row waits for its unsent predecessors.

The writing transaction may claim fresh rows for its own process's relay and hand them
over in memory, which spares the claim's round trip (docs/adr/0007). Such a claim is
short: should the process die, another relay finds the rows after ten seconds.
"""

from __future__ import annotations

import random
from collections import Counter as Counts
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa
import structlog
from prometheus_client import Counter, Gauge
from sqlalchemy.dialects.postgresql import BYTEA
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.broker import Broker, Message, PublishOutcome
from chassis.database import AnyConnection, Database
from chassis.events import Event
from chassis.ids import NewId
from chassis.worker import Worker

CONTENT_TYPE = "application/x-protobuf; messageType=ordermesh.common.v1.EventEnvelope"
HANDOVER_SECONDS = 10
CLAIM_SECONDS = 30
ATTEMPTS_MAX = 50
PARK_HOURS = 24
BACKOFF_MAX_SECONDS = 60
RETENTION_DAYS = 7

_log = structlog.get_logger("outbox")
_PUBLISHED = Counter(
    "mesh_outbox_published_total", "Events given to the broker, by outcome.", ["outcome"]
)
_UNSENT = Gauge("mesh_outbox_unsent", "Events that wait to be published.")
_OLDEST = Gauge("mesh_outbox_oldest_unsent_seconds", "Age of the oldest event that waits.")
_PARKED = Gauge(
    "mesh_outbox_parked", "Events given up after a day of attempts, until a person acts."
)


def outbox_table(metadata: sa.MetaData) -> sa.Table:
    """The outbox of a service, to stand in its `tables`."""
    table = sa.Table(
        "outbox",
        metadata,
        sa.Column("event_id", PgUuid(as_uuid=True), primary_key=True),
        sa.Column("merchant", sa.Text, nullable=False),
        sa.Column("aggregate", sa.Text, nullable=False),
        sa.Column("aggregate_version", sa.BigInteger, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("body", BYTEA, nullable=False),
        sa.Column("correlation_id", sa.Text, nullable=False),
        sa.Column("traceparent", sa.Text, nullable=False),
        sa.Column(
            "create_time",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.func.now(),
        ),
        sa.Column("claim", PgUuid(as_uuid=True)),
        sa.Column("claimed_until", sa.DateTime(timezone=True)),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column(
            "next_attempt_time",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.func.now(),
        ),
        sa.Column("last_outcome", sa.Text),
        sa.Column("sent_time", sa.DateTime(timezone=True)),
        sa.Column("park_time", sa.DateTime(timezone=True)),
        sa.UniqueConstraint("aggregate", "aggregate_version", name="outbox_version"),
        postgresql_with={
            "autovacuum_vacuum_scale_factor": "0.01",
            "autovacuum_vacuum_insert_scale_factor": "0.05",
        },
    )
    sa.Index(
        "outbox_unsent",
        table.c.aggregate,
        table.c.aggregate_version,
        postgresql_where=table.c.sent_time.is_(None),
    )
    # In the order of the claim, which so reads what it takes and not all that waits.
    sa.Index(
        "outbox_waiting",
        table.c.create_time,
        postgresql_where=sa.and_(table.c.sent_time.is_(None), table.c.park_time.is_(None)),
    )
    sa.Index("outbox_sent", table.c.sent_time, postgresql_where=table.c.sent_time.is_not(None))
    return table


_STAGE = f"""
INSERT INTO outbox (event_id, merchant, aggregate, aggregate_version, type, body,
                    correlation_id, traceparent, claim, claimed_until)
SELECT n.event_id, n.merchant, n.aggregate, n.aggregate_version, n.type, n.body,
       n.correlation_id, n.traceparent,
       CASE WHEN free THEN $9::uuid END,
       CASE WHEN free THEN now() + interval '{HANDOVER_SECONDS} seconds' END
FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::bytea[],
            $7::text[], $8::text[], $10::boolean[])
     AS n(event_id, merchant, aggregate, aggregate_version, type, body,
          correlation_id, traceparent, first)
CROSS JOIN LATERAL (
    SELECT $9::uuid IS NOT NULL AND n.first AND NOT EXISTS (
        SELECT FROM outbox AS earlier
        WHERE earlier.aggregate = n.aggregate AND earlier.sent_time IS NULL) AS free) AS f
RETURNING event_id, claim IS NOT NULL AS handed_over
"""

# As a subquery of the update, `due` may be run anew for each row that it is compared with,
# and each time find further rows that are not claimed yet: more than the limit altogether.
_CLAIM = f"""
WITH due AS MATERIALIZED (
    SELECT event_id FROM outbox AS o
    WHERE sent_time IS NULL AND park_time IS NULL AND next_attempt_time <= now()
      AND (claimed_until IS NULL OR claimed_until < now())
      AND NOT EXISTS (
          SELECT FROM outbox AS earlier
          WHERE earlier.aggregate = o.aggregate AND earlier.sent_time IS NULL
            AND earlier.aggregate_version < o.aggregate_version)
    ORDER BY create_time LIMIT $2 FOR UPDATE SKIP LOCKED
)
UPDATE outbox AS o
SET claim = $1, claimed_until = now() + interval '{CLAIM_SECONDS} seconds'
FROM due WHERE o.event_id = due.event_id
RETURNING o.event_id, o.type, o.body, o.correlation_id, o.traceparent
"""

_SENT = """
UPDATE outbox SET sent_time = now(), claim = NULL, claimed_until = NULL, attempts = attempts + 1
WHERE event_id = ANY($1::uuid[]) AND claim = $2
"""

_NOT_SENT = f"""
UPDATE outbox SET claim = NULL, claimed_until = NULL, attempts = attempts + 1,
    last_outcome = n.outcome,
    next_attempt_time = now() + make_interval(
        secs => least(power(2, least(attempts, 10)), {BACKOFF_MAX_SECONDS}) * n.jitter),
    park_time = CASE WHEN attempts + 1 >= {ATTEMPTS_MAX}
                      AND create_time < now() - interval '{PARK_HOURS} hours' THEN now() END
FROM unnest($1::uuid[], $2::text[], $4::float8[]) AS n(event_id, outcome, jitter)
WHERE outbox.event_id = n.event_id AND outbox.claim = $3
"""

_BACKLOG = """
SELECT count(*) FILTER (WHERE park_time IS NULL) AS unsent,
       count(*) FILTER (WHERE park_time IS NOT NULL) AS parked,
       coalesce(extract(epoch FROM now() - min(create_time)
                        FILTER (WHERE park_time IS NULL)), 0)::float8 AS oldest
FROM outbox WHERE sent_time IS NULL
"""

_DROP_OLD = f"""
DELETE FROM outbox WHERE event_id IN (
    SELECT event_id FROM outbox
    WHERE sent_time < now() - interval '{RETENTION_DAYS} days' LIMIT $1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutboxRow:
    """One event that waits to be published, claimed by this process."""

    event_id: UUID
    type: str
    body: bytes
    correlation_id: str
    traceparent: str


class Outbox:
    """Stages events inside transactions and relays them to the broker afterwards.

    Args:
        database: The service's own database.
        broker: Where events go.
        new_id: Makes the token of this process's claims.
    """

    def __init__(self, database: Database, broker: Broker, *, new_id: NewId) -> None:
        self._database = database
        self._broker = broker
        # One token for the process: a row that it claims again after a lease ran out is
        # its own all the same.
        self._claim_token = new_id()
        self.relay: Worker[OutboxRow] = Worker(
            "outbox-relay",
            claim=self._claim,
            perform=self._publish,
            batch_max=100,
            poll_seconds=0.2,
            backlog_max=4096,
        )

    async def stage(self, connection: AnyConnection, events: Sequence[Event]) -> list[OutboxRow]:
        """Writes events into the transaction that `connection` is in.

        Answers the rows that this process has claimed by it: give them to
        `relay.offer` once the transaction is committed.
        """
        if not events:
            return []
        claim = self._claim_token if self.relay.running else None
        bodies = [event.encoded() for event in events]
        # Of one aggregate's events only the first may go out at once.
        heads = {event.aggregate: event.event_id for event in reversed(events)}
        first = [heads[event.aggregate] == event.event_id for event in events]
        returned = await connection.fetch(
            _STAGE,
            [event.event_id for event in events],
            [event.merchant for event in events],
            [event.aggregate for event in events],
            [event.version for event in events],
            [event.type for event in events],
            bodies,
            [event.correlation_id for event in events],
            [event.traceparent for event in events],
            claim,
            first,
        )
        if claim is None:
            return []
        handed_over = {row["event_id"] for row in returned if row["handed_over"]}
        return [
            OutboxRow(
                event_id=event.event_id,
                type=event.type,
                body=body,
                correlation_id=event.correlation_id,
                traceparent=event.traceparent,
            )
            for event, body in zip(events, bodies, strict=True)
            if event.event_id in handed_over
        ]

    async def _claim(self, limit: int) -> list[OutboxRow]:
        async with self._database.reading() as connection:
            rows = await connection.fetch(_CLAIM, self._claim_token, limit)
        # UPDATE … RETURNING answers in no order; versions of one aggregate never
        # stand in one batch, so only fairness asks for the order of creation.
        return [
            OutboxRow(
                event_id=row["event_id"],
                type=row["type"],
                body=row["body"],
                correlation_id=row["correlation_id"],
                traceparent=row["traceparent"],
            )
            for row in rows
        ]

    async def _publish(self, rows: Sequence[OutboxRow]) -> None:
        outcomes = await self._broker.publish(
            [
                Message(
                    event_id=row.event_id,
                    type=row.type,
                    body=row.body,
                    headers={
                        "content-type": CONTENT_TYPE,
                        "correlation-id": row.correlation_id,
                        "traceparent": row.traceparent,
                    },
                )
                for row in rows
            ]
        )
        for outcome, times in Counts(outcomes).items():
            _PUBLISHED.labels(outcome.name).inc(times)
        async with self._database.reading() as connection:
            await _settle(connection, self._claim_token, list(zip(rows, outcomes, strict=True)))

    async def measure(self) -> None:
        """Brings the metrics of the backlog up to date."""
        async with self._database.reading() as connection:
            row = await connection.fetchrow(_BACKLOG)
        if row is not None:
            _UNSENT.set(row["unsent"])
            _PARKED.set(row["parked"])
            _OLDEST.set(row["oldest"])

    async def drop_old(self) -> int:
        """Deletes rows that were sent over seven days ago; says how many."""
        return await self._database.delete_all(_DROP_OLD)

    async def sweep(self) -> None:
        """Measures the backlog and drops old rows."""
        await self.measure()
        await self.drop_old()


async def _settle(
    connection: AnyConnection,
    claim: UUID,
    settled: Sequence[tuple[OutboxRow, PublishOutcome]],
) -> None:
    sent = [row.event_id for row, outcome in settled if outcome is PublishOutcome.CONFIRMED]
    if sent:
        await connection.execute(_SENT, sent, claim)
    failed = [(row, outcome) for row, outcome in settled if outcome is not PublishOutcome.CONFIRMED]
    if failed:
        _log.warning(
            "publish.failed",
            events=len(failed),
            outcomes=sorted({outcome.name for _, outcome in failed}),
            types=sorted({row.type for row, _ in failed}),
        )
        await connection.execute(
            _NOT_SENT,
            [row.event_id for row, _ in failed],
            [outcome.name for _, outcome in failed],
            claim,
            # Full jitter, so that relays do not come back all at once.
            [random.uniform(0.1, 1.0) for _ in failed],
        )
