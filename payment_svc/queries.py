"""What is read of payments: SQL straight to the read table, without the domain.

Answers are the serialized resources of the read rows, which go out as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa

from chassis.database import Database, Statement
from chassis.errors import NotFoundError
from chassis.mediator import Query
from chassis.paging import PageTokens, page_size_of
from payment_svc.tables import payment_reads, payments


@dataclass(frozen=True, slots=True, kw_only=True)
class GetPayment(Query[bytes]):
    """One payment as it is now, serialized."""

    merchant: str
    payment_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ListPayments(Query["Page"]):
    """A page of a merchant's payments, the newest first; of one order where it is given."""

    merchant: str
    order_id: UUID | None = None
    page_size: int = 0
    page_token: str = ""


@dataclass(frozen=True, slots=True)
class Page:
    """Serialized payments, and the token of the next page; empty on the last."""

    resources: Sequence[bytes]
    next_page_token: str


_MERCHANT = sa.bindparam("merchant", type_=sa.Text)
_BEFORE = sa.bindparam("before", type_=payment_reads.c.payment_id.type)
_SIZE = sa.bindparam("size", type_=sa.Integer)

_GET = Statement(
    sa.select(payment_reads.c.resource).where(
        payment_reads.c.merchant == _MERCHANT,
        payment_reads.c.payment_id
        == sa.bindparam("payment_id", type_=payment_reads.c.payment_id.type),
    )
)

_LIST = Statement(
    sa.select(payment_reads.c.payment_id, payment_reads.c.resource)
    .where(payment_reads.c.merchant == _MERCHANT, payment_reads.c.payment_id < _BEFORE)
    .order_by(payment_reads.c.payment_id.desc())
    .limit(_SIZE)
)

_LIST_OF_ORDER = Statement(
    sa.select(payment_reads.c.payment_id, payment_reads.c.resource)
    .join(
        payments,
        sa.and_(
            payments.c.merchant == payment_reads.c.merchant,
            payments.c.payment_id == payment_reads.c.payment_id,
        ),
    )
    .where(
        payments.c.merchant == _MERCHANT,
        payments.c.order_id == sa.bindparam("order_id", type_=payments.c.order_id.type),
        payments.c.payment_id < _BEFORE,
    )
    .order_by(payments.c.payment_id.desc())
    .limit(_SIZE)
)

_NEWEST = UUID(int=(1 << 128) - 1)


class PaymentQueries:
    """Answers the queries; its methods are registered with the mediator."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def get(self, query: GetPayment) -> bytes:
        """One payment.

        Raises:
            NotFoundError: There is no such payment.
        """
        async with self._database.reading() as connection:
            resource: bytes | None = await connection.fetchval(
                *_GET(merchant=query.merchant, payment_id=query.payment_id)
            )
        if resource is None:
            name = f"merchants/{query.merchant}/payments/{query.payment_id}"
            raise NotFoundError("PAYMENT_NOT_FOUND", f"there is no {name}", metadata={"name": name})
        return resource

    async def list(self, query: ListPayments) -> Page:
        """A page of payments.

        Raises:
            InvalidInputError: The page token is not of this list.
        """
        size = page_size_of(query.page_size)
        arguments = ("payments", query.merchant, str(query.order_id or ""))
        position = self._tokens.read(query.page_token, *arguments)
        before = UUID(position[0]) if position else _NEWEST
        if query.order_id is None:
            statement = _LIST(merchant=query.merchant, before=before, size=size + 1)
        else:
            statement = _LIST_OF_ORDER(
                merchant=query.merchant, order_id=query.order_id, before=before, size=size + 1
            )
        async with self._database.reading() as connection:
            rows = await connection.fetch(*statement)
        token = ""
        if len(rows) > size:
            token = self._tokens.make([str(rows[size - 1]["payment_id"])], *arguments)
        return Page([row["resource"] for row in rows[:size]], token)
