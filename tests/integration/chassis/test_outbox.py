"""The outbox: published if, and only if, committed; in order; and never given up silently."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest
from prometheus_client import REGISTRY

from chassis.broker import Ack, Delivery, Message, PublishOutcome, Subscription, Verdict
from chassis.broker.memory import MemoryBroker, MemoryServer
from chassis.database import Database
from chassis.events import Event, EventTypes
from chassis.ids import new_id
from chassis.outbox import _CLAIM, CONTENT_TYPE, Outbox
from ordermesh.payment.v1.payment_events_pb2 import PaymentFailed
from tests.builders import NOON
from tests.databases import Databases
from tests.eventually import eventually
from tests.integration.chassis.conftest import prepare
from tests.integration.chassis.sessions import doomed

TYPES = EventTypes([PaymentFailed])
LISTENER = Subscription(consumer="listener", types=TYPES.names)

CONFIRMED = PublishOutcome.CONFIRMED
UNROUTABLE = PublishOutcome.UNROUTABLE
REFUSED = PublishOutcome.REFUSED
UNKNOWN = PublishOutcome.UNKNOWN


def an_event(aggregate: str = "payments/1", version: int = 1) -> Event:
    """One change of an aggregate."""
    return Event(
        event_id=uuid4(),
        merchant="default",
        aggregate=aggregate,
        version=version,
        occur_time=NOON,
        payload=PaymentFailed(payment=aggregate),
        correlation_id="corr-1",
        traceparent="00-ab-cd-01",
    )


class Scripted(MemoryBroker):
    """A broker whose answers a test dictates, and that remembers what it was given."""

    def __init__(self, *outcomes: PublishOutcome) -> None:
        super().__init__()
        self.outcomes = list(outcomes)
        self.published: list[Message] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """Takes messages, and answers when the gate is open."""
        self.published += messages
        await self.gate.wait()
        return [self.outcomes.pop(0) if self.outcomes else CONFIRMED for _ in messages]

    @property
    def event_ids(self) -> list[UUID]:
        """What was published, in order."""
        return [message.event_id for message in self.published]


def an_outbox(database: Database, broker: MemoryBroker) -> Outbox:
    """The outbox of one process."""
    return Outbox(database, broker, new_id=new_id)


async def staged(outbox: Outbox, *events: Event) -> None:
    """Writes events, and hands over what may go out at once, as a service does."""
    async with outbox._database.transaction() as connection:
        rows = await outbox.stage(connection, events)
    outbox.relay.offer(rows)


@asynccontextmanager
async def relaying(outbox: Outbox) -> AsyncIterator[None]:
    """Runs the relay of a process, which looks often, and stops it in order."""
    outbox.relay._poll_seconds = 0.02
    stopping = asyncio.Event()
    task = asyncio.create_task(outbox.relay.run(stopping))
    await eventually(lambda: outbox.relay.running)
    try:
        yield
    finally:
        stopping.set()
        async with asyncio.timeout(5):
            await task


async def rows(database: Database, columns: str = "*") -> list[Any]:
    """The outbox's rows, in the order of their events."""
    async with database.reading() as connection:
        return list(
            await connection.fetch(
                f"SELECT {columns} FROM outbox ORDER BY aggregate, aggregate_version"
            )
        )


async def unsent(database: Database) -> int:
    """How many rows wait."""
    async with database.reading() as connection:
        count: int = await connection.fetchval(
            "SELECT count(*) FROM outbox WHERE sent_time IS NULL"
        )
    return count


async def change(database: Database, assignment: str) -> None:
    """Lets time pass for the outbox's rows."""
    async with database.reading() as connection:
        await connection.execute(f"UPDATE outbox SET {assignment} WHERE sent_time IS NULL")


NOW = "next_attempt_time = now()"
LEASE_OVER = "claimed_until = now() - interval '1 second'"


# --- staging --------------------------------------------------------------------------


