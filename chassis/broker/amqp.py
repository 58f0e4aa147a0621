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
by an alarm of the broker never keeps consumers from acknowledging. A message that is to be
tried again is first copied to its tier, with a confirm, and then acknowledged: a crash in
between makes a duplicate and no loss.

**Reconnecting** is done here, by throwing the connection away and beginning again, topology
included; a connection is never repaired. That one path serves restarts of the broker, lost
networks, queues that were deleted and consumers that were cancelled.

The client is aiormq, the layer beneath aio-pika, for a third less processor time for a message
and because nothing of aio-pika's repairing is wanted (docs/adr/0014).
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from types import TracebackType
from typing import Any, Final, cast
from urllib.parse import parse_qsl, urlencode, urlsplit
from uuid import UUID

import aiormq
import structlog
from aiormq import spec
from aiormq.abc import AbstractChannel, DeliveredMessage

from chassis.broker import (
    DELIVERY_LIMIT_EXCEEDED,
    Broker,
    BrokerUnavailableError,
    DeadLetterRecord,
    Delivery,
    Handler,
    Limits,
    Message,
    PublishOutcome,
    Subscription,
    TopologyError,
)
from chassis.broker.handling import (
    Bury,
    Disposal,
    Forget,
    Handling,
    Recovery,
    SetAside,
    beside,
    bury,
    cancelled_by_caller,
    forward,
    handed_over_together,
)
from chassis.broker.metrics import RECONNECTED, count_published

EXCHANGE: Final = "ordermesh.events"

CONNECT_SECONDS: Final = 5.0
RPC_SECONDS: Final = 5.0
HEARTBEAT_SECONDS: Final = 10

MALFORMED_MESSAGE: Final = "MalformedMessage"
"""Error class of a dead letter that none of our publishers can have made."""

_EVENT_ID: Final = "cloudEvents:id"
_TYPE: Final = "cloudEvents:type"
_ATTEMPT: Final = "x-attempt"
_ERROR_CLASS: Final = "x-error-class"
_ERROR_DETAIL: Final = "x-error-detail"
_FIRST_DEATH: Final = "x-first-death"
_DEATH: Final = "x-death-time"

# Dead letters are looked at by taking and returning them, and every return counts; without a
# limit of its own RabbitMQ 4 would drop a dead letter at its 21st inspection.
_INSPECTIONS_MAX: Final = 1_000_000_000
_INSPECTED_MAX: Final = 1000

_COPY_RETRY_SECONDS_MAX: Final = 5.0

_log = structlog.get_logger("broker")

# What a broken or unwilling broker makes aiormq raise; RuntimeError is a closed connection or
# channel. A broken connection may also raise CancelledError: see `_in_our_terms`.
_TROUBLE: Final = (aiormq.AMQPError, OSError, TimeoutError, RuntimeError)

_NIL: Final = UUID(int=0)


def _queue(consumer: str) -> str:
    return f"ordermesh.{consumer}"


def _dead_letter_queue(consumer: str) -> str:
    return f"{_queue(consumer)}.dlq"


def _retry_queue(consumer: str, seconds: float) -> str:
    return f"{_queue(consumer)}.retry.{_delay_name(seconds)}"


