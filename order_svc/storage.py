"""Orders in PostgreSQL.

One transaction writes the order, its history, its read row, its event and the answer
of the request that asked for it. Placements of concurrent callers share a transaction
(`chassis.group_commit`), and so do their changes, and the payment events of one batch.
Rows for which batches compete are taken in one order, so that batches never deadlock:
orders by name, new ones by the client_order_ref that only one of them may have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from chassis.cache import Cache, Versioned
from chassis.context import CallContext, current
from chassis.database import AnyConnection, Database
from chassis.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    ServiceError,
)
from chassis.events import Event
from chassis.group_commit import GroupCommit
from chassis.idempotency import Entry, find, forget, record
from chassis.ids import NewId
from chassis.inbox import first_seen
from chassis.outbox import Outbox, OutboxRow
from chassis.request_key import Replay, RequestKey
from order_svc.commands import Answer, PaymentReport, Placement, replayed
from order_svc.domain.order import Order
from order_svc.domain.saga import PaymentFact
from order_svc.messages import (
    UNANNOUNCED,
    address_document,
    announcement_type,
    document_of,
    event_of,
    order_from_row,
    order_resource,
)

CONSUMER = "order"

_PLACE = """
WITH given AS (
    SELECT * FROM unnest($1::text[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[],
                         $7::text[], $8::text[], $9::timestamptz[], $10::text[], $11::text[],
                         $12::text[], $13::text[], $14::text[], $15::bytea[])
    AS g(merchant, order_id, announcement, client_order_ref, document, state, payment_state,
         fulfillment_state, create_time, customer_id, email, locale, shipping_address,
         billing_address, resource)
    ORDER BY merchant, client_order_ref
), placed AS (
    INSERT INTO orders (merchant, order_id, version, announcement, client_order_ref, document,
                        state, payment_state, fulfillment_state, payment, failure_reason,
                        cancel_reason, attention_reason, create_time, update_time)
    SELECT merchant, order_id, 1, announcement, client_order_ref, document::jsonb, state,
           payment_state, fulfillment_state, '', '', '', '', create_time, create_time
    FROM given
    ON CONFLICT DO NOTHING RETURNING order_id
), customers AS (
    INSERT INTO order_customers (merchant, order_id, customer_id, email, locale,
                                 shipping_address, billing_address)
    SELECT merchant, order_id, customer_id, email, locale, shipping_address::jsonb,
           billing_address::jsonb
    FROM given JOIN placed USING (order_id)
), reads AS (
    INSERT INTO order_reads (merchant, order_id, version, resource)
    SELECT merchant, order_id, 1, resource FROM given JOIN placed USING (order_id)
)
SELECT order_id FROM placed
"""

_CHANGE = """
WITH given AS (
    SELECT * FROM unnest($1::text[], $2::uuid[], $3::bigint[], $4::text[], $5::text[], $6::text[],
                         $7::text[], $8::text[], $9::text[], $10::text[], $11::text[],
                         $12::timestamptz[], $13::bytea[])
    AS g(merchant, order_id, version, announcement, state, payment_state, fulfillment_state,
         payment, failure_reason, cancel_reason, attention_reason, update_time, resource)
), reads AS (
    UPDATE order_reads AS r SET version = g.version, resource = g.resource
    FROM given AS g WHERE r.merchant = g.merchant AND r.order_id = g.order_id
)
UPDATE orders AS o
SET version = g.version, announcement = g.announcement, state = g.state,
    payment_state = g.payment_state, fulfillment_state = g.fulfillment_state,
    payment = g.payment, failure_reason = g.failure_reason, cancel_reason = g.cancel_reason,
    attention_reason = g.attention_reason, update_time = g.update_time,
    state_time = CASE WHEN o.state = g.state THEN o.state_time ELSE now() END
FROM given AS g WHERE o.merchant = g.merchant AND o.order_id = g.order_id
"""

_REMEMBER = """
INSERT INTO order_history (merchant, order_id, version, event_id, event_type, state,
                           payment_state, document, occur_time, correlation_id, causation_id,
                           trace_id)
SELECT g.merchant, g.order_id, g.version, g.event_id, g.event_type, g.state, g.payment_state,
       g.document::jsonb, g.occur_time, g.correlation_id, g.causation_id, g.trace_id
FROM unnest($1::text[], $2::uuid[], $3::bigint[], $4::uuid[], $5::text[], $6::text[], $7::text[],
            $8::text[], $9::timestamptz[], $10::text[], $11::text[], $12::text[])
    AS g(merchant, order_id, version, event_id, event_type, state, payment_state, document,
         occur_time, correlation_id, causation_id, trace_id)
"""

_LOCK = """
SELECT o.*, c.customer_id, c.email, c.locale, c.shipping_address, c.billing_address
FROM orders AS o LEFT JOIN order_customers AS c USING (merchant, order_id)
WHERE (o.merchant, o.order_id) IN (SELECT * FROM unnest($1::text[], $2::uuid[]))
ORDER BY o.merchant, o.order_id FOR UPDATE OF o
"""

_FIND_REFS = """
SELECT merchant, client_order_ref, order_id FROM orders
JOIN unnest($1::text[], $2::text[]) AS g(merchant, client_order_ref)
     USING (merchant, client_order_ref)
"""

OrderKey = tuple[str, UUID]

Version = tuple[Order, bytes, CallContext]
"""A version of an order, its resource, and the context of what made it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Change:
    """A change that waits for its batch."""

    request: RequestKey
    order: OrderKey
    decide: Callable[[Order], Order | None]
    context: CallContext


class PostgresOrders:
    """The `OrderStore` of the service.

    Args:
        database: The service's own database.
        outbox: Where events are staged.
        cache: The cache of read orders, told of every change after it is committed.
        new_id: Makes the ids of events.
    """

    def __init__(self, database: Database, outbox: Outbox, cache: Cache, *, new_id: NewId) -> None:
        self._database = database
        self._outbox = outbox
        self._cache = cache
        self._new_id = new_id
        self._placements: GroupCommit[tuple[Placement, CallContext], Answer] = GroupCommit(
            "place-orders", self._place_all
        )
        self._changes: GroupCommit[_Change, Answer] = GroupCommit("change-orders", self._change_all)

    async def place(self, placement: Placement) -> Answer:
        """Writes a new order together with whatever else is being placed now."""
        return await self._placements.submit((placement, current()))

    async def replay(self, request: RequestKey) -> Answer | None:
        """The answer that the request was given before, if any."""
        async with self._database.reading() as connection:
            found = await find(connection, request)
        return replayed(found) if found is not None else None

    async def change(
        self,
        request: RequestKey,
        merchant: str,
        order_id: UUID,
        decide: Callable[[Order], Order | None],
    ) -> Answer:
        """Changes an order together with whatever else is being changed now."""
        return await self._changes.submit(
            _Change(request=request, order=(merchant, order_id), decide=decide, context=current())
        )

    async def record(
        self,
        reports: Sequence[PaymentReport],
        decide: Callable[[PaymentFact, Order], Order | None],
    ) -> None:
        """Applies what payment reported, once for each event."""
        by_event = {report.cause.event_id: report for report in reports}
        async with self._database.transaction() as connection:
            fresh = await first_seen(
                connection, CONSUMER, [report.cause for report in by_event.values()]
            )
            todo = [by_event[cause.event_id] for cause in fresh]
            orders = await _lock(
                connection, {(report.merchant, report.order_id) for report in todo}
            )
            versions: list[Version] = []
            for report in todo:
                key = (report.merchant, report.order_id)
                if key not in orders:
                    raise ConflictError(
                        "CONCURRENT_CHANGE",
                        f"a payment is reported for order {report.order_id}, which is not here",
                    )
                decided = decide(report.fact, orders[key])
                if decided is not None:
                    orders[key] = decided
                    versions.append((decided, order_resource(decided), report.cause.context))
            staged = await self._write(connection, versions)
        self._outbox.relay.offer(staged)
        await self._refresh(versions)

    async def _place_all(
        self, jobs: Sequence[tuple[Placement, CallContext]]
    ) -> list[Answer | Exception]:
        resources = [order_resource(placement.order) for placement, _ in jobs]
        async with self._database.transaction() as connection:
            outcomes = await record(
                connection,
                [
                    Entry(
                        key=placement.request,
                        resource_id=placement.order.order_id,
                        answer=resource,
                    )
                    for (placement, _), resource in zip(jobs, resources, strict=True)
                ],
            )
            fresh = [
                (placement.order, resource, context)
                for (placement, context), resource, outcome in zip(
                    jobs, resources, outcomes, strict=True
                )
                if outcome is None
            ]
            placed = await _insert(connection, fresh)
            refused = [
                placement
                for (placement, _), outcome in zip(jobs, outcomes, strict=True)
                if outcome is None and placement.order.order_id not in placed
            ]
            taken = await _refuse(connection, refused) if refused else {}
            written = [version for version in fresh if version[0].order_id in placed]
            staged = await self._announce(connection, written)
        self._outbox.relay.offer(staged)
        await self._refresh(written)
        # A twin of a refused placement is refused with it: there is nothing to replay.
        twins = {
            placement.request.identity: taken[placement.order.order_id] for placement in refused
        }
        answers: list[Answer | Exception] = []
        for (placement, _), resource, outcome in zip(jobs, resources, outcomes, strict=True):
            if isinstance(outcome, Replay):
                answers.append(twins.get(placement.request.identity) or replayed(outcome))
            elif outcome is not None:
                answers.append(outcome)
            elif (error := taken.get(placement.order.order_id)) is not None:
                answers.append(error)
            else:
                answers.append(Answer(resource))
        return answers

    async def _change_all(self, jobs: Sequence[_Change]) -> list[Answer | Exception]:
        answers: list[Answer | Exception] = []
        versions: list[Version] = []
        async with self._database.transaction() as connection:
            orders = await _lock(connection, {job.order for job in jobs})
            for job in jobs:
                try:
                    answers.append(await self._change_one(connection, job, orders, versions))
                except ServiceError as error:
                    answers.append(error)  # a refusal of this job, which has written nothing
            staged = await self._write(connection, versions)
        self._outbox.relay.offer(staged)
        await self._refresh(versions)
        return answers

    async def _change_one(
        self,
        connection: AnyConnection,
        job: _Change,
        orders: dict[OrderKey, Order],
        versions: list[Version],
    ) -> Answer:
        """Decides one change, and puts what it makes of the locked order with the others'."""
        order = orders.get(job.order)
        if order is None:
            raise order_not_found(*job.order)
        # Looked up under the lock, so that a concurrent twin has answered by now.
        if (found := await find(connection, job.request)) is not None:
            return replayed(found)
        decided = job.decide(order)
        resource = order_resource(decided or order)
        entry = Entry(key=job.request, resource_id=self._new_id(), answer=resource)
        (outcome,) = await record(connection, [entry])
        if isinstance(outcome, InvalidInputError):
            raise outcome
        if isinstance(outcome, Replay):
            return replayed(outcome)
        if decided is not None:
            orders[job.order] = decided
            versions.append((decided, resource, job.context))
        return Answer(resource)

    async def _write(
        self, connection: AnyConnection, versions: Sequence[Version]
    ) -> list[OutboxRow]:
        """Writes versions of locked orders; of one order only the last becomes its row."""
        if not versions:
            return []
        last = {order.name: (order, resource) for order, resource, _ in versions}
        orders = [order for order, _ in last.values()]
        await connection.execute(
            _CHANGE,
            [order.merchant for order in orders],
            [order.order_id for order in orders],
            [order.version for order in orders],
            [order.announcement.name for order in orders],
            [order.state.name for order in orders],
            [order.payment_state.name for order in orders],
            [order.fulfillment_state.name for order in orders],
            [order.payment for order in orders],
            [order.failure_reason for order in orders],
            [order.cancel_reason for order in orders],
            [order.attention_reason for order in orders],
            [order.update_time for order in orders],
            [resource for _, resource in last.values()],
        )
        return await self._announce(connection, versions)

    async def _announce(
        self, connection: AnyConnection, versions: Sequence[Version]
    ) -> list[OutboxRow]:
        """Writes each version into the history, and its event into the outbox."""
        if not versions:
            return []
        ids = [self._new_id() for _ in versions]
        orders = [order for order, _, _ in versions]
        contexts = [context for _, _, context in versions]
        await connection.execute(
            _REMEMBER,
            [order.merchant for order in orders],
            [order.order_id for order in orders],
            [order.version for order in orders],
            ids,
            [announcement_type(order.announcement) for order in orders],
            [order.state.name for order in orders],
            [order.payment_state.name for order in orders],
            [document_of(order) for order in orders],
            [order.update_time for order in orders],
            [context.correlation_id for context in contexts],
            [context.causation_id for context in contexts],
            [context.trace_id for context in contexts],
        )
        events: list[Event] = [
            event_of(order, event_id=event_id, context=context)
            for event_id, (order, _, context) in zip(ids, versions, strict=True)
            if order.announcement not in UNANNOUNCED
        ]
        return await self._outbox.stage(connection, events)

    async def _refresh(self, versions: Sequence[Version]) -> None:
        last = {order.name: Versioned(order.version, resource) for order, resource, _ in versions}
        await self._cache.put(list(last.items()))


async def _lock(connection: AnyConnection, keys: set[OrderKey]) -> dict[OrderKey, Order]:
    if not keys:
        return {}
    rows = await connection.fetch(
        _LOCK, [merchant for merchant, _ in keys], [order_id for _, order_id in keys]
    )
    return {(row["merchant"], row["order_id"]): order_from_row(row) for row in rows}


async def _insert(connection: AnyConnection, placed: Sequence[Version]) -> set[UUID]:
    """Writes new orders; answers those whose client_order_ref was free."""
    if not placed:
        return set()
    orders = [order for order, _, _ in placed]
    baskets = [order.basket for order in orders]
    columns: list[list[Any]] = [
        [order.merchant for order in orders],
        [order.order_id for order in orders],
        [order.announcement.name for order in orders],
        [basket.client_order_ref or None for basket in baskets],
        [document_of(order) for order in orders],
        [order.state.name for order in orders],
        [order.payment_state.name for order in orders],
        [order.fulfillment_state.name for order in orders],
        [order.create_time for order in orders],
        [basket.customer.customer_id for basket in baskets],
        [basket.customer.email for basket in baskets],
        [basket.customer.locale for basket in baskets],
        [address_document(basket.shipping_address) for basket in baskets],
        [address_document(basket.billing_address) for basket in baskets],
        [resource for _, resource, _ in placed],
    ]
    rows = await connection.fetch(_PLACE, *columns)
    return {row["order_id"] for row in rows}


async def _refuse(
    connection: AnyConnection, refused: Sequence[Placement]
) -> dict[UUID, AlreadyExistsError]:
    """Takes back the requests of orders that were not written, and says why."""
    await forget(connection, [placement.request for placement in refused])
    orders = [placement.order for placement in refused]
    rows = await connection.fetch(
        _FIND_REFS,
        [order.merchant for order in orders],
        [order.basket.client_order_ref for order in orders],
    )
    holders = {(row["merchant"], row["client_order_ref"]): row["order_id"] for row in rows}
    errors = {}
    for order in orders:
        ref = order.basket.client_order_ref
        holder = holders.get((order.merchant, ref))
        errors[order.order_id] = AlreadyExistsError(
            "CLIENT_ORDER_REF_TAKEN",
            f"the merchant has an order with client_order_ref {ref!r} already",
            metadata={
                "client_order_ref": ref,
                "name": f"merchants/{order.merchant}/orders/{holder}",
            },
        )
    return errors


def order_not_found(merchant: str, order_id: UUID) -> NotFoundError:
    """The error of an order that is not there."""
    name = f"merchants/{merchant}/orders/{order_id}"
    return NotFoundError("ORDER_NOT_FOUND", f"there is no {name}", metadata={"name": name})