async def test_an_event_is_published_once_its_change_is_committed(database: Database) -> None:
    """To whoever listens, whole."""
    broker = MemoryBroker()
    await broker.declare([LISTENER])
    outbox = an_outbox(database, broker)
    event = an_event()
    await staged(outbox, event)
    assert await outbox.relay.run_once() == 1
    (held,) = broker.server.queues["listener"].ready
    assert TYPES.decode(held.message.body) == event
    assert held.message.event_id == event.event_id
    assert held.message.type == event.type
    assert held.message.headers == {
        "content-type": CONTENT_TYPE,
        "correlation-id": "corr-1",
        "traceparent": "00-ab-cd-01",
    }
    assert await unsent(database) == 0
    assert await outbox.relay.run_once() == 0


async def test_an_event_whose_change_is_rolled_back_is_never_published(
    database: Database,
) -> None:
    """There is nothing to publish, neither now nor later."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    async with doomed(database) as connection:
        await outbox.stage(connection, [an_event()])
    assert await rows(database) == []
    assert await outbox.relay.run_once() == 0
    assert broker.published == []


async def test_nothing_is_published_before_the_commit(database: Database) -> None:
    """A relay does not see what may still be rolled back."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    async with database.transaction() as connection:
        await outbox.stage(connection, [an_event()])
        assert await outbox.relay.run_once() == 0
    assert broker.published == []
    assert await outbox.relay.run_once() == 1


async def test_a_running_relay_is_handed_what_its_own_process_writes(database: Database) -> None:
    """The row is claimed by the writing transaction, so nobody else takes it."""
    broker = Scripted()
    mine, other = an_outbox(database, broker), an_outbox(database, Scripted())
    event = an_event()
    async with relaying(mine):
        async with database.transaction() as connection:
            (row,) = await mine.stage(connection, [event])
        assert row.event_id == event.event_id
        assert await other.relay.run_once() == 0
        mine.relay.offer([row])
        await eventually(lambda: broker.event_ids == [event.event_id])
        await eventually(lambda: unsent(database), until=lambda count: count == 0)


async def test_without_a_relay_in_the_process_nothing_is_claimed(database: Database) -> None:
    """Another process finds the rows at its next look."""
    outbox = an_outbox(database, Scripted())
    async with database.transaction() as connection:
        assert await outbox.stage(connection, [an_event()]) == []
    (row,) = await rows(database, "claim, claimed_until")
    assert tuple(row) == (None, None)


async def test_staging_nothing_is_nothing(database: Database) -> None:
    """A change that tells nobody costs no statement."""
    async with database.transaction() as connection:
        assert await an_outbox(database, Scripted()).stage(connection, []) == []


async def test_an_aggregate_has_each_version_once(database: Database) -> None:
    """Two writers of one version cannot both commit."""
    outbox = an_outbox(database, Scripted())
    await staged(outbox, an_event(version=1))
    with pytest.raises(asyncpg.UniqueViolationError):
        await staged(outbox, an_event(version=1))


# --- order ----------------------------------------------------------------------------


async def test_events_of_an_aggregate_go_out_in_the_order_of_their_versions(
    database: Database,
) -> None:
    """Staged together or one by one, handed over or found: one after the other."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    events = {name: [an_event(name, version) for version in range(1, 6)] for name in "abc"}
    async with relaying(outbox):
        for name in "abc":
            await staged(outbox, *events[name][:3])
        for version in (3, 4):
            for name in "abc":
                await staged(outbox, events[name][version])
        await eventually(lambda: len(broker.published) == 15)
    for name in "abc":
        mine = [event.event_id for event in events[name]]
        assert [event for event in broker.event_ids if event in mine] == mine


async def test_an_event_waits_for_its_unsent_predecessor(database: Database) -> None:
    """It is neither handed over nor claimed, whoever asks."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    first, second = an_event(version=1), an_event(version=2)
    await staged(outbox, first)
    broker.gate.clear()
    async with relaying(outbox):
        await eventually(lambda: broker.event_ids == [first.event_id])
        async with database.transaction() as connection:
            assert await outbox.stage(connection, [second]) == []
        assert await an_outbox(database, broker).relay.run_once() == 0
        broker.gate.set()
        await eventually(lambda: broker.event_ids == [first.event_id, second.event_id])


