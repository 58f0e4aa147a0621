"""What payment reports, from the queue to the orders."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from chassis.broker import Ack, DeadLetter, Delivery, Message, Retry
from chassis.events import Event
from chassis.mediator import Mediator, Registration
from chassis.testing import FrozenClock
from order_svc.commands import RecordPayments, RecordPaymentsHandler
from order_svc.consumers import SUBSCRIPTION, payment_consumer
from order_svc.domain.order import Order, OrderState
from order_svc.testing import InMemoryOrders
from ordermesh.payment.v1 import payment_events_pb2
from tests.builders import NOON, PAYMENT, a_placement, an_order


def a_delivery(payload: Any) -> Delivery:
    """A payment's event as the broker hands it over."""
    event = Event(
        event_id=uuid4(),
        merchant="default",
        aggregate=PAYMENT,
        version=1,
        occur_time=NOON,
        payload=payload,
    )
    return Delivery(Message(event_id=event.event_id, type=event.type, body=event.encoded()), 0)


def paid(order: Order | None) -> Delivery:
    """A payment that succeeded, of an order or of nothing."""
    return a_delivery(
        payment_events_pb2.PaymentSucceeded(payment=PAYMENT, order=order.name if order else "")
    )


class Consuming:
    """The service's consumer over orders in memory."""

    def __init__(self) -> None:
        self.store = InMemoryOrders()
        handler = RecordPaymentsHandler(store=self.store, now=FrozenClock())
        self.consumer = payment_consumer(Mediator([Registration(RecordPayments, handler)]))

    async def an_order(self) -> Order:
        """An order that awaits its payment."""
        order = an_order()
        await self.store.place(a_placement(order))
        return order


async def test_a_batch_of_payments_confirms_its_orders() -> None:
    """Every delivery is acknowledged."""
    consuming = Consuming()
    orders = [await consuming.an_order() for _ in range(3)]
    assert await consuming.consumer.settle([paid(order) for order in orders]) == [Ack()] * 3
    states = {order.state for order in consuming.store.orders.values()}
    assert states == {OrderState.CONFIRMED}


async def test_a_redelivered_event_is_handled_once() -> None:
    """The second delivery is acknowledged and does nothing."""
    consuming = Consuming()
    delivery = paid(await consuming.an_order())
    for _ in range(2):
        assert await consuming.consumer.settle([delivery]) == [Ack()]
    assert len(consuming.store.history) == 2


async def test_a_report_that_names_no_order_is_a_dead_letter() -> None:
    """Its neighbours are handled."""
    consuming = Consuming()
    order = await consuming.an_order()
    verdicts = await consuming.consumer.settle([paid(None), paid(order)])
    assert [type(verdict) for verdict in verdicts] == [DeadLetter, Ack]
    assert consuming.store.orders[order.name].state is OrderState.CONFIRMED


async def test_a_report_that_comes_before_its_order_waits() -> None:
    """Its neighbours do not."""
    consuming = Consuming()
    order = await consuming.an_order()
    verdicts = await consuming.consumer.settle([paid(an_order()), paid(order)])
    assert [type(verdict) for verdict in verdicts] == [Retry, Ack]


def test_the_queue_is_the_services_own_and_hears_all_of_payment() -> None:
    """The name stands in the contract between services and operators."""
    assert SUBSCRIPTION.consumer == "order"
    assert len(SUBSCRIPTION.types) == len(payment_events_pb2.DESCRIPTOR.message_types_by_name)
