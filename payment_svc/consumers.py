"""What the payment service listens to: orders placed and cancelled, queue `payment`."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.broker import Subscription
from chassis.events import Event
from chassis.inbox import EventConsumer
from chassis.mediator import Mediator
from payment_svc.commands import FollowOrders
from payment_svc.messages import ORDER_EVENTS, news_of

SUBSCRIPTION = Subscription(consumer="payment", types=ORDER_EVENTS.names)


def order_consumer(mediator: Mediator) -> EventConsumer:
    """Consumes order events in batches; each batch is one `FollowOrders`."""

    async def handle(events: Sequence[Event]) -> None:
        await mediator.send(FollowOrders(news=[news_of(event) for event in events]))

    return EventConsumer(SUBSCRIPTION, ORDER_EVENTS, handle)
