"""Payments in PostgreSQL: a payment and all that belongs to it in one transaction.

That is its attempt, its refunds, its read row, and the event that tells of it. Every
statement writes all rows of a batch. Rows are locked in the order of their keys, so that
batches never deadlock; `take` waits for no lock at all. A payment's row stands for all
that belongs to it: whoever changes an attempt or a refund holds the payment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

import structlog
from prometheus_client import Counter, Gauge

from chassis.context import CallContext
from chassis.database import AnyConnection, Database
from chassis.errors import ConflictError
from chassis.ids import NewId
from chassis.inbox import first_seen
from chassis.money import Money
from chassis.outbox import Outbox, OutboxRow
from payment_svc.commands import (
    Answer,
    CancellationAsked,
    Held,
    OrderNews,
    OrderPlaced,
    PaymentKey,
)
from payment_svc.domain.attempt import Attempt, AttemptState, CaptureMethod, ChargeTerms
from payment_svc.domain.payment import Payment, PaymentState, Task
from payment_svc.domain.refund import Refund, RefundState
from payment_svc.messages import event_of, payment_resource

CONSUMER = "payment"

_log = structlog.get_logger("storage")
_LATE = Counter(
    "mesh_payment_late_answers_total",
    "Answers of the provider whose work had been taken over or settled; another one counts.",
)
_UNKNOWN = Gauge(
    "mesh_payment_unknown", "Payments of which the outcome, or that of a refund, is unknown."
)
_OLDEST_UNKNOWN = Gauge(
    "mesh_payment_oldest_unknown_seconds",
    "How long ago the oldest of what is unknown was sent; a person is needed at a day.",
)
_OVERDUE = Gauge(
    "mesh_payment_overdue_seconds", "How long the provider should have been asked of something."
)

_BEGIN = """
WITH given AS (
    SELECT * FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::text[], $6::text[],
                         $7::bigint[], $8::text[], $9::float8[], $10::bigint[], $11::text[],
                         $12::text[], $13::text[], $14::timestamptz[], $15::uuid[], $16::text[],
                         $17::bigint[], $18::text[], $19::text[], $20::text[],
                         $21::timestamptz[], $22::bytea[])
    AS g(merchant, payment_id, order_id, provider, state, currency, revision, due, due_in, fence,
         correlation_id, causation_id, traceparent, create_time, attempt_id, provider_key, amount,
         payment_method, capture_method, attempt_state, sent_time, resource)
    ORDER BY merchant, order_id
), begun AS (
    INSERT INTO payments (merchant, payment_id, order_id, provider, state, currency, captured,
                          refunded, attempts, failure_reason, cancel_requested, cancel_reason,
                          revision, events, due, due_time, fence, correlation_id, causation_id,
                          traceparent, create_time, update_time)
    SELECT merchant, payment_id, order_id, provider, state, currency, 0, 0, 1, '', false, '',
           revision, 0, due, now() + make_interval(secs => due_in), fence, correlation_id,
           causation_id, traceparent, create_time, create_time
    FROM given
    ON CONFLICT DO NOTHING RETURNING payment_id
), attempts AS (
    INSERT INTO payment_attempts (merchant, payment_id, seq, attempt_id, order_id, provider_key,
                                  amount, currency, payment_method, capture_method, state,
                                  provider_reference, failure_reason, asked, sent_time)
    SELECT merchant, payment_id, 1, attempt_id, order_id, provider_key, amount, currency,
           payment_method, capture_method, attempt_state, '', '', 0, sent_time
    FROM given JOIN begun USING (payment_id)
), reads AS (
    INSERT INTO payment_reads (merchant, payment_id, revision, resource)
    SELECT merchant, payment_id, revision, resource FROM given JOIN begun USING (payment_id)
)
SELECT payment_id FROM begun
"""

# Writes only what is still at the revision it was decided on.
_CHANGE = """
WITH given AS (
    SELECT * FROM unnest($1::text[], $2::uuid[], $3::bigint[], $4::text[], $5::bigint[],
                         $6::bigint[], $7::text[], $8::boolean[], $9::text[], $10::bigint[],
                         $11::bigint[], $12::text[], $13::float8[], $14::bigint[], $15::text[],
                         $16::text[], $17::text[], $18::timestamptz[], $19::integer[],
                         $20::text[], $21::text[], $22::text[], $23::integer[],
                         $24::timestamptz[], $25::bytea[])
    AS g(merchant, payment_id, seen, state, captured, refunded, failure_reason, cancel_requested,
         cancel_reason, revision, events, due, due_in, fence, correlation_id, causation_id,
         traceparent, update_time, seq, attempt_state, provider_reference, attempt_failure,
         asked, sent_time, resource)
), changed AS (
    UPDATE payments AS p
    SET state = g.state, captured = g.captured, refunded = g.refunded,
        failure_reason = g.failure_reason, cancel_requested = g.cancel_requested,
        cancel_reason = g.cancel_reason, revision = g.revision, events = g.events, due = g.due,
        due_time = CASE WHEN g.due IS NULL THEN NULL
                        WHEN g.due_in IS NULL THEN p.due_time
                        ELSE now() + make_interval(secs => g.due_in) END,
        fence = g.fence, correlation_id = g.correlation_id, causation_id = g.causation_id,
        traceparent = g.traceparent, update_time = g.update_time
    FROM given AS g
    WHERE p.merchant = g.merchant AND p.payment_id = g.payment_id AND p.revision = g.seen
    RETURNING p.merchant, p.payment_id
), attempts AS (
    UPDATE payment_attempts AS a
    SET state = g.attempt_state, provider_reference = g.provider_reference,
        failure_reason = g.attempt_failure, asked = g.asked, sent_time = g.sent_time
    FROM given AS g JOIN changed AS c USING (merchant, payment_id)
    WHERE a.merchant = g.merchant AND a.payment_id = g.payment_id AND a.seq = g.seq
), reads AS (
    UPDATE payment_reads AS r SET revision = g.revision, resource = g.resource
    FROM given AS g JOIN changed AS c USING (merchant, payment_id)
    WHERE r.merchant = g.merchant AND r.payment_id = g.payment_id
)
SELECT payment_id FROM changed
"""

_REFUND = """
INSERT INTO refunds (merchant, payment_id, refund_id, provider_key, amount, currency, reason,
                     state, provider_reference, failure_reason, asked, create_time, sent_time)