async def test_a_row_that_commits_late_is_not_skipped(database: Database) -> None:
    """Two transactions take numbers 1 and 2, and 2 commits first: both are published."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    early, late = an_event("a"), an_event("b")
    async with database.transaction() as connection:
        await outbox.stage(connection, [early])
        await staged(outbox, late)
        assert await outbox.relay.run_once() == 1
    assert await outbox.relay.run_once() == 1
    assert broker.event_ids == [late.event_id, early.event_id]


async def test_a_transaction_left_open_does_not_hold_up_others(database: Database) -> None:
    """Neither by its rows nor by its snapshot."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    async with database.transaction() as connection:
        await outbox.stage(connection, [an_event("held")])
        for number in range(5):
            await staged(outbox, an_event(f"free/{number}"))
            assert await outbox.relay.run_once() == 1
    assert len(broker.published) == 5


async def test_relays_share_the_work_and_none_is_done_twice(database: Database) -> None:
    """Each row goes to one of them."""
    writer = an_outbox(database, Scripted())
    events = [an_event(f"a/{number}") for number in range(60)]
    await staged(writer, *events)
    brokers = [Scripted() for _ in range(3)]
    relays = [an_outbox(database, broker).relay for broker in brokers]
    for relay in relays:
        relay._batch_max = 20
    assert sum(await asyncio.gather(*(relay.run_once() for relay in relays))) == 60
    published = [event for broker in brokers for event in broker.event_ids]
    assert sorted(published) == sorted(event.event_id for event in events)


async def test_a_relay_does_not_wait_for_rows_that_another_is_claiming(
    database: Database,
) -> None:
    """It steps over what is locked and takes what is free."""
    broker = Scripted()
    outbox = an_outbox(database, broker)
    events = [an_event(f"a/{number}") for number in range(6)]
    await staged(outbox, *events)
    held = [event.event_id for event in events[::2]]
    async with database.transaction() as other:
        await other.execute("SELECT FROM outbox WHERE event_id = ANY($1) FOR UPDATE", held)
        assert await outbox.relay.run_once() == 3
    assert sorted(broker.event_ids) == sorted(event.event_id for event in events[1::2])


# --- death and recovery ---------------------------------------------------------------


async def test_a_relay_killed_after_the_confirm_and_before_the_mark_publishes_again(
    database: Database,
) -> None:
    """Once its claim has run out another one does; the same event id tells the repeat."""
    server = MemoryServer()
    await MemoryBroker(server).declare([LISTENER])

    class Confirming(MemoryBroker):
        """Confirms, and then its process is not heard of again."""

        async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
            outcomes = await super().publish(messages)
            assert outcomes == [CONFIRMED]
            confirmed.set()
            await asyncio.Event().wait()
            return outcomes

    confirmed = asyncio.Event()
    event = an_event()
    killed, survivor = (an_outbox(database, kind(server)) for kind in (Confirming, MemoryBroker))
    await staged(killed, event)
    task = asyncio.create_task(killed.relay.run_once())
    await confirmed.wait()
    task.cancel()
    await asyncio.wait([task])
    assert await survivor.relay.run_once() == 0, "its claim is still good"
    await change(database, LEASE_OVER)
    assert await survivor.relay.run_once() == 1
    delivered = [held.message.event_id for held in server.queues["listener"].ready]
    assert delivered == [event.event_id] * 2
    assert await unsent(database) == 0


async def test_a_relay_that_wakes_after_its_claim_marks_nothing(database: Database) -> None:
    """Another one holds the row by then, and its word counts."""
    slow, quick = Scripted(), Scripted(REFUSED)
    sleeper, other = an_outbox(database, slow), an_outbox(database, quick)
    await staged(sleeper, an_event())
    slow.gate.clear()
    quick.gate.clear()
    first = asyncio.create_task(sleeper.relay.run_once())
    await eventually(lambda: slow.published)
    await change(database, LEASE_OVER)
    second = asyncio.create_task(other.relay.run_once())
    await eventually(lambda: quick.published)
    slow.gate.set()
    await first
    assert await unsent(database) == 1, "the sleeper's confirm is not the holder's"
    quick.gate.set()
    await second
    (row,) = await rows(database, "sent_time, attempts, last_outcome")
    assert tuple(row) == (None, 1, "REFUSED")


