"""A broker in this process's memory, for tests; it passes the same suite as the real ones.

A `MemoryServer` is what a RabbitMQ server or a database would be, and outlives the
`MemoryBroker`s that are connected to it; `MemoryServer.away` plays a server that is down.
Nothing survives the process.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from weakref import WeakValueDictionary

from chassis.broker import (
    BrokerUnavailableError,
    DeadLetterRecord,
    Delivery,
    Handler,
    Limits,
    Message,
    PublishOutcome,
    Subscription,
)
from chassis.broker.handling import (
    Bury,
    Disposal,
    Forget,
    Handling,
    beside,
    forward,
    handed_over_together,
    patiently,
)
from chassis.broker.metrics import count_published


@dataclass(slots=True)
class _Held:
    message: Message
    deliveries: int = 0
    first_death_time: datetime | None = None


@dataclass(slots=True)
class _Queue:
    ready: deque[_Held] = field(default_factory=deque)
    dead: list[DeadLetterRecord] = field(default_factory=list)


class MemoryServer:
    """The queues and bindings that brokers in memory share."""

    def __init__(self) -> None:
        self.queues: dict[str, _Queue] = {}
        self.bindings: dict[str, list[str]] = {}
        self.consumers: set[asyncio.Event] = set()
        """One event for each consumer: one in common would be cleared by one of them before
        the next has seen it."""
        self._away = False

    @property
    def away(self) -> bool:
        """Whether the server plays dead: it accepts and delivers nothing, and loses nothing."""
        return self._away

    @away.setter
    def away(self, away: bool) -> None:
        self._away = away
        self.wake()

    def check(self) -> None:
        """Raises `BrokerUnavailableError` while the server plays dead."""
        if self._away:
            raise BrokerUnavailableError("the broker in memory is away")

    def wake(self) -> None:
        """Lets every consumer look at its queue."""
        for consumer in self.consumers:
            consumer.set()


_SERVERS: WeakValueDictionary[str, MemoryServer] = WeakValueDictionary()


def server_named(name: str) -> MemoryServer:
    """The server of a name within this process, as long as anybody holds it."""
    server = _SERVERS.get(name)
    if server is None:
        server = _SERVERS[name] = MemoryServer()
    return server


class MemoryBroker:
    """A connection to a `MemoryServer`; see `chassis.broker.Broker` for what it promises."""

    def __init__(self, server: MemoryServer | None = None, *, limits: Limits | None = None) -> None:
        self.server = server or MemoryServer()
        self._limits = limits or Limits()

    async def declare(self, subscriptions: Sequence[Subscription]) -> None:
        """See `chassis.broker.Broker.declare`."""
        await patiently(lambda: self._declare(subscriptions), self._limits.declare_seconds_max)

    async def _declare(self, subscriptions: Sequence[Subscription]) -> None:
        self.server.check()
        for subscription in subscriptions:
            self.server.queues.setdefault(subscription.consumer, _Queue())
            for name in subscription.types:
                bound = self.server.bindings.setdefault(name, [])
                if subscription.consumer not in bound:
                    bound.append(subscription.consumer)

    async def publish(self, messages: Sequence[Message]) -> list[PublishOutcome]:
        """See `chassis.broker.Broker.publish`."""
        # As with a real broker, others get to run before the answer is there.
        await asyncio.sleep(0)
        outcomes = [self._published(message) for message in messages]
        count_published(outcomes)
        return outcomes

    def _published(self, message: Message) -> PublishOutcome:
        if self.server.away or len(message.body) > self._limits.body_bytes_max:
            return PublishOutcome.REFUSED
        bound = self.server.bindings.get(message.type)
        if not bound:
            return PublishOutcome.UNROUTABLE
        arriving = replace(
            message,
            headers={
                name: value for name, value in message.headers.items() if not name.startswith("x-")
            },
        )
        for consumer in bound:
            self._arrive(self.server.queues[consumer], _Held(arriving))
        return PublishOutcome.CONFIRMED

    async def consume(
        self, subscription: Subscription, handle: Handler, *, stopping: asyncio.Event
    ) -> None:
        """See `chassis.broker.Broker.consume`."""
        wake = asyncio.Event()
        handling = Handling(subscription.consumer, handle, self._limits)
        self.server.consumers.add(wake)
        try:
            async with beside(forward(stopping, wake)):
                while not stopping.is_set():
                    wake.clear()
                    if self.server.away or not await self._handle_some(subscription, handling):
                        await wake.wait()
        finally:
            self.server.consumers.discard(wake)

    async def _handle_some(self, subscription: Subscription, handling: Handling) -> bool:
        await self._declare([subscription])
        queue = self.server.queues[subscription.consumer]
        if not queue.ready:
            return False
        arrived = islice(queue.ready, subscription.batch_size)
        deliveries = [Delivery(held.message, held.deliveries) for held in arrived]
        deliveries = deliveries[: handed_over_together(deliveries)]
        taken = [queue.ready.popleft() for _ in deliveries]
        try:
            disposals = await handling.dispose(deliveries)
            self.server.check()
        except BaseException as error:
            # The consumer dies, or its server does: what it held goes back to where it was.
            for held in reversed(taken):
                held.deliveries += 1
                queue.ready.appendleft(held)
            self.server.wake()
            if isinstance(error, BrokerUnavailableError):
                return False
            raise
        for held, disposal in zip(taken, disposals, strict=True):
            self._settle(queue, handling.consumer, held, disposal)
        return True

    def _settle(self, queue: _Queue, consumer: str, held: _Held, disposal: Disposal) -> None:
        if isinstance(disposal, Forget):
            return
        now = datetime.now(UTC)
        first_death_time = held.first_death_time or now
        if isinstance(disposal, Bury):
            queue.dead.append(
                DeadLetterRecord(
                    message=held.message,
                    consumer=consumer,
                    error_class=disposal.error_class,
                    error_detail=disposal.error_detail,
                    first_death_time=first_death_time,
                    death_time=now,
                )
            )
            return
        again = _Held(
            replace(held.message, attempt=held.message.attempt + 1),
            first_death_time=first_death_time,
        )
        delay = self._limits.retry_tiers_seconds[disposal.tier]
        asyncio.get_running_loop().call_later(delay, self._arrive, queue, again)

    def _arrive(self, queue: _Queue, held: _Held) -> None:
        queue.ready.append(held)
        self.server.wake()

    async def ping(self) -> None:
        """See `chassis.broker.Broker.ping`."""
        self.server.check()

    async def close(self) -> None:
        """See `chassis.broker.Broker.close`."""

    async def dead_letters(self, consumer: str, *, limit: int = 100) -> list[DeadLetterRecord]:
        """See `chassis.broker.Broker.dead_letters`."""
        self.server.check()
        queue = self.server.queues.get(consumer)
        return [] if queue is None else queue.dead[:limit]
