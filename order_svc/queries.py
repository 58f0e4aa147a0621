"""What is read of orders: SQL straight to the read tables, without the domain.

A single order is cached by version. Answers are the serialized resources of the read
rows, which go out as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa

from chassis.cache import Cache, Versioned
from chassis.database import Database, Statement
from chassis.errors import NotFoundError
from chassis.lists import Page, PagedList
from chassis.mediator import Query
from chassis.paging import PageTokens
from order_svc.tables import order_history, order_reads


@dataclass(frozen=True, slots=True, kw_only=True)
class GetOrder(Query[bytes]):
    """One order as it is now, serialized."""

    merchant: str
    order_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOrders(Query[Page]):
    """A page of a merchant's orders, the newest first."""

    merchant: str
    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListOrderEvents(Query[Page]):
    """A page of an order's timeline, the oldest first."""

    merchant: str
    order_id: UUID
    page_size: int = 0
    page_token: str = ""


_GET = Statement(
    sa.select(order_reads.c.version, order_reads.c.resource).where(
        order_reads.c.merchant == sa.bindparam("merchant", type_=sa.Text),
        order_reads.c.order_id == sa.bindparam("order_id", type_=order_reads.c.order_id.type),
    )
)

_ORDERS = PagedList(
    "orders",
    sa.select(order_reads.c.order_id, order_reads.c.resource).where(
        order_reads.c.merchant == sa.bindparam("merchant", type_=sa.Text)
    ),
    order_reads.c.order_id,
)

_TIMELINE = PagedList(
    "events",
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
    ).where(
        order_history.c.merchant == sa.bindparam("merchant", type_=sa.Text),
        order_history.c.order_id == sa.bindparam("order_id", type_=order_history.c.order_id.type),
    ),
    order_history.c.version,
    oldest_first=True,
)


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
        return await _ORDERS.page(self._database, self._tokens, query, merchant=query.merchant)

    async def timeline(self, query: ListOrderEvents) -> Page:
        """A page of an order's history.

        Raises:
            NotFoundError: There is no such order.
            InvalidInputError: The page token is not of this list.
        """
        page = await _TIMELINE.page(
            self._database, self._tokens, query, merchant=query.merchant, order_id=query.order_id
        )
        if not page.rows and not query.page_token:
            raise _not_found(f"merchants/{query.merchant}/orders/{query.order_id}")
        return page


def _not_found(name: str) -> NotFoundError:
    return NotFoundError("ORDER_NOT_FOUND", f"there is no {name}", metadata={"name": name})