async def test_what_a_dead_process_was_handed_is_found_by_others(database: Database) -> None:
    """The writer's claim is short."""
    dead, alive = an_outbox(database, Scripted()), an_outbox(database, Scripted())
    async with relaying(dead), database.transaction() as connection:
        await dead.stage(connection, [an_event()])  # and it dies before it offers
    assert await alive.relay.run_once() == 0
    await change(database, "claimed_until = claimed_until - interval '10 seconds'")
    assert await alive.relay.run_once() == 1


async def test_the_next_version_waits_for_a_dead_process_too(database: Database) -> None:
    """No event overtakes one whose relay died."""
    broker = Scripted()
    dead, alive = an_outbox(database, Scripted()), an_outbox(database, broker)
    first, second = an_event(version=1), an_event(version=2)
    async with relaying(dead), database.transaction() as connection:
        await dead.stage(connection, [first])
    await staged(alive, second)
    assert await alive.relay.run_once() == 0
    await change(database, LEASE_OVER)
    assert [await alive.relay.run_once() for _ in range(3)] == [1, 1, 0]
    assert broker.event_ids == [first.event_id, second.event_id]


# --- outcomes -------------------------------------------------------------------------


@pytest.mark.parametrize("outcome", [UNROUTABLE, REFUSED, UNKNOWN], ids=lambda one: one.name)
async def test_what_was_not_confirmed_is_kept_and_tried_again(
    database: Database, outcome: PublishOutcome
) -> None:
    """Not at once, but with a growing pause, and under the same event id."""
    broker = Scripted(outcome)
    outbox = an_outbox(database, broker)
    event = an_event()
    await staged(outbox, event)
    assert await outbox.relay.run_once() == 1
    (row,) = await rows(
        database,
        "attempts, last_outcome, sent_time, park_time, claim,"
        " extract(epoch FROM next_attempt_time - now()) AS pause",
    )
    assert tuple(row)[:5] == (1, outcome.name, None, None, None)
    assert row["pause"] <= 1
    await change(database, "next_attempt_time = now() + interval '1 hour'")
    assert await outbox.relay.run_once() == 0
    await change(database, NOW)
    assert await outbox.relay.run_once() == 1
    assert broker.event_ids == [event.event_id] * 2
    assert await unsent(database) == 0


async def test_an_event_that_nobody_listens_to_waits_for_a_listener(database: Database) -> None:
    """A fault of the topology loses nothing."""
    broker = MemoryBroker()
    outbox = an_outbox(database, broker)
    await staged(outbox, an_event())
    await outbox.relay.run_once()
    (row,) = await rows(database, "last_outcome")
    assert row["last_outcome"] == "UNROUTABLE"
    await broker.declare([LISTENER])
    await change(database, NOW)
    await outbox.relay.run_once()
    assert len(broker.server.queues["listener"].ready) == 1


async def test_a_broker_that_is_away_holds_up_nobody(database: Database) -> None:
    """Changes are committed, events wait, and all go out when it is back."""
    broker = MemoryBroker()
    await broker.declare([LISTENER])
    broker.server.away = True
    outbox = an_outbox(database, broker)
    async with relaying(outbox):
        for number in range(10):
            await staged(outbox, an_event(f"a/{number}"))
        await eventually(
            lambda: rows(database, "attempts"),
            until=lambda found: all(row["attempts"] for row in found),
        )
        broker.server.away = False
        await change(database, NOW)
        await eventually(lambda: unsent(database), until=lambda count: count == 0)
    assert len(broker.server.queues["listener"].ready) == 10


async def test_only_what_was_not_confirmed_of_a_batch_is_tried_again(database: Database) -> None:
    """Every row has its own outcome."""
    broker = Scripted(CONFIRMED, REFUSED, CONFIRMED)
    outbox = an_outbox(database, broker)
    await staged(outbox, *(an_event(name) for name in "abc"))
    assert await outbox.relay.run_once() == 3
    kept = [row["event_id"] for row in await rows(database) if row["sent_time"] is None]
    assert kept == [broker.event_ids[1]]


