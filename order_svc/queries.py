"""What is read of orders: SQL straight to the read tables, without the domain.

A single order is cached by version. Answers are the serialized resources of the read
rows, which go out as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from chassis.cache import Cache, Versioned
from chassis.database import Database, Statement
from chassis.errors import NotFoundError
from chassis.mediator import Query
from chassis.paging import PageTokens, page_size_of
from order_svc.tables import order_history, order_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class GetOrder(Query[bytes]):
    """One order as it is now, serialized."""

    merchant: str
    order_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOrders(Query["Page"]):
    """A page of a merchant's orders, the newest first."""

    merchant: str
    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOrderEvents(Query["Page"]):
    """A page of an order's timeline, the oldest first."""

    merchant: str
    order_id: UUID
    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Rows of a list, and the token of the next page; empty on the last."""

    rows: Sequence[Any]
    next_page_token: str


_GET = Statement(
    sa.select(order_reads.c.version, order_reads.c.resource).where(
        order_reads.c.merchant == sa.bindparam("merchant", type_=sa.Text),
        order_reads.c.order_id == sa.bindparam("order_id", type_=order_reads.c.order_id.type),
    )
)

_LIST = Statement(
    sa.select(order_reads.c.order_id, order_reads.c.resource)
    .where(
        order_reads.c.merchant == sa.bindparam("merchant", type_=sa.Text),
        order_reads.c.order_id < sa.bindparam("before", type_=order_reads.c.order_id.type),
    )
    .order_by(order_reads.c.order_id.desc())
    .limit(sa.bindparam("size", type_=sa.Integer))
)

_TIMELINE = Statement(
    sa.select(
        order_history.c.version,
        order_history.c.event_id,
        order_history.c.event_type,
        order_history.c.state,
        order_history.c.payment_state,
        order_history.c.occur_time,
        order_history.c.correlation_id,
        order_history.c.causation_id,
        order_history.c.trace_id,
    )
    .where(
        order_history.c.merchant == sa.bindparam("merchant", type_=sa.Text),
        order_history.c.order_id == sa.bindparam("order_id", type_=order_history.c.order_id.type),
        order_history.c.version > sa.bindparam("after", type_=sa.BigInteger),
    )
    .order_by(order_history.c.version)
    .limit(sa.bindparam("size", type_=sa.Integer))
)

_NEWEST = UUID(int=(1 << 128) - 1)


class OrderQueries:
    """Answers the queries; its methods are registered with the mediator."""

    def __init__(self, database: Database, cache: Cache, tokens: PageTokens) -> None:
        self._database = database
        self._cache = cache
        self._tokens = tokens

    async def get(self, query: GetOrder) -> bytes:
        """One order.

        Raises:
            NotFoundError: There is no such order.
        """
        name = f"merchants/{query.merchant}/orders/{query.order_id}"

        async def load() -> Versioned | None:
            async with self._database.reading() as connection:
                row = await connection.fetchrow(
                    *_GET(merchant=query.merchant, order_id=query.order_id)
                )
            return Versioned(row["version"], row["resource"]) if row is not None else None

        found = await self._cache.get_or_load(name, load)
        if found is None:
            raise _not_found(name)
        return found.value

    async def list(self, query: ListOrders) -> Page:
        """A page of orders.

        Raises:
            InvalidInputError: The page token is not of this list.
        """
        size = page_size_of(query.page_size)
        position = self._tokens.read(query.page_token, "orders", query.merchant)
        before = UUID(position[0]) if position else _NEWEST
        async with self._database.reading() as connection:
            rows = await connection.fetch(
                *_LIST(merchant=query.merchant, before=before, size=size + 1)
            )
        token = ""
        if len(rows) > size:
            last = str(rows[size - 1]["order_id"])
            token = self._tokens.make([last], "orders", query.merchant)
        return Page(rows[:size], token)

    async def timeline(self, query: ListOrderEvents) -> Page:
        """A page of an order's history.

        Raises:
            NotFoundError: There is no such order.
            InvalidInputError: The page token is not of this list.
        """
        size = page_size_of(query.page_size)
        name = f"merchants/{query.merchant}/orders/{query.order_id}"
        position = self._tokens.read(query.page_token, "events", name)
        after = int(position[0]) if position else 0
        async with self._database.reading() as connection:
            rows = await connection.fetch(
                *_TIMELINE(
                    merchant=query.merchant, order_id=query.order_id, after=after, size=size + 1
                )
            )
        if not rows and after == 0:
            raise _not_found(name)
        token = ""
        if len(rows) > size:
            token = self._tokens.make([str(rows[size - 1]["version"])], "events", name)
        return Page(rows[:size], token)


def _not_found(name: str) -> NotFoundError:
    return NotFoundError("ORDER_NOT_FOUND", f"there is no {name}", metadata={"name": name})