def _delay_name(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    if milliseconds % 60_000 == 0:
        return f"{milliseconds // 60_000}m"
    if milliseconds % 1000 == 0:
        return f"{milliseconds // 1000}s"
    return f"{milliseconds}ms"


@asynccontextmanager
async def _in_our_terms(seconds: float) -> AsyncIterator[None]:
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


async def _connect(url: str, connection_name: str) -> aiormq.Connection:
    parts = urlsplit(url)
    # A heartbeat finds a dead peer within about three of them.
    query = {"heartbeat": str(HEARTBEAT_SECONDS), **dict(parse_qsl(parts.query))}
    connection = aiormq.Connection(
        parts._replace(query=urlencode(query)).geturl(),
        client_properties={"connection_name": connection_name},
    )
    async with _in_our_terms(CONNECT_SECONDS):
        await connection.connect()
    return connection


async def _closed(connection: aiormq.Connection) -> None:
    """Closes a connection, politely if the broker plays along."""
    try:
        # What still waits on it learns that the connection ended, not that it was cancelled.
        async with _in_our_terms(3.0):
            await connection.close(aiormq.ConnectionClosed(0, "given up by this side"))
    except BrokerUnavailableError as error:
        _log.debug("connection.lost_while_closing", reason=str(error))


async def _declare(
    connection: aiormq.Connection, subscriptions: Sequence[Subscription], limits: Limits
) -> None:
    """Makes the topology of some subscriptions.

    Raises:
        BrokerUnavailableError: The broker did not answer.
        TopologyError: A queue exists with other properties.
    """
    async with _in_our_terms(RPC_SECONDS * 2):
        try:
            channel = await connection.channel(publisher_confirms=False)
            await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            for subscription in subscriptions:
                await _declare_one(channel, subscription, limits)
            await channel.close()
        except aiormq.ChannelPreconditionFailed as error:
            raise TopologyError(str(error)) from error


async def _declare_one(
    channel: AbstractChannel, subscription: Subscription, limits: Limits
) -> None:
    consumer = subscription.consumer
    await channel.queue_declare(
        _dead_letter_queue(consumer),
        durable=True,
        arguments={"x-queue-type": "quorum", "x-delivery-limit": _INSPECTIONS_MAX},
    )
    # At-least-once dead-lettering holds a message until the next queue has confirmed it, and
    # asks for the overflow behaviour that refuses instead of dropping.
    passing_on: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-max-length-bytes": limits.queue_bytes_max,
    }
    await channel.queue_declare(
        _queue(consumer),
        durable=True,
        arguments={
            **passing_on,
            "x-delivery-limit": limits.delivery_limit,
            "x-dead-letter-routing-key": _dead_letter_queue(consumer),
        },
    )
    for seconds in dict.fromkeys(limits.retry_tiers_seconds):
        await channel.queue_declare(
            _retry_queue(consumer, seconds),
            durable=True,
            arguments={
                **passing_on,
                "x-message-ttl": round(seconds * 1000),
                "x-dead-letter-routing-key": _queue(consumer),
            },
        )
    for name in subscription.types:
        await channel.queue_bind(_queue(consumer), EXCHANGE, routing_key=name)


@dataclass(frozen=True, slots=True)
class _Parcel:
    """One publish: where to, and what."""

    exchange: str
    routing_key: str
    body: bytes
    headers: Mapping[str, Any]
    content_type: str | None
    correlation_id: str | None


def _parcel(message: Message) -> _Parcel:
    """The form in which an event goes to its subscribers."""
    headers: dict[str, Any] = {_EVENT_ID: str(message.event_id), _TYPE: message.type}
    content_type = correlation_id = None
    for name, value in message.headers.items():
        if name == "content-type":
            content_type = value
        elif name == "correlation-id":
            correlation_id = value
        elif name.startswith("ce-"):
            headers[f"cloudEvents:{name[3:]}"] = value
        elif not name.startswith("x-"):
            headers[name] = value
    if message.attempt:
        headers[_ATTEMPT] = message.attempt
    return _Parcel(EXCHANGE, message.type, message.body, headers, content_type, correlation_id)


def _message(delivered: DeliveredMessage) -> Message:
    """The event that was delivered.

    Raises:
        ValueError: It is none: none of our publishers made this message.
    """
    properties = delivered.header.properties
    headers: dict[str, str] = {}
    attempt = 0
    event_id = name_of_type = ""
    for name, value in (properties.headers or {}).items():
        if name == _EVENT_ID:
            event_id = str(value)
        elif name == _TYPE:
            name_of_type = str(value)
        elif name == _ATTEMPT:
            attempt = int(str(value))
        elif name.startswith("cloudEvents:"):
            headers[f"ce-{name[12:]}"] = str(value)
        elif not name.startswith("x-"):
            headers[name] = str(value)
    if properties.content_type:
        headers["content-type"] = properties.content_type
    if properties.correlation_id:
        headers["correlation-id"] = properties.correlation_id
    if not name_of_type:
        raise ValueError("the message says no type")
    return Message(
        event_id=UUID(event_id),
        type=name_of_type,
        body=delivered.body,
        headers=headers,
        attempt=attempt,
    )


