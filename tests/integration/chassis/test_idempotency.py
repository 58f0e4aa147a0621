"""The ledger of requests: one effect for each, and the same answer for ever after."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from uuid import uuid4

import pytest

from chassis.database import Database
from chassis.errors import InvalidInputError
from chassis.idempotency import Entry, drop_expired, find, forget, record
from chassis.request_key import Replay, RequestKey
from tests.builders import a_request_key
from tests.eventually import eventually
from tests.integration.chassis.sessions import doomed, waiting_for_a_lock

Outcome = Replay | InvalidInputError | None


def an_entry(answer: bytes = b"done", key: RequestKey | None = None) -> Entry:
    """A request about to be done."""
    return Entry(key=key or a_request_key(), resource_id=uuid4(), answer=answer)


async def recorded(database: Database, *entries: Entry) -> list[Outcome]:
    """What the ledger says of these, in a transaction of their own."""
    async with database.transaction() as connection:
        return await record(connection, entries)


async def found(database: Database, key: RequestKey) -> Replay | None:
    """What the ledger knows of a request."""
    async with database.reading() as connection:
        return await find(connection, key)


async def expire(database: Database) -> None:
    """Lets 72 hours pass for every request."""
    async with database.reading() as connection:
        await connection.execute("UPDATE requests SET expire_time = now() - interval '1 second'")


def is_reuse(outcome: object) -> bool:
    """Whether a request's id was used for something else."""
    return isinstance(outcome, InvalidInputError) and outcome.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_a_new_request_is_to_be_done(database: Database) -> None:
    """And its answer is there once that is committed."""
    entry = an_entry(b"\x00\xffanswer")
    assert await recorded(database, entry) == [None]
    assert await found(database, entry.key) == Replay(b"\x00\xffanswer")


async def test_a_repeated_request_is_answered_from_the_ledger(database: Database) -> None:
    """With the first answer, whatever would be answered now."""
    entry = an_entry(b"first")
    await recorded(database, entry)
    assert await recorded(database, an_entry(b"second", entry.key)) == [Replay(b"first")]


async def test_a_request_id_used_for_something_else_is_refused(database: Database) -> None:
    """By record and by find, with the field and the id."""
    entry = an_entry()
    await recorded(database, entry)
    other = replace(entry.key, fingerprint=b"else".ljust(32))
    (outcome,) = await recorded(database, an_entry(key=other))
    assert isinstance(outcome, InvalidInputError)
    assert outcome.metadata == {"field": "request_id", "request_id": str(other.request_id)}
    with pytest.raises(InvalidInputError, match="request_id"):
        await found(database, other)


async def test_a_request_is_known_by_merchant_method_and_id(database: Database) -> None:
    """Never by its id alone."""
    entry = an_entry()
    await recorded(database, entry)
    for other in (replace(entry.key, merchant="acme"), replace(entry.key, method="CancelOrder")):
        assert await found(database, other) is None
        assert await recorded(database, an_entry(key=other)) == [None]


async def test_twins_in_one_batch_are_done_once(database: Database) -> None:
    """The first is done, the others replay its answer; a stranger is refused."""
    first = an_entry(b"first")
    twin = an_entry(b"twin", first.key)
    stranger = an_entry(b"other", replace(first.key, fingerprint=b"else".ljust(32)))
    lone = an_entry()
    outcomes = await recorded(database, first, lone, twin, stranger)
    assert outcomes[:3] == [None, None, Replay(b"first")]
    assert is_reuse(outcomes[3])


async def test_a_batch_may_hold_new_and_old_requests(database: Database) -> None:
    """Each gets its own outcome, in the order given."""
    old, reused, new = an_entry(b"old"), an_entry(), an_entry()
    await recorded(database, old, reused)
    stranger = an_entry(key=replace(reused.key, fingerprint=b"else".ljust(32)))
    outcomes = await recorded(database, stranger, new, an_entry(b"again", old.key))
    assert is_reuse(outcomes[0])
    assert outcomes[1:] == [None, Replay(b"old")]


async def test_a_rolled_back_request_was_never_made(database: Database) -> None:
    """Effect and record are one."""
    entry = an_entry()
    async with doomed(database) as connection:
        await record(connection, [entry])
    assert await recorded(database, entry) == [None]


