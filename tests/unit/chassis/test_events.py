"""The envelope: what goes into it comes out, and what is none is refused."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import uuid4

import pytest

from chassis.context import CallContext
from chassis.errors import InvalidInputError
from chassis.events import Event, EventTypes
from ordermesh.common.v1.event_envelope_pb2 import EventEnvelope
from ordermesh.payment.v1.payment_events_pb2 import PaymentFailed, PaymentVoided

TYPES = EventTypes([PaymentFailed])

EVENT = Event(
    event_id=uuid4(),
    merchant="default",
    aggregate="merchants/default/payments/1",
    version=3,
    occur_time=datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC),
    payload=PaymentFailed(payment="merchants/default/payments/1", failure_reason="declined"),
    correlation_id="corr-1",
    causation_id="req-1",
    traceparent="00-ab-cd-01",
)


def test_an_event_comes_out_of_its_envelope_as_it_went_in() -> None:
    """Every attribute, to the microsecond."""
    assert TYPES.decode(EVENT.encoded()) == EVENT


def test_an_event_is_named_as_its_proto_is() -> None:
    """The routing key is the contract's name, never a class's."""
    assert EVENT.type == "ordermesh.payment.v1.PaymentFailed"
    assert TYPES.names == ("ordermesh.payment.v1.PaymentFailed",)
    assert EventEnvelope.FromString(EVENT.encoded()).type == EVENT.type


def test_what_an_event_sets_off_is_caused_by_it() -> None:
    """The correlation goes on, the cause is the event itself."""
    assert EVENT.context == CallContext(
        correlation_id="corr-1", causation_id=str(EVENT.event_id), traceparent="00-ab-cd-01"
    )


def envelope(**changes: object) -> bytes:
    """The envelope with attributes that no producer of ours would give it."""
    made = EventEnvelope.FromString(EVENT.encoded())
    for name, value in changes.items():
        setattr(made, name, value)
    return made.SerializeToString()


NONE_OF_OURS = {
    "noise": b"\xff\xfe\xfd",
    "nothing": b"",
    "an unknown type": replace(EVENT, payload=PaymentVoided()).encoded(),
    "no event id": envelope(event_id=""),
    "an event id that is none": envelope(event_id="not-a-uuid"),
    "a payload that is none": envelope(payload=b"\xff\xff"),
}


@pytest.mark.parametrize("case", NONE_OF_OURS)
def test_what_is_no_event_is_refused_for_good(case: str) -> None:
    """Delivering it again would not help."""
    with pytest.raises(InvalidInputError) as caught:
        TYPES.decode(NONE_OF_OURS[case])
    assert not caught.value.retryable
