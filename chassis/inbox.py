"""The inbox: an event has its effect once, however often it is delivered.

A consumer writes the event's id in the transaction of the effect; a redelivery finds
it there and is acknowledged without one. `EventConsumer` is the loop around that: it
decodes a batch, hands it to the service, isolates an event that fails from its
neighbours, and turns errors into the broker's verdicts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar
from uuid import UUID

import sqlalchemy as sa
import structlog
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from prometheus_client import Counter
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.broker import Ack, Broker, DeadLetter, Delivery, Retry, Subscription, Verdict
from chassis.context import Cause, entered
from chassis.database import AnyConnection, Database
from chassis.errors import ConflictError, OverloadedError, ServiceError, UnavailableError
from chassis.events import Event, EventTypes

RETENTION_DAYS = 14

C = TypeVar("C", bound=Cause)

_log = structlog.get_logger("inbox")
_tracer = trace.get_tracer("chassis.inbox")
_traces = TraceContextTextMapPropagator()
_EVENTS = Counter(
    "mesh_inbox_events_total", "Events consumed, by outcome.", ["consumer", "outcome"]
)


def inbox_table(metadata: sa.MetaData) -> sa.Table:
    """The inbox of a service, to stand in its `tables`."""
    table = sa.Table(
        "inbox",
        metadata,
        sa.Column("consumer", sa.Text, primary_key=True),
        sa.Column("event_id", PgUuid(as_uuid=True), primary_key=True),
        sa.Column("aggregate", sa.Text, nullable=False),
        sa.Column("aggregate_version", sa.BigInteger, nullable=False),
        sa.Column(
            "receive_time",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.func.now(),
        ),
        postgresql_with={"autovacuum_vacuum_insert_scale_factor": "0.05"},
    )
    sa.Index("inbox_received", table.c.receive_time, postgresql_using="brin")
    return table


_RECORD = """
INSERT INTO inbox (consumer, event_id, aggregate, aggregate_version)
SELECT $1, n.event_id, n.aggregate, n.aggregate_version
FROM unnest($2::uuid[], $3::text[], $4::bigint[]) AS n(event_id, aggregate, aggregate_version)
ORDER BY n.event_id
ON CONFLICT DO NOTHING RETURNING event_id
"""

_DROP_OLD = f"""
DELETE FROM inbox WHERE (consumer, event_id) IN (
    SELECT consumer, event_id FROM inbox
    WHERE receive_time < now() - interval '{RETENTION_DAYS} days' LIMIT $1)
