"""The demo: what its samples cover, and that it notices whatever differs from them."""

from collections import Counter
from typing import Any

import pytest
from google.protobuf.json_format import ParseDict

from meshctl.client import CallError
from meshctl.demo import Way, _judge, _judge_mails
from meshctl.samples import Sample, samples
from ordermesh.order.v1 import order_service_pb2


def _sent(template: str) -> dict[str, str]:
    return {"state": "SENT", "template": template}


def _a_way(**changes: Any) -> Way:
    """A paid order that went its way, but for these changes."""
    sample = Sample(title="one", via="REST", order={})
    way = Way(
        1,
        sample,
        name="merchants/default/orders/1",
        order={"state": "CONFIRMED", "paymentState": "PAID"},
        payments=[{"state": "CAPTURED"}],
        notifications=[_sent(template) for template in sample.mails],
    )
    for name, value in changes.items():
        setattr(way, name, value)
    return way


def test_half_of_twenty_samples_go_over_rest_and_half_over_grpc() -> None:
    """Ten each, with different keys but for the repeat."""
    made = samples()
    assert Counter(sample.via for sample in made) == {"REST": 10, "gRPC": 10}
    assert len({sample.key for sample in made}) == 19


def test_the_samples_are_varied() -> None:
    """A decline, a repeat, a bad request, a cancellation, another settlement currency."""
    made = samples()
    assert any(sample.state == "FAILED" for sample in made)
    assert any(sample.repeats for sample in made)
    assert any(sample.refused for sample in made)
    assert any(sample.cancel for sample in made)
    assert any(sample.merchant == "acme" and sample.settled_in == "USD" for sample in made)
    assert len({sample.order["currencyCode"] for sample in made}) >= 4


@pytest.mark.parametrize("sample", samples(), ids=lambda sample: sample.title)
def test_a_sample_is_a_request_of_the_contract(sample: Sample) -> None:
    """Every field's name and type is the proto's."""
    body = {"order": sample.order, "paymentMethod": sample.payment_method}
    request = ParseDict(body, order_service_pb2.CreateOrderRequest())
    assert request.order.customer.email


def test_an_order_that_went_its_way_has_no_differences() -> None:
    """Otherwise every demo would fail."""
    way = _a_way()
    _judge(way)
    assert way.differences == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"order": {"state": "FAILED", "paymentState": "NONE"}}, "ended as FAILED NONE"),
        ({"payments": []}, "0 payments"),
        ({"payments": [{}, {}]}, "2 payments"),
        ({"notifications": []}, "mails sent: none"),
        ({"refusal": CallError(503, b"{}")}, "refused"),
    ],
)
def test_an_order_that_went_another_way_is_told(changes: dict[str, Any], words: str) -> None:
    """Wrong end, no or two payments, no mail, an unexpected refusal."""
    way = _a_way(**changes)
    _judge(way)
    assert any(words in difference for difference in way.differences), way.differences


def test_a_mail_that_was_sent_twice_is_told() -> None:
    """One notification per template, one mail per notification."""
    way = _a_way()
    way.notifications.append(_sent("order_confirmed"))
    _judge(way)
    assert way.differences
    other = _a_way()
    _judge_mails([other], mails=len(other.notifications) + 1)
    assert other.differences == ["the sink holds 4 mails for 3 notifications"]


def test_a_bad_request_has_to_be_refused_for_the_right_field() -> None:
    """Accepted, or refused for something else, is a difference."""
    sample = Sample(title="bad", via="REST", order={}, refused="order.lines[0].quantity")
    for way in (
        Way(1, sample, name="merchants/default/orders/1"),
        Way(1, sample, refusal=CallError(400, b'{"code": 3, "message": "no"}')),
        Way(1, sample, refusal=CallError(503, b'{"code": 14, "message": "away"}')),
    ):
        _judge(way)
        assert len(way.differences) == 1
