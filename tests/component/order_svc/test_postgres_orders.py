"""Orders in PostgreSQL: the suite of every order store, and what only a database shows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from chassis.broker.memory import MemoryBroker
from chassis.cache import Cache
from chassis.context import CallContext, entered
from chassis.database import Database
from chassis.errors import AlreadyExistsError, ConflictError
from chassis.ids import new_id
from chassis.outbox import Outbox
from order_svc.domain.order import Announcement, Order
from order_svc.messages import order_from_row, order_resource
from order_svc.storage import PostgresOrders
from tests.builders import (
    a_basket,
    a_placement,
    a_report,
    a_request_key,
    an_address,
    an_order,
    an_order_id,
)
from tests.eventually import eventually
from tests.suites.order_store import Kept, OrderStoreSuite, Version, cancel, decide

_ORDER = """
SELECT o.*, c.customer_id, c.email, c.locale, c.shipping_address, c.billing_address
FROM orders AS o LEFT JOIN order_customers AS c USING (merchant, order_id)
WHERE merchant = $1 AND order_id = $2
"""

_VERSIONS = """
SELECT 'merchants/' || merchant || '/orders/' || order_id AS name, version, event_type AS type
FROM order_history ORDER BY order_id, version
"""

_PUBLISHED = (
    "SELECT aggregate AS name, aggregate_version AS version, type FROM outbox ORDER BY 1, 2"
)


_WAITING = (
    "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
)


class KeptInPostgres:
    """A `PostgresOrders` and a look into its database."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.outbox = Outbox(database, MemoryBroker(), new_id=new_id)
        self.store = PostgresOrders(database, self.outbox, Cache(None, "order:"), new_id=new_id)

    async def rows(self, statement: str, *arguments: Any) -> list[Any]:
        """What a statement finds."""
        async with self.database.reading() as connection:
            return list(await connection.fetch(statement, *arguments))

    async def order(self, order: Order) -> Order | None:
        """The write model's row; its read row must say the same."""
        found = await self.rows(_ORDER, order.merchant, order.order_id)
        read = await self.rows(
            "SELECT version, resource FROM order_reads WHERE merchant = $1 AND order_id = $2",
            order.merchant, order.order_id,
        )  # fmt: skip
        if not found:
            assert read == []
            return None
        kept = order_from_row(found[0])
        assert [tuple(row) for row in read] == [(kept.version, order_resource(kept))]
        return kept

    async def versions(self) -> Sequence[Version]:
        """The history."""
        return [_version(row) for row in await self.rows(_VERSIONS)]

    async def published(self) -> Sequence[Version]:
        """The outbox."""
        return [_version(row) for row in await self.rows(_PUBLISHED)]


async def _cancelled(kept: KeptInPostgres, order: Order) -> None:
    """Asks for an order to be undone."""
    request = a_request_key(method="CancelOrder")
    await kept.store.change(request, order.merchant, order.order_id, cancel)


def _version(row: Any) -> Version:
    told_as = Announcement(row["type"].removeprefix("ordermesh.order.v1."))
    return (row["name"], row["version"], told_as)


@pytest_asyncio.fixture
async def kept(order_database: str) -> AsyncIterator[KeptInPostgres]:
    """An empty store."""
    async with Database.opened(order_database, application_name="test") as database:
        yield KeptInPostgres(database)


class TestPostgresOrders(OrderStoreSuite):
    """The suite, over PostgreSQL."""

    @pytest.fixture
    def kept(self, kept: KeptInPostgres) -> Kept:
        """The module's."""
        return kept


async def test_orders_placed_at_once_share_a_transaction(kept: KeptInPostgres) -> None:
    """Thirty callers, one commit."""
    await asyncio.gather(*(kept.store.place(a_placement()) for _ in range(30)))
    (row,) = await kept.rows("SELECT count(*), count(DISTINCT xmin::text) FROM orders")
    assert tuple(row) == (30, 1)


async def test_orders_cancelled_at_once_share_a_transaction(kept: KeptInPostgres) -> None:
    """Sixteen callers need one connection, not sixteen, so a burst of them is not turned away."""
    orders = [an_order() for _ in range(16)]
    await asyncio.gather(*(kept.store.place(a_placement(order)) for order in orders))
    await asyncio.gather(*(_cancelled(kept, order) for order in orders))
    (row,) = await kept.rows("SELECT count(*), count(DISTINCT xmin::text) FROM orders")
    assert tuple(row) == (16, 1)


