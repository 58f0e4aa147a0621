"""Proto to domain and back, and the documents that orders are kept as."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.context import CallContext
from chassis.errors import InvalidInputError
from chassis.events import Event
from chassis.money import Money
from order_svc.commands import CreateOrder
from order_svc.domain.order import (
    Address,
    Announcement,
    Basket,
    CaptureMethod,
    FulfillmentState,
    Order,
    OrderState,
    PaymentState,
)
from order_svc.domain.saga import (
    PaymentAuthorized,
    PaymentCaptured,
    PaymentFailed,
    PaymentVoided,
    RefundFailed,
    RefundSucceeded,
)
from order_svc.messages import (
    PAYMENT_EVENTS,
    UNANNOUNCED,
    address_document,
    cancel_order_from_proto,
    create_order_from_proto,
    document_of,
    event_of,
    order_from_row,
    order_resource,
    order_to_proto,
    report_of,
)
from ordermesh.common.v1 import money_pb2
from ordermesh.order.v1 import order_events_pb2, order_service_pb2
from ordermesh.payment.v1 import payment_events_pb2
from tests.builders import (
    NOON,
    PAYMENT,
    a_basket,
    a_create_order_request,
    a_line,
    a_line_message,
    a_merchant,
    a_rate,
    an_address,
    an_order,
    an_order_id,
    eur,
)


def full_order(**changes: Any) -> Order:
    """An order in which no field is left out."""
    order = an_order(
        basket=a_basket(
            a_line("TEA"),
            a_line("CUP", quantity=3, unit_price=eur(999)),
            capture_method=CaptureMethod.MANUAL,
            client_order_ref="web-1001",
            shipping_address=an_address(),
            billing_address=an_address(locality="Graz", address_lines=()),
            labels={"b": "2", "a": "1", "note": 'größer, 日本, "quoted"'},
            discount=eur(100),
            shipping=eur(490),
            tax=eur(250),
        ),
        settlement_rate=a_rate("1.0837"),
        settlement_currency="USD",
        version=4,
        announcement=Announcement.CANCELLED,
        state=OrderState.CANCELLED,
        payment_state=PaymentState.REFUNDED,
        fulfillment_state=FulfillmentState.PARTIALLY_FULFILLED,
        update_time=NOON + timedelta(minutes=5, microseconds=7),
        payment=PAYMENT,
        failure_reason="card_declined",
        cancel_reason="changed my mind",
        attention_reason="refund failed",
    )
    return replace(order, **changes)


def row_of(order: Order) -> dict[str, Any]:
    """The order's columns, as storage writes and reads them."""
    customer = order.basket.customer
    return {
        "merchant": order.merchant,
        "order_id": order.order_id,
        "version": order.version,
        "announcement": order.announcement.name,
        "client_order_ref": order.basket.client_order_ref or None,
        "document": document_of(order),
        "state": order.state.name,
        "payment_state": order.payment_state.name,
        "fulfillment_state": order.fulfillment_state.name,
        "payment": order.payment,
        "failure_reason": order.failure_reason,
        "cancel_reason": order.cancel_reason,
        "attention_reason": order.attention_reason,
        "create_time": order.create_time,
        "update_time": order.update_time,
        "customer_id": customer.customer_id,
        "email": customer.email,
        "locale": customer.locale,
        "shipping_address": address_document(order.basket.shipping_address),
        "billing_address": address_document(order.basket.billing_address),
    }


# --- requests -------------------------------------------------------------------------


def command_of(**changes: Any) -> CreateOrder:
    """The command of a request with these changes."""
    return create_order_from_proto(a_create_order_request(**changes), a_merchant())


