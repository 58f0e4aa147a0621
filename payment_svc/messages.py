"""Proto to domain and back: the only module that knows both.

The domain's enums share their numbers with the proto's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from google.protobuf.message import Message as ProtoMessage

from chassis.context import CallContext
from chassis.errors import InvalidInputError
from chassis.events import Event, EventTypes
from chassis.money import Money, MoneyError
from ordermesh.common.v1 import money_pb2
from ordermesh.order.v1 import order_events_pb2
from ordermesh.payment.v1 import payment_events_pb2, payment_service_pb2
from payment_svc.commands import CancellationAsked, OrderNews, OrderPlaced
from payment_svc.domain.attempt import CaptureMethod, ChargeTerms
from payment_svc.domain.payment import Announcement, Payment, Told
from payment_svc.domain.refund import Refund

ORDER_EVENTS = EventTypes(
    [order_events_pb2.OrderCreated, order_events_pb2.OrderCancellationRequested]
)
"""What the payment service listens to."""

_UUID = "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_ORDER_NAME = re.compile(f"merchants/([a-z][a-z0-9-]{{0,62}})/orders/({_UUID})")
_ORDER_FILTER = re.compile(f'\\s*order\\s*=\\s*"({_ORDER_NAME.pattern})"\\s*')


# --- names and filters --------------------------------------------------------------


def split_payment_name(name: str) -> tuple[str, UUID]:
    """Merchant and id of a validated `merchants/{merchant}/payments/{payment}`."""
    _, merchant, _, payment_id = name.split("/")
    return merchant, UUID(payment_id)


def split_order_name(name: str) -> tuple[str, UUID]:
    """Merchant and id of a `merchants/{merchant}/orders/{order}`.

    Raises:
        InvalidInputError: It is none.
    """
    found = _ORDER_NAME.fullmatch(name)
    if found is None:
        raise InvalidInputError.of_field("INVALID_FIELD", "order", "is not the name of an order")
    return found[1], UUID(found[2])


def order_of_filter(text: str, *, merchant: str) -> UUID | None:
    """The order that a filter asks for, or None for an empty filter.

    Raises:
        InvalidInputError: It is neither empty nor of the one documented form, or names
            an order of another merchant.
    """
    if not text:
        return None
    found = _ORDER_FILTER.fullmatch(text)
    if found is None or found[2] != merchant:
        raise InvalidInputError.of_field(
            "FILTER_INVALID",
            "filter",
            f'is not of the form order = "merchants/{merchant}/orders/{{order}}"',
        )
    return UUID(found[3])


# --- events of orders ---------------------------------------------------------------


def news_of(event: Event) -> OrderNews:
    """What an event of the order service asks of the payment service.

    Raises:
        InvalidInputError: It asks for something that cannot be.
    """
    payload: Any = event.payload
    merchant, order_id = split_order_name(payload.order)
    if merchant != event.merchant:
        raise InvalidInputError.of_field(
            "INVALID_FIELD", "order", "is not an order of the event's merchant"
        )
    match payload:
        case order_events_pb2.OrderCreated():
            return OrderPlaced(
                merchant=merchant, order_id=order_id, terms=_terms_of(payload), cause=event
            )
        case order_events_pb2.OrderCancellationRequested():
            return CancellationAsked(
                merchant=merchant, order_id=order_id, reason=payload.reason, cause=event
            )
        case _:
            raise InvalidInputError("INVALID_FIELD", f"{event.type} asks nothing of payments")


def _terms_of(created: order_events_pb2.OrderCreated) -> ChargeTerms:
    try:
        amount = Money(created.amount.currency_code, created.amount.minor_units)
        capture_method = CaptureMethod(created.capture_method)
    except MoneyError as error:
        raise InvalidInputError.of_field("INVALID_FIELD", "amount", str(error)) from error
    except ValueError as error:
        raise InvalidInputError.of_field(
            "INVALID_FIELD", "capture_method", "says nothing of when to take the money"
        ) from error
    return ChargeTerms(
        amount=amount, payment_method=created.payment_method, capture_method=capture_method
    )


# --- the resource -------------------------------------------------------------------


def payment_resource(payment: Payment) -> bytes:
    """The resource as callers read it, serialized; equal payments give equal bytes."""
    resource = payment_service_pb2.Payment(
        name=payment.name,
        order=payment.order,
        state=payment.state.value,  # type: ignore[arg-type]
        amount=_money_to_proto(payment.amount),
        captured=_money_to_proto(payment.captured),
        refunded=_money_to_proto(payment.refunded),
        payment_method=payment.attempt.terms.payment_method,
        provider=payment.provider,
        provider_reference=payment.attempt.provider_reference,
        failure_reason=payment.failure_reason,
        refunds=[_refund_to_proto(payment, refund) for refund in payment.refunds],
        etag=payment.etag,
    )
    resource.create_time.FromDatetime(payment.create_time)
    resource.update_time.FromDatetime(payment.update_time)
    return resource.SerializeToString(deterministic=True)


def payments_page(resources: Sequence[bytes], next_page_token: str) -> bytes:
    """A serialized ListPaymentsResponse around resources that are serialized already."""
    rest = payment_service_pb2.ListPaymentsResponse(next_page_token=next_page_token)
    parts: list[bytes] = []
    for resource in resources:
        # Field 1, length-delimited: what serializing the parsed resources would give.
        parts += (b"\x0a", _varint(len(resource)), resource)
    return b"".join((*parts, rest.SerializeToString()))


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def refund_name(payment: Payment, refund: Refund) -> str:
    """The resource name, `merchants/{merchant}/payments/{payment}/refunds/{refund}`."""
    return f"{payment.name}/refunds/{refund.refund_id}"


def _refund_to_proto(payment: Payment, refund: Refund) -> payment_service_pb2.Refund:
    resource = payment_service_pb2.Refund(
        name=refund_name(payment, refund),
        state=refund.state.value,  # type: ignore[arg-type]
        amount=_money_to_proto(refund.amount),
        reason=refund.reason,
    )
    resource.create_time.FromDatetime(refund.create_time)
    return resource


def _money_to_proto(money: Money) -> money_pb2.Money:
    return money_pb2.Money(currency_code=money.currency_code, minor_units=money.minor_units)


# --- events of payments -------------------------------------------------------------


def event_of(
    payment: Payment,
    announcement: Announcement,
    *,
    version: int,
    event_id: UUID,
    context: CallContext,
) -> Event:
    """The event that an announcement is told as."""
    return Event(
        event_id=event_id,
        merchant=payment.merchant,
        aggregate=payment.name,
        version=version,
        occur_time=payment.update_time,
        payload=_payload_of(payment, announcement),
        correlation_id=context.correlation_id,
        causation_id=context.causation_id,
        traceparent=context.traceparent,
    )


def _payload_of(payment: Payment, announcement: Announcement) -> ProtoMessage:
    refund = announcement.refund
    match announcement.told:
        case Told.AUTHORIZED:
            return payment_events_pb2.PaymentAuthorized(
                payment=payment.name, order=payment.order, amount=_money_to_proto(payment.amount)
            )
        case Told.SUCCEEDED:
            return payment_events_pb2.PaymentSucceeded(
                payment=payment.name, order=payment.order, amount=_money_to_proto(payment.captured)
            )
        case Told.FAILED:
            return payment_events_pb2.PaymentFailed(
                payment=payment.name,
                order=payment.order,
                amount=_money_to_proto(payment.amount),
                failure_reason=payment.failure_reason,
            )
        case Told.VOIDED:
            return payment_events_pb2.PaymentVoided(
                payment=payment.name, order=payment.order, amount=_money_to_proto(payment.amount)
            )
        case Told.REFUND_SUCCEEDED if refund is not None:
            return payment_events_pb2.RefundSucceeded(
                refund=refund_name(payment, refund),
                payment=payment.name,
                order=payment.order,
                amount=_money_to_proto(refund.amount),
                refunded_total=_money_to_proto(payment.refunded),
                captured_total=_money_to_proto(payment.captured),
            )
        case Told.REFUND_FAILED if refund is not None:
            return payment_events_pb2.RefundFailed(
                refund=refund_name(payment, refund),
                payment=payment.name,
                order=payment.order,
                amount=_money_to_proto(refund.amount),
                failure_reason=refund.failure_reason,
            )
        case _:
            raise ValueError(f"{announcement.told.value} is about a refund, and there is none")
