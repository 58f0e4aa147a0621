"""From events to commands, from payments to resources and events."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.context import CallContext
from chassis.errors import InvalidInputError
from chassis.money import Money
from ordermesh.order.v1 import order_events_pb2
from ordermesh.payment.v1 import payment_events_pb2, payment_service_pb2
from payment_svc.commands import CancellationAsked, OrderPlaced
from payment_svc.domain.attempt import CaptureMethod
from payment_svc.domain.outcomes import Authorized, Captured, Declined, Refunded, Voided
from payment_svc.domain.payment import Payment
from payment_svc.messages import (
    ORDER_EVENTS,
    event_of,
    news_of,
    order_of_filter,
    payment_resource,
    payments_page,
)
from tests.builders import NOON, eur
from tests.payments import (
    REFERENCE,
    a_captured_payment,
    a_payment,
    a_payment_id,
    a_refunded_payment,
    an_order_event,
    answered,
    cancelled,
    order_cancellation,
    order_created,
    order_id_of,
    order_name,
    taken,
)

ORDER = UUID("018c0000-0000-7000-8000-00000000000a")


def resource_of(payment: Payment) -> payment_service_pb2.Payment:
    """What a caller reads."""
    return payment_service_pb2.Payment.FromString(payment_resource(payment))


def payload_of(payment: Payment) -> Any:
    """The one event that a change is told as."""
    (announcement,) = payment.announcements
    event = event_of(
        payment,
        announcement,
        version=payment.events,
        event_id=a_payment_id(),
        context=CallContext(correlation_id="corr-1", causation_id="event-1"),
    )
    assert (event.aggregate, event.merchant) == (payment.name, payment.merchant)
    assert (event.version, event.correlation_id) == (payment.events, "corr-1")
    return event.payload


# --- events of orders ---------------------------------------------------------------


def test_an_order_placed_is_a_charge_with_its_terms() -> None:
    """Amount, method and time of capture, exactly as the order says."""
    event = order_created(
        amount=Money("JPY", 1250),
        payment_method="pm_card_amex",
        capture_method=CaptureMethod.MANUAL,
    )

    news = news_of(event)

    assert isinstance(news, OrderPlaced)
    assert (news.merchant, news.order_id) == ("default", order_id_of(event))
    assert news.terms.amount == Money("JPY", 1250)
    assert news.terms.payment_method == "pm_card_amex"
    assert news.terms.capture_method is CaptureMethod.MANUAL
    assert news.cause is event


def test_a_cancellation_carries_the_callers_reason() -> None:
    """It becomes the refund's reason."""
    news = news_of(order_cancellation(ORDER))

    assert isinstance(news, CancellationAsked)
    assert (news.order_id, news.reason) == (ORDER, "changed my mind")


@pytest.mark.parametrize(
    "changes",
    [
        {"order": "orders/1"},
        {"order": order_name(ORDER) + "/x"},
        {"order": order_name(ORDER, "acme")},
        {"amount": {"currency_code": "XXX", "minor_units": 1}},
        {"amount": {"currency_code": "EUR", "minor_units": 10**15 + 1}},
        {"capture_method": 0},
        {"capture_method": 99},
    ],
    ids=str,
)
def test_an_event_that_cannot_be_is_refused_for_good(changes: dict[str, Any]) -> None:
    """It would be the same the next time, so it becomes a dead letter."""
    fields: dict[str, Any] = {
        "order": order_name(ORDER),
        "amount": {"currency_code": "EUR", "minor_units": 1250},
        "payment_method": "pm_card_visa",
        "capture_method": 1,
    }
    payload = order_events_pb2.OrderCreated(**{**fields, **changes})

    with pytest.raises(InvalidInputError):
        news_of(an_order_event(payload, order_name(ORDER)))


def test_the_service_listens_to_what_begins_and_ends_an_order() -> None:
    """Nothing else of orders moves money now."""
    assert set(ORDER_EVENTS.names) == {
        "ordermesh.order.v1.OrderCreated",
        "ordermesh.order.v1.OrderCancellationRequested",
    }


# --- the resource -------------------------------------------------------------------


def test_the_resource_shows_the_payment_as_it_is() -> None:
    """Every field that a caller reads."""
    payment = a_captured_payment()

    resource = resource_of(payment)

    assert resource.name == payment.name
    assert resource.order == payment.order
    assert resource.state == payment_service_pb2.Payment.CAPTURED
    assert (resource.amount.currency_code, resource.amount.minor_units) == ("EUR", 2500)
    assert (resource.captured.minor_units, resource.refunded.minor_units) == (2500, 0)
    assert resource.payment_method == "pm_card_visa"
    assert (resource.provider, resource.provider_reference) == ("in_process", REFERENCE)
    assert resource.create_time.ToDatetime() == NOON.replace(tzinfo=None)
    assert resource.etag == payment.etag