def test_a_request_becomes_a_command_field_by_field() -> None:
    """Nothing that the caller gives is lost on the way."""
    address = {
        "recipient": "Ada Lovelace",
        "address_lines": ["Ringstraße 1", "Stiege 2"],
        "locality": "Wien",
        "administrative_area": "Wien",
        "postal_code": "1010",
        "region_code": "AT",
    }
    request = a_create_order_request(
        client_order_ref="web-1001",
        shipping_address=address,
        billing_address={**address, "locality": "Graz"},
        labels={"campaign": "spring"},
        discount={"currency_code": "EUR", "minor_units": 100},
        shipping={"currency_code": "EUR", "minor_units": 490},
        tax={"currency_code": "EUR", "minor_units": 250},
        capture_method=order_service_pb2.MANUAL,
    )
    request.expected_total.CopyFrom(money_pb2.Money(currency_code="EUR", minor_units=3140))
    command = create_order_from_proto(request, a_merchant())
    assert command.basket == a_basket(
        capture_method=CaptureMethod.MANUAL,
        client_order_ref="web-1001",
        shipping_address=an_address(),
        billing_address=an_address(locality="Graz"),
        labels={"campaign": "spring"},
        discount=eur(100),
        shipping=eur(490),
        tax=eur(250),
    )
    assert command.expected_total == eur(3140)
    assert command.payment_method == "pm_card_visa"
    assert (command.merchant, command.request.merchant) == ("default", "default")
    assert command.request.method == "CreateOrder"
    assert command.request.request_id == UUID(request.request_id)


def test_what_a_request_leaves_out_is_left_out() -> None:
    """An absent amount is no zero, an absent address no empty one."""
    basket = command_of().basket
    assert basket == a_basket()
    assert basket.discount is None
    assert basket.shipping_address is None
    assert command_of().expected_total is None


def test_an_order_that_names_no_capture_method_gets_the_merchants() -> None:
    """And one that names it keeps its own."""
    manual = a_merchant(capture_method="manual")
    request = a_create_order_request()
    assert create_order_from_proto(request, manual).basket.capture_method is CaptureMethod.MANUAL
    request.order.capture_method = order_service_pb2.AUTOMATIC
    basket = create_order_from_proto(request, manual).basket
    assert basket.capture_method is CaptureMethod.AUTOMATIC


def test_a_customer_without_a_locale_is_written_to_in_english() -> None:
    """The contract's default."""
    customer = {"customer_id": "c", "email": "c@example.com"}
    assert command_of(customer=customer).basket.customer.locale == "en"


def test_what_the_server_gives_is_ignored_in_a_request() -> None:
    """A caller can claim neither a state nor a total."""
    basket = command_of(
        name="merchants/default/orders/mine",
        state=order_service_pb2.Order.COMPLETED,
        payment_state=order_service_pb2.Order.PAID,
        total={"currency_code": "EUR", "minor_units": 1},
    ).basket
    assert basket == a_basket()


UNKNOWN = {"currency_code": "XXX", "minor_units": 1}

UNKNOWN_CURRENCIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "order": ({"currency_code": "XXX"}, "CURRENCY_UNKNOWN", "order.currency_code"),
    "order and lines": (
        {"currency_code": "XXX", "lines": [a_line_message(currency_code="XXX")]},
        "CURRENCY_UNKNOWN",
        "order.currency_code",
    ),
    "line": (
        {"lines": [a_line_message("A"), a_line_message("B", currency_code="XXX")]},
        "CURRENCY_UNKNOWN",
        "order.lines[1].unit_price.currency_code",
    ),
    "discount": ({"discount": UNKNOWN}, "CURRENCY_UNKNOWN", "order.discount.currency_code"),
    "shipping": ({"shipping": UNKNOWN}, "CURRENCY_UNKNOWN", "order.shipping.currency_code"),
    "tax": ({"tax": UNKNOWN}, "CURRENCY_UNKNOWN", "order.tax.currency_code"),
}


@pytest.mark.parametrize("case", UNKNOWN_CURRENCIES)
def test_a_currency_that_nobody_knows_is_the_callers_mistake(case: str) -> None:
    """It has the form of a code and is none: told with its field, never as a fault of ours."""
    order, reason, field = UNKNOWN_CURRENCIES[case]
    with pytest.raises(InvalidInputError) as caught:
        command_of(**order)
    assert caught.value.reason == reason
    assert caught.value.metadata == {"field": field, "given": "XXX"}


