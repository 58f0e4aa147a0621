"""Events to what happened, filters to orders, rows to resources."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest

from chassis.errors import InvalidInputError
from notify_svc.commands import Hear, Line, Occasion
from notify_svc.messages import (
    EVENTS,
    hear_from_events,
    notification_to_proto,
    order_from_filter,
)
from ordermesh.notification.v1 import notification_service_pb2 as pb
from ordermesh.order.v1 import order_events_pb2
from tests.builders import NOON, an_order_id, eur
from tests.unit.notify_svc.builders import (
    an_order_name,
    order_cancelled,
    order_confirmed,
    order_created,
    order_failed,
    payment_succeeded,
    refund_succeeded,
)


def test_order_created_introduces_the_recipient() -> None:
    """Whom to write to, and what mails repeat of the order."""
    order = an_order_name()
    event = order_created(order, locale="de-AT", titles=["Darjeeling", ""])
    (introduction,) = hear_from_events([event]).introductions
    recipient = introduction.recipient
    assert introduction.cause is event
    assert recipient.email == "ada@example.com"
    assert recipient.locale == "de-AT"
    assert recipient.client_order_ref == "4711"
    assert recipient.total == eur(2500)
    assert recipient.order_time == NOON
    # A line without a title is told by its article's number.
    assert recipient.lines == (Line(2, "Darjeeling"), Line(2, "SKU-1"))


def test_a_customer_without_a_locale_is_written_to_in_english() -> None:
    """As the contract says of an unset locale."""
    hear = hear_from_events([order_created(an_order_name(), locale="")])
    assert hear.introductions[0].recipient.locale == "en"


def test_each_event_is_the_news_that_it_tells() -> None:
    """The occasion, and what the mail needs beside the amount."""
    order = an_order_name()
    hear = hear_from_events(
        [
            payment_succeeded(order),
            order_confirmed(order),
            order_failed(order, "insufficient_funds"),
            order_cancelled(order, "wrong size"),
            refund_succeeded(order),
        ]
    )
    assert [(n.occasion, n.payment_state, n.detail) for n in hear.news] == [
        (Occasion.PAID, "", ""),
        (Occasion.CONFIRMED, "PAID", ""),
        (Occasion.FAILED, "", "insufficient_funds"),
        (Occasion.CANCELLED, "REFUNDED", "wrong size"),
        (Occasion.REFUNDED, "", ""),
    ]
    assert [n.amount for n in hear.news] == [eur(2500)] * 4 + [eur(1000)]


def test_every_event_that_is_subscribed_to_is_understood() -> None:
    """A type cannot be added to the subscription without saying what it means."""
    order = an_order_name()
    builders = (
        order_created, order_confirmed, order_failed, order_cancelled, payment_succeeded,
        refund_succeeded,
    )  # fmt: skip
    events = [build(order) for build in builders]
    assert {event.type for event in events} == set(EVENTS.names)
    hear: Hear = hear_from_events(events)
    assert len(hear.introductions) + len(hear.news) == len(events)


def test_a_payment_state_of_a_newer_order_service_is_not_told() -> None:
    """The mail says less; it does not fail."""
    event = order_confirmed(an_order_name())
    payload: Any = event.payload
    payload.payment_state = 99
    assert hear_from_events([event]).news[0].payment_state == ""


@pytest.mark.parametrize(
    "name",
    [
        "",
        "orders/1",
        "merchants/default/orders/not-a-uuid",
        "merchants/default/orders/018c0000-0000-7000-8000-000000000001/events",
        "merchants/acme/orders/018c0000-0000-7000-8000-000000000001",
    ],
)
def test_an_event_about_no_order_of_its_merchant_is_refused(name: str) -> None:
    """Such an event would tell one merchant's customer about another's order."""
    event = payment_succeeded(an_order_name("default"))
    payload: Any = event.payload
    payload.order = name
    with pytest.raises(InvalidInputError, match="no order of merchant 'default'"):
        hear_from_events([event])


def test_an_amount_of_an_unknown_currency_is_refused() -> None:
    """It can be printed in no mail; the event becomes a dead letter."""
    event = payment_succeeded(an_order_name())
    payload: Any = event.payload
    payload.amount.currency_code = "XYZ"
    with pytest.raises(InvalidInputError, match="XYZ"):
        hear_from_events([event])


def test_an_event_that_nobody_is_told_of_is_refused() -> None:
    """Should it ever be subscribed to by mistake."""
    order = an_order_name()
    event = replace(
        order_confirmed(order), payload=order_events_pb2.OrderPaymentRecorded(order=order)
    )
    with pytest.raises(InvalidInputError, match="OrderPaymentRecorded"):
        hear_from_events([event])


ORDER = UUID("018c0000-0000-7000-8000-000000000001")


@pytest.mark.parametrize("text", [f'order = "merchants/default/orders/{ORDER}"'])
def test_the_documented_filter_names_an_order(text: str) -> None:
    """And no filter at all names none."""
    assert order_from_filter(text, merchant="default") == ORDER
    assert order_from_filter("", merchant="default") is None


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "order",
        f"order = merchants/default/orders/{ORDER}",
        f'order = "merchants/acme/orders/{ORDER}"',
        f'order != "merchants/default/orders/{ORDER}"',
        f'order = "merchants/default/orders/{ORDER}" AND state = "SENT"',
        f'order = "merchants/default/orders/{ORDER}"\n',
        'order = "merchants/default/orders/*"',
        'state = "SENT"',
    ],
)
def test_any_other_filter_is_refused(text: str) -> None:
    """Answering a filter that was not understood would be a wrong answer."""
    with pytest.raises(InvalidInputError) as caught:
        order_from_filter(text, merchant="default")
    assert caught.value.reason == "FILTER_INVALID"
    assert [violation.field for violation in caught.value.violations] == ["filter"]


def test_a_row_is_answered_as_the_contract_has_it() -> None:
    """Enums by their proto's numbers; an unsent one has no send_time."""
    order_id, notification_id, event_id = an_order_id(), an_order_id(), an_order_id()
    row = {
        "merchant": "default",
        "notification_id": notification_id,
        "order_id": order_id,
        "event_id": event_id,
        "channel": "EMAIL",
        "audience": "MERCHANT",
        "template": "merchant_order_confirmed",
        "locale": "de",
        "recipient": "m**@default.example",
        "state": "RETRYING",
        "attempts": 3,
        "failure_reason": "451 4.2.1 Try again later",
        "create_time": NOON,
        "send_time": None,
    }
    notification = notification_to_proto(row)
    assert notification.name == f"merchants/default/notifications/{notification_id}"
    assert notification.order == f"merchants/default/orders/{order_id}"
    assert notification.event_id == str(event_id)
    assert notification.state == pb.Notification.RETRYING
    assert notification.channel == pb.Notification.EMAIL
    assert notification.audience == pb.Notification.MERCHANT
    assert notification.attempts == 3
    assert notification.failure_reason == "451 4.2.1 Try again later"
    assert not notification.HasField("send_time")
    sent = notification_to_proto({**row, "send_time": NOON + timedelta(seconds=1)})
    assert sent.send_time.ToSeconds() == int(NOON.timestamp()) + 1
