"""Proto to what happened, and notifications to proto: the only module that knows both."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from chassis.errors import InvalidInputError
from chassis.events import Event, EventTypes
from chassis.money import Money, MoneyError
from notify_svc.commands import (
    Audience,
    Channel,
    Hear,
    Introduction,
    Line,
    News,
    Occasion,
    Recipient,
    State,
)
from ordermesh.common.v1 import money_pb2
from ordermesh.notification.v1 import notification_service_pb2 as pb
from ordermesh.order.v1 import order_events_pb2, order_service_pb2
from ordermesh.payment.v1 import payment_events_pb2

EVENTS: Final = EventTypes(
    [
        order_events_pb2.OrderCreated,
        order_events_pb2.OrderConfirmed,
        order_events_pb2.OrderFailed,
        order_events_pb2.OrderCancelled,
        payment_events_pb2.PaymentSucceeded,
        payment_events_pb2.RefundSucceeded,
    ]
)
"""The events that somebody is told of, or that say whom to tell."""

# A newer order service may know states that we do not; then the mail says less.
_PAYMENT_STATES: Final[dict[int, str]] = {
    number: name for name, number in order_service_pb2.Order.PaymentState.items()
}

_UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
_ORDER = re.compile(rf"merchants/([a-z][a-z0-9-]{{0,62}})/orders/({_UUID})")
_FILTER = re.compile(rf'order *= *"({_ORDER.pattern})"')


def hear_from_events(events: Sequence[Event]) -> Hear:
    """The command that a batch of events amounts to.

    Raises:
        InvalidInputError: An event contradicts itself or its contract.
    """
    introductions: list[Introduction] = []
    news: list[News] = []
    for event in events:
        payload: Any = event.payload
        if isinstance(payload, order_events_pb2.OrderCreated):
            introductions.append(
                Introduction(recipient=_recipient_from_proto(event, payload), cause=event)
            )
        else:
            news.append(_news_from_proto(event, payload))
    return Hear(introductions=introductions, news=news)


def _recipient_from_proto(event: Event, created: order_events_pb2.OrderCreated) -> Recipient:
    merchant, order_id = _order_of(event, created.order)
    customer = created.customer
    return Recipient(
        merchant=merchant,
        order_id=order_id,
        email=customer.email,
        customer_id=customer.customer_id,
        locale=customer.locale or "en",
        client_order_ref=created.client_order_ref,
        total=_money_from_proto(created.amount),
        lines=tuple(Line(line.quantity, line.title or line.sku) for line in created.lines),
        order_time=(
            created.create_time.ToDatetime(tzinfo=UTC)
            if created.HasField("create_time")
            else event.occur_time
        ),
    )


def _news_from_proto(event: Event, payload: Any) -> News:
    payment_state, detail = "", ""
    match payload:
        case payment_events_pb2.PaymentSucceeded():
            occasion = Occasion.PAID
        case order_events_pb2.OrderConfirmed():
            occasion = Occasion.CONFIRMED
            payment_state = _PAYMENT_STATES.get(payload.payment_state, "")
        case order_events_pb2.OrderFailed():
            occasion, detail = Occasion.FAILED, payload.failure_reason
        case order_events_pb2.OrderCancelled():
            occasion, detail = Occasion.CANCELLED, payload.reason
            payment_state = _PAYMENT_STATES.get(payload.payment_state, "")
        case payment_events_pb2.RefundSucceeded():
            occasion = Occasion.REFUNDED
        case _:
            raise InvalidInputError("INVALID_FIELD", f"nobody is told of a {event.type}")
    merchant, order_id = _order_of(event, payload.order)
    return News(
        merchant=merchant,
        order_id=order_id,
        occasion=occasion,
        amount=_money_from_proto(payload.amount),
        occur_time=event.occur_time,
        payment_state=payment_state,
        detail=detail,
        cause=event,
    )


def _order_of(event: Event, name: str) -> tuple[str, UUID]:
    found = _ORDER.fullmatch(name)
    if found is None or found[1] != event.merchant:
        raise InvalidInputError(
            "INVALID_FIELD", f"{name!r} is no order of merchant {event.merchant!r}"
        )
    return found[1], UUID(found[2])


def _money_from_proto(money: money_pb2.Money) -> Money:
    try:
        return Money(money.currency_code, money.minor_units)
    except MoneyError as error:
        raise InvalidInputError("INVALID_FIELD", f"amount: {error}") from error


def split_notification_name(name: str) -> tuple[str, UUID]:
    """Merchant and id of a validated `merchants/{merchant}/notifications/{notification}`."""
    _, merchant, _, notification_id = name.split("/")
    return merchant, UUID(notification_id)


def order_from_filter(text: str, *, merchant: str) -> UUID | None:
    """The order that a list is narrowed to; None when it is not narrowed.

    Raises:
        InvalidInputError: FILTER_INVALID, the filter is not of the one form that is
            known, or names an order of another merchant.
    """
    if not text:
        return None
    found = _FILTER.fullmatch(text)
    if found is None or found[2] != merchant:
        raise InvalidInputError.of_field(
            "FILTER_INVALID",
            "filter",
            f'must be order = "merchants/{merchant}/orders/{{order}}", or empty',
        )
    return UUID(found[3])


def notification_to_proto(row: Any) -> pb.Notification:
    """A row of `notifications` as the contract has it."""
    merchant: str = row["merchant"]
    # The generated types know an enum's values by name only.
    state: Any = State[row["state"]].value
    channel: Any = Channel[row["channel"]].value
    audience: Any = Audience[row["audience"]].value
    notification = pb.Notification(
        name=notification_name(merchant, row["notification_id"]),
        state=state,
        channel=channel,
        audience=audience,
        template=row["template"],
        locale=row["locale"],
        recipient=row["recipient"],
        order=order_name(merchant, row["order_id"]),
        event_id=str(row["event_id"]),
        attempts=row["attempts"],
        failure_reason=row["failure_reason"],
    )
    notification.create_time.FromDatetime(row["create_time"])
    send_time: datetime | None = row["send_time"]
    if send_time is not None:
        notification.send_time.FromDatetime(send_time)
    return notification


def notification_name(merchant: str, notification_id: UUID) -> str:
    """The resource name of a notification."""
    return f"merchants/{merchant}/notifications/{notification_id}"


def order_name(merchant: str, order_id: UUID) -> str:
    """The resource name of an order."""
    return f"merchants/{merchant}/orders/{order_id}"
