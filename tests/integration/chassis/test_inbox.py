"""The inbox: an event has its effect once, however often it is delivered."""

from __future__ import annotations

import asyncio
from uuid import UUID

from chassis.database import Database
from chassis.inbox import drop_old, first_seen
from tests.builders import ACause
from tests.eventually import eventually
from tests.integration.chassis.sessions import doomed, waiting_for_a_lock


async def seen(database: Database, *causes: ACause, consumer: str = "order") -> list[UUID]:
    """Which of these had not been seen, in a transaction of their own."""
    async with database.transaction() as connection:
        fresh = await first_seen(connection, consumer, causes)
    return [cause.event_id for cause in fresh]


async def test_an_event_is_new_once(database: Database) -> None:
    """The second delivery has no effect."""
    cause = ACause()
    assert await seen(database, cause) == [cause.event_id]
    assert await seen(database, cause) == []


async def test_of_a_batch_only_what_is_new_is_answered_in_its_order(database: Database) -> None:
    """Old ones are left out."""
    causes = [ACause() for _ in range(6)]
    await seen(database, causes[1], causes[4])
    fresh = [causes[number].event_id for number in (0, 2, 3, 5)]
    assert await seen(database, *causes) == fresh


async def test_an_event_twice_in_a_batch_is_answered_once(database: Database) -> None:
    """At its first place."""
    one, other = ACause(), ACause()
    assert await seen(database, one, other, one) == [one.event_id, other.event_id]


async def test_consumers_do_not_see_for_each_other(database: Database) -> None:
    """Every one of them has its effect."""
    cause = ACause()
    assert await seen(database, cause, consumer="order") == [cause.event_id]
    assert await seen(database, cause, consumer="notification") == [cause.event_id]


async def test_an_empty_batch_is_no_news(database: Database) -> None:
    """Nothing to record."""
    assert await seen(database) == []


async def test_an_event_whose_effect_was_rolled_back_is_new_again(database: Database) -> None:
    """Effect and record are one."""
    cause = ACause()
    async with doomed(database) as connection:
        await first_seen(connection, "order", [cause])
    assert await seen(database, cause) == [cause.event_id]


async def test_a_concurrent_delivery_waits_and_has_no_effect(database: Database) -> None:
    """Two consumers that hold the same event do not both act."""
    cause = ACause()
    async with database.transaction() as connection:
        await first_seen(connection, "order", [cause])
        other = asyncio.create_task(seen(database, cause))
        await eventually(lambda: waiting_for_a_lock(database))
    assert await other == []


async def test_a_concurrent_delivery_has_the_effect_when_the_first_fails(
    database: Database,
) -> None:
    """Somebody acts."""
    cause = ACause()
    async with doomed(database) as connection:
        await first_seen(connection, "order", [cause])
        other = asyncio.create_task(seen(database, cause))
        await eventually(lambda: waiting_for_a_lock(database))
    assert await other == [cause.event_id]


async def test_a_batch_is_written_in_the_order_of_its_keys(database: Database) -> None:
    """Two batches that wait for each other's rows would deadlock; so nobody goes back."""
    causes = [ACause() for _ in range(50)]
    await seen(database, *causes)
    async with database.reading() as connection:
        rows = await connection.fetch("SELECT event_id FROM inbox ORDER BY ctid")
    assert [row["event_id"] for row in rows] == sorted(cause.event_id for cause in causes)


async def test_overlapping_batches_do_not_deadlock(database: Database) -> None:
    """Whatever order they come in; each event is new for one of them."""
    causes = [ACause() for _ in range(20)]
    done = await asyncio.gather(
        *(seen(database, *(causes if n % 2 else reversed(causes))) for n in range(8))
    )
    assert sorted(event for fresh in done for event in fresh) == sorted(
        cause.event_id for cause in causes
    )


async def test_old_entries_are_dropped_and_young_ones_stay(database: Database) -> None:
    """Fourteen days, longer than an outbox keeps what it could send again."""
    old, young = ACause(), ACause()
    await seen(database, old)
    async with database.reading() as connection:
        await connection.execute("UPDATE inbox SET receive_time = now() - interval '14 days 1 s'")
    await seen(database, young)
    assert await drop_old(database) == 1
    assert await seen(database, young) == []
