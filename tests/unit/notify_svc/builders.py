"""What the notification service's tests talk about, made in one line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

from google.protobuf.message import Message as ProtoMessage

from chassis.broker import Message
from chassis.context import CallContext
from chassis.events import Event
from chassis.settings import Merchant
from notify_svc.commands import Audience, Line, News, Occasion, Recipient
from notify_svc.delivery import Outgoing
from ordermesh.common.v1.money_pb2 import Money as ProtoMoney
from ordermesh.order.v1 import order_events_pb2, order_service_pb2
from ordermesh.payment.v1 import payment_events_pb2
from tests.builders import NOON, ACause, a_merchant, an_order_id, eur

CARD_DECLINED = "card_declined"


def merchants() -> dict[str, Merchant]:
    """`default`, who reads English, and `acme`, who reads German."""
    return {
        "default": a_merchant(name="Teehaus & Söhne"),
        "acme": a_merchant(id="acme", name="Acme", email="orders@acme.example", locale="de"),
    }


def a_recipient(order_id: UUID | None = None, **changes: Any) -> Recipient:
    """Ada, who ordered two packets of tea under her shop's number 4711."""
    return replace(
        Recipient(
            merchant="default",
            order_id=order_id or an_order_id(),
            email="ada@example.com",
            customer_id="cust-42",
            locale="en",
            client_order_ref="4711",
            total=eur(2500),
            lines=(Line(2, "Darjeeling 100 g"),),
            order_time=NOON,
        ),
        **changes,
    )


def a_news(recipient: Recipient, occasion: Occasion = Occasion.CONFIRMED, **changes: Any) -> News:
    """Something that happened to a recipient's order."""
    return replace(
        News(
            merchant=recipient.merchant,
            order_id=recipient.order_id,
            occasion=occasion,
            amount=recipient.total,
            occur_time=NOON,
            payment_state="PAID",
            cause=ACause(),
        ),
        **changes,
    )


def an_outgoing(
    template: str = "order_confirmed", *, recipient: Recipient | None = None, **changes: Any
) -> Outgoing:
    """A notification that is about to be sent, claimed for a minute."""
    recipient = recipient or a_recipient()
    return replace(
        Outgoing(
            merchant=recipient.merchant,
            notification_id=uuid4(),
            order_id=recipient.order_id,
            event_id=uuid4(),
            audience=Audience.MERCHANT if template.startswith("merchant_") else Audience.CUSTOMER,
            template=template,
            locale=recipient.locale,
            amount=recipient.total,
            payment_state="PAID",
            detail="",
            occur_time=NOON,
            create_time=NOON,
            attempts=1,
            context=CallContext(),
            recipient=recipient,
            claim=uuid4(),
            lease_end=float("inf"),
        ),
        **changes,
    )


def _event(
    payload: ProtoMessage, order: str, *, event_id: UUID | None = None, version: int = 1
) -> Event:
    return Event(
        event_id=event_id or uuid4(),
        merchant=order.split("/")[1],
        aggregate=order,
        version=version,
        occur_time=NOON,
        payload=payload,
        correlation_id="corr-1",
    )


def an_order_name(merchant: str = "default") -> str:
    """The name of an order that nobody has heard of."""
    return f"merchants/{merchant}/orders/{an_order_id()}"


def order_created(
    order: str,
    *,
    email: str = "ada@example.com",
    locale: str = "en",
    titles: Sequence[str] = ("Darjeeling 100 g",),
    minor_units: int = 2500,
    **event: Any,
) -> Event:
    """OrderCreated of this order."""
    created = order_events_pb2.OrderCreated(
        order=order,
        amount=ProtoMoney(currency_code="EUR", minor_units=minor_units),
        payment_method="pm_card_visa",
        capture_method=order_service_pb2.AUTOMATIC,
        customer=order_service_pb2.Customer(customer_id="cust-42", email=email, locale=locale),
        lines=[
            order_service_pb2.OrderLine(sku=f"SKU-{number}", title=title, quantity=2)
            for number, title in enumerate(titles)
        ],
        client_order_ref="4711",
    )
    created.create_time.FromDatetime(NOON)
    return _event(created, order, **event)


def payment_succeeded(order: str, *, minor_units: int = 2500, **event: Any) -> Event:
    """PaymentSucceeded of this order."""
    return _event(
        payment_events_pb2.PaymentSucceeded(
            payment=order.replace("orders", "payments"),
            order=order,
            amount=ProtoMoney(currency_code="EUR", minor_units=minor_units),
        ),
        order,
        **event,
    )


def order_confirmed(order: str, **event: Any) -> Event:
    """OrderConfirmed of this order, paid."""
    return _event(
        order_events_pb2.OrderConfirmed(
            order=order,
            amount=ProtoMoney(currency_code="EUR", minor_units=2500),
            payment_state=order_service_pb2.Order.PAID,
        ),
        order,
        **event,
    )


def order_failed(order: str, reason: str = CARD_DECLINED, **event: Any) -> Event:
    """OrderFailed of this order."""
    return _event(
        order_events_pb2.OrderFailed(
            order=order,
            amount=ProtoMoney(currency_code="EUR", minor_units=2500),
            failure_reason=reason,
        ),
        order,
        **event,
    )


def order_cancelled(order: str, reason: str = "wrong size", **event: Any) -> Event:
    """OrderCancelled of this order, refunded."""
    return _event(
        order_events_pb2.OrderCancelled(
            order=order,
            amount=ProtoMoney(currency_code="EUR", minor_units=2500),
            payment_state=order_service_pb2.Order.REFUNDED,
            reason=reason,
        ),
        order,
        **event,
    )


def refund_succeeded(order: str, **event: Any) -> Event:
    """RefundSucceeded of this order."""
    return _event(
        payment_events_pb2.RefundSucceeded(
            order=order, amount=ProtoMoney(currency_code="EUR", minor_units=1000)
        ),
        order,
        **event,
    )


def message_of(event: Event) -> Message:
    """An event as it travels."""
    return Message(event_id=event.event_id, type=event.type, body=event.encoded())