def _delivery_count(delivered: DeliveredMessage) -> int:
    # RabbitMQ counts in a header; since 4.3 it does not count what was given back on purpose,
    # which the flag still tells.
    counted = (delivered.header.properties.headers or {}).get("x-delivery-count", 0)
    return max(counted if isinstance(counted, int) else 0, 1 if delivered.redelivered else 0)


class _Publisher:
    """The one connection and channel that everything is published on.

    It is opened by the first publish that needs it, thrown away when the fate of a message is
    unknown, and opened again by the next.
    """

    def __init__(self, url: str, name: str, limits: Limits) -> None:
        self._url = url
        self._name = name
        self._limits = limits
        self._connection: aiormq.Connection | None = None
        self._channel: aiormq.Channel | None = None
        self._opening = asyncio.Lock()
        self._run = secrets.token_hex(4)
        self._numbers = count()
        self._closing: set[asyncio.Task[None]] = set()

    async def send(self, parcels: Sequence[_Parcel]) -> list[PublishOutcome]:
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
        self, channel: aiormq.Channel, parcel: _Parcel, seconds: float
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
        async with _in_our_terms(seconds), self._opening:
            connection, channel = self._connection, self._channel
            if connection is None or channel is None or channel.is_closed or connection.is_closed:
                self._forget()
                connection = await _connect(self._url, f"{self._name} publish")
                self._connection = connection
                opened = await connection.channel(publisher_confirms=True, on_return_raises=True)
                channel = self._channel = cast("aiormq.Channel", opened)
                # Publishing to a missing exchange would close the channel.
                await channel.exchange_declare(EXCHANGE, exchange_type="topic", durable=True)
            elif await _is_blocked(connection):
                raise BrokerUnavailableError("the broker blocks publishers: an alarm is on")
            return channel

    async def connection(self) -> aiormq.Connection:
        """The connection, for the rare calls that are no publishing.

        Raises:
            BrokerUnavailableError: There is none to be had.
        """
        await self.open(CONNECT_SECONDS)
        if self._connection is None:
            raise BrokerUnavailableError("the connection was lost at once")
        return self._connection

    async def _renounce(self, channel: AbstractChannel) -> None:
        """Gives up the connection on which the fate of a message became unknown.

        A blocked one is kept, with what it holds: the broker does not read from it, would not
        notice that it is closed, and takes what was sent as soon as the alarm is over.
        """
        connection = self._connection
        if channel is not self._channel or connection is None:
            return
        if connection.is_closed or channel.is_closed or not await _is_blocked(connection):
            self._forget()

    def _forget(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None and not connection.is_closed:
            # Beside everything else, because a frozen broker does not answer the goodbye.
            task = asyncio.create_task(_closed(connection))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Closes the connection."""
        self._forget()
        if self._closing:
            await asyncio.wait(self._closing)


async def _is_blocked(connection: aiormq.Connection) -> bool:
    """Whether the broker has told this connection to publish nothing for now."""
    try:
        async with asyncio.timeout(0):
            await connection.ready()
    except TimeoutError:
        return True
    return False


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
        self._publisher = _Publisher(url, name, limits)

    async def __aenter__(self) -> Broker:
        """Connects to nothing yet."""
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        await self.close()

    async def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """See `chassis.broker.Broker.declare`."""
        await _declare(await self._publisher.connection(), subscriptions, self._limits)

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """See `chassis.broker.Broker.publish`."""
        bytes_max = self._limits.body_bytes_max
        parcels = [_parcel(message) for message in messages if len(message.body) <= bytes_max]
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
            connection: aiormq.Connection | None = None
            try:
                connection = await _connect(self._url, f"{self._name} consume")
                session = _Session(
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
                    await _closed(connection)
            if stopping.is_set():
                return
            await recovery.pause(reached=connection is not None, why=trouble, stopping=stopping)
            if stopping.is_set():
                return

    async def ping(self) -> None:
        """See `chassis.broker.Broker.ping`."""
        channel = await self._publisher.open(CONNECT_SECONDS)
        async with _in_our_terms(RPC_SECONDS):
            await channel.basic_qos(prefetch_count=0)

    async def close(self) -> None:
        """See `chassis.broker.Broker.close`."""
        await self._publisher.close()

    async def dead_letters(self, consumer: str, *, limit: int = 100) -> list[DeadLetterRecord]:
        """See `chassis.broker.Broker.dead_letters`.

        RabbitMQ shows a message only to who takes it, and puts at the end what is given back.
        So all of them are taken, up to a thousand, sorted, and given back; nobody else sees
        them meanwhile.
        """
        connection = await self._publisher.connection()
        records: list[DeadLetterRecord] = []
        async with _in_our_terms(RPC_SECONDS * 2):
            channel = await connection.channel(publisher_confirms=False)
            try:
                while len(records) < _INSPECTED_MAX:
                    taken = await channel.basic_get(_dead_letter_queue(consumer))
                    if not isinstance(taken.delivery, spec.Basic.GetOk):
                        break
                    records.append(_dead_letter(consumer, taken))
            except aiormq.ChannelNotFoundEntity:
                return []
            # Closing the channel gives back what it took.
            await channel.close()
        records.sort(key=lambda record: record.death_time)
        return records[:limit]


def _dead_letter(consumer: str, taken: DeliveredMessage) -> DeadLetterRecord:
    headers = taken.header.properties.headers or {}
    try:
        message = _message(taken)
    except ValueError:
        message = Message(event_id=_NIL, type=str(headers.get(_TYPE, "")), body=taken.body)
    error_class = headers.get(_ERROR_CLASS)
    if error_class is not None:
        now = datetime.now(UTC)
        return DeadLetterRecord(
            message=message,
            consumer=consumer,
            error_class=str(error_class),
            error_detail=str(headers.get(_ERROR_DETAIL, "")),
            first_death_time=_time(headers.get(_FIRST_DEATH), now),
            death_time=_time(headers.get(_DEATH), now),
        )
    # RabbitMQ put it here of its own accord, and says why in its own way.
    deaths = headers.get("x-death")
    death = deaths[0] if isinstance(deaths, list) and deaths else {}
    when = death.get("time") if isinstance(death, dict) else None
    moment = when if isinstance(when, datetime) else datetime.now(UTC)
    reason = str(headers.get("x-first-death-reason", "unknown"))
    return DeadLetterRecord(
        message=message,
        consumer=consumer,
        error_class=DELIVERY_LIMIT_EXCEEDED if reason == "delivery_limit" else reason,
        error_detail=f"dead-lettered by RabbitMQ: {reason}",
        first_death_time=_time(headers.get(_FIRST_DEATH), moment),
        death_time=moment,
    )


def _time(value: object, otherwise: datetime) -> datetime:
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return otherwise


@dataclass(frozen=True, slots=True)
class _Held:
    """A delivery that this consumer has and that is not settled."""

    delivered: DeliveredMessage
    delivery: Delivery
    malformed: str = ""

    @property
    def tag(self) -> int:
        return self.delivered.delivery_tag or 0


class _Session:
    """Consuming over one connection, until it breaks or the consumer is told to stop.

    It begins with one unsettled message at a time, and takes whole batches once the first
    message comes that nobody took before. RabbitMQ counts a redelivery against everything that
    a dying consumer held; a message that kills its consumer again and again would otherwise
    take its neighbours beyond the delivery limit with it.
    """

    def __init__(
        self,
        connection: aiormq.Connection,
        publisher: _Publisher,
        subscription: Subscription,
        handling: Handling,
        recovery: Recovery,
        limits: Limits,
        stopping: asyncio.Event,
    ) -> None:
        self._connection = connection
        self._publisher = publisher
        self._subscription = subscription
        self._handling = handling
        self._recovery = recovery
        self._limits = limits
        self._stopping = stopping
        self._wake = asyncio.Event()
        self._arrived: deque[DeliveredMessage] = deque()
        self._arrivals = 0
        self._resting = False
        self._lost = ""
        self._prefetch = 0
        self._tag = ""

    async def run(self) -> None:
        """Consumes until told to stop.

        Raises:
            BrokerUnavailableError: The connection, the channel or the consumer was lost.
            TopologyError: The queue cannot be made as it should be.
        """
        await _declare(self._connection, [self._subscription], self._limits)
        async with _in_our_terms(RPC_SECONDS):
            channel = await self._connection.channel(publisher_confirms=False)
        channel.on_consumer_cancel_callbacks.add(self._on_cancel)
        closing = channel.closing
        closing.add_done_callback(self._on_close)
        await self._take_up(channel, prefetch=1)
        async with beside(forward(self._stopping, self._wake), self._watch()):
            while True:
                self._wake.clear()
                if self._lost:
                    raise BrokerUnavailableError(self._lost)
                if self._stopping.is_set():
                    break
                if self._arrived:
                    await self._handle(channel, self._next_batch())
                    self._recovery.consuming()
                else:
                    self._resting = True
                    await self._wake.wait()
                    self._resting = False
        await self._leave(channel)

    async def _take_up(self, channel: AbstractChannel, *, prefetch: int) -> None:
        """Begins to consume, or goes on with another number of unsettled messages."""
        async with _in_our_terms(RPC_SECONDS):
            if self._tag:
                await channel.basic_cancel(self._tag)
            # Applies to the consumers that begin after it.
            await channel.basic_qos(prefetch_count=prefetch)
            answer = await channel.basic_consume(
                _queue(self._subscription.consumer), self._on_delivery
            )
            self._tag = answer.consumer_tag or ""
        self._prefetch = prefetch

    async def _on_delivery(self, delivered: DeliveredMessage) -> None:
        self._arrived.append(delivered)
        self._arrivals += 1
        self._wake.set()

    def _on_cancel(self, _frame: spec.Basic.Cancel) -> None:
        self._lose("the broker cancelled the consumer: its queue is gone")

    def _on_close(self, _closing: asyncio.Future[Any]) -> None:
        self._lose("the channel was closed")

    def _lose(self, why: str) -> None:
        self._lost = self._lost or why
        self._wake.set()

    def _next_batch(self) -> list[_Held]:
        """Takes what goes to the handler together from what has arrived."""
        held: list[_Held] = []
        for delivered in self._arrived:
            try:
                delivery = Delivery(_message(delivered), _delivery_count(delivered))
            except ValueError as error:
                if not held:
                    nameless = Message(event_id=_NIL, type="", body=delivered.body)
                    held.append(_Held(delivered, Delivery(nameless, 0), str(error)))
                break
            held.append(_Held(delivered, delivery))
            if len(held) == self._subscription.batch_size:
                break
        batch = held[: handed_over_together([one.delivery for one in held])]
        for _ in batch:
            self._arrived.popleft()
        return batch

    async def _handle(self, channel: AbstractChannel, batch: Sequence[_Held]) -> None:
        if self._prefetch < self._subscription.batch_size and not batch[0].delivery.delivery_count:
            await self._take_up(channel, prefetch=self._subscription.batch_size)
        if batch[0].malformed:
            disposals: list[Disposal] = [bury(MALFORMED_MESSAGE, batch[0].malformed)]
        else:
            disposals = await self._handling.dispose([held.delivery for held in batch])
        copies = [
            (held, disposal)
            for held, disposal in zip(batch, disposals, strict=True)
            if not isinstance(disposal, Forget)
        ]
        if copies:
            left = await self._copied(copies)
            if left:
                missing = {held.tag for held, _ in left}
                for held in batch:
                    if held.tag not in missing:
                        await self._ack(channel, held.tag, multiple=False)
                await self._copy_at_length(channel, left)
                return
        # Batches are settled in the order of arrival, so nothing before this is unsettled.
        await self._ack(channel, batch[-1].tag, multiple=True)

    async def _copied(
        self, copies: Sequence[tuple[_Held, SetAside | Bury]]
    ) -> list[tuple[_Held, SetAside | Bury]]:
        """Copies messages to their retry or dead-letter queue; answers those that failed.

        With the connection gone the originals come again by themselves: no copy is made then.
        """
        if self._lost:
            raise BrokerUnavailableError(self._lost)
        outcomes = await self._publisher.send([self._copy(*copy) for copy in copies])
        return [
            copy
            for copy, outcome in zip(copies, outcomes, strict=True)
            if outcome is not PublishOutcome.CONFIRMED
        ]

    def _copy(self, held: _Held, disposal: SetAside | Bury) -> _Parcel:
        consumer = self._subscription.consumer
        properties = held.delivered.header.properties
        original = properties.headers or {}
        headers = {name: value for name, value in original.items() if not name.startswith("x-")}
        now = datetime.now(UTC).isoformat()
        headers[_FIRST_DEATH] = original.get(_FIRST_DEATH, now)
        if isinstance(disposal, SetAside):
            headers[_ATTEMPT] = held.delivery.message.attempt + 1
            seconds = self._limits.retry_tiers_seconds[disposal.tier]
            to = _retry_queue(consumer, seconds)
        else:
            headers[_ATTEMPT] = held.delivery.message.attempt
            headers[_ERROR_CLASS] = disposal.error_class
            headers[_ERROR_DETAIL] = disposal.error_detail
            headers[_DEATH] = now
            to = _dead_letter_queue(consumer)
        return _Parcel(
            "", to, held.delivered.body, headers, properties.content_type, properties.correlation_id
        )

    async def _copy_at_length(
        self, channel: AbstractChannel, left: list[tuple[_Held, SetAside | Bury]]
    ) -> None:
        """Goes on copying what the broker did not take, and settles what it takes.

        The originals are held meanwhile rather than given back: to give them back counts as a
        redelivery, and the broker's trouble would exceed their delivery limit.
        """
        ceiling = 0.1
        while not self._stopping.is_set():
            self._wake.clear()
            await _pause(random.uniform(0.0, ceiling), self._wake)
            ceiling = min(_COPY_RETRY_SECONDS_MAX, ceiling * 2)
            # The queues may be what is missing.
            await _declare(self._connection, [self._subscription], self._limits)
            still = await self._copied(left)
            missing = {held.tag for held, _ in still}
            for held, _ in left:
                if held.tag not in missing:
                    await self._ack(channel, held.tag, multiple=False)
            left = still
            if not left:
                return
        async with _in_our_terms(RPC_SECONDS):
            for held, _ in left:
                await channel.basic_nack(held.tag, requeue=True, wait=False)

    async def _ack(self, channel: AbstractChannel, tag: int, *, multiple: bool) -> None:
        async with _in_our_terms(RPC_SECONDS):
            await channel.basic_ack(tag, multiple=multiple, wait=False)

    async def _leave(self, channel: AbstractChannel) -> None:
        """Stops deliveries, gives back what nobody has begun, and sees the last ack out."""
        async with _in_our_terms(RPC_SECONDS):
            await channel.basic_cancel(self._tag)
            if self._arrived:
                last = self._arrived[-1].delivery_tag or 0
                await channel.basic_nack(last, multiple=True, requeue=True, wait=False)
            # A round trip: what was written before it has reached the broker.
            await channel.close()

    async def _watch(self) -> None:
        """Proves from time to time that the broker still has this consumer; else gives up.

        That is: it answers, knows the queue, counts a consumer, and does not keep messages
        ready while this one has waited with room for them through two rounds.
        """
        channel: AbstractChannel | None = None
        arrivals = idle_rounds = 0
        while True:
            await asyncio.sleep(self._limits.watchdog_seconds * random.uniform(0.8, 1.2))
            try:
                async with _in_our_terms(RPC_SECONDS):
                    if channel is None:
                        channel = await self._connection.channel(publisher_confirms=False)
                    state = await channel.queue_declare(
                        _queue(self._subscription.consumer), passive=True
                    )
            except BrokerUnavailableError as error:
                self._lose(f"the queue cannot be seen: {error}")
                return
            nothing_came = self._resting and arrivals == self._arrivals
            passed_over = nothing_came and bool(state.message_count)
            idle_rounds = idle_rounds + 1 if passed_over else 0
            arrivals = self._arrivals
            if not state.consumer_count:
                self._lose("the broker knows of no consumer")
            elif idle_rounds == 2:
                self._lose("the broker keeps messages and delivers none")
            else:
                self._recovery.consuming()


async def _pause(seconds: float, wake: asyncio.Event) -> None:
    try:
        async with asyncio.timeout(seconds):
            await wake.wait()
    except TimeoutError:
        return
