"""Recipients and notifications in PostgreSQL.

A batch of events is one transaction: the inbox, the recipients it introduces and the
notifications it asks for, each by one statement that writes all rows in the order of
their keys. While this process sends mails, that transaction also claims what it queues,
and the mails are handed over in memory. Everything else is found by polling with SKIP
LOCKED. Results share transactions (`chassis.group_commit`).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Final
from uuid import UUID

from prometheus_client import Gauge

from chassis.context import CallContext
from chassis.database import AnyConnection, Database
from chassis.ids import NewId
from chassis.inbox import first_seen
from chassis.money import Money
from notify_svc.commands import (
    Audience,
    Compose,
    Introduction,
    Line,
    News,
    Notification,
    Recipient,
    State,
)
from notify_svc.delivery import Outgoing, Settlement

CONSUMER: Final = "notification"
GIVE_UP_HOURS: Final = 72
"""A weekend, and a day to put right on Monday what kept the mail from going."""
BACKOFF_SECONDS: Final = 2
BACKOFF_MAX_SECONDS: Final = 900

_WAITING = Gauge("mesh_notifications_waiting", "Notifications that wait to be sent.")
_OLDEST = Gauge("mesh_notifications_oldest_waiting_seconds", "Age of the oldest that waits.")

_FIND = """
SELECT r.* FROM recipients AS r
JOIN unnest($1::text[], $2::uuid[]) AS g(merchant, order_id) USING (merchant, order_id)
"""

_INTRODUCE = """
INSERT INTO recipients (merchant, order_id, email, customer_id, locale, client_order_ref,
                        currency_code, total_minor_units, lines, order_time)
SELECT g.merchant, g.order_id, g.email, g.customer_id, g.locale, g.client_order_ref,
       g.currency_code, g.total_minor_units, g.lines::jsonb, g.order_time
FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
            $7::text[], $8::bigint[], $9::text[], $10::timestamptz[])
     AS g(merchant, order_id, email, customer_id, locale, client_order_ref,
          currency_code, total_minor_units, lines, order_time)
ORDER BY g.merchant, g.order_id
ON CONFLICT DO NOTHING
"""

# The first `$19` of the rows are claimed for the process that writes them.
_QUEUE = """
INSERT INTO notifications (merchant, notification_id, order_id, event_id, channel, audience,
                           template, locale, recipient, recipient_hash, currency_code,
                           minor_units, payment_state, detail, occur_time, correlation_id,
                           traceparent, state, attempts, create_time, claim, due_time)
SELECT g.merchant, g.notification_id, g.order_id, g.event_id, g.channel, g.audience,
       g.template, g.locale, g.recipient, g.recipient_hash, g.currency_code,
       g.minor_units, g.payment_state, g.detail, g.occur_time, g.correlation_id,
       g.traceparent,
       CASE WHEN g.position <= $19 THEN 'SENDING' ELSE 'QUEUED' END,
       CASE WHEN g.position <= $19 THEN 1 ELSE 0 END,
       now(),
       CASE WHEN g.position <= $19 THEN $18::uuid END,
       CASE WHEN g.position <= $19 THEN now() + make_interval(secs => $20) ELSE now() END
FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[],
            $8::text[], $9::text[], $10::bytea[], $11::text[], $12::bigint[], $13::text[],
            $14::text[], $15::timestamptz[], $16::text[], $17::text[]) WITH ORDINALITY
     AS g(merchant, notification_id, order_id, event_id, channel, audience, template, locale,
          recipient, recipient_hash, currency_code, minor_units, payment_state, detail,
          occur_time, correlation_id, traceparent, position)
ORDER BY g.merchant, g.event_id, g.recipient_hash, g.channel, g.template
ON CONFLICT DO NOTHING
RETURNING notification_id, create_time, claim IS NOT NULL AS claimed
"""

# As a subquery of the update, `due` may be run anew for each row that it is compared with,
# and each time find further rows that are not claimed yet: more than the limit altogether.
_CLAIM = """
WITH due AS MATERIALIZED (
    SELECT merchant, notification_id FROM notifications
    WHERE state IN ('QUEUED', 'SENDING', 'RETRYING') AND due_time <= now()
    ORDER BY due_time LIMIT $2 FOR UPDATE SKIP LOCKED
), claimed AS (
    UPDATE notifications AS n SET state = 'SENDING', attempts = attempts + 1, claim = $1,
                                  due_time = now() + make_interval(secs => $3)
    FROM due WHERE n.merchant = due.merchant AND n.notification_id = due.notification_id
    RETURNING n.*
)
SELECT c.*, r.order_id IS NOT NULL AS known, r.email, r.customer_id, r.locale AS asked_locale,
       r.client_order_ref, r.currency_code AS total_currency_code, r.total_minor_units,
       r.lines, r.order_time
