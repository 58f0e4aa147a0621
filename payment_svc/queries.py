"""What is read of payments: SQL straight to the read table, without the domain.

Answers are the serialized resources of the read rows, which go out as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import sqlalchemy as sa

from chassis.database import Database, Statement
from chassis.errors import NotFoundError
from chassis.lists import Page, PagedList
from chassis.mediator import Query
from chassis.paging import PageTokens
from payment_svc.tables import payment_reads, payments


@dataclass(frozen=True, slots=True, kw_only=True)
class GetPayment(Query[bytes]):
    """One payment as it is now, serialized."""

    merchant: str
    payment_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ListPayments(Query[Page]):
    """A page of a merchant's payments, the newest first; of one order where it is given."""

    merchant: str
    order_id: UUID | None = None
    page_size: int = 0
    page_token: str = ""


_MERCHANT = sa.bindparam("merchant", type_=sa.Text)

_GET = Statement(
    sa.select(payment_reads.c.resource).where(
        payment_reads.c.merchant == _MERCHANT,
        payment_reads.c.payment_id
        == sa.bindparam("payment_id", type_=payment_reads.c.payment_id.type),
    )
)

_PAYMENTS = PagedList(
    "payments",
    sa.select(payment_reads.c.payment_id, payment_reads.c.resource).where(
        payment_reads.c.merchant == _MERCHANT
    ),
    payment_reads.c.payment_id,
)

_PAYMENTS_OF_ORDER = PagedList(
    "payments-of-order",
    sa.select(payments.c.payment_id, payment_reads.c.resource)
    .join(
        payment_reads,
        sa.and_(
            payments.c.merchant == payment_reads.c.merchant,
            payments.c.payment_id == payment_reads.c.payment_id,
        ),
    )
    .where(
        payments.c.merchant == _MERCHANT,
        payments.c.order_id == sa.bindparam("order_id", type_=payments.c.order_id.type),
    ),
    payments.c.payment_id,
)


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
        if query.order_id is None:
            return await _PAYMENTS.page(
                self._database, self._tokens, query, merchant=query.merchant
            )
        return await _PAYMENTS_OF_ORDER.page(
            self._database, self._tokens, query, merchant=query.merchant, order_id=query.order_id
        )