async def test_the_pause_grows_to_a_minute_and_no_further(database: Database) -> None:
    """With full jitter, so that relays do not come back all at once."""
    outbox = an_outbox(database, Scripted(*[REFUSED] * 100))
    await staged(outbox, *(an_event(f"a/{number}") for number in range(30)))
    pauses = {}
    for attempts in (0, 3, 40):
        await change(database, f"attempts = {attempts}, {NOW}")
        await outbox.relay.run_once()
        found = await rows(
            database, "extract(epoch FROM next_attempt_time - now())::float AS pause"
        )
        pauses[attempts] = [row["pause"] for row in found]
    assert max(pauses[0]) <= 1 < max(pauses[3]) <= 8 < max(pauses[40]) <= 60
    assert len(set(pauses[40])) == 30


async def test_an_event_that_fails_too_often_is_parked_and_not_deleted(
    database: Database,
) -> None:
    """Only its own aggregate halts; a person lets it go on."""
    broker = Scripted(REFUSED)
    outbox = an_outbox(database, broker)
    poison, after, other = an_event("p", 1), an_event("p", 2), an_event("q", 1)
    await staged(outbox, poison)
    await change(database, "attempts = 49, create_time = now() - interval '25 hours'")
    await outbox.relay.run_once()
    (row,) = await rows(database, "attempts, park_time")
    assert row["attempts"] == 50
    assert row["park_time"] is not None
    await change(database, NOW)
    await staged(outbox, after, other)
    assert await outbox.relay.run_once() == 1
    assert broker.event_ids == [poison.event_id, other.event_id]
    await outbox.measure()
    assert REGISTRY.get_sample_value("mesh_outbox_parked") == 1
    await change(database, "park_time = NULL")
    assert [await outbox.relay.run_once() for _ in range(3)] == [1, 1, 0]
    assert broker.event_ids[2:] == [poison.event_id, after.event_id]


@pytest.mark.parametrize(
    "tried",
    ["attempts = 49, create_time = now() - interval '23 hours'",
     "attempts = 48, create_time = now() - interval '30 hours'"],
    ids=["often", "long"],
)  # fmt: skip
async def test_an_outage_of_the_broker_parks_nothing(database: Database, tried: str) -> None:
    """Fifty attempts are over in half an hour, and one that waited long may have had few."""
    outbox = an_outbox(database, Scripted(REFUSED, CONFIRMED))
    await staged(outbox, an_event())
    await change(database, tried)
    await outbox.relay.run_once()
    await change(database, NOW)
    await outbox.relay.run_once()
    (row,) = await rows(database, "sent_time")
    assert row["sent_time"] is not None


async def test_a_claim_reads_what_it_takes_and_not_all_that_waits(database: Database) -> None:
    """After an outage thousands wait; sorting them for every batch would take for ever."""
    await staged(an_outbox(database, Scripted()), *(an_event(str(n)) for n in range(3000)))
    async with database.reading() as connection:
        await connection.execute("ANALYZE outbox")
        plan = await connection.fetch(f"EXPLAIN {_CLAIM}", uuid4(), 100)
    lines = [row[0] for row in plan]
    assert any("Index Scan using outbox_waiting" in line for line in lines), lines
    assert not any("Sort" in line for line in lines), lines


async def test_no_more_is_claimed_than_asked_for_by_any_plan(databases: Databases) -> None:
    """PostgreSQL joins as its statistics tell it to; a batch is bounded all the same."""
    async with databases.cloned(await databases.template("chassis", prepare)) as url:
        async with Database.opened(url, application_name="test") as database:
            await staged(an_outbox(database, Scripted()), *(an_event(str(n)) for n in range(40)))
            async with database.reading() as connection:
                name = await connection.fetchval("SELECT current_database()")
                for way in ("hashagg", "hashjoin", "mergejoin", "material", "sort"):
                    await connection.execute(f'ALTER DATABASE "{name}" SET enable_{way} = off')
        async with Database.opened(url, application_name="test") as database:
            assert len(await an_outbox(database, Scripted())._claim(10)) == 10