FROM claimed AS c LEFT JOIN recipients AS r USING (merchant, order_id)
"""

_SETTLE = f"""
UPDATE notifications AS n
SET state = CASE WHEN s.state = 'RETRYING'
                      AND n.create_time < now() - interval '{GIVE_UP_HOURS} hours'
                 THEN 'DEAD' ELSE s.state END,
    failure_reason = s.failure_reason,
    send_time = CASE WHEN s.state = 'SENT' THEN now() END,
    due_time = now() + make_interval(secs => s.jitter * least(
        {BACKOFF_MAX_SECONDS}, {BACKOFF_SECONDS} * 2 ^ least(n.attempts - 1, 20))),
    claim = NULL
FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::float8[])
     AS s(merchant, notification_id, claim, state, failure_reason, jitter)
WHERE n.merchant = s.merchant AND n.notification_id = s.notification_id AND n.claim = s.claim
RETURNING n.notification_id, n.state
"""

_BACKLOG = """
SELECT count(*) AS waiting,
       coalesce(extract(epoch FROM now() - min(create_time)), 0)::float8 AS oldest
FROM notifications WHERE state IN ('QUEUED', 'SENDING', 'RETRYING')
"""


class PostgresNotifications:
    """The service's `NotificationStore` and `DeliveryStore`.

    Args:
        database: The service's own database.
        new_id: Makes the tokens of claims.
    """

    def __init__(self, database: Database, *, new_id: NewId) -> None:
        self._database = database
        self._new_id = new_id
        self._room: Callable[[], int] = lambda: 0
        self._offer: Callable[[Sequence[Outgoing]], None] = lambda _: None
        self._lease_seconds = 0.0

    def hand_over_to(
        self,
        offer: Callable[[Sequence[Outgoing]], None],
        *,
        room: Callable[[], int],
        lease_seconds: float,
    ) -> None:
        """Has later transactions claim what they queue, as long as there is room for it.

        Args:
            offer: Takes what a committed transaction has claimed.
            room: How much may be claimed right now.
            lease_seconds: How long such a claim holds.
        """
        self._offer, self._room, self._lease_seconds = offer, room, lease_seconds

    async def record(
        self, introductions: Sequence[Introduction], news: Sequence[News], compose: Compose
    ) -> Sequence[News]:
        """Notes what is new and queues what it asks for; answers the news it left out."""
        # Taken before the transaction begins, so our clock ends the lease first.
        lease_end = asyncio.get_running_loop().time() + self._lease_seconds
        async with self._database.transaction() as connection:
            known = await _find(connection, news)
            introduced = {_key(i.recipient): i.recipient for i in introductions}
            ready = [item for item in news if _key(item) in known or _key(item) in introduced]
            causes = [i.cause for i in introductions] + [item.cause for item in ready]
            fresh = {cause.event_id for cause in await first_seen(connection, CONSUMER, causes)}
            await _introduce(
                connection, [i.recipient for i in introductions if i.cause.event_id in fresh]
            )
            queued: list[tuple[Notification, Recipient]] = []
            for item in ready:
                if item.cause.event_id in fresh:
                    fresh.discard(item.cause.event_id)  # the batch may hold it twice
                    # What is stored comes first: the customer may have been erased since
                    # OrderCreated was sent.
                    recipient = known.get(_key(item)) or introduced[_key(item)]
                    queued.extend((made, recipient) for made in compose(item, recipient))
            claimed = await self._queue(connection, queued, lease_end)
        self._offer(claimed)
        return [item for item in news if _key(item) not in known and _key(item) not in introduced]

    async def _queue(
        self,
        connection: AnyConnection,
        queued: Sequence[tuple[Notification, Recipient]],
        lease_end: float,
    ) -> list[Outgoing]:
        """Writes notifications; answers those that this process has claimed by it."""
        if not queued:
            return []
        claim = self._new_id()
        made = [notification for notification, _ in queued]
        columns: list[list[Any]] = [
            [n.news.merchant for n in made],
            [n.notification_id for n in made],
            [n.news.order_id for n in made],
            [n.news.cause.event_id for n in made],
            [n.channel.name for n in made],
            [n.audience.name for n in made],
            [n.template for n in made],
            [n.locale for n in made],
            [n.recipient for n in made],
            [n.recipient_hash for n in made],
            [n.news.amount.currency_code for n in made],
            [n.news.amount.minor_units for n in made],
            [n.news.payment_state for n in made],
            [n.news.detail for n in made],
            [n.news.occur_time for n in made],
            [n.news.cause.context.correlation_id for n in made],
            [n.news.cause.context.traceparent for n in made],
        ]
        rows = await connection.fetch(_QUEUE, *columns, claim, self._room(), self._lease_seconds)
        create_times = {
            row["notification_id"]: row["create_time"] for row in rows if row["claimed"]
        }
        return [
            Outgoing(
                merchant=n.news.merchant,
                notification_id=n.notification_id,
                order_id=n.news.order_id,
                event_id=n.news.cause.event_id,
                audience=n.audience,
                template=n.template,
                locale=n.locale,
                amount=n.news.amount,
                payment_state=n.news.payment_state,
                detail=n.news.detail,
                occur_time=n.news.occur_time,
                create_time=create_times[n.notification_id],
                attempts=1,
                context=n.news.cause.context,
                recipient=recipient,
                claim=claim,
                lease_end=lease_end,
            )
            for n, recipient in queued
            if n.notification_id in create_times
        ]

    async def claim(self, limit: int, *, lease_seconds: float) -> Sequence[Outgoing]:
        """Claims what is due and nobody holds, what has waited longest first."""
        claim = self._new_id()
        lease_end = asyncio.get_running_loop().time() + lease_seconds
        async with self._database.reading() as connection:
            rows = await connection.fetch(_CLAIM, claim, limit, lease_seconds)
        return [_outgoing_from_row(row, claim, lease_end) for row in rows]

    async def settle(self, settlements: Sequence[Settlement]) -> list[State | None]:
        """Writes down what became of tries; answers the states that they led to."""
        async with self._database.reading() as connection:
            rows = await connection.fetch(
                _SETTLE,
                [s.merchant for s in settlements],
                [s.notification_id for s in settlements],
                [s.claim for s in settlements],
                [s.state.name for s in settlements],
                [s.failure_reason for s in settlements],
                [s.jitter for s in settlements],
            )
        states = {row["notification_id"]: State[row["state"]] for row in rows}
        return [states.get(s.notification_id) for s in settlements]

    async def measure(self) -> None:
        """Brings the metrics of the backlog up to date."""
        async with self._database.reading() as connection:
            row = await connection.fetchrow(_BACKLOG)
        if row is not None:
            _WAITING.set(row["waiting"])
            _OLDEST.set(row["oldest"])


def _key(about: Recipient | News) -> tuple[str, UUID]:
    return (about.merchant, about.order_id)


async def _find(
    connection: AnyConnection, news: Sequence[News]
) -> dict[tuple[str, UUID], Recipient]:
    if not news:
        return {}
    keys = {_key(item) for item in news}
    rows = await connection.fetch(
        _FIND, [merchant for merchant, _ in keys], [order_id for _, order_id in keys]
    )
    return {
        (row["merchant"], row["order_id"]): Recipient(
            merchant=row["merchant"],
            order_id=row["order_id"],
            email=row["email"],
            customer_id=row["customer_id"],
            locale=row["locale"],
            client_order_ref=row["client_order_ref"],
            total=Money(row["currency_code"], row["total_minor_units"]),
            lines=_lines_from_json(row["lines"]),
            order_time=row["order_time"],
        )
        for row in rows
    }


async def _introduce(connection: AnyConnection, recipients: Sequence[Recipient]) -> None:
    if not recipients:
        return
    columns: list[list[Any]] = [
        [r.merchant for r in recipients],
        [r.order_id for r in recipients],
        [r.email for r in recipients],
        [r.customer_id for r in recipients],
        [r.locale for r in recipients],
        [r.client_order_ref for r in recipients],
        [r.total.currency_code for r in recipients],
        [r.total.minor_units for r in recipients],
        [_lines_to_json(r.lines) for r in recipients],
        [r.order_time for r in recipients],
    ]
    await connection.execute(_INTRODUCE, *columns)


def _lines_to_json(lines: Sequence[Line]) -> str:
    return json.dumps([[line.quantity, line.title] for line in lines], ensure_ascii=False)


def _lines_from_json(text: str) -> tuple[Line, ...]:
    return tuple(Line(quantity, title) for quantity, title in json.loads(text))


def _outgoing_from_row(row: Any, claim: UUID, lease_end: float) -> Outgoing:
    recipient = None
    if row["known"]:
        recipient = Recipient(
            merchant=row["merchant"],
            order_id=row["order_id"],
            email=row["email"],
            customer_id=row["customer_id"],
            locale=row["asked_locale"],
            client_order_ref=row["client_order_ref"],
            total=Money(row["total_currency_code"], row["total_minor_units"]),
            lines=_lines_from_json(row["lines"]),
            order_time=row["order_time"],
        )
    return Outgoing(
        merchant=row["merchant"],
        notification_id=row["notification_id"],
        order_id=row["order_id"],
        event_id=row["event_id"],
        audience=Audience[row["audience"]],
        template=row["template"],
        locale=row["locale"],
        amount=Money(row["currency_code"], row["minor_units"]),
        payment_state=row["payment_state"],
        detail=row["detail"],
        occur_time=row["occur_time"],
        create_time=row["create_time"],
        attempts=row["attempts"],
        context=CallContext(
            correlation_id=row["correlation_id"],
            causation_id=str(row["event_id"]),
            traceparent=row["traceparent"],
        ),
        recipient=recipient,
        claim=claim,
        lease_end=lease_end,
    )