SELECT * FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::text[], $5::bigint[], $6::text[],
                     $7::text[], $8::text[], $9::text[], $10::text[], $11::integer[],
                     $12::timestamptz[], $13::timestamptz[])
ON CONFLICT (merchant, payment_id, refund_id) DO UPDATE
SET state = excluded.state, provider_reference = excluded.provider_reference,
    failure_reason = excluded.failure_reason, asked = excluded.asked,
    sent_time = excluded.sent_time
"""

_LOCK_BY_ORDER = """
SELECT * FROM payments
WHERE (merchant, order_id) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))
ORDER BY merchant, payment_id FOR UPDATE
"""

_LOCK = """
SELECT * FROM payments
WHERE (merchant, payment_id) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))
ORDER BY merchant, payment_id FOR UPDATE
"""

# Each task by itself, in the order of the index: a backlog of one is not read through in
# search of another. Rows locked beyond the limit are free again at the commit.
_TAKE = """
SELECT found.*
FROM unnest($1::text[]) AS task CROSS JOIN LATERAL (
    SELECT * FROM payments
    WHERE due = task AND due_time <= now()
    ORDER BY due_time LIMIT $2 FOR UPDATE SKIP LOCKED
) AS found
ORDER BY found.due_time LIMIT $2
"""

_ATTEMPTS = """
SELECT a.* FROM payment_attempts AS a
JOIN unnest($1::text[], $2::uuid[], $3::integer[]) AS g(merchant, payment_id, seq)
     USING (merchant, payment_id, seq)
"""

_REFUNDS = """
SELECT r.* FROM refunds AS r
JOIN unnest($1::text[], $2::uuid[]) AS g(merchant, payment_id) USING (merchant, payment_id)
ORDER BY r.merchant, r.payment_id, r.refund_id
"""

_MEASURE = """
SELECT count(*) FILTER (WHERE p.state = 'OUTCOME_UNKNOWN' OR r.refund_id IS NOT NULL) AS unknown,
       coalesce(extract(epoch FROM now() - least(
           min(a.sent_time) FILTER (WHERE p.state = 'OUTCOME_UNKNOWN'), min(r.sent_time)
       )), 0)::float8 AS oldest,
       coalesce(extract(epoch FROM now() - min(p.due_time)), 0)::float8 AS overdue
FROM payments AS p JOIN payment_attempts AS a
     ON a.merchant = p.merchant AND a.payment_id = p.payment_id AND a.seq = p.attempts
     LEFT JOIN refunds AS r
     ON r.merchant = p.merchant AND r.payment_id = p.payment_id AND r.state = 'OUTCOME_UNKNOWN'