# --- housekeeping ---------------------------------------------------------------------


async def test_old_rows_are_dropped_once_they_are_sent(database: Database) -> None:
    """After seven days; what waits is never dropped."""
    outbox = an_outbox(database, Scripted())
    await staged(outbox, an_event("sent long ago"))
    await outbox.relay.run_once()
    async with database.reading() as connection:
        await connection.execute("UPDATE outbox SET sent_time = now() - interval '7 days 1 s'")
    await staged(outbox, an_event("sent just now"))
    await outbox.relay.run_once()
    await staged(outbox, an_event("waiting"))
    await change(database, "create_time = now() - interval '30 days'")
    assert await outbox.drop_old() == 1
    assert await outbox.drop_old() == 0
    left = [row["aggregate"] for row in await rows(database)]
    assert left == ["sent just now", "waiting"]


async def test_the_backlog_is_measured(database: Database) -> None:
    """How many wait, and for how long the oldest of them has."""
    outbox = an_outbox(database, Scripted())
    await outbox.measure()
    assert REGISTRY.get_sample_value("mesh_outbox_unsent") == 0
    assert REGISTRY.get_sample_value("mesh_outbox_oldest_unsent_seconds") == 0
    await staged(outbox, an_event("a"), an_event("b"))
    await change(database, "create_time = now() - interval '90 seconds'")
    await outbox.measure()
    assert REGISTRY.get_sample_value("mesh_outbox_unsent") == 2
    oldest = REGISTRY.get_sample_value("mesh_outbox_oldest_unsent_seconds")
    assert oldest is not None
    assert 90 <= oldest < 120


async def test_the_sweep_measures_and_drops(database: Database) -> None:
    """What was sent long ago goes, and the metrics say so."""
    outbox = an_outbox(database, Scripted())
    await staged(outbox, an_event())
    await outbox.relay.run_once()
    async with database.reading() as connection:
        await connection.execute("UPDATE outbox SET sent_time = now() - interval '8 days'")
    await outbox.sweep()
    assert await rows(database) == []
    assert REGISTRY.get_sample_value("mesh_outbox_unsent") == 0


# --- all together ---------------------------------------------------------------------


async def test_events_arrive_in_order_and_whole_whatever_the_broker_answers(
    database: Database,
) -> None:
    """Two relays, a moody broker: every version arrives, none before the one before it."""
    server = MemoryServer()
    received: dict[str, list[int]] = {}

    async def listen(deliveries: Sequence[Delivery]) -> list[Verdict]:
        for delivery in deliveries:
            event = TYPES.decode(delivery.message.body)
            received.setdefault(event.aggregate, []).append(event.version)
        return [Ack() for _ in deliveries]

    moody = [Moody(server), Moody(server)]
    outboxes = [an_outbox(database, broker) for broker in moody]
    stopping = asyncio.Event()
    await moody[0].declare([LISTENER])
    listener = asyncio.create_task(moody[0].consume(LISTENER, listen, stopping=stopping))
    async with relaying(outboxes[0]), relaying(outboxes[1]):
        for version in range(1, 9):
            for number, outbox in enumerate(outboxes):
                await staged(outbox, *(an_event(f"{number}/{name}", version) for name in "abc"))

        async def hurried() -> int:
            await change(database, NOW)
            return await unsent(database)

        await eventually(hurried, within_seconds=20, until=lambda count: count == 0)
        await eventually(lambda: sum(map(len, received.values())) >= 48)
    stopping.set()
    await listener
    for versions in received.values():
        assert list(dict.fromkeys(versions)) == list(range(1, 9))


class Moody(MemoryBroker):
    """Refuses every third message, and forgets to say of every fifth that it took it."""

    def __init__(self, server: MemoryServer) -> None:
        super().__init__(server)
        self._count = 0

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """As the mood is."""
        outcomes = []
        for message in messages:
            self._count += 1
            if self._count % 3 == 0:
                outcomes.append(REFUSED)
                continue
            (outcome,) = await super().publish([message])
            outcomes.append(UNKNOWN if self._count % 5 == 0 else outcome)
        return outcomes
