"""Events as RabbitMQ carries them: what stands in properties, in headers, and under which names.

Attributes have the names of CloudEvents' AMQP binding; retries and dead letters add headers
of their own, which begin with `x-` like the broker's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from aiormq.abc import DeliveredMessage

from chassis.broker import DELIVERY_LIMIT_EXCEEDED, DeadLetterRecord, Message
from chassis.broker.amqp.topology import EXCHANGE

EVENT_ID: Final = "cloudEvents:id"
TYPE: Final = "cloudEvents:type"
ATTEMPT: Final = "x-attempt"
ERROR_CLASS: Final = "x-error-class"
ERROR_DETAIL: Final = "x-error-detail"
FIRST_DEATH: Final = "x-first-death"
DEATH: Final = "x-death-time"

NIL: Final = UUID(int=0)
"""Stands for the event's id where a message has none that can be read."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """One publish: where to, and what."""

    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any]
    content_type: str | None
    correlation_id: str | None


def parcel_of(message: Message) -> Parcel:
    """The form in which an event goes to its subscribers."""
    headers: dict[str, Any] = {EVENT_ID: str(message.event_id), TYPE: message.type}
    content_type = correlation_id = None
    for name, value in message.headers.items():
        if name == "content-type":
            content_type = value
        elif name == "correlation-id":
            correlation_id = value
        elif name.startswith("ce-"):
            headers[f"cloudEvents:{name[3:]}"] = value
        elif not name.startswith("x-"):
            headers[name] = value
    if message.attempt:
        headers[ATTEMPT] = message.attempt
    return Parcel(EXCHANGE, message.type, message.body, headers, content_type, correlation_id)


def message_of(delivered: DeliveredMessage) -> Message:
    """The event that was delivered.

    Raises:
        ValueError: It is none: none of our publishers made this message.
    """
    properties = delivered.header.properties
    headers: dict[str, str] = {}
    attempt = 0
    event_id = name_of_type = ""
    for name, value in (properties.headers or {}).items():
        if name == EVENT_ID:
            event_id = str(value)
        elif name == TYPE:
            name_of_type = str(value)
        elif name == ATTEMPT:
            attempt = int(str(value))
        elif name.startswith("cloudEvents:"):
            headers[f"ce-{name[12:]}"] = str(value)
        elif not name.startswith("x-"):
            headers[name] = str(value)
    if properties.content_type:
        headers["content-type"] = properties.content_type
    if properties.correlation_id:
        headers["correlation-id"] = properties.correlation_id
    if not name_of_type:
        raise ValueError("the message says no type")
    return Message(
        event_id=UUID(event_id),
        type=name_of_type,
        body=delivered.body,
        headers=headers,
        attempt=attempt,
    )


def delivery_count_of(delivered: DeliveredMessage) -> int:
    """How often the message was taken before and not settled."""
    # RabbitMQ counts in a header; since 4.3 it does not count what was given back on purpose,
    # which the flag still tells.
    counted = (delivered.header.properties.headers or {}).get("x-delivery-count", 0)
    return max(counted if isinstance(counted, int) else 0, 1 if delivered.redelivered else 0)


def dead_letter_of(consumer: str, taken: DeliveredMessage) -> DeadLetterRecord:
    """A message of a dead-letter queue, as an operator sees it."""
    headers = taken.header.properties.headers or {}
    try:
        message = message_of(taken)
    except ValueError:
        message = Message(event_id=NIL, type=str(headers.get(TYPE, "")), body=taken.body)
    error_class = headers.get(ERROR_CLASS)
    if error_class is not None:
        now = datetime.now(UTC)
        return DeadLetterRecord(
            message=message,
            consumer=consumer,
            error_class=str(error_class),
            error_detail=str(headers.get(ERROR_DETAIL, "")),
            first_death_time=_time(headers.get(FIRST_DEATH), now),
            death_time=_time(headers.get(DEATH), now),
        )
    # RabbitMQ put it here of its own accord, and says why in its own way: the newest death
    # comes first. What it calls the first may be a retry's stay in its queue.
    deaths = headers.get("x-death")
    newest = deaths[0] if isinstance(deaths, list) and deaths else None
    death = newest if isinstance(newest, dict) else {}
    when = death.get("time")
    moment = when if isinstance(when, datetime) else datetime.now(UTC)
    reason = str(death.get("reason", "unknown"))
    return DeadLetterRecord(
        message=message,
        consumer=consumer,
        error_class=DELIVERY_LIMIT_EXCEEDED if reason == "delivery_limit" else reason,
        error_detail=f"dead-lettered by RabbitMQ: {reason}",
        first_death_time=_time(headers.get(FIRST_DEATH), moment),
        death_time=moment,
    )


def _time(value: object, otherwise: datetime) -> datetime:
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return otherwise
