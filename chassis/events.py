"""Domain events on the wire: one envelope around one past-tense proto message.

`type` is the proto's full name, never a Python class name, and the routing key.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from uuid import UUID

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage

from chassis.context import CallContext
from chassis.errors import InvalidInputError
from ordermesh.common.v1.event_envelope_pb2 import EventEnvelope


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One change of one aggregate.

    Attributes:
        event_id: Unique for ever; consumers remember it.
        merchant: The merchant to whom the aggregate belongs.
        aggregate: Resource name of what changed.
        version: Counts the changes of the aggregate from 1; one that is published to
            nobody leaves a gap.
        occur_time: When the change was made, by the producer's clock.
        payload: The event's own proto message.
        correlation_id: Ties together what one outside call set off.
        causation_id: The request or event that led here.
        traceparent: W3C trace context, empty where nothing is traced.
    """

    event_id: UUID
    merchant: str
    aggregate: str
    version: int
    occur_time: datetime
    payload: ProtoMessage
    correlation_id: str = ""
    causation_id: str = ""
    traceparent: str = ""

    @property
    def type(self) -> str:
        """The payload's full proto name."""
        return self.payload.DESCRIPTOR.full_name

    @property
    def context(self) -> CallContext:
        """The context in which what the event sets off is handled."""
        return CallContext(
            correlation_id=self.correlation_id,
            causation_id=str(self.event_id),
            traceparent=self.traceparent,
        )

    def encoded(self) -> bytes:
        """The envelope, serialized."""
        envelope = EventEnvelope(
            event_id=str(self.event_id),
            type=self.type,
            merchant=self.merchant,
            aggregate=self.aggregate,
            aggregate_version=self.version,
            correlation_id=self.correlation_id,
            causation_id=self.causation_id,
            traceparent=self.traceparent,
            payload=self.payload.SerializeToString(),
        )
        envelope.occur_time.FromDatetime(self.occur_time)
        return envelope.SerializeToString()


class EventTypes:
    """The events that a consumer understands, by full proto name."""

    def __init__(self, types: Iterable[type[ProtoMessage]]) -> None:
        self._by_name: Mapping[str, type[ProtoMessage]] = {
            kind.DESCRIPTOR.full_name: kind for kind in types
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The full proto names, which are the routing keys to subscribe to."""
        return tuple(self._by_name)

    def decode(self, body: bytes) -> Event:
        """Reads an envelope and its payload.

        Raises:
            InvalidInputError: The bytes are no envelope, or hold an unknown event.
        """
        try:
            envelope = EventEnvelope.FromString(body)
            kind = self._by_name.get(envelope.type)
            if kind is None:
                raise InvalidInputError("INVALID_FIELD", f"unknown event type {envelope.type!r}")
            return Event(
                event_id=UUID(envelope.event_id),
                merchant=envelope.merchant,
                aggregate=envelope.aggregate,
                version=envelope.aggregate_version,
                occur_time=envelope.occur_time.ToDatetime(tzinfo=UTC),
                payload=kind.FromString(envelope.payload),
                correlation_id=envelope.correlation_id,
                causation_id=envelope.causation_id,
                traceparent=envelope.traceparent,
            )
        except (DecodeError, ValueError) as error:
            raise InvalidInputError("INVALID_FIELD", f"not an event envelope: {error}") from error