def test_an_expected_total_in_a_currency_that_nobody_knows_is_the_callers_mistake() -> None:
    """As every other amount."""
    request = a_create_order_request()
    request.expected_total.CopyFrom(money_pb2.Money(currency_code="XXX", minor_units=2500))
    with pytest.raises(InvalidInputError) as caught:
        create_order_from_proto(request, a_merchant())
    assert caught.value.reason == "CURRENCY_UNKNOWN"
    assert caught.value.metadata == {"field": "expected_total.currency_code", "given": "XXX"}


def test_a_cancellation_becomes_a_command_field_by_field() -> None:
    """The name is taken apart."""
    order_id, request_id = an_order_id(), uuid4()
    command = cancel_order_from_proto(
        order_service_pb2.CancelOrderRequest(
            name=f"merchants/acme/orders/{order_id}",
            reason="changed my mind",
            etag='"3"',
            request_id=str(request_id),
        )
    )
    assert (command.merchant, command.order_id) == ("acme", order_id)
    assert (command.reason, command.etag) == ("changed my mind", '"3"')
    assert (command.request.merchant, command.request.method) == ("acme", "CancelOrder")
    assert command.request.request_id == request_id


# --- the resource ---------------------------------------------------------------------


def test_a_resource_says_all_that_an_order_holds() -> None:
    """Every field of the message is filled from the fullest order."""
    resource = order_to_proto(full_order())
    fields = {field.name for field, _ in resource.ListFields()}
    assert fields == {field.name for field in resource.DESCRIPTOR.fields}
    assert resource.etag == '"4"'
    assert resource.total.minor_units == 2500 + 2997 - 2500 + 2500 - 100 + 490 + 250
    assert [line.amount.minor_units for line in resource.lines] == [2500, 2997]
    assert resource.settlement.exchange_rate == "1.0837"


def test_equal_orders_give_equal_bytes() -> None:
    """A replay is compared byte by byte, so the order of labels must not matter."""
    labels = {f"label-{number}": str(number) for number in range(32)}
    turned = dict(reversed(labels.items()))
    one, other = (
        full_order(basket=replace(full_order().basket, labels=given), order_id=ORDER_ID)
        for given in (labels, turned)
    )
    assert list(turned) != list(labels)
    assert order_resource(one) == order_resource(other)


@pytest.mark.parametrize("enum", [OrderState, PaymentState, FulfillmentState, CaptureMethod])
def test_the_domains_enums_are_the_protos(enum: Any) -> None:
    """Same names, same numbers, none missing on either side."""
    order = order_service_pb2.Order.DESCRIPTOR
    kinds = {
        OrderState: order.enum_types_by_name["State"],
        PaymentState: order.enum_types_by_name["PaymentState"],
        FulfillmentState: order.enum_types_by_name["FulfillmentState"],
        CaptureMethod: order_service_pb2.DESCRIPTOR.enum_types_by_name["CaptureMethod"],
    }
    listed = {value.name: value.number for value in kinds[enum].values if value.number}
    assert {member.name: member.value for member in enum} == listed


# --- documents ------------------------------------------------------------------------


def test_an_order_comes_back_from_its_row_as_it_was() -> None:
    """Every field, the fullest order."""
    order = full_order()
    assert order_from_row(row_of(order)) == order


def test_a_plain_order_comes_back_from_its_row_as_it_was() -> None:
    """What is absent stays absent."""
    order = an_order()
    assert order_from_row(row_of(order)) == order


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
amounts = st.none() | st.integers(0, 10**6).map(eur)
addresses = st.none() | st.builds(
    Address,
    recipient=texts,
    address_lines=st.lists(texts, max_size=5).map(tuple),
    locality=texts,
    administrative_area=texts,
    postal_code=texts,
    region_code=st.just("AT"),
)
baskets = st.builds(
    Basket,
    currency_code=st.just("EUR"),
    lines=st.lists(st.integers(1, 10_000), min_size=1, max_size=4).map(
        lambda quantities: tuple(
            a_line(f"SKU-{n}", quantity=quantity, unit_price=eur(10**7))
            for n, quantity in enumerate(quantities)
        )
    ),
    customer=st.just(a_basket().customer),
    capture_method=st.sampled_from(CaptureMethod),
    client_order_ref=st.just("") | st.just("web-1"),
    shipping_address=addresses,
    billing_address=addresses,
    labels=st.dictionaries(st.from_regex(r"\A[a-z]{1,8}\Z"), texts, max_size=4),
    discount=amounts,
    shipping=amounts,
    tax=amounts,
)


