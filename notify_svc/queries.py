"""What is read of notifications: SQL straight to the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa

from chassis.database import Database, Statement
from chassis.errors import NotFoundError
from chassis.lists import Page, PagedList
from chassis.mediator import Query
from chassis.paging import PageTokens
from notify_svc.messages import notification_name
from notify_svc.tables import notifications


@dataclass(frozen=True, slots=True, kw_only=True)
class GetNotification(Query[Any]):
    """One notification as it is now: its row."""

    merchant: str
    notification_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class ListNotifications(Query[Page]):
    """A page of a merchant's notifications, of one order or of all, the newest first."""

    merchant: str
    order_id: UUID | None = None
    page_size: int = 0
    page_token: str = ""


_SHOWN = (
    notifications.c.merchant,
    notifications.c.notification_id,
    notifications.c.order_id,
    notifications.c.event_id,
    notifications.c.channel,
    notifications.c.audience,
    notifications.c.template,
    notifications.c.locale,
    notifications.c.recipient,
    notifications.c.state,
    notifications.c.attempts,
    notifications.c.failure_reason,
    notifications.c.create_time,
    notifications.c.send_time,
)
_of_merchant = notifications.c.merchant == sa.bindparam("merchant", type_=sa.Text)

_GET = Statement(
    sa.select(*_SHOWN).where(
        _of_merchant,
        notifications.c.notification_id
        == sa.bindparam("notification_id", type_=notifications.c.notification_id.type),
    )
)

_all = sa.select(*_SHOWN).where(_of_merchant)
_NOTIFICATIONS = PagedList(
    "notifications",
    _all,
    notifications.c.notification_id,
)
_NOTIFICATIONS_OF_ORDER = PagedList(
    "notifications-of-order",
    _all.where(
        notifications.c.order_id == sa.bindparam("order_id", type_=notifications.c.order_id.type)
    ),
    notifications.c.notification_id,
)


class NotificationQueries:
    """Answers the queries; its methods are registered with the mediator."""

    def __init__(self, database: Database, tokens: PageTokens) -> None:
        self._database = database
        self._tokens = tokens

    async def get(self, query: GetNotification) -> Any:
        """One notification's row.

        Raises:
            NotFoundError: NOTIFICATION_NOT_FOUND, the merchant has no such notification.
        """
        async with self._database.reading() as connection:
            row = await connection.fetchrow(
                *_GET(merchant=query.merchant, notification_id=query.notification_id)
            )
        if row is None:
            name = notification_name(query.merchant, query.notification_id)
            raise NotFoundError(
                "NOTIFICATION_NOT_FOUND", f"there is no {name}", metadata={"name": name}
            )
        return row

    async def list(self, query: ListNotifications) -> Page:
        """A page of rows.

        Raises:
            InvalidInputError: PAGE_TOKEN_INVALID, the token is not of this list.
        """
        if query.order_id is None:
            return await _NOTIFICATIONS.page(
                self._database, self._tokens, query, merchant=query.merchant
            )
        return await _NOTIFICATIONS_OF_ORDER.page(
            self._database, self._tokens, query, merchant=query.merchant, order_id=query.order_id
        )
