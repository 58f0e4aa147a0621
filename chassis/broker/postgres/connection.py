"""One connection to the broker's database, and what every connection needs to know."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import asyncpg
import structlog

from chassis.broker import Message, Subscription
from chassis.broker.postgres.statements import (
    DECLARE_BINDINGS,
    DECLARE_QUEUES,
    PLANNING,
    SCHEMA,
    SCHEMA_LOCK,
)

if TYPE_CHECKING:
    Connection = asyncpg.Connection[asyncpg.Record]
    Row = asyncpg.Record
else:
    Connection = asyncpg.Connection
    Row = asyncpg.Record

CONNECT_SECONDS: Final = 5.0
STATEMENT_SECONDS: Final = 5.0

_log = structlog.get_logger("broker")

# What a broken or unwilling server makes asyncpg raise; its internal error is what a statement
# meets that begins while asyncpg is only just learning that the connection is dead.
TROUBLE: Final = (
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
    OSError,
    TimeoutError,
)


async def open_connection(url: str, *, application_name: str, durable: bool) -> Connection:
    """Opens a connection.

    Args:
        url: Of the broker's database.
        application_name: Shown in `pg_stat_activity`.
        durable: Whether a commit waits until it has reached the disk.
    """
    return await asyncpg.connect(
        url,
        timeout=CONNECT_SECONDS,
        command_timeout=STATEMENT_SECONDS * 2,
        server_settings={
            "application_name": application_name,
            # In the server, because a client that is gone leaves its statement running.
            "statement_timeout": f"{STATEMENT_SECONDS:g}s",
            "idle_in_transaction_session_timeout": f"{STATEMENT_SECONDS:g}s",
            "synchronous_commit": "on" if durable else "off",
            **PLANNING,
        },
    )


async def close_connection(connection: Connection) -> None:
    """Closes a connection, politely if the server plays along."""
    try:
        await connection.close(timeout=2.0)
    except TROUBLE as error:
        _log.debug("connection.lost_while_closing", reason=str(error))


async def declare(connection: Connection, subscriptions: Sequence[Subscription]) -> None:
    """Brings the schema up to date and makes the queues and bindings of some subscriptions."""
    async with connection.transaction():
        # Also keeps two declarations from waiting for each other in a circle.
        await connection.execute("SELECT pg_advisory_xact_lock($1)", SCHEMA_LOCK)
        await connection.execute(
            "CREATE SCHEMA IF NOT EXISTS mesh_broker;"
            "CREATE TABLE IF NOT EXISTS mesh_broker.schema_step ("
            "number int PRIMARY KEY, done_time timestamptz NOT NULL DEFAULT now())"
        )
        done = await connection.fetchval(
            "SELECT coalesce(max(number), 0) FROM mesh_broker.schema_step"
        )
        for number, step in enumerate(SCHEMA, 1):
            if number > done:
                await connection.execute(step)
                await connection.execute(
                    "INSERT INTO mesh_broker.schema_step (number) VALUES ($1)", number
                )
        await connection.execute(
            DECLARE_QUEUES, sorted({subscription.consumer for subscription in subscriptions})
        )
        pairs = [
            (name, subscription.consumer)
            for subscription in subscriptions
            for name in subscription.types
        ]
        await connection.execute(
            DECLARE_BINDINGS, [name for name, _ in pairs], [consumer for _, consumer in pairs]
        )


def message_of(row: Row) -> Message:
    """The event that a row holds."""
    return Message(
        event_id=row["event_id"],
        type=row["type"],
        body=row["body"],
        headers=json.loads(row["headers"]),
        attempt=row["attempt"],
    )
