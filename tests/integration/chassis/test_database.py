"""PostgreSQL by way of the chassis: short transactions, and errors in our own terms."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import asyncpg
import pytest
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.database import AnyConnection, Database, Statement, database_name
from chassis.errors import ConflictError, NotFoundError, OverloadedError, UnavailableError
from meshctl.processes import free_port
from tests.eventually import eventually
from tests.integration.chassis.sessions import doomed, waiting_for_a_lock

NOTE = "INSERT INTO notes (id, text) VALUES ($1, $2)"


async def notes(database: Database) -> list[int]:
    """The ids of all notes."""
    async with database.reading() as connection:
        return [row["id"] for row in await connection.fetch("SELECT id FROM notes ORDER BY id")]


async def test_a_transaction_is_committed_when_its_block_ends(database: Database) -> None:
    """And seen by everybody."""
    async with database.transaction() as connection:
        await connection.execute(NOTE, 1, "kept")
    assert await notes(database) == [1]


async def test_a_transaction_is_rolled_back_when_its_block_raises(database: Database) -> None:
    """Nothing of it is seen by anybody."""
    async with doomed(database) as connection:
        await connection.execute(NOTE, 1, "lost")
    assert await notes(database) == []


async def test_an_accident_inside_a_transaction_comes_out_as_it_is(database: Database) -> None:
    """Only what the database says of its own state is put in our terms."""

    async def failing(error: Exception) -> None:
        async with database.transaction():
            raise error

    for error in (ZeroDivisionError(), NotFoundError("NOTHING", "nothing here")):
        with pytest.raises(type(error)) as caught:
            await failing(error)
        assert caught.value is error


async def test_a_broken_constraint_is_a_matter_of_whoever_wrote(database: Database) -> None:
    """It is no outage and no conflict."""

    async def write_twice() -> None:
        async with database.transaction() as connection:
            await connection.execute(NOTE, 1, "first")
            await connection.execute(NOTE, 1, "second")

    with pytest.raises(asyncpg.UniqueViolationError):
        await write_twice()


async def test_a_cancelled_transaction_is_rolled_back_and_its_connection_is_free(
    database_url: str,
) -> None:
    """With a single connection the next one shows it."""
    async with Database.opened(database_url, application_name="test", pool_max=1) as database:
        began = asyncio.Event()

        async def stuck() -> None:
            async with database.transaction() as connection:
                await connection.execute(NOTE, 1, "lost")
                began.set()
                await asyncio.Event().wait()

        for _ in range(3):
            began.clear()
            task = asyncio.create_task(stuck())
            await began.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert await notes(database) == []


async def test_a_statement_that_is_cancelled_does_not_answer_the_next_one(
    database_url: str,
) -> None:
    """The connection that comes back to the pool is in step with the server."""
    async with Database.opened(database_url, application_name="test", pool_max=1) as database:

        async def slow() -> None:
            async with database.reading() as connection:
                await connection.fetchval("SELECT pg_sleep(4), 'slow'")

        task = asyncio.create_task(slow())
        await asyncio.wait([task], timeout=0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(3), database.reading() as connection:
            assert await connection.fetchval("SELECT 'quick'") == "quick"


async def test_a_lock_that_is_not_had_in_time_is_a_conflict(
    database_url: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To be tried again."""
    monkeypatch.setattr("chassis.database.LOCK_SECONDS", 0.05)
    async with (
        Database.opened(database_url, application_name="impatient") as impatient,
        database.transaction() as holder,
    ):
        await holder.execute("LOCK TABLE notes")
        with pytest.raises(ConflictError) as caught:
            async with impatient.transaction() as connection:
                await connection.execute(NOTE, 1, "never")
    assert caught.value.reason == "CONCURRENT_CHANGE"


async def test_the_victim_of_a_deadlock_has_a_conflict(database: Database) -> None:
    """The other one goes on."""
    async with database.transaction() as connection:
        await connection.execute("INSERT INTO notes VALUES (1, ''), (2, '')")
    both = asyncio.Barrier(2)

    async def update(first: int, second: int) -> None:
        async with database.transaction() as connection:
            await connection.execute("SET LOCAL deadlock_timeout = '20ms'")
            await connection.execute("UPDATE notes SET text = 'a' WHERE id = $1", first)
            await both.wait()
            await connection.execute("UPDATE notes SET text = 'b' WHERE id = $1", second)

    done = await asyncio.gather(update(1, 2), update(2, 1), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in done) == ["ConflictError", "NoneType"]


