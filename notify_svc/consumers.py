"""What the notification service listens to: orders and payments, queue `notification`."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.broker import Subscription
from chassis.events import Event
from chassis.inbox import EventConsumer
from chassis.mediator import Mediator
from notify_svc.messages import EVENTS, hear_from_events
from notify_svc.storage import CONSUMER

SUBSCRIPTION = Subscription(consumer=CONSUMER, types=EVENTS.names)


def event_consumer(mediator: Mediator) -> EventConsumer:
    """Consumes events in batches; each batch is one `Hear`."""

    async def handle(events: Sequence[Event]) -> None:
        await mediator.send(hear_from_events(events))

    return EventConsumer(SUBSCRIPTION, EVENTS, handle)
