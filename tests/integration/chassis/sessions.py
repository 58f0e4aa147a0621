"""What tests do with sessions of a database: wait for one another, and fail on purpose."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from chassis.database import AnyConnection, Database


async def waiting_for_a_lock(database: Database) -> bool:
    """Whether some session of this database waits for a lock."""
    async with database.reading() as connection:
        count = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    return bool(count)


class MishapError(Exception):
    """Something goes wrong in a transaction."""


@asynccontextmanager
async def doomed(database: Database) -> AsyncIterator[AnyConnection]:
    """A transaction that fails when its block ends."""
    try:
        async with database.transaction() as connection:
            yield connection
            raise MishapError
    except MishapError:
        return
