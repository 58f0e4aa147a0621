"""The broker of production: RabbitMQ 3.10 to 4.x, with quorum queues.

**Topology**, the same for every service, made by `declare` and by each `consume`:

* `ordermesh.events`, a durable topic exchange; the routing key is the event's type;
* `ordermesh.<consumer>`, the work queue: limited in redeliveries and bytes;
* `ordermesh.<consumer>.retry.<delay>`, one queue for each tier, whose messages expire all
  after the same time and go back to the work queue. A time to live for each message would
  not do: a long one at the head keeps shorter ones behind it waiting;
* `ordermesh.<consumer>.dlq`, the dead letters, kept until a person decides.

All are quorum queues that dead-letter at least once. Their properties are arguments, not
policies, since a client cannot set policies; what may change has its value in the queue's
name (docs/adr/0012). The exchange has no alternate exchange: a message caught by one counts
as routed, and the outbox would mark as sent what no consumer will ever see (docs/adr/0011).

**Publishing** goes over one connection and one channel: all messages of a batch are in
flight before the first confirm is awaited. aiormq tells returned messages by their
message_id, so that is unique to each publish and the event's id is a header.

**Consuming** has a connection for each `consume` call, so that a publisher which is blocked
by an alarm of the broker never keeps consumers from acknowledging. Declaring and looking at
dead letters have one each for the same reason. A message that is to be
tried again is first copied to its tier, with a confirm, and then acknowledged: a crash in
between makes a duplicate and no loss.

**Reconnecting** is done here, by throwing the connection away and beginning again, topology
included; a connection is never repaired. That one path serves restarts of the broker, lost
networks, queues that were deleted and consumers that were cancelled.

The client is aio-pika, without its repairing: it connects and makes the topology. The calls
that are made for every message go to aiormq, the layer beneath it, for a third less processor
time (docs/adr/0014).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import aiormq
from aio_pika.abc import AbstractConnection
from aiormq import spec

from chassis.broker import (
    BrokerUnavailableError,
    DeadLetterRecord,
    Handler,
    Limits,
    Message,
    PublishOutcome,
    Subscription,
    TopologyError,
)
from chassis.broker.amqp.connection import (
    RPC_SECONDS,
    beneath,
    close_connection,
    in_our_terms,
    open_connection,
)
from chassis.broker.amqp.publisher import Publisher
from chassis.broker.amqp.session import Session
from chassis.broker.amqp.topology import dead_letter_queue, declare
from chassis.broker.amqp.wire import dead_letter_of, parcel_of
from chassis.broker.handling import Handling, Recovery, patiently
from chassis.broker.metrics import count_published

_INSPECTED_MAX: Final = 1000


class AmqpBroker:
    """A connection to RabbitMQ; see `chassis.broker.Broker`.

    Args:
        url: `amqp://` or `amqps://`; its query may set `heartbeat`, `cafile` and the like.
        name: The service's name, shown in RabbitMQ's list of connections.
        limits: The numbers of its behaviour.
    """

    def __init__(self, url: str, *, name: str, limits: Limits) -> None:
        self._url = url
        self._name = name
        self._limits = limits
        self._publisher = Publisher(url, name, limits)

    async def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """See `chassis.broker.Broker.declare`."""
        await patiently(lambda: self._declare(subscriptions), self._limits.declare_seconds_max)

    async def _declare(self, subscriptions: Sequence[Subscription]) -> None:
        async with self._connected("declare") as connection:
            await declare(connection, subscriptions, self._limits)

    @asynccontextmanager
    async def _connected(self, purpose: str) -> AsyncIterator[AbstractConnection]:
        """A connection for a rare call: no alarm blocks it, and its end gives all back."""
        connection = await open_connection(self._url, f"{self._name} {purpose}")
        try:
            yield connection
        finally:
            await close_connection(connection)

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """See `chassis.broker.Broker.publish`."""
        bytes_max = self._limits.body_bytes_max
        parcels = [parcel_of(message) for message in messages if len(message.body) <= bytes_max]
        answers = iter(await self._publisher.send(parcels) if parcels else [])
        outcomes = [
            next(answers) if len(message.body) <= bytes_max else PublishOutcome.REFUSED
            for message in messages
        ]
        count_published(outcomes)
        return outcomes

    async def consume(
        self, subscription: Subscription, handle: Handler, *, stopping: asyncio.Event
    ) -> None:
        """See `chassis.broker.Broker.consume`."""
        handling = Handling(subscription.consumer, handle, self._limits)
        recovery = Recovery(subscription.consumer, self._limits.stuck_seconds_max)
        while True:
            connection: AbstractConnection | None = None
            try:
                connection = await open_connection(self._url, f"{self._name} consume")
                session = Session(
                    connection,
                    self._publisher,
                    subscription,
                    handling,
                    recovery,
                    self._limits,
                    stopping,
                )
                await session.run()
            except (BrokerUnavailableError, TopologyError) as error:
                trouble = error
            else:
                return
            finally:
                if connection is not None:
                    await close_connection(connection)
            if stopping.is_set():
                return
            await recovery.pause(reached=connection is not None, why=trouble, stopping=stopping)
            if stopping.is_set():
                return

    async def ping(self) -> None:
        """See `chassis.broker.Broker.ping`."""
        await self._publisher.ping()

    async def close(self) -> None:
        """See `chassis.broker.Broker.close`."""
        await self._publisher.close()

    async def dead_letters(self, consumer: str, *, limit: int = 100) -> list[DeadLetterRecord]:
        """See `chassis.broker.Broker.dead_letters`.

        RabbitMQ shows a message only to who takes it, and puts at the end what is given back.
        So all of them are taken, up to a thousand, sorted, and given back; nobody else sees
        them meanwhile.
        """
        records: list[DeadLetterRecord] = []
        async with self._connected("inspect") as connection, in_our_terms(RPC_SECONDS * 2):
            channel = await beneath(connection).channel(publisher_confirms=False)
            try:
                while len(records) < _INSPECTED_MAX:
                    taken = await channel.basic_get(dead_letter_queue(consumer))
                    if not isinstance(taken.delivery, spec.Basic.GetOk):
                        break
                    records.append(dead_letter_of(consumer, taken))
            except aiormq.ChannelNotFoundEntity:
                return []
            # Closing the channel gives back what it took.
            await channel.close()
        records.sort(key=lambda record: record.death_time)
        return records[:limit]
