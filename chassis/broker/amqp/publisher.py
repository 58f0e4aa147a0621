"""Publishing to RabbitMQ: whole batches in flight, and an outcome for each message."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Coroutine, Sequence
from itertools import count
from typing import Any, cast

import aiormq
import structlog
from aio_pika.abc import AbstractConnection
from aiormq import spec

from chassis.broker import BrokerUnavailableError, Limits, PublishOutcome
from chassis.broker.amqp.connection import (
    CONNECT_SECONDS,
    RPC_SECONDS,
    beneath,
    close_connection,
    in_our_terms,
    is_blocked,
    open_connection,
)
from chassis.broker.amqp.topology import EXCHANGE
from chassis.broker.amqp.wire import Parcel
from chassis.broker.metrics import RECONNECTED

_log = structlog.get_logger("broker")


class Publisher:
    """The one connection and channel that everything is published on.

    It is opened by the first publish that needs it, thrown away when the fate of a message is
    unknown, and opened again by the next.
    """

    def __init__(self, url: str, name: str, limits: Limits) -> None:
        self._url = url
        self._name = name
        self._limits = limits
        self._connection: AbstractConnection | None = None
        self._channel: aiormq.Channel | None = None
        self._opening = asyncio.Lock()
        self._run = secrets.token_hex(4)
        self._numbers = count()
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, parcels: Sequence[Parcel]) -> list[PublishOutcome]:
        """Publishes parcels in order and answers what became of each."""
        seconds = self._limits.publish_seconds_max
        began = time.monotonic()
        try:
            channel = await self.open(seconds)
        except BrokerUnavailableError as error:
            RECONNECTED.labels("publish").inc()
            _log.warning("publish.refused", reason=str(error), messages=len(parcels))
            return [PublishOutcome.REFUSED] * len(parcels)
        remaining = max(1.0, began + seconds - time.monotonic())
        # The calls begin in this order and queue for the channel, so the messages go out in it.
        answers = await asyncio.gather(
            *(self._send_one(channel, parcel, remaining) for parcel in parcels),
            return_exceptions=True,
        )
        outcomes = [_outcome(answer) for answer in answers]
        if PublishOutcome.UNKNOWN in outcomes:
            first = answers[outcomes.index(PublishOutcome.UNKNOWN)]
            _log.warning(
                "publish.unknown",
                reason=f"{type(first).__name__}: {first}",
                messages=outcomes.count(PublishOutcome.UNKNOWN),
            )
            await self._renounce(channel)
        return outcomes

    def _send_one(
        self, channel: aiormq.Channel, parcel: Parcel, seconds: float
    ) -> Coroutine[Any, Any, Any]:
        return channel.basic_publish(
            parcel.body,
            exchange=parcel.exchange,
            routing_key=parcel.routing_key,
            mandatory=True,
            timeout=seconds,
            wait=False,
            properties=spec.Basic.Properties(
                app_id=self._name,
                content_type=parcel.content_type,
                correlation_id=parcel.correlation_id,
                delivery_mode=2,
                headers=dict(parcel.headers),
                message_id=f"{self._run}-{next(self._numbers)}",
            ),
        )

    async def open(self, seconds: float) -> aiormq.Channel:
        """The channel, ready to publish on.

        Raises:
            BrokerUnavailableError: There is none to be had, or the broker has blocked it.
        """
        async with in_our_terms(seconds), self._opening:
            connection, channel = self._connection, self._channel
            if connection is None or channel is None or channel.is_closed or connection.is_closed:
                self._forget()
                connection = await open_connection(self._url, f"{self._name} publish")
                self._connection = connection
                opened = await beneath(connection).channel(
                    publisher_confirms=True, on_return_raises=True
                )
                channel = self._channel = cast("aiormq.Channel", opened)
                # Publishing to a missing exchange would close the channel.
                await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            elif await is_blocked(connection):
                raise BrokerUnavailableError("the broker blocks publishers: an alarm is on")
            return channel

    async def ping(self) -> None:
        """Proves that the broker answers on the connection that publishes, and takes messages.

        By a channel of its own: aiormq closes the channel of a call that is given up, and on
        the publisher's the fate of everything in flight would become unknown.

        Raises:
            BrokerUnavailableError: It does not.
        """
        publishing = await self.open(CONNECT_SECONDS)
        async with in_our_terms(RPC_SECONDS):
            channel = await publishing.connection.channel(publisher_confirms=False)
            await channel.close()

    async def _renounce(self, channel: aiormq.Channel) -> None:
        """Gives up the connection on which the fate of a message became unknown.

        A blocked one is kept, with what it holds: the broker does not read from it, would not
        notice that it is closed, and takes what was sent as soon as the alarm is over.
        """
        connection = self._connection
        if channel is not self._channel or connection is None:
            return
        if connection.is_closed or channel.is_closed or not await is_blocked(connection):
            self._forget()

    def _forget(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None and not connection.is_closed:
            # Beside everything else, because a frozen broker does not answer the goodbye.
            task = asyncio.create_task(close_connection(connection))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes the connection."""
        self._forget()
        if self._closing:
            await asyncio.wait(self._closing)


def _outcome(answer: object) -> PublishOutcome:
    match answer:
        case spec.Basic.Ack():
            return PublishOutcome.CONFIRMED
        case aiormq.PublishError():
            return PublishOutcome.UNROUTABLE
        case aiormq.DeliveryError():
            return PublishOutcome.REFUSED
        case ValueError() | TypeError():
            # Raised while encoding: it cannot be sent at all.
            return PublishOutcome.REFUSED
        case _:
            return PublishOutcome.UNKNOWN
