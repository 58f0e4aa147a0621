"""Events that were written once are read for ever, and mean what they meant."""

from __future__ import annotations

import json
from typing import Any

import pytest

from chassis.events import EventTypes
from ordermesh.common.v1.event_envelope_pb2 import EventEnvelope
from tests.contract.golden import FOLDER, KINDS, TYPES, an_event, described

UNKNOWN_FIELD = bytes([0xFA, 0x3F, 0x03]) + b"new"
"""Field 1023 of any message, three bytes: what a newer release may add."""


def golden(name: str) -> dict[str, Any]:
    """The golden event of a type."""
    read: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    return read


def bytes_of(name: str) -> bytes:
    """Its bytes on the broker."""
    return bytes.fromhex(golden(name)["bytes"])


def test_every_event_has_a_golden_one_and_every_golden_one_is_an_event() -> None:
    """`python -m tests.contract.golden` writes what is missing; none may disappear."""
    assert {path.stem for path in FOLDER.glob("*.json")} == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_a_golden_event_is_read_as_it_was_meant(name: str) -> None:
    """Envelope and payload, field by field."""
    assert described(TYPES.decode(bytes_of(name))) == golden(name)["means"]


@pytest.mark.parametrize("name", KINDS)
def test_an_event_of_a_newer_release_is_read_by_an_older_one(name: str) -> None:
    """Fields that are not known yet, in the envelope and in the event, do no harm."""
    envelope = EventEnvelope.FromString(bytes_of(name))
    envelope.payload += UNKNOWN_FIELD
    newer = envelope.SerializeToString() + UNKNOWN_FIELD
    assert described(TYPES.decode(newer)) == golden(name)["means"]


@pytest.mark.parametrize("name", KINDS)
def test_today_an_event_is_written_as_the_golden_one_or_with_more(name: str) -> None:
    """An older release that reads it finds all that it knows."""
    kind = KINDS[name]
    payload = EventEnvelope.FromString(bytes_of(name)).payload
    before = kind.FromString(payload)
    today = kind.FromString(an_event(name).payload.SerializeToString())
    for field, value in before.ListFields():
        assert getattr(today, field.name) == value, field.name


@pytest.mark.parametrize("name", KINDS)
def test_an_event_is_decoded_by_its_full_name(name: str) -> None:
    """The name on the wire is the proto's; a consumer of one type knows no other."""
    envelope = EventEnvelope.FromString(bytes_of(name))
    assert envelope.type == name
    assert EventTypes([KINDS[name]]).names == (name,)
