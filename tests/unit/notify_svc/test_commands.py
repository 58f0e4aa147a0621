"""Who is told what, in which language, and what is kept of their address."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import pytest

from chassis.errors import ConflictError
from notify_svc.commands import (
    Audience,
    Compose,
    Hear,
    HearHandler,
    Introduction,
    News,
    Notification,
    Occasion,
    Recipient,
    hashed,
    is_address,
    shortened,
)
from tests.builders import an_order_id
from tests.unit.notify_svc.builders import a_news, a_recipient, merchants


class Memory:
    """A store that knows some recipients and keeps what it is told to queue."""

    def __init__(self, *known: Recipient) -> None:
        self.known = {recipient.order_id: recipient for recipient in known}
        self.queued: list[Notification] = []

    async def record(
        self, introductions: Sequence[Introduction], news: Sequence[News], compose: Compose
    ) -> Sequence[News]:
        """Queues what is known whom to tell of."""
        self.known.update({i.recipient.order_id: i.recipient for i in introductions})
        for item in news:
            if item.order_id in self.known:
                self.queued.extend(compose(item, self.known[item.order_id]))
        return [item for item in news if item.order_id not in self.known]


def a_handler(store: Memory) -> HearHandler:
    """The handler, writing to everyone in what they asked for."""
    return HearHandler(
        store=store,
        merchants=merchants(),
        negotiate_locale=lambda _, asked: asked,
        new_id=uuid4,
    )


@pytest.mark.parametrize(
    ("occasion", "told"),
    [
        (Occasion.PAID, {(Audience.CUSTOMER, "payment_receipt")}),
        (
            Occasion.CONFIRMED,
            {
                (Audience.CUSTOMER, "order_confirmed"),
                (Audience.MERCHANT, "merchant_order_confirmed"),
            },
        ),
        (Occasion.FAILED, {(Audience.CUSTOMER, "order_failed")}),
        (
            Occasion.CANCELLED,
            {
                (Audience.CUSTOMER, "order_cancelled"),
                (Audience.MERCHANT, "merchant_order_cancelled"),
            },
        ),
        (Occasion.REFUNDED, {(Audience.CUSTOMER, "refund_issued")}),
    ],
)
async def test_each_occasion_tells_those_it_concerns(
    occasion: Occasion, told: set[tuple[Audience, str]]
) -> None:
    """Every occasion has its mails; a new one cannot be added without them."""
    store = Memory()
    recipient = a_recipient()
    news = a_news(recipient, occasion)
    await a_handler(store)(
        Hear(
            introductions=[Introduction(recipient=recipient, cause=news.cause)],
            news=[news],
        )
    )
    assert {(n.audience, n.template) for n in store.queued} == told


async def test_a_customer_and_a_merchant_are_each_written_to_in_their_own_language() -> None:
    """The customer's comes with the order, the merchant's from the file."""
    recipient = a_recipient(merchant="acme", locale="fr-CA")
    store = Memory(recipient)
    await a_handler(store)(Hear(news=[a_news(recipient)]))
    assert {n.audience: n.locale for n in store.queued} == {
        Audience.CUSTOMER: "fr-CA",
        Audience.MERCHANT: "de",
    }


async def test_a_notification_holds_no_address() -> None:
    """Shortened for people, hashed for the constraint, whole nowhere."""
    recipient = a_recipient()
    store = Memory(recipient)
    await a_handler(store)(Hear(news=[a_news(recipient)]))
    assert {n.recipient for n in store.queued} == {"a**@example.com", "m**@default.example"}
    assert "ada@example.com" not in repr(store.queued)


async def test_news_of_an_unknown_order_is_to_be_tried_again() -> None:
    """Its OrderCreated may be on its way; the neighbours are noted all the same."""
    known = a_recipient()
    store = Memory(known)
    unknown = a_news(a_recipient())
    with pytest.raises(ConflictError, match=str(unknown.order_id)):
        await a_handler(store)(Hear(news=[unknown, a_news(known)]))
    assert {n.news.order_id for n in store.queued} == {known.order_id}


async def test_a_merchant_who_is_not_in_the_file_yet_is_to_be_tried_again() -> None:
    """During a roll-out another process may know a merchant that this one does not."""
    recipient = a_recipient(merchant="newcomer")
    with pytest.raises(ConflictError, match="newcomer"):
        await a_handler(Memory(recipient))(Hear(news=[a_news(recipient)]))


async def test_an_erased_customer_leaves_no_trace_of_an_address() -> None:
    """There is nothing to shorten; the notification is queued and suppressed later."""
    recipient = a_recipient(email=None)
    store = Memory(recipient)
    await a_handler(store)(Hear(news=[a_news(recipient, Occasion.PAID)]))
    assert [n.recipient for n in store.queued] == [""]


@pytest.mark.parametrize(
    ("address", "short"),
    [
        ("ada@example.com", "a**@example.com"),
        ("ad@example.com", "a**@example.com"),
        ("a@example.com", "**@example.com"),
        ("", ""),
        ("no address", ""),
    ],
)
def test_a_shortened_address_cannot_be_harvested(address: str, short: str) -> None:
    """Neither its letters nor their number are told."""
    assert shortened(address) == short


def test_a_hash_tells_neither_two_spellings_nor_two_orders_of_a_customer() -> None:
    """One address is one recipient within an order, and a stranger in the next."""
    order, other = an_order_id(), an_order_id()
    assert hashed("ada@example.com", order) == hashed("Ada@Example.com", order)
    assert hashed("ada@example.com", order) != hashed("ada@example.com", other)
    assert hashed("ada@example.com", order) != hashed("bob@example.com", order)


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        ("ada@example.com", True),
        ("ada.l+tea@mail.example.co.uk", True),
        ("o'hara@example.com", True),
        ("", False),
        ("ada", False),
        ("@example.com", False),
        ("ada@", False),
        ("ada@example.com\r\nBcc: x@y.example", False),
        ("ada@example.com>\r\nRCPT TO:<x@y.example", False),
        ("ada@example.com, bob@example.com", False),
        ("ada bob@example.com", False),
        ("ada@bob@example.com", False),
        ("ädä@example.com", False),
        ("ada@exämple.com", False),
    ],
)
def test_only_one_plain_address_is_an_address(text: str, usable: bool) -> None:
    """What could end a header or an SMTP command is none."""
    assert is_address(text) is usable