"""


async def first_seen(connection: AnyConnection, consumer: str, events: Sequence[C]) -> list[C]:
    """Records events in the inbox and answers those that had not been there.

    Waits for a concurrent transaction that is recording the same event. An event
    that stands in `events` twice is answered once.
    """
    rows = await connection.fetch(
        _RECORD,
        consumer,
        [event.event_id for event in events],
        [event.aggregate for event in events],
        [event.version for event in events],
    )
    fresh: set[UUID] = {row["event_id"] for row in rows}
    answer = []
    for event in events:
        if event.event_id in fresh:
            fresh.discard(event.event_id)
            answer.append(event)
    _EVENTS.labels(consumer, "duplicate").inc(len(events) - len(answer))
    return answer


async def drop_old(database: Database) -> int:
    """Deletes entries older than 14 days; says how many.

    That is longer than an outbox keeps its rows (7 days) plus the time in which dead
    letters are played again, so that a late duplicate still finds its entry.
    """
    return await database.delete_all(_DROP_OLD)


class EventConsumer:
    """Consumes a service's events, batch by batch.

    Args:
        subscription: The queue, named as the inbox's consumer is.
        types: The events the service understands.
        handle: Handles a batch in one transaction, the inbox's entries included. It
            raises when some of the batch did not take effect; what did is in the inbox,
            and is not done again when the events are handled one by one.
        in_process_retries: How often a race or a lost connection is tried again
            before the event goes to a retry queue.
    """

    def __init__(
        self,
        subscription: Subscription,
        types: EventTypes,
        handle: Callable[[Sequence[Event]], Awaitable[None]],
        *,
        in_process_retries: int = 2,
    ) -> None:
        self.subscription = subscription
        self._types = types
        self._handle = handle
        self._in_process_retries = in_process_retries

    async def run(self, broker: Broker, stopping: asyncio.Event) -> None:
        """Consumes until told to stop."""
        await broker.consume(self.subscription, self.settle, stopping=stopping)

    async def settle(self, deliveries: Sequence[Delivery]) -> list[Verdict]:
        """Handles deliveries and answers the broker's verdict on each, in their order."""
        verdicts: dict[int, Verdict] = {}
        events: list[tuple[int, Event]] = []
        for position, delivery in enumerate(deliveries):
            try:
                events.append((position, self._types.decode(delivery.message.body)))
            except ServiceError as error:
                verdicts[position] = self._refused(error, str(delivery.message.event_id))
        if events:
            verdicts.update(await self._handled(events))
        return [verdicts[position] for position in range(len(deliveries))]

    async def _handled(self, events: Sequence[tuple[int, Event]]) -> dict[int, Verdict]:
        consumer = self.subscription.consumer
        try:
            with entered(events[0][1].context), self._span([event for _, event in events]):
                await self._with_retries([event for _, event in events])
        except (UnavailableError, OverloadedError) as error:
            # One by one they would only meet the same outage again, or the same crowd.
            _EVENTS.labels(consumer, "retried").inc(len(events))
            _log.warning("events.retried", consumer=consumer, reason=error.reason)
            return {position: Retry(error.reason) for position, _ in events}
        except Exception as error:  # noqa: BLE001 - the broker's verdict says what becomes of it
            if len(events) == 1:
                position, event = events[0]
                return {position: self._refused(error, str(event.event_id), event.type)}
            verdicts: dict[int, Verdict] = {}
            for alone in events:
                verdicts.update(await self._handled([alone]))
            return verdicts
        _EVENTS.labels(consumer, "handled").inc(len(events))
        return {position: Ack() for position, _ in events}

    def _span(self, events: Sequence[Event]) -> AbstractContextManager[object]:
        """A span that goes on from what the events' producers did, where spans are made.

        One event is a step of its trace; several, which share a transaction, are links.
        """
        if not isinstance(trace.get_tracer_provider(), TracerProvider):
            return nullcontext()
        origins = [
            trace.get_current_span(
                _traces.extract({"traceparent": event.traceparent})
            ).get_span_context()
            for event in events
            if event.traceparent
        ]
        return _tracer.start_as_current_span(
            f"consume {self.subscription.consumer}",
            context=(
                trace.set_span_in_context(trace.NonRecordingSpan(origins[0]))
                if len(origins) == 1
                else None
            ),
            kind=trace.SpanKind.CONSUMER,
            links=[trace.Link(origin) for origin in origins] if len(origins) > 1 else None,
        )

    async def _with_retries(self, events: Sequence[Event]) -> None:
        for remaining in range(self._in_process_retries, -1, -1):
            try:
                return await self._handle(events)
            except (ConflictError, UnavailableError):
                if remaining == 0:
                    raise
                await asyncio.sleep(0.1 * (self._in_process_retries - remaining + 1))

    def _refused(self, error: Exception, event_id: str, type_name: str = "") -> Verdict:
        consumer = self.subscription.consumer
        if isinstance(error, ServiceError):
            if error.retryable:
                _EVENTS.labels(consumer, "retried").inc()
                return Retry(f"{error.reason}: {error.message}")
            _EVENTS.labels(consumer, "dead").inc()
            _log.error(
                "event.dead", consumer=consumer, event_id=event_id, type=type_name,
                reason=error.reason, detail=error.message,
            )  # fmt: skip
            return DeadLetter(error.reason, error.message)
        _EVENTS.labels(consumer, "retried").inc()
        _log.error(
            "event.failed", consumer=consumer, event_id=event_id, type=type_name, exc_info=error
        )
        return Retry(f"{type(error).__name__}: {error}")