def test_a_refund_stands_in_its_payment() -> None:
    """With its name, state, amount and reason."""
    payment = a_refunded_payment()

    (refund,) = resource_of(payment).refunds

    assert refund.name == f"{payment.name}/refunds/{payment.refunds[0].refund_id}"
    assert refund.state == payment_service_pb2.Refund.SUCCEEDED
    assert refund.amount.minor_units == 2500
    assert refund.reason == "changed my mind"


def test_equal_payments_have_equal_bytes() -> None:
    """Caches and replays compare them."""
    payment = a_captured_payment()

    assert payment_resource(payment) == payment_resource(payment)


@given(
    sizes=st.lists(st.integers(0, 300), max_size=5),
    token=st.text(max_size=20),
)
def test_a_page_of_serialized_payments_is_what_serializing_them_would_give(
    sizes: list[int], token: str
) -> None:
    """The shortcut around parsing and writing each again changes nothing."""
    payments = [
        payment_service_pb2.Payment(payment_method="x" * size, name=str(size)) for size in sizes
    ]

    page = payments_page([payment.SerializeToString() for payment in payments], token)

    assert payment_service_pb2.ListPaymentsResponse.FromString(
        page
    ) == payment_service_pb2.ListPaymentsResponse(payments=payments, next_page_token=token)


# --- events of payments -------------------------------------------------------------


def test_a_capture_is_told_with_the_amount_taken() -> None:
    """PaymentSucceeded."""
    payment = answered(a_payment(), Captured(REFERENCE))

    payload = payload_of(payment)

    assert isinstance(payload, payment_events_pb2.PaymentSucceeded)
    assert (payload.payment, payload.order) == (payment.name, payment.order)
    assert payload.amount.minor_units == 2500


def test_a_decline_is_told_with_its_reason() -> None:
    """PaymentFailed."""
    payload = payload_of(answered(a_payment(), Declined("expired_card")))

    assert isinstance(payload, payment_events_pb2.PaymentFailed)
    assert payload.failure_reason == "expired_card"
    assert payload.amount.minor_units == 2500


def test_an_authorization_and_its_end_are_told() -> None:
    """PaymentAuthorized, PaymentVoided."""
    authorized = answered(a_payment(capture_method=CaptureMethod.MANUAL), Authorized(REFERENCE))
    voided = answered(cancelled(authorized.announced()), Voided())

    assert isinstance(payload_of(authorized), payment_events_pb2.PaymentAuthorized)
    assert isinstance(payload_of(voided), payment_events_pb2.PaymentVoided)


def test_a_refund_is_told_with_what_is_given_back_in_all() -> None:
    """RefundSucceeded: the order tells a full refund from a partial one by the totals."""
    payment = answered(cancelled(a_captured_payment()), Refunded("re_1"))

    payload = payload_of(payment)

    assert isinstance(payload, payment_events_pb2.RefundSucceeded)
    assert payload.refund == f"{payment.name}/refunds/{payment.refunds[0].refund_id}"
    assert (payload.amount.minor_units, payload.refunded_total.minor_units) == (2500, 2500)
    assert payload.captured_total.minor_units == 2500


def test_a_refused_refund_is_told_with_the_providers_code() -> None:
    """RefundFailed."""
    payment = answered(cancelled(a_captured_payment()), Declined("expired_card"))

    payload = payload_of(payment)

    assert isinstance(payload, payment_events_pb2.RefundFailed)
    assert (payload.failure_reason, payload.amount.minor_units) == ("expired_card", 2500)
    assert payment.refunded == eur(0)


# --- filters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f'order = "{order_name(ORDER)}"',
        f'order="{order_name(ORDER)}"',
        f'  order  =  "{order_name(ORDER)}"  ',
    ],
)
def test_a_filter_names_an_order(text: str) -> None:
    """The one documented form; spaces do not matter (AIP-160)."""
    assert order_of_filter(text, merchant="default") == ORDER


def test_no_filter_asks_for_all() -> None:
    """An empty string is no filter."""
    assert order_of_filter("", merchant="default") is None


@pytest.mark.parametrize(
    "text",
    [
        " ",
        "order",
        f"order = {order_name(ORDER)}",
        f'order != "{order_name(ORDER)}"',
        f'order = "{order_name(ORDER)}" AND state = "CAPTURED"',
        f'order = "{order_name(ORDER, "acme")}"',
        f'order = "{order_name(ORDER).upper()}"',
        f'order = "{order_name(ORDER)}\n"',
        'state = "CAPTURED"',
        'order = ""',
        "\x00",
    ],
)
def test_any_other_filter_is_refused(text: str) -> None:
    """Rather than answered as if it had asked for something else."""
    with pytest.raises(InvalidInputError) as refused:
        order_of_filter(text, merchant="default")

    assert (refused.value.reason, refused.value.metadata["field"]) == ("FILTER_INVALID", "filter")


def test_what_is_in_hand_shows_as_processing() -> None:
    """A reader sees that the provider may be at it."""
    assert resource_of(taken(a_payment())).state == payment_service_pb2.Payment.PROCESSING