WHERE p.due IS NOT NULL
"""


class PostgresPayments:
    """The `PaymentStore` of the service.

    Args:
        database: The service's own database.
        outbox: Where events are staged.
        new_id: Makes the ids of events.
    """

    def __init__(self, database: Database, outbox: Outbox, *, new_id: NewId) -> None:
        self._database = database
        self._outbox = outbox
        self._new_id = new_id

    async def follow(
        self,
        news: Sequence[OrderNews],
        begin: Callable[[OrderPlaced], Payment],
        cancel: Callable[[CancellationAsked, Payment], Payment | None],
    ) -> list[Held]:
        """Applies news of orders, once for each event."""
        by_event = {one.cause.event_id: one for one in news}
        async with self._database.transaction() as connection:
            fresh = await first_seen(connection, CONSUMER, [one.cause for one in by_event.values()])
            todo = [by_event[cause.event_id] for cause in fresh]
            begun = await _begin(
                connection,
                [
                    Held(payment=begin(one), context=one.cause.context)
                    for one in todo
                    if isinstance(one, OrderPlaced)
                ],
            )
            cancelled, staged = await self._cancel(
                connection, [one for one in todo if isinstance(one, CancellationAsked)], cancel
            )
        self._outbox.relay.offer(staged)
        return [*begun, *cancelled]

    async def take(
        self, tasks: Sequence[Task], limit: int, taken: Callable[[Payment], Payment]
    ) -> list[Held]:
        """Takes what is due, as far as nobody else holds it."""
        async with self._database.transaction() as connection:
            rows = await connection.fetch(_TAKE, [task.value for task in tasks], limit)
            locked = await _loaded(connection, rows)
            changes = {
                key: (
                    held.payment.revision,
                    Held(payment=taken(held.payment), context=held.context),
                )
                for key, held in locked.items()
            }
            written, staged = await self._write(connection, changes)
        self._outbox.relay.offer(staged)
        return written

    async def settle(
        self, answers: Sequence[Answer], settled: Callable[[Answer, Payment], Payment]
    ) -> list[Held]:
        """Writes what answers make of their payments.

        Nearly always nothing has happened to a payment since its work was taken, so what
        follows is decided on the payment as it was then, and written if that holds. Only
        the others are locked, read and decided again. An answer whose commit was lost
        from sight may come a second time; the fence that the first raised leaves it out.
        """
        changes = {
            answer.work.key: (
                answer.work.payment.revision,
                Held(payment=settled(answer, answer.work.payment), context=answer.work.context),
            )
            for answer in answers
        }
        async with self._database.transaction() as connection:
            written, staged = await self._write(connection, changes)
            done = {held.payment.payment_id for held in written}
            others = [answer for answer in answers if answer.work.payment.payment_id not in done]
            if others:
                again, more = await self._settle_again(connection, others, settled)
                written += again
                staged += more
        self._outbox.relay.offer(staged)
        return written

    async def measure(self) -> None:
        """Brings the metrics of what waits for the provider up to date."""
        async with self._database.reading() as connection:
            row = await connection.fetchrow(_MEASURE)
        if row is not None:
            _UNKNOWN.set(row["unknown"])
            _OLDEST_UNKNOWN.set(row["oldest"])
            _OVERDUE.set(max(row["overdue"], 0.0))

    async def _cancel(
        self,
        connection: AnyConnection,
        asked: Sequence[CancellationAsked],
        cancel: Callable[[CancellationAsked, Payment], Payment | None],
    ) -> tuple[list[Held], list[OutboxRow]]:
        if not asked:
            return [], []
        rows = await connection.fetch(
            _LOCK_BY_ORDER, [one.merchant for one in asked], [one.order_id for one in asked]
        )
        locked = {
            (held.payment.merchant, held.payment.order_id): held
            for held in (await _loaded(connection, rows)).values()
        }
        changes: dict[PaymentKey, tuple[int, Held]] = {}
        for one in asked:
            held = locked.get((one.merchant, one.order_id))
            if held is None:
                raise ConflictError(
                    "CONCURRENT_CHANGE",
                    f"order {one.order_id} is to be cancelled and its payment is not here",
                )
            changed = cancel(one, held.payment)
            key = (held.payment.merchant, held.payment.payment_id)
            # Of several cancellations of one order only the first changes anything.
            if changed is not None and key not in changes:
                changes[key] = (
                    held.payment.revision,
                    Held(payment=changed, context=one.cause.context),
                )
        return await self._write(connection, changes)

    async def _settle_again(
        self,
        connection: AnyConnection,
        answers: Sequence[Answer],
        settled: Callable[[Answer, Payment], Payment],
    ) -> tuple[list[Held], list[OutboxRow]]:
        keys = [answer.work.key for answer in answers]
        rows = await connection.fetch(
            _LOCK, [merchant for merchant, _ in keys], [payment_id for _, payment_id in keys]
        )
        locked = await _loaded(connection, rows)
        changes: dict[PaymentKey, tuple[int, Held]] = {}
        for answer in answers:
            held = locked[answer.work.key]
            if held.payment.fence != answer.work.payment.fence:
                _LATE.inc()
                _log.warning(
                    "answer.late",
                    payment=held.payment.name,
                    task=answer.work.task.name,
                    outcome=type(answer.outcome).__name__,
                )
                continue
            changes[answer.work.key] = (
                held.payment.revision,
                Held(payment=settled(answer, held.payment), context=held.context),
            )
        return await self._write(connection, changes)

    async def _write(
        self, connection: AnyConnection, changes: Mapping[PaymentKey, tuple[int, Held]]
    ) -> tuple[list[Held], list[OutboxRow]]:
        """Writes changes of payments that are still at the revision given with each."""
        if not changes:
            return [], []
        rows = [changes[key] for key in sorted(changes)]
        payments = [held.payment for _, held in rows]
        contexts = [held.context for _, held in rows]
        attempts = [payment.attempt for payment in payments]
        columns: list[list[Any]] = [
            [payment.merchant for payment in payments],
            [payment.payment_id for payment in payments],
            [seen for seen, _ in rows],
            [payment.state.name for payment in payments],
            [payment.captured.minor_units for payment in payments],
            [payment.refunded.minor_units for payment in payments],
            [payment.failure_reason for payment in payments],
            [payment.cancel_requested for payment in payments],
            [payment.cancel_reason for payment in payments],
            [payment.revision for payment in payments],
            [payment.events for payment in payments],
            [payment.due.value if payment.due else None for payment in payments],
            [payment.due_in_seconds for payment in payments],
            [payment.fence for payment in payments],
            [context.correlation_id for context in contexts],
            [context.causation_id for context in contexts],
            [context.traceparent for context in contexts],
            [payment.update_time for payment in payments],
            [attempt.seq for attempt in attempts],
            [attempt.state.value for attempt in attempts],
            [attempt.provider_reference for attempt in attempts],
            [attempt.failure_reason for attempt in attempts],
            [attempt.asked for attempt in attempts],
            [attempt.sent_time for attempt in attempts],
            [payment_resource(payment) for payment in payments],
        ]
        changed = {row["payment_id"] for row in await connection.fetch(_CHANGE, *columns)}
        written = [held for _, held in rows if held.payment.payment_id in changed]
        await _write_refunds(connection, [held.payment for held in written])
        staged = await self._announce(connection, written)
        return written, staged

    async def _announce(
        self, connection: AnyConnection, written: Sequence[Held]
    ) -> list[OutboxRow]:
        return await self._outbox.stage(
            connection,
            [
                event_of(
                    held.payment,
                    announcement,
                    version=held.payment.events - len(held.payment.announcements) + position,
                    event_id=self._new_id(),
                    context=held.context,
                )
                for held in written
                for position, announcement in enumerate(held.payment.announcements, start=1)
            ],
        )


async def _begin(connection: AnyConnection, begun: Sequence[Held]) -> list[Held]:
    """Writes new payments; answers those whose order had none."""
    if not begun:
        return []
    payments = [held.payment for held in begun]
    contexts = [held.context for held in begun]
    attempts = [payment.attempt for payment in payments]
    columns: list[list[Any]] = [
        [payment.merchant for payment in payments],
        [payment.payment_id for payment in payments],
        [payment.order_id for payment in payments],
        [payment.provider for payment in payments],
        [payment.state.name for payment in payments],
        [payment.amount.currency_code for payment in payments],
        [payment.revision for payment in payments],
        [payment.due.value if payment.due else None for payment in payments],
        [payment.due_in_seconds for payment in payments],
        [payment.fence for payment in payments],
        [context.correlation_id for context in contexts],
        [context.causation_id for context in contexts],
        [context.traceparent for context in contexts],
        [payment.create_time for payment in payments],
        [attempt.attempt_id for attempt in attempts],
        [attempt.provider_key for attempt in attempts],
        [attempt.terms.amount.minor_units for attempt in attempts],
        [attempt.terms.payment_method for attempt in attempts],
        [attempt.terms.capture_method.name for attempt in attempts],
        [attempt.state.value for attempt in attempts],
        [attempt.sent_time for attempt in attempts],
        [payment_resource(payment) for payment in payments],
    ]
    new = {row["payment_id"] for row in await connection.fetch(_BEGIN, *columns)}
    return [held for held in begun if held.payment.payment_id in new]


async def _write_refunds(connection: AnyConnection, payments: Sequence[Payment]) -> None:
    rows = [(payment, refund) for payment in payments for refund in payment.refunds]
    if not rows:
        return
    await connection.execute(
        _REFUND,
        [payment.merchant for payment, _ in rows],
        [payment.payment_id for payment, _ in rows],
        [refund.refund_id for _, refund in rows],
        [refund.provider_key for _, refund in rows],
        [refund.amount.minor_units for _, refund in rows],
        [refund.amount.currency_code for _, refund in rows],
        [refund.reason for _, refund in rows],
        [refund.state.name for _, refund in rows],
        [refund.provider_reference for _, refund in rows],
        [refund.failure_reason for _, refund in rows],
        [refund.asked for _, refund in rows],
        [refund.create_time for _, refund in rows],
        [refund.sent_time for _, refund in rows],
    )


async def _loaded(connection: AnyConnection, rows: Sequence[Any]) -> dict[PaymentKey, Held]:
    """The payments of rows that are locked, in their order.

    What belongs to a payment is read in statements of its own: each sees what was
    committed before the lock was had, which a join with the lock would not.
    """
    if not rows:
        return {}
    merchants = [row["merchant"] for row in rows]
    ids = [row["payment_id"] for row in rows]
    attempts: dict[UUID, Attempt] = {
        row["payment_id"]: _attempt_of(row)
        for row in await connection.fetch(
            _ATTEMPTS, merchants, ids, [row["attempts"] for row in rows]
        )
    }
    refunds: dict[UUID, list[Refund]] = {}
    # Nothing can be given back before something was taken.
    if any(row["captured"] for row in rows):
        for row in await connection.fetch(_REFUNDS, merchants, ids):
            refunds.setdefault(row["payment_id"], []).append(_refund_of(row))
    return {
        (row["merchant"], row["payment_id"]): Held(
            payment=_payment_of(
                row, attempts[row["payment_id"]], tuple(refunds.get(row["payment_id"], ()))
            ),
            context=CallContext(
                correlation_id=row["correlation_id"],
                causation_id=row["causation_id"],
                traceparent=row["traceparent"],
            ),
        )
        for row in rows
    }


def _payment_of(row: Any, attempt: Attempt, refunds: tuple[Refund, ...]) -> Payment:
    return Payment(
        merchant=row["merchant"],
        payment_id=row["payment_id"],
        order_id=row["order_id"],
        provider=row["provider"],
        attempt=attempt,
        state=PaymentState[row["state"]],
        captured=Money(row["currency"], row["captured"]),
        refunded=Money(row["currency"], row["refunded"]),
        create_time=row["create_time"],
        update_time=row["update_time"],
        refunds=refunds,
        failure_reason=row["failure_reason"],
        cancel_requested=row["cancel_requested"],
        cancel_reason=row["cancel_reason"],
        revision=row["revision"],
        events=row["events"],
        fence=row["fence"],
        due=Task(row["due"]) if row["due"] is not None else None,
    )


def _attempt_of(row: Any) -> Attempt:
    return Attempt(
        attempt_id=row["attempt_id"],
        seq=row["seq"],
        provider_key=row["provider_key"],
        terms=ChargeTerms(
            amount=Money(row["currency"], row["amount"]),
            payment_method=row["payment_method"],
            capture_method=CaptureMethod[row["capture_method"]],
        ),
        state=AttemptState(row["state"]),
        provider_reference=row["provider_reference"],
        failure_reason=row["failure_reason"],
        asked=row["asked"],
        sent_time=row["sent_time"],
    )


def _refund_of(row: Any) -> Refund:
    return Refund(
        refund_id=row["refund_id"],
        provider_key=row["provider_key"],
        amount=Money(row["currency"], row["amount"]),
        reason=row["reason"],
        state=RefundState[row["state"]],
        create_time=row["create_time"],
        provider_reference=row["provider_reference"],
        failure_reason=row["failure_reason"],
        asked=row["asked"],
        sent_time=row["sent_time"],
    )
