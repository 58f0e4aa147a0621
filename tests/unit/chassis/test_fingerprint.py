"""Fingerprints: what a request asks for, whichever way it was written down."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st

from chassis.idempotency import fingerprint_of
from ordermesh.order.v1.order_service_pb2 import CreateOrderRequest
from tests.builders import a_create_order_request, a_line_message


def a_request(**changes: Any) -> CreateOrderRequest:
    """A request with labels, an address and an amount."""
    fields: dict[str, Any] = {
        "labels": {"a": "1", "b": "2", "c": "3"},
        "shipping_address": {"recipient": "Ada", "address_lines": ["1", "2"], "region_code": "AT"},
        "discount": {"currency_code": "EUR", "minor_units": 100},
    }
    return a_create_order_request(**{**fields, **changes})


def test_a_fingerprint_is_32_bytes_and_the_same_every_time() -> None:
    """Two honest repeats are one request."""
    assert fingerprint_of(a_request()) == fingerprint_of(a_request())
    assert len(fingerprint_of(a_request())) == 32


def test_a_fingerprint_outlives_a_release() -> None:
    """Requests stay known for 72 hours, so a roll-out may not change how they are told apart."""
    request = CreateOrderRequest(parent="merchants/default", payment_method="pm_card_visa")
    assert fingerprint_of(request).hex() == (
        "4a1edf2d7a8b30606818396b78f7df779978d68ae07f1458bb6af1010fbb0110"
    )


def test_the_request_id_is_no_part_of_what_is_asked_for() -> None:
    """It may come as a header instead."""
    assert fingerprint_of(a_request(request_id=str(uuid4()))) == fingerprint_of(
        a_request(request_id="")
    )


def test_json_and_grpc_forms_of_one_request_are_one_request() -> None:
    """CamelCase or snake_case, amounts as strings or as numbers."""
    request = a_request()
    for names in (True, False):
        text = json_format.MessageToJson(request, preserving_proto_field_name=names)
        for form in (text, text.replace('"1250"', "1250")):
            assert fingerprint_of(json_format.Parse(form, CreateOrderRequest())) == fingerprint_of(
                request
            )


def test_the_order_of_json_members_makes_no_difference() -> None:
    """Nor does a member that is given twice with the same value."""
    members = ['"parent": "merchants/default"', '"paymentMethod": "pm_x"', '"requestId": "1"']
    forms = [
        "{" + ",".join(members) + "}",
        "{" + ",".join(reversed(members)) + "}",
    ]
    prints = {fingerprint_of(json_format.Parse(form, CreateOrderRequest())) for form in forms}
    assert len(prints) == 1


def test_unknown_fields_make_no_difference() -> None:
    """A caller with newer protos repeats through an older service."""
    raw = a_request().SerializeToString()
    unknown = bytes([0xFA, 0x3F, 0x03]) + b"new"  # field 1023, three bytes
    newer = CreateOrderRequest.FromString(raw + unknown)
    assert newer.SerializeToString() != raw
    assert fingerprint_of(newer) == fingerprint_of(a_request())


@given(st.permutations(["a", "b", "c", "d"]))
def test_the_order_of_a_map_makes_no_difference(keys: list[str]) -> None:
    """Maps have none."""
    turned = a_request(labels={key: key.upper() for key in keys})
    assert fingerprint_of(turned) == fingerprint_of(
        a_request(labels={"a": "A", "b": "B", "c": "C", "d": "D"})
    )


def test_a_field_given_as_its_default_is_as_if_not_given() -> None:
    """proto3 cannot tell them apart, so neither may we."""
    assert fingerprint_of(a_request(client_order_ref="")) == fingerprint_of(a_request())


OTHERS: dict[str, CreateOrderRequest] = {
    "amount": a_request(lines=[a_line_message(minor_units=1251)]),
    "quantity": a_request(lines=[a_line_message(quantity=3)]),
    "merchant": a_request(merchant="acme"),
    "payment method": a_request(payment_method="pm_card_mastercard"),
    "label": a_request(labels={"a": "1", "b": "2", "c": "4"}),
    "one label less": a_request(labels={"a": "1", "b": "2"}),
    "order of lines": a_request(lines=[a_line_message("B"), a_line_message("A")]),
    "lines the other way": a_request(lines=[a_line_message("A"), a_line_message("B")]),
    "address lines joined": a_request(
        shipping_address={"recipient": "Ada", "address_lines": ["12"], "region_code": "AT"}
    ),
    "no discount": a_request(discount={}),
    "other address": a_request(
        shipping_address={},
        billing_address={"recipient": "Ada", "address_lines": ["1", "2"], "region_code": "AT"},
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_request_has_another_fingerprint(case: str) -> None:
    """Whatever differs, be it the place where the same text stands."""
    others = [fingerprint_of(request) for name, request in OTHERS.items() if name != case]
    assert fingerprint_of(OTHERS[case]) not in [fingerprint_of(a_request()), *others]


def test_a_nested_request_id_would_count() -> None:
    """Only the request's own id is left out."""
    one = a_request(labels={"request_id": "1"})
    two = a_request(labels={"request_id": "2"})
    assert fingerprint_of(one) != fingerprint_of(two)