@given(basket=baskets, rate=st.none() | st.decimals("0.0001", "999", places=6))
def test_whatever_is_ordered_comes_back_as_it_was(basket: Basket, rate: Any) -> None:
    """Any text, any amount, with and without a settlement."""
    order = an_order(
        basket=basket,
        settlement_rate=None if rate is None else a_rate(str(rate)),
        settlement_currency="USD",
    )
    assert order_from_row(row_of(order)) == order


def test_a_document_holds_no_personal_data() -> None:
    """The history is kept for ever, so nothing in it may have to be erased."""
    document = document_of(full_order())
    for secret in ("ada@example.com", "cust-42", "Lovelace", "Ringstraße", "1010"):
        assert secret not in document
    assert json.loads(document)["total"] == full_order().total.minor_units


def test_an_order_whose_customer_was_erased_is_still_an_order() -> None:
    """The left join finds nobody, and money can still move."""
    row = row_of(full_order())
    erased = dict.fromkeys(("customer_id", "email", "locale", "shipping_address"))
    order = order_from_row({**row, **erased, "billing_address": None})
    assert order.basket.customer.email == ""
    assert order.basket.shipping_address is None
    assert order.total == full_order().total


# --- events ---------------------------------------------------------------------------

CALL = CallContext(correlation_id="corr-1", causation_id="req-1", traceparent="00-ab-cd-01")


@pytest.mark.parametrize("announcement", Announcement, ids=lambda told_as: told_as.name)
def test_every_announcement_is_an_event_of_the_contract(announcement: Announcement) -> None:
    """Its message is named as the announcement says, and it names its order."""
    order = full_order(announcement=announcement)
    event = event_of(order, event_id=uuid4(), context=CALL)
    payload: Any = event.payload
    assert event.type == f"ordermesh.order.v1.{announcement.value}"
    assert payload.order == order.name
    assert (event.aggregate, event.version) == (order.name, order.version)
    assert event.occur_time == order.update_time
    assert event.context.correlation_id == "corr-1"
    assert (event.causation_id, event.traceparent) == ("req-1", "00-ab-cd-01")


@pytest.mark.parametrize("announcement", Announcement, ids=lambda told_as: told_as.name)
def test_an_event_leaves_no_field_out(announcement: Announcement) -> None:
    """Of the fullest order every field of every event is filled."""
    order = full_order(announcement=announcement)
    payload = event_of(order, event_id=uuid4(), context=CALL).payload
    filled = {field.name for field, _ in payload.ListFields()}
    assert filled == {field.name for field in payload.DESCRIPTOR.fields}


def test_every_event_of_the_contract_is_announced_by_some_change() -> None:
    """No message of order_events.proto is without a producer."""
    listed = set(order_events_pb2.DESCRIPTOR.message_types_by_name)
    assert listed == {announcement.value for announcement in Announcement}


def test_only_the_creation_carries_personal_data() -> None:
    """Nobody else may ever have to erase anything."""
    for announcement in Announcement:
        event = event_of(full_order(announcement=announcement), event_id=uuid4(), context=CALL)
        told = b"ada@example.com" in event.encoded()
        assert told is (announcement is Announcement.CREATED)


def test_what_is_told_to_nobody_is_only_the_recording_of_money() -> None:
    """Every other change is somebody's command or news."""
    assert {Announcement.PAYMENT_RECORDED} == UNANNOUNCED


def payment_event(payload: Any) -> Event:
    """An event of the payment service."""
    return Event(
        event_id=uuid4(),
        merchant="default",
        aggregate=PAYMENT,
        version=1,
        occur_time=NOON,
        payload=payload,
    )


ORDER_ID = an_order_id()
ORDER = f"merchants/default/orders/{ORDER_ID}"


