"""What the order service listens to: the payment service's reports, queue `order`."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.broker import Subscription
from chassis.errors import InvalidInputError
from chassis.events import Event
from chassis.inbox import EventConsumer
from chassis.mediator import Mediator
from order_svc.commands import RecordPayments
from order_svc.messages import PAYMENT_EVENTS, report_of

SUBSCRIPTION = Subscription(consumer="order", types=PAYMENT_EVENTS.names)


def payment_consumer(mediator: Mediator) -> EventConsumer:
    """Consumes payment events in batches; each batch is one `RecordPayments`."""

    async def handle(events: Sequence[Event]) -> None:
        try:
            reports = [report_of(event) for event in events]
        except ValueError as error:
            raise InvalidInputError("INVALID_FIELD", f"not a payment's report: {error}") from error
        await mediator.send(RecordPayments(reports=reports))

    return EventConsumer(SUBSCRIPTION, PAYMENT_EVENTS, handle)
