"""The broker port: what a service may ask of a message broker, and what it is promised.

Three implementations stand beside it, chosen by the scheme of a URL (`connect`):

* `amqp` — RabbitMQ 3.10 to 4.x with quorum queues; the one for production;
* `postgres` — a queue in a PostgreSQL database of its own, so that one command runs
  the mesh where no broker is installed;
* `memory` — for tests, and shipped so that every service's tests may use it.

All three pass `tests/suites/broker.py`. What they promise alike:

* **At least once.** A message that `publish` calls CONFIRMED survives a restart of the
  broker and is delivered to every queue that subscribed to its type, until a consumer
  has settled it. Duplicates happen after crashes; the inbox makes effects happen once.
* **Order.** Messages of one `publish` call enter each queue in the order given. A queue
  is first in, first out, except for what is retried or redelivered, and several
  consumers of one queue share it; so consumers go by the versions inside the events.
* **Poison stays alone.** A delivery that somebody took before and did not settle
  (`Delivery.delivery_count` of one or more) is handled by itself; one that was redelivered
  more than `Limits.delivery_limit` times becomes a dead letter.
* **Retry tiers.** A handler's `Retry` puts a message aside for the next of
  `RETRY_TIERS_SECONDS`; past the last tier it becomes a dead letter.

Why it is made like this, and what it costs: docs/adr/0010 to 0014.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from typing import Final, Protocol, TypeAlias
from urllib.parse import urlsplit
from uuid import UUID

RETRY_TIERS_SECONDS: Final[tuple[float, ...]] = (1.0, 5.0, 30.0, 120.0, 600.0)
"""How long a message rests before its first, second, … further attempt: 12 min in all."""

DELIVERY_LIMIT_EXCEEDED: Final = "DeliveryLimitExceeded"
"""Error class of a dead letter that was taken too often and never settled."""

RETRIES_EXHAUSTED: Final = "RetriesExhausted"
"""Error class of a dead letter whose handler asked for one retry more than there are tiers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One event on its way to its subscribers.

    Header names are lower-case. `content-type` and `correlation-id` travel as AMQP
    properties of these meanings and `ce-…` as CloudEvents attributes, all others as they
    are; names that begin with `x-` belong to brokers and do not arrive.
    """

    event_id: UUID
    """Identity of the event; a message that is published again keeps it."""
    type: str
    """Full protobuf name of the event: the routing key."""
    body: bytes
    """Serialized `ordermesh.common.v1.EventEnvelope`, at most `Limits.body_bytes_max`."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """content-type, correlation-id, traceparent, ce-* attributes."""
    attempt: int = 0
    """How often a consumer has asked for a retry of it so far."""


class PublishOutcome(Enum):
    """What became of one published message (docs/reliability.md, the relay's table)."""

    CONFIRMED = "confirmed"
    """Stored durably in every subscribed queue."""
    UNROUTABLE = "unroutable"
    """Nobody subscribes to its type; it is stored nowhere. A fault of the topology."""
    REFUSED = "refused"
    """Certainly not accepted as a whole: the broker is away, blocked, full, or says no.
    Of several queues one may have refused it and the others taken it."""
    UNKNOWN = "unknown"
    """It may or may not have been stored: publish it again under the same event id."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One message as it is handed to a consumer."""

    message: Message
    delivery_count: int
    """How often it was taken before and not settled; 0 the first time."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Done: the message leaves the queue."""


@dataclass(frozen=True, slots=True)
class Retry:
    """Not now: the message comes again after the next tier's delay."""

    reason: str
    """For the dead letter that it becomes when there is no further tier."""
    error_class: str = RETRIES_EXHAUSTED
    """Error class of that dead letter."""


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """Never: the message is put with the consumer's dead letters, for a person."""

    error_class: str
    """Short and stable, for grouping: an error reason or an exception's name."""
    detail: str
    """For the person; cut to 1 KiB."""


Verdict: TypeAlias = Ack | Retry | DeadLetter
"""What a handler says about one delivery."""

Handler: TypeAlias = Callable[[Sequence[Delivery]], Awaitable[Sequence[Verdict]]]
"""Handles deliveries and answers a verdict for each, in the same order.

When it raises, or takes longer than `Limits.handler_seconds_max` and is cancelled, each
delivery is handed to it once more by itself, so that one bad message does not fail its
neighbours; one that fails alone is retried as by `Retry`. It must therefore undo what it
began when it raises, which a database transaction does. It shields its commit.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscription:
    """A consumer and what it wants to hear of."""

    consumer: str
    """Name of the queue; consumers of the same name share its messages."""
    types: tuple[str, ...]
    """Full names of events, no patterns. A type once subscribed stays subscribed until an
    operator unbinds it: during a roll-out older processes read the same queue."""
    batch_size: int = 64
    """Most deliveries handed over at once. RabbitMQ's consumers hold as many again, which
    arrive in the meantime."""

    def __post_init__(self) -> None:
        """Rejects what no implementation could honour."""
        if not self.consumer or len(self.consumer) > 100:
            raise ValueError("a consumer's name has 1 to 100 characters")
        if self.batch_size < 1:
            raise ValueError("a batch holds at least one delivery")
        for name in self.types:
            if not name or "*" in name or "#" in name or len(name.encode()) > 255:
                raise ValueError(f"{name!r} is not the full name of an event")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterRecord:
    """A message that was given up for one consumer, as an operator sees it."""

    message: Message
    consumer: str
    error_class: str
    error_detail: str
    first_death_time: datetime
    """When it failed for the first time."""
    death_time: datetime
    """When it was given up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The numbers of a broker's behaviour; tests shorten them."""

    retry_tiers_seconds: tuple[float, ...] = RETRY_TIERS_SECONDS
    delivery_limit: int = 10
    """Redeliveries after which a message that is never settled becomes a dead letter."""
    handler_seconds_max: float = 30.0
    """A handler that takes longer is cancelled; far below RabbitMQ's 30 min."""
    publish_seconds_max: float = 5.0
    """A publish that is not confirmed by then has an UNKNOWN outcome."""
    declare_seconds_max: float = 60.0
    """How long `declare` goes on trying to reach a broker that is away."""
    lease_seconds: float = 10.0
    """PostgreSQL alone: how long after its consumer's death a message is handed to another
    one. A living consumer renews it; RabbitMQ notices the lost connection instead."""
    poll_seconds: float = 0.25
    """PostgreSQL alone: pause between looks at an idle queue; notifications cut it short."""
    watchdog_seconds: float = 10.0
    """RabbitMQ alone: time between proofs that a consumer still has its queue."""
    stuck_seconds_max: float = 30.0
    """A consumer that reaches its broker and yet cannot consume for so long raises
    `ConsumerStuckError`."""
    queue_bytes_max: int = 1 << 30
    """RabbitMQ alone: past so many bytes in a queue, its publishers are REFUSED."""
    body_bytes_max: int = 1 << 20
    """A larger message is REFUSED without asking the broker."""


class BrokerError(Exception):
    """Anything this port raises of its own accord."""


class BrokerUnavailableError(BrokerError):
    """The broker cannot be used now; later it may."""


class TopologyError(BrokerError):
    """A queue exists with other properties than these; an operator must decide."""


class ConsumerStuckError(BrokerError):
    """A consumer cannot consume though its broker answers: the process should restart."""


class Broker(Protocol):
    """A message broker, as a service sees it. Safe for concurrent use in one event loop."""

    async def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """Makes the queues and bindings of these subscriptions; idempotent.

        `consume` does the same for its own subscription. A type has no home before its
        first subscriber was declared, so a deployment declares consumers first. A broker that
        is away is waited for, `Limits.declare_seconds_max` at the most.

        Raises:
            BrokerUnavailableError: It is still away; nothing can be said of the queues.
            TopologyError: A queue exists with other properties.
        """

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """Publishes messages in the order given and answers the outcome of each.

        Takes no longer than about `Limits.publish_seconds_max`. A broker's trouble is an
        outcome, never an exception; `CancelledError` comes out only when the calling task
        is being cancelled, and then all outcomes are unknown.
        """

    async def consume(
        self, subscription: Subscription, handle: Handler, *, stopping: asyncio.Event
    ) -> None:
        """Hands the queue's messages to `handle`, batch by batch, until told to stop.

        A batch is what has arrived, at most `batch_size`, handed over at once. Returns when
        `stopping` is set and what was in flight is settled. It outlives restarts of the
        broker. Cancelling it leaves what is in flight unsettled, to be delivered again.

        Raises:
            ConsumerStuckError: The broker answers and yet consuming has been impossible for
                `Limits.stuck_seconds_max`. While the broker is away it waits without end.
        """

    async def ping(self) -> None:
        """Proves that publishing is possible now.

        Raises:
            BrokerUnavailableError: It is not.
        """

    async def close(self) -> None:
        """Gives up all connections; `consume` calls must have ended before. Idempotent."""

    async def dead_letters(self, consumer: str, *, limit: int = 100) -> list[DeadLetterRecord]:
        """Lists a consumer's oldest dead letters, the newest of them last; removes none.

        Raises:
            BrokerUnavailableError: The broker is away.
        """


@asynccontextmanager
async def connect(url: str, *, name: str, limits: Limits | None = None) -> AsyncIterator[Broker]:
    """The broker at a URL, closed at the end of the block.

    Entering does not wait for the broker: a service takes orders while its broker is away.

    Args:
        url: `amqp://` or `amqps://user:password@host:port/vhost`,
            `postgresql://role:password@host:port/database`, or `memory://name`; brokers in
            memory with the same name are one and the same within a process.
        name: The service's name, for the broker's operators.
        limits: Other numbers than the usual ones.

    Raises:
        ValueError: The scheme names no broker.
    """
    broker = _broker(url, name, limits or Limits())
    try:
        yield broker
    finally:
        await broker.close()


def _broker(url: str, name: str, limits: Limits) -> Broker:
    # Late imports: a mesh on PostgreSQL never loads the AMQP client, nor the other way round.
    scheme = urlsplit(url).scheme
    if scheme in {"amqp", "amqps"}:
        from chassis.broker.amqp import AmqpBroker

        return AmqpBroker(url, name=name, limits=limits)
    if scheme in {"postgresql", "postgres"}:
        from chassis.broker.postgres import PostgresBroker

        return PostgresBroker(url, name=name, limits=limits)
    if scheme == "memory":
        from chassis.broker.memory import MemoryBroker, server_named

        return MemoryBroker(server_named(urlsplit(url).netloc), limits=limits)
    raise ValueError(f"no broker speaks {scheme!r}: use amqp, amqps, postgresql or memory")
