"""Consuming from RabbitMQ over one connection: batches, settlement, and proof of life."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from aio_pika.abc import AbstractConnection
from aiormq import spec
from aiormq.abc import AbstractChannel, DeliveredMessage

from chassis.broker import (
    BrokerUnavailableError,
    Delivery,
    Limits,
    Message,
    PublishOutcome,
    Subscription,
)
from chassis.broker.amqp.connection import RPC_SECONDS, beneath, in_our_terms
from chassis.broker.amqp.publisher import Publisher
from chassis.broker.amqp.topology import dead_letter_queue, declare, retry_queue, work_queue
from chassis.broker.amqp.wire import (
    ATTEMPT,
    DEATH,
    ERROR_CLASS,
    ERROR_DETAIL,
    FIRST_DEATH,
    NIL,
    Parcel,
    delivery_count_of,
    message_of,
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
    forward,
    handed_over_together,
)

MALFORMED_MESSAGE: Final = "MalformedMessage"
"""Error class of a dead letter that none of our publishers can have made."""

_COPY_RETRY_SECONDS_MAX: Final = 5.0

_BATCHES_HELD: Final = 2
"""One is handled while the next arrives; else each would be cut short by the round trip in
which the settled one makes room."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A delivery that this consumer has and that is not settled."""

    delivered: DeliveredMessage
    delivery: Delivery
    malformed: str = ""

    @property
    def tag(self) -> int:
        return self.delivered.delivery_tag or 0


class Session:
    """Consuming over one connection, until it breaks or the consumer is told to stop.

    It begins with one unsettled message at a time, and takes whole batches once the first
    message comes that nobody took before. RabbitMQ counts a redelivery against everything that
    a dying consumer held; a message that kills its consumer again and again would otherwise
    take its neighbours beyond the delivery limit with it.
    """

    def __init__(
        self,
        connection: AbstractConnection,
        publisher: Publisher,
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
        await declare(self._connection, [self._subscription], self._limits)
        async with in_our_terms(RPC_SECONDS):
            channel = await beneath(self._connection).channel(publisher_confirms=False)
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
        async with in_our_terms(RPC_SECONDS):
            if self._tag:
                await channel.basic_cancel(self._tag)
            # Applies to the consumers that begin after it.
            await channel.basic_qos(prefetch_count=prefetch)
            answer = await channel.basic_consume(
                work_queue(self._subscription.consumer), self._on_delivery
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
                delivery = Delivery(message_of(delivered), delivery_count_of(delivered))
            except ValueError as error:
                if not held:
                    nameless = Message(event_id=NIL, type="", body=delivered.body)
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
        prefetch = _BATCHES_HELD * self._subscription.batch_size
        if self._prefetch < prefetch and not batch[0].delivery.delivery_count:
            await self._take_up(channel, prefetch=prefetch)
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

    def _copy(self, held: _Held, disposal: SetAside | Bury) -> Parcel:
        consumer = self._subscription.consumer
        properties = held.delivered.header.properties
        original = properties.headers or {}
        headers = {name: value for name, value in original.items() if not name.startswith("x-")}
        now = datetime.now(UTC).isoformat()
        headers[FIRST_DEATH] = original.get(FIRST_DEATH, now)
        if isinstance(disposal, SetAside):
            headers[ATTEMPT] = held.delivery.message.attempt + 1
            seconds = self._limits.retry_tiers_seconds[disposal.tier]
            to = retry_queue(consumer, seconds)
        else:
            headers[ATTEMPT] = held.delivery.message.attempt
            headers[ERROR_CLASS] = disposal.error_class
            headers[ERROR_DETAIL] = disposal.error_detail
            headers[DEATH] = now
            to = dead_letter_queue(consumer)
        return Parcel(
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
            await declare(self._connection, [self._subscription], self._limits)
            still = await self._copied(left)
            missing = {held.tag for held, _ in still}
            for held, _ in left:
                if held.tag not in missing:
                    await self._ack(channel, held.tag, multiple=False)
            left = still
            if not left:
                return
        async with in_our_terms(RPC_SECONDS):
            for held, _ in left:
                await channel.basic_nack(held.tag, requeue=True, wait=False)

    async def _ack(self, channel: AbstractChannel, tag: int, *, multiple: bool) -> None:
        async with in_our_terms(RPC_SECONDS):
            await channel.basic_ack(tag, multiple=multiple, wait=False)

    async def _leave(self, channel: AbstractChannel) -> None:
        """Stops deliveries, gives back what nobody has begun, and sees the last ack out."""
        async with in_our_terms(RPC_SECONDS):
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
                async with in_our_terms(RPC_SECONDS):
                    if channel is None:
                        channel = await beneath(self._connection).channel(publisher_confirms=False)
                    state = await channel.queue_declare(
                        work_queue(self._subscription.consumer), passive=True
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