def cents(minor_units: int, currency_code: str = "EUR") -> money_pb2.Money:
    """An amount of a message."""
    return money_pb2.Money(currency_code=currency_code, minor_units=minor_units)


pay = payment_events_pb2

REPORTS: dict[str, tuple[Any, Any]] = {
    "authorized": (
        pay.PaymentAuthorized(payment=PAYMENT, order=ORDER, amount=cents(2500)),
        PaymentAuthorized(payment=PAYMENT),
    ),
    "succeeded": (
        pay.PaymentSucceeded(payment=PAYMENT, order=ORDER, amount=cents(2500)),
        PaymentCaptured(payment=PAYMENT),
    ),
    "failed": (
        pay.PaymentFailed(payment=PAYMENT, order=ORDER, failure_reason="card_declined"),
        PaymentFailed(payment=PAYMENT, reason="card_declined"),
    ),
    "voided": (
        pay.PaymentVoided(payment=PAYMENT, order=ORDER),
        PaymentVoided(payment=PAYMENT),
    ),
    "refunded": (
        pay.RefundSucceeded(
            payment=PAYMENT,
            order=ORDER,
            amount=cents(1000),
            refunded_total=cents(1500),
            captured_total=cents(2500),
        ),
        RefundSucceeded(payment=PAYMENT, refunded_total=eur(1500), captured_total=eur(2500)),
    ),
    "refund failed": (
        pay.RefundFailed(payment=PAYMENT, order=ORDER, failure_reason="expired_card"),
        RefundFailed(payment=PAYMENT, reason="expired_card"),
    ),
}


@pytest.mark.parametrize("case", REPORTS)
def test_every_event_of_payment_is_a_fact_about_its_order(case: str) -> None:
    """Who, which order, what, and by which event."""
    payload, fact = REPORTS[case]
    event = payment_event(payload)
    report = report_of(event)
    assert (report.merchant, report.order_id) == ("default", ORDER_ID)
    assert report.fact == fact
    assert report.cause is event


def test_all_that_payment_tells_is_listened_to() -> None:
    """A new event of payment_events.proto cannot be overlooked."""
    told = {kind.full_name for kind in pay.DESCRIPTOR.message_types_by_name.values()}
    assert set(PAYMENT_EVENTS.names) == told
    assert {payload.DESCRIPTOR.full_name for payload, _ in REPORTS.values()} == told


MALFORMED: dict[str, Any] = {
    "no order": pay.PaymentSucceeded(payment=PAYMENT),
    "no id": pay.PaymentSucceeded(payment=PAYMENT, order="merchants/default/orders/mine"),
    "too many parts": pay.PaymentSucceeded(payment=PAYMENT, order=f"{ORDER}/lines/1"),
    "no totals": pay.RefundSucceeded(payment=PAYMENT, order=ORDER),
    "unknown currency": pay.RefundSucceeded(
        payment=PAYMENT,
        order=ORDER,
        refunded_total=cents(1, "XXX"),
        captured_total=cents(1, "XXX"),
    ),
    "two currencies": pay.RefundSucceeded(
        payment=PAYMENT,
        order=ORDER,
        refunded_total=cents(1, "USD"),
        captured_total=cents(1, "EUR"),
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_report_that_makes_no_sense_is_none(case: str) -> None:
    """It is found out before the saga, which never raises for money, has to compare it."""
    with pytest.raises(ValueError, match=r"."):
        report_of(payment_event(MALFORMED[case]))


def test_amounts_that_do_not_fit_are_no_report() -> None:
    """The largest int64 is beyond what money may be."""
    event = payment_event(
        pay.RefundSucceeded(
            payment=PAYMENT, order=ORDER,
            refunded_total=cents(2**62), captured_total=cents(2**62),
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="beyond"):
        report_of(event)


def test_money_of_every_size_survives_the_resource() -> None:
    """64 bits there and back, no float in between."""
    line = a_line(quantity=1, unit_price=Money("EUR", 10**15 - 1))
    resource = order_service_pb2.Order.FromString(order_resource(an_order(basket=a_basket(line))))
    assert resource.total.minor_units == 10**15 - 1
