"""One connection to RabbitMQ: opened, closed, and its failures told in our own terms."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final, cast
from urllib.parse import parse_qsl, urlencode, urlsplit

import aio_pika
import aiormq
import structlog
from aio_pika.abc import AbstractConnection

from chassis.broker import BrokerUnavailableError
from chassis.broker.handling import cancelled_by_caller

CONNECT_SECONDS: Final = 5.0
RPC_SECONDS: Final = 5.0
HEARTBEAT_SECONDS: Final = 10

_log = structlog.get_logger("broker")

# What a broken or unwilling broker makes aiormq raise; RuntimeError is a closed connection or
# channel. A broken connection may also raise CancelledError: see `in_our_terms`.
_TROUBLE: Final = (aiormq.AMQPError, OSError, TimeoutError, RuntimeError)


@asynccontextmanager
async def in_our_terms(seconds: float) -> AsyncIterator[None]:
    """Limits the time of calls to the broker, and makes their failures one kind of error.

    Raises:
        BrokerUnavailableError: They failed or took too long.
    """
    try:
        async with asyncio.timeout(seconds):
            yield
    except asyncio.CancelledError as error:
        if cancelled_by_caller():
            raise
        raise BrokerUnavailableError("the connection broke") from error
    except _TROUBLE as error:
        raise BrokerUnavailableError(f"{type(error).__name__}: {error}") from error


async def open_connection(url: str, connection_name: str) -> AbstractConnection:
    """Opens a connection, shown under a name in RabbitMQ's list.

    Raises:
        BrokerUnavailableError: There is none to be had.
    """
    parts = urlsplit(url)
    # A heartbeat finds a dead peer within about three of them.
    query = {"heartbeat": str(HEARTBEAT_SECONDS), **dict(parse_qsl(parts.query))}
    async with in_our_terms(CONNECT_SECONDS):
        return await aio_pika.connect(
            parts._replace(query=urlencode(query)).geturl(),
            client_properties={"connection_name": connection_name},
        )


def beneath(connection: AbstractConnection) -> aiormq.Connection:
    """The connection beneath aio-pika's, for the calls that are made for every message.

    Raises:
        BrokerUnavailableError: The connection is closed.
    """
    if connection.transport is None:
        raise BrokerUnavailableError("the connection is closed")
    return cast("aiormq.Connection", connection.transport.connection)


async def close_connection(connection: AbstractConnection) -> None:
    """Closes a connection, politely if the broker plays along."""
    try:
        # What still waits on it learns that the connection ended, not that it was cancelled.
        async with in_our_terms(3.0):
            await connection.close(aiormq.ConnectionClosed(0, "given up by this side"))
    except BrokerUnavailableError as error:
        _log.debug("connection.lost_while_closing", reason=str(error))


async def is_blocked(connection: AbstractConnection) -> bool:
    """Whether the broker has told this connection to publish nothing for now."""
    try:
        async with asyncio.timeout(0):
            await beneath(connection).ready()
    except TimeoutError:
        return True
    return False