async def test_a_concurrent_twin_waits_and_replays(database: Database) -> None:
    """It is never told that the first is in progress, nor done twice."""
    entry = an_entry(b"first")
    async with database.transaction() as connection:
        assert await record(connection, [entry]) == [None]
        twin = asyncio.create_task(recorded(database, an_entry(b"twin", entry.key)))
        await eventually(lambda: waiting_for_a_lock(database))
        assert not twin.done()
    assert await twin == [Replay(b"first")]


async def test_a_concurrent_twin_takes_over_when_the_first_fails(database: Database) -> None:
    """Somebody does it."""
    entry = an_entry(b"first")
    async with doomed(database) as connection:
        await record(connection, [entry])
        twin = asyncio.create_task(recorded(database, an_entry(b"twin", entry.key)))
        await eventually(lambda: waiting_for_a_lock(database))
    assert await twin == [None]
    assert await found(database, entry.key) == Replay(b"twin")


async def test_a_concurrent_twin_takes_over_when_the_first_is_taken_back(
    database: Database,
) -> None:
    """An effect that turned out to be refused leaves the id free."""
    entry = an_entry(b"first")
    async with database.transaction() as connection:
        await record(connection, [entry])
        twin = asyncio.create_task(recorded(database, an_entry(b"twin", entry.key)))
        await eventually(lambda: waiting_for_a_lock(database))
        await forget(connection, [entry.key])
    assert await twin == [None]


async def test_a_forgotten_request_may_be_made_again(database: Database) -> None:
    """Only those that are named are forgotten."""
    gone, kept = an_entry(), an_entry(b"kept")
    async with database.transaction() as connection:
        await record(connection, [gone, kept])
        await forget(connection, [gone.key])
    other = an_entry(key=replace(gone.key, fingerprint=b"else".ljust(32)))
    assert await recorded(database, other) == [None]
    assert await found(database, kept.key) == Replay(b"kept")


async def test_a_batch_is_written_in_the_order_of_its_keys(database: Database) -> None:
    """Two batches that wait for each other's rows would deadlock; so nobody goes back."""
    entries = [an_entry() for _ in range(50)]
    await recorded(database, *entries)
    async with database.reading() as connection:
        rows = await connection.fetch("SELECT request_id FROM requests ORDER BY ctid")
    assert [row["request_id"] for row in rows] == sorted(e.key.request_id for e in entries)


async def test_batches_with_common_requests_do_not_deadlock(database: Database) -> None:
    """Whatever order they come in; each request is done by one of them."""
    entries = [an_entry() for _ in range(20)]

    async def batch(turned: bool) -> list[Outcome]:
        mine = [an_entry(entry.answer, entry.key) for entry in entries]
        outcomes = await recorded(database, *(reversed(mine) if turned else mine))
        return list(reversed(outcomes)) if turned else outcomes

    done = await asyncio.gather(*(batch(number % 2 == 1) for number in range(8)))
    for of_one_request in zip(*done, strict=True):
        assert of_one_request.count(None) == 1
        assert of_one_request.count(Replay(b"done")) == 7


async def test_an_expired_request_is_a_new_one(database: Database) -> None:
    """After 72 hours; what it then answers is kept for the next 72."""
    entry = an_entry(b"first")
    await recorded(database, entry)
    await expire(database)
    assert await found(database, entry.key) is None
    other = an_entry(b"second", replace(entry.key, fingerprint=b"else".ljust(32)))
    assert await recorded(database, other) == [None]
    assert await found(database, other.key) == Replay(b"second")
    async with database.reading() as connection:
        hours = await connection.fetchval(
            "SELECT extract(epoch FROM expire_time - now()) / 3600 FROM requests"
        )
    assert 71.9 < hours <= 72


async def test_a_request_made_anew_while_the_sweeper_drops_it_stays(database: Database) -> None:
    """Else its next repeat would be done a second time."""
    entry = an_entry()
    await recorded(database, entry)
    await expire(database)
    again = an_entry(b"again", entry.key)
    async with database.transaction() as connection:
        assert await record(connection, [again]) == [None]
        dropping = asyncio.create_task(drop_expired(database))
        await eventually(lambda: waiting_for_a_lock(database))
    assert await dropping == 0
    assert await found(database, entry.key) == Replay(b"again")


async def test_expired_requests_are_dropped_and_others_stay(database: Database) -> None:
    """The sweeper says how many."""
    await recorded(database, *(an_entry() for _ in range(5)))
    await expire(database)
    kept = an_entry()
    await recorded(database, kept)
    assert await drop_expired(database) == 5
    assert await drop_expired(database) == 0
    assert await found(database, kept.key) == Replay(b"done")
