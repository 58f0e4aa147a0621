"""What the service does when it hears of something: which mails, to whom, about what.

Nothing here knows the broker, the database or SMTP; those come in as the protocols that
stand beside the handler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from types import MappingProxyType
from typing import Final, Protocol
from uuid import UUID

from chassis.context import Cause
from chassis.errors import ConflictError
from chassis.ids import NewId
from chassis.mediator import Command
from chassis.money import Money
from chassis.settings import Merchant


class State(Enum):
    """How far a message has come; the values are the proto's `Notification.State`."""

    QUEUED = 1
    SENDING = 2
    SENT = 3
    RETRYING = 4
    DEAD = 5
    CANCELLED = 6
    SUPPRESSED = 7


class Channel(Enum):
    """The way by which it goes; the values are the proto's `Notification.Channel`."""

    EMAIL = 1


class Audience(Enum):
    """In what role someone is written to; the values are the proto's."""

    CUSTOMER = 1
    MERCHANT = 2


class Occasion(Enum):
    """What happened to an order that somebody is told of."""

    PAID = "PaymentSucceeded"
    CONFIRMED = "OrderConfirmed"
    FAILED = "OrderFailed"
    CANCELLED = "OrderCancelled"
    REFUNDED = "RefundSucceeded"


MAILS: Final[Mapping[Occasion, tuple[tuple[Audience, str], ...]]] = MappingProxyType(
    {
        Occasion.PAID: ((Audience.CUSTOMER, "payment_receipt"),),
        Occasion.CONFIRMED: (
            (Audience.CUSTOMER, "order_confirmed"),
            (Audience.MERCHANT, "merchant_order_confirmed"),
        ),
        Occasion.FAILED: ((Audience.CUSTOMER, "order_failed"),),
        Occasion.CANCELLED: (
            (Audience.CUSTOMER, "order_cancelled"),
            (Audience.MERCHANT, "merchant_order_cancelled"),
        ),
        Occasion.REFUNDED: ((Audience.CUSTOMER, "refund_issued"),),
    }
)
"""Who is told what, and by which template, on each occasion."""


@dataclass(frozen=True, slots=True)
class Line:
    """What a mail says of one line of the order."""

    quantity: int
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipient:
    """An order's customer, and what mails repeat of the order. Personal data.

    Attributes:
        email: None once it has been erased.
        client_order_ref: The merchant's own number of the order; may be empty.
        total: What the order costs.
    """

    merchant: str
    order_id: UUID
    email: str | None
    customer_id: str
    locale: str
    client_order_ref: str
    total: Money
    lines: tuple[Line, ...]
    order_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class News:
    """Something that happened to an order.

    Attributes:
        amount: What was paid, refunded, or would have been.
        payment_state: What the event says of the money, as the order's proto names it;
            empty where it says nothing.
        detail: The provider's code of a failure, or a cancellation's reason.
        occur_time: When it happened.
        cause: The event that told of it.
    """

    merchant: str
    order_id: UUID
    occasion: Occasion
    amount: Money
    occur_time: datetime
    cause: Cause
    payment_state: str = ""
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Introduction:
    """A recipient, and the event that introduced them."""

    recipient: Recipient
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    """One message that somebody is to get. Holds the address shortened and hashed only."""

    notification_id: UUID
    news: News
    audience: Audience
    template: str
    locale: str
    recipient: str
    recipient_hash: bytes
    channel: Channel = Channel.EMAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class Hear(Command[None]):
    """Take note of a batch of events: who is to be written to, and about what."""

    introductions: Sequence[Introduction] = ()
    news: Sequence[News] = ()


Compose = Callable[[News, Recipient], Sequence[Notification]]
"""Says which notifications a piece of news asks for."""

NegotiateLocale = Callable[[str, str], str]
"""The locale in which a template is written to someone who asked for another one."""


class NotificationStore(Protocol):
    """Keeps recipients and notifications."""

    async def record(
        self, introductions: Sequence[Introduction], news: Sequence[News], compose: Compose
    ) -> Sequence[News]:
        """Notes in one transaction what is new, each event once, and queues what it asks for.

        Answers the news about orders of which no recipient is known (yet): nothing of
        these was noted.
        """
        ...


class HearHandler:
    """Queues the mails that events ask for.

    News of an order whose OrderCreated has not arrived fails alone: its neighbours are
    noted, and find themselves in the inbox when the batch is tried again.
    """

    def __init__(
        self,
        *,
        store: NotificationStore,
        merchants: Mapping[str, Merchant],
        negotiate_locale: NegotiateLocale,
        new_id: NewId,
    ) -> None:
        self._store = store
        self._merchants = merchants
        self._negotiate_locale = negotiate_locale
        self._new_id = new_id

    async def __call__(self, command: Hear) -> None:
        """Notes the batch.

        Raises:
            ConflictError: Of some order no recipient is known yet, or a merchant is not
                in this process's file yet; both may be there when it is tried again.
        """
        left = await self._store.record(command.introductions, command.news, self.compose)
        if left:
            orders = sorted({str(news.order_id) for news in left})
            raise ConflictError(
                "CONCURRENT_CHANGE",
                f"news of orders whose OrderCreated has not arrived: {', '.join(orders[:5])}",
            )

    def compose(self, news: News, recipient: Recipient) -> list[Notification]:
        """The notifications that a piece of news asks for.

        Raises:
            ConflictError: The merchant is unknown.
        """
        merchant = self._merchants.get(news.merchant)
        if merchant is None:
            raise ConflictError(
                "CONCURRENT_CHANGE", f"merchant {news.merchant!r} is not in the merchants file"
            )
        notifications = []
        for audience, template in MAILS[news.occasion]:
            if audience is Audience.CUSTOMER:
                address, locale = recipient.email or "", recipient.locale
            else:
                address, locale = merchant.email, merchant.locale
            notifications.append(
                Notification(
                    notification_id=self._new_id(),
                    news=news,
                    audience=audience,
                    template=template,
                    locale=self._negotiate_locale(template, locale),
                    recipient=shortened(address),
                    recipient_hash=hashed(address, news.order_id),
                )
            )
        return notifications


def is_address(text: str) -> bool:
    """Whether a text can stand as one address in a header and in an SMTP command."""
    local, at, domain = text.rpartition("@")
    return bool(
        at
        and local
        and domain
        and text.isascii()
        and text.isprintable()
        and not any(character in ' <>(),;:"\\[]' for character in text)
        and "@" not in local
    )


def shortened(address: str) -> str:
    """An address that people recognize and nobody can harvest: `a**@example.com`."""
    local, at, domain = address.rpartition("@")
    if not at:
        return ""
    # A local part of one letter would be told whole.
    return f"{local[0] if len(local) > 1 else ''}**@{domain}"


def hashed(address: str, order_id: UUID) -> bytes:
    """A fingerprint of an address within one order.

    The order is in it so that neither a list of hashed addresses nor two orders of one
    customer match anything.
    """
    return hashlib.sha256(order_id.bytes + address.casefold().encode()).digest()