async def test_a_migration_beneath_a_running_process_is_a_conflict(
    database: Database, database_url: str
) -> None:
    """What the process had prepared is of the old schema; the next try finds the new one."""

    async def read() -> list[dict[str, Any]]:
        async with database.transaction() as connection:
            return [dict(row) for row in await connection.fetch("SELECT * FROM changing")]

    migrating = await asyncpg.connect(database_url)
    try:
        await migrating.execute("CREATE TABLE changing AS SELECT 1 AS old")
        assert await read() == [{"old": 1}]
        await migrating.execute("ALTER TABLE changing ADD COLUMN new integer DEFAULT 2")
        with pytest.raises(ConflictError):
            await read()
        assert await read() == [{"old": 1, "new": 2}]
    finally:
        await migrating.execute("DROP TABLE changing")
        await migrating.close()


async def test_a_statement_that_takes_too_long_is_an_outage(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends it, since a client that gave up could not."""
    monkeypatch.setattr("chassis.database.STATEMENT_SECONDS", 0.05)
    async with Database.opened(database_url, application_name="test") as database:
        with pytest.raises(UnavailableError, match="too long"):
            async with database.reading() as connection:
                await connection.execute("SELECT pg_sleep(5)")


async def test_a_silent_transaction_is_ended_by_the_server(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its locks are not held for ever; whoever still uses it hears of an outage."""
    monkeypatch.setattr("chassis.database.IDLE_IN_TRANSACTION_SECONDS", 0.05)

    async def is_gone(pid: int) -> bool:
        async with database.reading() as connection:
            return not await connection.fetch("SELECT FROM pg_stat_activity WHERE pid = $1", pid)

    async with Database.opened(database_url, application_name="silent") as silent:

        async def forgotten() -> None:
            async with silent.transaction() as connection:
                await connection.execute(NOTE, 1, "lost")
                pid = connection.get_server_pid()
                await eventually(lambda: is_gone(pid))
                await connection.execute(NOTE, 2, "lost too")

        with pytest.raises(UnavailableError):
            await forgotten()
    assert await notes(database) == []


async def test_when_every_connection_is_in_use_the_next_caller_is_shed(
    database_url: str,
) -> None:
    """Within a quarter of a second, with a wait to keep, not after a long queue."""
    async with Database.opened(database_url, application_name="test", pool_max=1) as database:
        async with database.reading():
            began = time.monotonic()
            with pytest.raises(OverloadedError) as caught:
                await database.ping()
        assert time.monotonic() - began < 2
        assert caught.value.retry_after_seconds
        await database.ping()


async def test_a_server_that_is_not_there_is_an_outage() -> None:
    """Told when the service starts."""
    url = f"postgresql://mesh@127.0.0.1:{free_port()}/nothing"
    with pytest.raises(UnavailableError) as caught:
        async with Database.opened(url, application_name="test"):
            raise AssertionError("opened")
    assert caught.value.metadata == {"dependency": "database"}


async def test_a_connection_that_the_server_ends_is_an_outage_and_then_replaced(
    database: Database, database_url: str
) -> None:
    """The transaction in it fails; the next one works without anybody's doing."""

    async def interrupted(administrator: Database) -> None:
        async with database.transaction() as connection:
            await connection.execute(NOTE, 1, "lost")
            pid = connection.get_server_pid()
            async with administrator.reading() as other:
                await other.fetchval("SELECT pg_terminate_backend($1, 5000)", pid)
            await connection.execute(NOTE, 2, "lost too")

    async with Database.opened(database_url, application_name="administrator") as administrator:
        with pytest.raises(UnavailableError):
            await interrupted(administrator)
    assert await notes(database) == []
    await database.ping()


async def test_reading_takes_no_transaction(database: Database) -> None:
    """Each statement stands for itself."""
    async with database.reading() as connection:
        assert not connection.is_in_transaction()
    async with database.transaction() as connection:
        assert connection.is_in_transaction()


async def test_many_rows_are_deleted_in_bounded_steps(database: Database) -> None:
    """All that the statement means, and nothing else; each step locks few rows and ends soon."""
    async with database.reading() as connection:
        await connection.execute(
            "INSERT INTO notes SELECT n, 'old' FROM generate_series(1, 2500) n"
        )
        await connection.execute(NOTE, 2501, "new")
    statement = "DELETE FROM notes WHERE id IN (SELECT id FROM notes WHERE text = 'old' LIMIT $1)"
    assert await database.delete_all(statement) == 2500
    assert await database.delete_all(statement) == 0
    assert await notes(database) == [2501]


async def test_sessions_say_whose_they_are_and_have_their_limits(database: Database) -> None:
    """For whoever looks at the server, and for the server itself."""
    async with database.reading() as connection:
        rows = await connection.fetch(
            "SELECT name, setting FROM pg_settings WHERE name = ANY($1)",
            ["application_name", "statement_timeout", "lock_timeout",
             "idle_in_transaction_session_timeout", "jit"],
        )  # fmt: skip
    assert {row["name"]: row["setting"] for row in rows} == {
        "application_name": "test",
        "statement_timeout": "5000",
        "lock_timeout": "2000",
        "idle_in_transaction_session_timeout": "10000",
        "jit": "off",
    }


async def test_concurrent_transactions_wait_for_each_others_locks(database: Database) -> None:
    """The second sees what the first has committed."""

    async def add(connection: AnyConnection) -> None:
        await connection.execute(
            "INSERT INTO notes VALUES (1, 'a') ON CONFLICT (id)"
            " DO UPDATE SET text = notes.text || 'a'"
        )

    async def second() -> None:
        async with database.transaction() as connection:
            await add(connection)

    async with database.transaction() as connection:
        await add(connection)
        task = asyncio.create_task(second())
        await eventually(lambda: waiting_for_a_lock(database))
    await task
    async with database.reading() as connection:
        assert await connection.fetchval("SELECT text FROM notes") == "aa"


# --- Statement ------------------------------------------------------------------------

_notes = sa.table("notes", sa.column("id", sa.Integer), sa.column("text", sa.Text))


async def test_a_statement_is_run_with_its_values(database: Database) -> None:
    """By name, whatever their order in the text."""
    insert = Statement(sa.insert(_notes).values(id=sa.bindparam("id"), text=sa.bindparam("words")))
    find = Statement(
        sa.select(_notes.c.text)
        .where(_notes.c.id >= sa.bindparam("least"))
        .order_by(_notes.c.id)
        .limit(sa.bindparam("size", type_=sa.Integer))
    )
    async with database.transaction() as connection:
        for number, words in enumerate(["a", "b", "c"]):
            await connection.execute(*insert(words=words, id=number))
        rows = await connection.fetch(*find(size=2, least=1))
        assert [row["text"] for row in rows] == ["b", "c"]
        assert [row["text"] for row in await connection.fetch(*find(size=1, least=0))] == ["a"]


def test_a_statement_takes_no_value_that_it_has_no_place_for() -> None:
    """A misspelt parameter is found at once."""
    find = Statement(sa.select(_notes.c.text).where(_notes.c.id == sa.bindparam("id")))
    with pytest.raises(TypeError, match="idd"):
        find(idd=1)


def test_a_statement_keeps_the_values_that_it_was_made_with() -> None:
    """And takes others in their place."""
    find = Statement(
        sa.select(_notes.c.text).where(
            _notes.c.id == sa.bindparam("id", value=7, type_=sa.Integer),
            _notes.c.text != sa.bindparam("not", type_=PgUuid()),
        )
    )
    values: Any = find(**{"not": "x"})[1:]
    assert sorted(map(str, values)) == ["7", "x"]


def test_a_database_is_named_without_its_password() -> None:
    """For messages and logs."""
    name = database_name("postgresql://order:secret@127.0.0.1:5432/order")
    assert name == "order at 127.0.0.1:5432"