async def test_a_batch_that_waits_for_a_ref_holds_no_later_one(kept: KeptInPostgres) -> None:
    """Refs are taken by name, whatever the ids say, so two replicas' batches never deadlock."""
    ids = sorted(an_order_id() for _ in range(2))
    batch = [
        an_order(order_id=order_id, basket=a_basket(client_order_ref=ref))
        for order_id, ref in zip(ids, ("web-2", "web-1"), strict=True)
    ]
    await kept.store.place(a_placement(an_order()))
    copy = """
        INSERT INTO orders
        SELECT (jsonb_populate_record(o, jsonb_build_object('order_id', $1::uuid,
                                                            'client_order_ref', $2::text))).*
        FROM orders AS o LIMIT 1
    """
    async with kept.database.transaction() as connection:
        await connection.execute("SET LOCAL lock_timeout = '200ms'")
        await connection.execute(copy, an_order_id(), "web-1")
        placing = asyncio.gather(
            *(kept.store.place(a_placement(order)) for order in batch), return_exceptions=True
        )
        await eventually(lambda: kept.rows(_WAITING), until=lambda waiting: len(waiting) == 1)
        await connection.execute(copy, an_order_id(), "web-2")
    assert [type(outcome) for outcome in await placing] == [AlreadyExistsError] * 2


async def test_a_version_is_remembered_with_its_correlation_and_cause(
    kept: KeptInPostgres,
) -> None:
    """A placement under the call it came with, a payment under its event."""
    call = CallContext(correlation_id="corr-9", causation_id="req-9", traceparent="00-ab-cd-01")
    order = an_order()
    with entered(call):
        await kept.store.place(a_placement(order))
    report = a_report(order)
    await kept.store.record([report], decide)
    rows = await kept.rows(
        "SELECT correlation_id, causation_id, trace_id FROM order_history ORDER BY version"
    )
    assert [tuple(row) for row in rows] == [
        ("corr-9", "req-9", "ab"),
        ("corr-1", str(report.cause.event_id), report.cause.context.trace_id),
    ]


async def test_calls_that_share_a_transaction_keep_their_own_contexts(
    kept: KeptInPostgres,
) -> None:
    """A call is never remembered under its neighbour's correlation id."""
    orders = [an_order() for _ in range(20)]

    async def place(number: int) -> None:
        with entered(CallContext(correlation_id=f"place-{number}")):
            await kept.store.place(a_placement(orders[number]))

    async def undo(number: int) -> None:
        with entered(CallContext(correlation_id=f"cancel-{number}")):
            await _cancelled(kept, orders[number])

    await asyncio.gather(*(place(number) for number in range(20)))
    await asyncio.gather(*(undo(number) for number in range(20)))
    rows = await kept.rows("SELECT order_id, version, correlation_id FROM order_history")
    assert {(row["order_id"], row["version"]): row["correlation_id"] for row in rows} == {
        (order.order_id, version): f"{call}-{number}"
        for number, order in enumerate(orders)
        for version, call in ((1, "place"), (2, "cancel"))
    }


async def test_personal_data_stands_in_one_table_alone(kept: KeptInPostgres) -> None:
    """Neither the order's row nor its history holds what a person could ask to have erased."""
    order = an_order(basket=a_basket(shipping_address=an_address()))
    await kept.store.place(a_placement(order))
    for table in ("orders", "order_history"):
        (row,) = await kept.rows(f"SELECT t::text FROM {table} AS t")
        assert "ada@example.com" not in row[0]
        assert "Ringstraße" not in row[0]


async def test_an_order_without_its_personal_data_still_moves(kept: KeptInPostgres) -> None:
    """Erasing the customer does not stop the money."""
    order = an_order(basket=a_basket(shipping_address=an_address()))
    await kept.store.place(a_placement(order))
    await kept.rows("DELETE FROM order_customers")
    await kept.store.record([a_report(order)], decide)
    changed = await kept.order(order)
    assert changed is not None
    assert changed.basket.customer.email == ""
    assert changed.basket.shipping_address is None


async def test_how_long_an_order_has_been_in_its_state_is_kept_by_the_database(
    kept: KeptInPostgres,
) -> None:
    """A change that keeps the state keeps its time; a move takes a new one."""
    order = an_order()
    await kept.store.place(a_placement(order))
    times = [row[0] for row in await kept.rows("SELECT state_time FROM orders")]
    await kept.store.record([a_report(order)], decide)
    times += [row[0] for row in await kept.rows("SELECT state_time FROM orders")]
    assert times[0] < times[1]


async def test_a_locked_order_is_a_conflict_to_be_tried_again(
    kept: KeptInPostgres, order_database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change does not wait for a lock for ever."""
    monkeypatch.setattr("chassis.database.LOCK_SECONDS", 0.05)
    order = an_order()
    await kept.store.place(a_placement(order))
    async with (
        Database.opened(order_database, application_name="impatient") as database,
        kept.database.transaction() as connection,
    ):
        await connection.execute("SELECT FROM orders FOR UPDATE")
        impatient = KeptInPostgres(database)
        with pytest.raises(ConflictError) as caught:
            await _cancelled(impatient, order)
    assert caught.value.reason == "CONCURRENT_CHANGE"
