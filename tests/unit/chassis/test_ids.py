"""Ids and clocks: the real ones and the doubles pass the same tests."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from chassis.ids import NewId, Now, new_id, now, uuid7
from chassis.testing import EPOCH, FrozenClock, SequentialIds

MAKERS = {"real": new_id, "sequential": SequentialIds()}
CLOCKS = {"real": now, "frozen": FrozenClock()}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_ids_are_unlike_each_other_and_of_version_seven(make: NewId) -> None:
    """RFC 9562: version 7, variant 2, and none is made twice."""
    made = [make() for _ in range(1000)]
    assert len(set(made)) == 1000
    assert {(one.version, one.variant) for one in made} == {(7, "specified in RFC 4122")}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_id_made_in_a_later_millisecond_is_larger(make: NewId) -> None:
    """Rows lie in the order of their creation."""
    earlier = make()
    later = make()
    while later.int >> 80 == earlier.int >> 80:
        later = make()
    assert earlier < later


@pytest.mark.parametrize("tell", CLOCKS.values(), ids=CLOCKS)
def test_a_clock_tells_utc_and_does_not_run_backwards(tell: Now) -> None:
    """Times of different processes can be compared."""
    times = [tell() for _ in range(100)]
    assert times == sorted(times)
    assert {time.tzinfo for time in times} == {UTC}


def test_an_id_holds_its_time_and_its_randomness() -> None:
    """Bit by bit, as the RFC lays them out."""
    made = uuid7(0x0123456789AB, bytes.fromhex("ffffffffffffffffffff"))
    assert str(made) == "01234567-89ab-7fff-bfff-ffffffffffff"
    assert str(uuid7(0, bytes(10))) == "00000000-0000-7000-8000-000000000000"


@pytest.mark.parametrize("length", [0, 9, 11])
def test_an_id_takes_ten_bytes_of_randomness(length: int) -> None:
    """Fewer would be guessable, more a misunderstanding."""
    with pytest.raises(ValueError, match="10 random bytes"):
        uuid7(0, bytes(length))


def test_two_makers_of_sequential_ids_repeat_each_other_unless_told_apart() -> None:
    """Repeatable within a test's schedule, and distinguishable where two are needed."""
    one, same, other = SequentialIds(), SequentialIds(), SequentialIds(start=1)
    assert [one() for _ in range(3)] == [same() for _ in range(3)]
    assert one() != [other() for _ in range(4)][-1]


def test_a_frozen_clock_moves_when_it_is_told_to() -> None:
    """Forth and back."""
    clock = FrozenClock()
    clock.advance(90)
    assert clock() == EPOCH + timedelta(seconds=90)
    clock.advance(-60)
    assert clock() == EPOCH + timedelta(seconds=30)


def test_a_frozen_clock_tells_utc_whatever_it_was_given() -> None:
    """As the real one does."""
    vienna = datetime(2026, 1, 1, 13, tzinfo=timezone(timedelta(hours=1)))
    assert FrozenClock(vienna)() == datetime(2026, 1, 1, 12, tzinfo=UTC)
    assert FrozenClock(vienna)().tzinfo is UTC


def test_a_time_of_no_zone_is_no_time() -> None:
    """It could mean anything."""
    with pytest.raises(ValueError, match="zone"):
        FrozenClock(datetime(2026, 1, 1))  # noqa: DTZ001 - that is the point
