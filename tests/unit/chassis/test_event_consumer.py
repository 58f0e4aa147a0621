"""The consumer's loop: a batch in, a verdict for each delivery out."""

from __future__ import annotations

from collections.abc import Sequence
from uuid import uuid4

import pytest

from chassis.broker import Ack, DeadLetter, Delivery, Message, Retry, Subscription, Verdict
from chassis.context import current
from chassis.errors import (
    ConflictError,
    InvalidInputError,
    OverloadedError,
    RuleViolationError,
    UnavailableError,
)
from chassis.events import Event, EventTypes
from chassis.inbox import EventConsumer
from ordermesh.payment.v1.payment_events_pb2 import PaymentFailed
from tests.builders import NOON

TYPES = EventTypes([PaymentFailed])
SUBSCRIPTION = Subscription(consumer="test", types=TYPES.names)


def a_delivery(payment: str, body: bytes | None = None) -> Delivery:
    """An event about a payment; its correlation id is the payment's name."""
    event = Event(
        event_id=uuid4(),
        merchant="default",
        aggregate=payment,
        version=1,
        occur_time=NOON,
        payload=PaymentFailed(payment=payment),
        correlation_id=payment,
    )
    message = Message(
        event_id=event.event_id, type=event.type, body=event.encoded() if body is None else body
    )
    return Delivery(message, 0)


class Handler:
    """A service's handler: fails on what a test says, remembers what it was given."""

    def __init__(self, **failing: Exception) -> None:
        self.failing = failing
        self.calls: list[list[str]] = []
        self.contexts: list[str] = []

    async def __call__(self, events: Sequence[Event]) -> None:
        """Handles a batch whole, or not at all."""
        self.calls.append([event.aggregate for event in events])
        self.contexts.append(current().correlation_id)
        for event in events:
            if event.aggregate in self.failing:
                raise self.failing[event.aggregate]


async def settled(handler: Handler, *deliveries: Delivery, retries: int = 0) -> list[Verdict]:
    """The verdicts on these."""
    consumer = EventConsumer(SUBSCRIPTION, TYPES, handler, in_process_retries=retries)
    return await consumer.settle(deliveries)


async def test_a_batch_is_handled_in_one_go() -> None:
    """Many deliveries, one transaction."""
    handler = Handler()
    assert await settled(handler, *map(a_delivery, "abc")) == [Ack()] * 3
    assert handler.calls == [["a", "b", "c"]]


async def test_a_poisonous_event_dies_alone() -> None:
    """Its neighbours are handled, in their order, and it is put with the dead letters."""
    handler = Handler(b=InvalidInputError("INVALID_FIELD", "makes no sense"))
    verdicts = await settled(handler, *map(a_delivery, "abc"))
    assert verdicts == [Ack(), DeadLetter("INVALID_FIELD", "makes no sense"), Ack()]
    assert handler.calls == [["a", "b", "c"], ["a"], ["b"], ["c"]]


async def test_what_is_no_event_dies_without_being_handled() -> None:
    """And the rest of its batch stays together."""
    handler = Handler()
    verdicts = await settled(handler, a_delivery("a"), a_delivery("b", b"\xff"), a_delivery("c"))
    assert [type(verdict) for verdict in verdicts] == [Ack, DeadLetter, Ack]
    assert handler.calls == [["a", "c"]]


async def test_a_batch_of_noise_calls_nobody() -> None:
    """There is nothing to handle."""
    handler = Handler()
    (verdict,) = await settled(handler, a_delivery("a", b"\xff"))
    assert isinstance(verdict, DeadLetter)
    assert handler.calls == []


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("INVALID_FIELD", "no"),
        RuleViolationError("ILLEGAL_TRANSITION", "no"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_permanent_failure_is_a_dead_letter(error: Exception) -> None:
    """Delivering it again would not help."""
    (verdict,) = await settled(Handler(a=error), a_delivery("a"))
    assert isinstance(verdict, DeadLetter)
    assert verdict.detail == "no"


@pytest.mark.parametrize(
    "error",
    [
        ConflictError("CONCURRENT_CHANGE", "not now"),
        OverloadedError("OVERLOADED", "not now"),
        UnavailableError("DEPENDENCY_UNAVAILABLE", "not now"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_passing_failure_is_tried_again_later(error: Exception) -> None:
    """The reason goes with it."""
    (verdict,) = await settled(Handler(a=error), a_delivery("a"))
    assert isinstance(verdict, Retry)
    assert verdict.reason.startswith(error.reason)  # type: ignore[attr-defined]


async def test_an_accident_of_ours_is_tried_again_later() -> None:
    """It may be repaired before the tries are used up; then it is a dead letter."""
    (verdict,) = await settled(Handler(a=ZeroDivisionError("by zero")), a_delivery("a"))
    assert verdict == Retry("ZeroDivisionError: by zero")


@pytest.mark.parametrize(
    "outage",
    [
        UnavailableError("DEPENDENCY_UNAVAILABLE", "the database is away"),
        OverloadedError("OVERLOADED", "every database connection is in use"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_an_outage_is_not_met_again_by_each_event_alone(outage: Exception) -> None:
    """All of the batch waits."""
    handler = Handler(b=outage)
    verdicts = await settled(handler, *map(a_delivery, "abc"))
    assert [type(verdict) for verdict in verdicts] == [Retry] * 3
    assert handler.calls == [["a", "b", "c"]]


async def test_a_conflict_is_tried_again_on_the_spot() -> None:
    """Most are over in a moment, and need no trip through the broker."""

    class Once(Handler):
        async def __call__(self, events: Sequence[Event]) -> None:
            try:
                await super().__call__(events)
            finally:
                self.failing = {}

    handler = Once(a=ConflictError("CONCURRENT_CHANGE", "not now"))
    assert await settled(handler, a_delivery("a"), retries=1) == [Ack()]
    assert handler.calls == [["a"], ["a"]]


async def test_an_event_is_handled_in_its_own_context() -> None:
    """What it sets off carries its correlation id; afterwards there is none."""
    handler = Handler()
    await settled(handler, a_delivery("corr-7"))
    assert handler.contexts == ["corr-7"]
    assert current().correlation_id == ""


async def test_the_same_event_twice_in_a_batch_gets_two_verdicts() -> None:
    """The broker counts deliveries, not events."""
    delivery = a_delivery("a")
    assert await settled(Handler(), delivery, delivery) == [Ack(), Ack()]
