"""Golden events: the bytes of every event as a release has put them on the broker.

`python -m tests.contract.golden` writes those that are missing, from the fullest event
that there is. It never changes one: messages of an older release wait in queues, outboxes
and dead letters while a newer one starts, so what was written once must be read for ever.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from google.protobuf import json_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.events import Event, EventTypes
from ordermesh.order.v1 import order_events_pb2
from ordermesh.payment.v1 import payment_events_pb2

FOLDER = Path(__file__).parent / "golden"

KINDS: dict[str, type[Message]] = {
    descriptor.full_name: GetMessageClass(descriptor)
    for module in (order_events_pb2, payment_events_pb2)
    for descriptor in module.DESCRIPTOR.message_types_by_name.values()
}
"""Every event of the contracts, by full name."""

TYPES = EventTypes(KINDS.values())

HAPPENED = datetime(2026, 11, 20, 12, 0, 0, 123456, tzinfo=UTC)


def fullest(descriptor: Any) -> Message:
    """A message in which every field holds something, told apart by its number."""
    message = GetMessageClass(descriptor)()
    for field in descriptor.fields:
        value = _value_of(field)
        if isinstance(value, Message):
            if field.is_repeated:
                getattr(message, field.name).add().CopyFrom(value)
            else:
                getattr(message, field.name).CopyFrom(value)
        elif field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)
    return message


def _value_of(field: FieldDescriptor) -> Any:
    if field.message_type is not None:
        if field.message_type.full_name == Timestamp.DESCRIPTOR.full_name:
            moment = Timestamp()
            moment.FromDatetime(HAPPENED)
            return moment
        return fullest(field.message_type)
    if field.enum_type is not None:
        return field.enum_type.values[-1].number
    return f"{field.name} {field.number}" if field.type == field.TYPE_STRING else field.number


def an_event(name: str) -> Event:
    """The fullest event of a type."""
    return Event(
        event_id=UUID("019aa0f5-0a00-7000-8000-000000000001"),
        merchant="default",
        aggregate="merchants/default/orders/019aa0f5-0a00-7000-8000-000000000002",
        version=3,
        occur_time=HAPPENED,
        payload=fullest(KINDS[name].DESCRIPTOR),
        correlation_id="corr-1",
        causation_id="req-1",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )


def described(event: Event) -> dict[str, Any]:
    """What a reader makes of an event, as JSON."""
    return {
        "event_id": str(event.event_id),
        "type": event.type,
        "merchant": event.merchant,
        "aggregate": event.aggregate,
        "version": event.version,
        "occur_time": event.occur_time.isoformat(),
        "correlation_id": event.correlation_id,
        "causation_id": event.causation_id,
        "traceparent": event.traceparent,
        "payload": json_format.MessageToDict(event.payload, preserving_proto_field_name=True),
    }


def main() -> int:
    """Writes what is missing; answers the exit code."""
    for name in KINDS:
        path = FOLDER / f"{name}.json"
        if not path.exists():
            event = an_event(name)
            golden = {"bytes": event.encoded().hex(), "means": described(event)}
            path.write_text(json.dumps(golden, indent=2) + "\n")
            sys.stdout.write(f"{path.name}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
