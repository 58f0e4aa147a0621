"""What every broker behind the port must do, asked of each of them in the same words.

A test module subclasses `BrokerSuite` and gives it a `backend` fixture: a server that can
be ended and started again. All tests of a module share the server and one event loop;
each has its own consumers and types of events. Delays are shortened, never removed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Protocol
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from chassis.broker import (
    DELIVERY_LIMIT_EXCEEDED,
    RETRIES_EXHAUSTED,
    Ack,
    Broker,
    BrokerUnavailableError,
    DeadLetter,
    DeadLetterRecord,
    Delivery,
    Handler,
    Limits,
    Message,
    PublishOutcome,
    Retry,
    Subscription,
    Verdict,
    connect,
)
from tests.eventually import eventually

LIMITS = Limits(
    retry_tiers_seconds=(0.2, 0.4),
    delivery_limit=2,
    publish_seconds_max=3.0,
    declare_seconds_max=0.5,
    lease_seconds=0.6,
    poll_seconds=0.1,
    watchdog_seconds=1.0,
)

RESTART_SECONDS = 60

CONFIRMED = PublishOutcome.CONFIRMED


class Backend(Protocol):
    """A server behind the port, that a test may end and start again."""

    @property
    def url(self) -> str:
        """What to give to `connect`."""

    async def stop(self) -> None:
        """Ends the server in an orderly way."""

    async def kill(self) -> None:
        """Ends the server at once."""

    async def start(self) -> None:
        """Starts it again with what it had confirmed."""


class Recorder:
    """A handler that remembers what it was given, and answers as it is told."""

    def __init__(self, answer: Callable[[Delivery], Verdict] = lambda _: Ack()) -> None:
        self.calls: list[list[Delivery]] = []
        self._answer = answer

    async def __call__(self, deliveries: Sequence[Delivery]) -> list[Verdict]:
        """Handles a batch."""
        self.calls.append(list(deliveries))
        return [self._answer(delivery) for delivery in deliveries]

    @property
    def deliveries(self) -> list[Delivery]:
        """Everything so far, in order."""
        return [delivery for call in self.calls for delivery in call]

    @property
    def numbers(self) -> list[int]:
        """The numbers of the messages so far, in order."""
        return [number_of(delivery) for delivery in self.deliveries]


def number_of(delivery: Delivery) -> int:
    """The number that a test's message carries."""
    return int(delivery.message.body)


def outcome_counts(outcomes: Sequence[PublishOutcome]) -> dict[PublishOutcome, int]:
    """How often each outcome occurs."""
    return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}


@asynccontextmanager
async def consuming(
    broker: Broker, subscription: Subscription, handle: Handler
) -> AsyncIterator[asyncio.Task[None]]:
    """Consumes while the block runs, and stops in an orderly way when it ends."""
    stopping = asyncio.Event()
    task = asyncio.create_task(broker.consume(subscription, handle, stopping=stopping))
    try:
        yield task
    finally:
        stopping.set()
        async with asyncio.timeout(20):
            await asyncio.gather(task, return_exceptions=task.cancelled())


async def held_at_death(
    url: str, subscription: Subscription, *, attempt: int = 0
) -> list[Delivery]:
    """Consumes and dies with the first batch, or that of a later attempt; answers what it held."""
    held: list[Delivery] = []
    begun = asyncio.Event()

    async def never_ends(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
        if deliveries[0].message.attempt < attempt:
            return [Retry("not yet")] * len(deliveries)
        held.extend(deliveries)
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError("nobody sets that event")

    async with connect(url, name="doomed", limits=LIMITS) as doomed:
        task = asyncio.create_task(
            doomed.consume(subscription, never_ends, stopping=asyncio.Event())
        )
        async with asyncio.timeout(10):
            await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    return held


class Names:
    """A consumer's name and types of events that no other test uses."""

    def __init__(self) -> None:
        self._own = uuid4().hex[:10]
        self.type = self.type_named("Happened")

    def type_named(self, name: str) -> str:
        """The full name of an event of this test."""
        return f"ordermesh.test.v{self._own}.{name}"

    def subscription(
        self, consumer: str = "consumer", *types: str, batch_size: int = 64
    ) -> Subscription:
        """A subscription of this test, to `type` when none is named."""
        return Subscription(
            consumer=f"{consumer}-{self._own}", types=types or (self.type,), batch_size=batch_size
        )

    def message(self, number: int = 0, name: str = "") -> Message:
        """A message that carries a number."""
        return Message(event_id=uuid4(), type=name or self.type, body=str(number).encode())

    def messages(self, count: int, first: int = 0) -> list[Message]:
        """Messages numbered from `first` on."""
        return [self.message(number) for number in range(first, first + count)]


class BrokerSuite:
    """The behaviour of a broker. Subclasses provide the fixture `backend`."""

    @pytest_asyncio.fixture(loop_scope="module")
    async def broker(self, backend: Backend) -> AsyncIterator[Broker]:
        """A connection of the test's own, with shortened delays."""
        async with connect(backend.url, name="suite", limits=LIMITS) as broker:
            yield broker

    @pytest.fixture
    def names(self) -> Names:
        """Names that no other test uses."""
        return Names()

    # Publishing and routing

    async def test_a_message_reaches_each_subscribed_consumer_once(
        self, broker: Broker, names: Names
    ) -> None:
        """Two consumers of one type both get what is published, once each."""
        one, other = names.subscription("one"), names.subscription("other")
        await broker.declare([one, other])
        assert await broker.publish(names.messages(5)) == [CONFIRMED] * 5
        first, second = Recorder(), Recorder()
        async with consuming(broker, one, first), consuming(broker, other, second):
            await eventually(lambda: len(first.numbers) >= 5 and len(second.numbers) >= 5)
            # Something published later proves that nothing else was on its way.
            await broker.publish([names.message(99)])
            await eventually(lambda: first.numbers[-1] == 99 and second.numbers[-1] == 99)
        assert first.numbers == second.numbers == [0, 1, 2, 3, 4, 99]

    async def test_a_message_arrives_as_it_was_sent(self, broker: Broker, names: Names) -> None:
        """Identity, type, body and headers arrive unchanged, but for headers of brokers."""
        subscription = names.subscription()
        await broker.declare([subscription])
        sent = Message(
            event_id=UUID("0198f0c2-7a2b-7cc0-b8aa-6f8f6a3c1d11"),
            type=names.type,
            body=bytes(range(256)) * 20,
            headers={
                "content-type": "application/x-protobuf; messageType=a.B",
                "correlation-id": "cor-1",
                "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
                "ce-source": "//ordermesh/order",
                "x-death": "a broker's own word",
            },
        )
        await broker.publish([sent])
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: recorder.calls)
        expected = {name: text for name, text in sent.headers.items() if name != "x-death"}
        assert recorder.deliveries == [Delivery(replace(sent, headers=expected), 0)]

    async def test_a_consumer_gets_only_the_types_it_subscribed_to(
        self, broker: Broker, names: Names
    ) -> None:
        """Types go by their full names: one that is the beginning of another stays apart."""
        wanted, longer = names.type_named("Paid"), names.type_named("Paid.Twice")
        narrow = names.subscription("narrow", wanted)
        wide = names.subscription("wide", wanted, longer)
        await broker.declare([narrow, wide])
        await broker.publish(
            [names.message(1, longer), names.message(2, wanted), names.message(3, longer)]
        )
        few, all_of_them = Recorder(), Recorder()
        async with consuming(broker, narrow, few), consuming(broker, wide, all_of_them):
            await eventually(lambda: len(all_of_them.numbers) == 3 and few.numbers)
        assert few.numbers == [2]
        assert all_of_them.numbers == [1, 2, 3]

    async def test_a_type_that_nobody_subscribes_to_is_unroutable_among_its_neighbours(
        self, broker: Broker, names: Names
    ) -> None:
        """Each message has its own outcome, and its neighbours arrive."""
        subscription = names.subscription()
        await broker.declare([subscription])
        nobodys = names.message(1, names.type_named("Unheard"))
        outcomes = await broker.publish([names.message(0), nobodys, names.message(2)])
        assert outcomes == [CONFIRMED, PublishOutcome.UNROUTABLE, CONFIRMED]
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: len(recorder.numbers) == 2)
        assert recorder.numbers == [0, 2]

    async def test_the_same_event_may_be_published_twice_at_once(
        self, broker: Broker, names: Names
    ) -> None:
        """Two copies in flight, one of them unroutable, do not take each other's outcome."""
        subscription = names.subscription()
        await broker.declare([subscription])
        known = names.message(1)
        unknown = replace(known, type=names.type_named("Unheard"))
        outcomes = await broker.publish([known, unknown, known, unknown])
        assert outcomes == [CONFIRMED, PublishOutcome.UNROUTABLE] * 2

    async def test_what_is_published_before_anyone_consumes_waits_for_the_consumer(
        self, broker: Broker, names: Names
    ) -> None:
        """A declared consumer that is down misses nothing."""
        subscription = names.subscription()
        assert await broker.publish([names.message(0)]) == [PublishOutcome.UNROUTABLE]
        await broker.declare([subscription])
        assert await broker.publish([names.message(1)]) == [CONFIRMED]
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: recorder.numbers)
        assert recorder.numbers == [1]

    async def test_declaring_again_changes_nothing(self, broker: Broker, names: Names) -> None:
        """A declaration may be repeated, at the same time too, and loses no message."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish(names.messages(3))
        await asyncio.gather(*(broker.declare([subscription]) for _ in range(4)))
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: len(recorder.numbers) >= 3)
        assert recorder.numbers == [0, 1, 2]

    async def test_a_message_that_is_too_large_is_refused_alone(
        self, backend: Backend, names: Names
    ) -> None:
        """The size limit costs the neighbours nothing."""
        subscription = names.subscription()
        limits = replace(LIMITS, body_bytes_max=100)
        async with connect(backend.url, name="suite", limits=limits) as broker:
            await broker.declare([subscription])
            huge = replace(names.message(), body=bytes(101))
            outcomes = await broker.publish([names.message(1), huge, names.message(2)])
        assert outcomes == [CONFIRMED, PublishOutcome.REFUSED, CONFIRMED]

    async def test_publishing_nothing_answers_nothing(self, broker: Broker) -> None:
        """An empty batch is no error."""
        assert await broker.publish([]) == []

    async def test_several_publishers_at_once_each_get_their_own_outcomes(
        self, broker: Broker, names: Names
    ) -> None:
        """Concurrent batches over one broker do not mix up their outcomes."""
        subscription = names.subscription()
        await broker.declare([subscription])
        nobodys = names.type_named("Unheard")
        heard, unheard = await asyncio.gather(
            broker.publish(names.messages(30)),
            broker.publish([names.message(0, nobodys) for _ in range(30)]),
        )
        assert outcome_counts(heard) == {CONFIRMED: 30}
        assert outcome_counts(unheard) == {PublishOutcome.UNROUTABLE: 30}

    async def test_a_cancelled_publish_leaves_the_broker_usable(
        self, broker: Broker, names: Names
    ) -> None:
        """Cancelling the caller is the one way to make `publish` raise."""
        await broker.declare([names.subscription()])
        task = asyncio.create_task(broker.publish(names.messages(200)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await broker.publish([names.message(1)]) == [CONFIRMED]

    # Order and batches

    async def test_messages_arrive_in_the_order_of_publishing(
        self, broker: Broker, names: Names
    ) -> None:
        """Within a batch, and from batch to batch."""
        subscription = names.subscription()
        await broker.declare([subscription])
        for first in range(0, 300, 100):
            await broker.publish(names.messages(100, first))
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: len(recorder.numbers) >= 300)
        assert recorder.numbers == list(range(300))

    async def test_waiting_messages_are_handed_over_in_batches_of_limited_size(
        self, broker: Broker, names: Names
    ) -> None:
        """Far fewer calls than messages, and never more in one than asked for."""
        subscription = names.subscription(batch_size=10)
        await broker.declare([subscription])
        await broker.publish(names.messages(100))
        recorder = Recorder()

        async def slowly(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            await asyncio.sleep(0.02)  # time in which the next batch arrives
            return await recorder(deliveries)

        async with consuming(broker, subscription, slowly):
            await eventually(lambda: len(recorder.numbers) >= 100)
        sizes = [len(call) for call in recorder.calls]
        assert max(sizes) == 10
        assert len(sizes) <= 15
        assert recorder.numbers == list(range(100))

    async def test_two_consumers_share_a_queue(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """Both get work and nobody gets what the other has."""
        subscription = names.subscription(batch_size=5)
        await broker.declare([subscription])
        await broker.publish(names.messages(200))
        one, other = Recorder(), Recorder()

        async def busily(recorder: Recorder, deliveries: Sequence[Delivery]) -> list[Verdict]:
            await asyncio.sleep(0.01)  # work that takes time, so that one cannot do it all
            return await recorder(deliveries)

        async with (
            connect(backend.url, name="second", limits=LIMITS) as second,
            consuming(broker, subscription, lambda deliveries: busily(one, deliveries)),
            consuming(second, subscription, lambda deliveries: busily(other, deliveries)),
        ):
            await eventually(lambda: len(one.numbers) + len(other.numbers) >= 200)
        assert one.numbers
        assert other.numbers
        assert sorted(one.numbers + other.numbers) == list(range(200))

    # Redelivery

    async def test_what_a_dead_consumer_held_is_delivered_again_one_by_one(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """A redelivered message is handled alone; those behind it go in batches again."""
        subscription = names.subscription(batch_size=4)
        await broker.declare([subscription])
        await broker.publish(names.messages(8))
        lost = await held_at_death(backend.url, subscription)
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: len(recorder.numbers) >= 8)
        assert sorted(recorder.numbers) == list(range(8))
        again = {number_of(delivery) for delivery in lost}
        for call in recorder.calls:
            if any(number_of(delivery) in again for delivery in call):
                assert [delivery.delivery_count for delivery in call] == [1]

    async def test_a_message_whose_consumer_dies_again_and_again_is_buried_after_a_retry_too(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """A retry that went before changes neither the limit nor what is said of the death."""
        subscription = names.subscription()
        await broker.declare([subscription])
        sent = names.message(1)
        await broker.publish([sent])
        counts = [
            delivery.delivery_count
            for _ in range(LIMITS.delivery_limit + 1)
            for delivery in await held_at_death(backend.url, subscription, attempt=1)
        ]
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            [dead] = await self._dead_letters(broker, subscription, 1)
        assert counts == list(range(LIMITS.delivery_limit + 1))
        assert recorder.numbers == []
        assert dead.error_class == DELIVERY_LIMIT_EXCEEDED
        assert dead.message == replace(sent, attempt=1)

    async def test_a_graceful_stop_settles_what_is_in_flight(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """What was being handled is done once; the rest goes to the next consumer."""
        subscription = names.subscription(batch_size=4)
        await broker.declare([subscription])
        await broker.publish(names.messages(20))
        stopping, begun, may_end = asyncio.Event(), asyncio.Event(), asyncio.Event()
        handled = Recorder()

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            begun.set()
            await may_end.wait()
            return await handled(deliveries)

        async with asyncio.timeout(10):
            task = asyncio.create_task(broker.consume(subscription, handle, stopping=stopping))
            await begun.wait()
            stopping.set()
            may_end.set()
            await task
        assert len(handled.calls) == 1
        recorder = Recorder()
        async with (
            connect(backend.url, name="next", limits=LIMITS) as following,
            consuming(following, subscription, recorder),
        ):
            await eventually(lambda: len(handled.numbers) + len(recorder.numbers) >= 20)
        assert sorted(handled.numbers + recorder.numbers) == list(range(20))

    async def test_an_idle_consumer_stops_at_once(self, broker: Broker, names: Names) -> None:
        """Nothing in flight, nothing to wait for."""
        stopping = asyncio.Event()
        task = asyncio.create_task(
            broker.consume(names.subscription(), Recorder(), stopping=stopping)
        )
        # Until it consumes, which is when what is published arrives.
        await eventually(lambda: self._routable(broker, names))
        stopping.set()
        async with asyncio.timeout(3):
            await task

    @staticmethod
    async def _routable(broker: Broker, names: Names) -> bool:
        return await broker.publish([names.message()]) == [CONFIRMED]

    # Retries and dead letters

    async def test_retries_go_up_the_tiers_and_end_as_a_dead_letter(
        self, broker: Broker, names: Names
    ) -> None:
        """Each attempt says its number and comes no sooner than its tier allows."""
        subscription = names.subscription()
        await broker.declare([subscription])
        sent = replace(names.message(7), headers={"traceparent": "tp-1"})
        await broker.publish([sent])
        times: list[float] = []

        def not_now(_: Delivery) -> Verdict:
            times.append(time.monotonic())
            return Retry("the provider is away")

        recorder = Recorder(not_now)
        async with consuming(broker, subscription, recorder):
            [dead] = await self._dead_letters(broker, subscription, 1)
        assert [delivery.message.attempt for delivery in recorder.deliveries] == [0, 1, 2]
        assert [delivery.delivery_count for delivery in recorder.deliveries] == [0, 0, 0]
        pauses = [later - earlier for earlier, later in pairwise(times)]
        for pause, tier in zip(pauses, LIMITS.retry_tiers_seconds, strict=True):
            assert pause > tier * 0.95
        assert dead.message == replace(sent, attempt=2)
        assert (dead.error_class, dead.error_detail) == (RETRIES_EXHAUSTED, "the provider is away")
        assert dead.death_time >= dead.first_death_time

    async def test_a_dead_letter_verdict_takes_effect_at_once_and_spares_its_neighbours(
        self, broker: Broker, names: Names
    ) -> None:
        """One message of a batch is buried, one retried, and the others are done."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish(names.messages(6))

        def judge(delivery: Delivery) -> Verdict:
            if number_of(delivery) == 2:
                return DeadLetter("UNKNOWN_CURRENCY", "XXX is no currency")
            if number_of(delivery) == 4 and delivery.message.attempt == 0:
                return Retry("not yet")
            return Ack()

        recorder = Recorder(judge)
        async with consuming(broker, subscription, recorder):
            [dead] = await self._dead_letters(broker, subscription, 1)
            await eventually(lambda: len(recorder.numbers) >= 7)
        assert recorder.numbers == [0, 1, 2, 3, 4, 5, 4]
        assert dead.message.body == b"2"
        assert dead.message.attempt == 0
        assert dead.consumer == subscription.consumer
        assert (dead.error_class, dead.error_detail) == ("UNKNOWN_CURRENCY", "XXX is no currency")

    async def test_dead_letters_are_listed_oldest_first_and_stay(
        self, broker: Broker, names: Names
    ) -> None:
        """Looking at dead letters removes none, however often."""
        subscription = names.subscription()
        assert await broker.dead_letters(subscription.consumer) == []
        await broker.declare([subscription])
        await broker.publish(names.messages(5))
        recorder = Recorder(lambda _: DeadLetter("BAD", "x" * 5000))
        async with consuming(broker, subscription, recorder):
            await self._dead_letters(broker, subscription, 5)
        for _ in range(3):
            seen = await broker.dead_letters(subscription.consumer, limit=3)
            assert [record.message.body for record in seen] == [b"0", b"1", b"2"]
            assert {len(record.error_detail) for record in seen} == {1024}

    async def test_a_handler_that_raises_hurts_only_the_message_that_makes_it(
        self, broker: Broker, names: Names
    ) -> None:
        """A failed batch is gone through one by one; the culprit is retried, then buried."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish(names.messages(6))
        done = Recorder()

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            if any(number_of(delivery) == 3 for delivery in deliveries):
                raise LookupError("no such order")
            return await done(deliveries)

        async with consuming(broker, subscription, handle):
            [dead] = await self._dead_letters(broker, subscription, 1)
        assert sorted(done.numbers) == [0, 1, 2, 4, 5]
        assert {delivery.message.attempt for delivery in done.deliveries} == {0}
        assert dead.message.attempt == len(LIMITS.retry_tiers_seconds)
        assert (dead.error_class, dead.error_detail) == (
            "LookupError",
            "LookupError: no such order",
        )

    async def test_a_handler_that_takes_too_long_is_cancelled_and_its_message_retried(
        self, backend: Backend, names: Names
    ) -> None:
        """The time limit ends a handler that hangs, and the next message is handled."""
        subscription = names.subscription(batch_size=1)
        limits = replace(LIMITS, handler_seconds_max=0.2, retry_tiers_seconds=(0.2,))
        cancelled: list[int] = []
        done = Recorder()

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            if number_of(deliveries[0]) == 0:
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    cancelled.append(deliveries[0].message.attempt)
                    raise
            return await done(deliveries)

        async with connect(backend.url, name="suite", limits=limits) as broker:
            await broker.declare([subscription])
            await broker.publish(names.messages(2))
            async with consuming(broker, subscription, handle):
                [dead] = await self._dead_letters(broker, subscription, 1)
                await eventually(lambda: done.numbers == [1])
        assert cancelled == [0, 1]
        assert dead.error_class == "TimeoutError"

    async def test_a_handler_that_answers_too_few_verdicts_settles_nothing_by_it(
        self, backend: Backend, names: Names
    ) -> None:
        """Verdicts that cannot be matched to deliveries are a failure of the handler."""
        subscription = names.subscription()

        async def forgetful(_: Sequence[Delivery]) -> Sequence[Verdict]:
            return []

        limits = replace(LIMITS, retry_tiers_seconds=())
        async with connect(backend.url, name="suite", limits=limits) as broker:
            await broker.declare([subscription])
            await broker.publish([names.message(1)])
            async with consuming(broker, subscription, forgetful):
                [dead] = await self._dead_letters(broker, subscription, 1)
        assert dead.error_class == "TypeError"

    async def test_someone_elses_cancellation_does_not_end_the_consumer(
        self, broker: Broker, names: Names
    ) -> None:
        """A library that raises `CancelledError` of its own accord is a failing handler."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish([names.message(1)])
        done = Recorder()

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            if deliveries[0].message.attempt == 0:
                raise asyncio.CancelledError
            return await done(deliveries)

        async with consuming(broker, subscription, handle) as task:
            await eventually(lambda: done.numbers == [1])
            assert not task.done()

    @staticmethod
    async def _dead_letters(
        broker: Broker, subscription: Subscription, count: int
    ) -> list[DeadLetterRecord]:
        return await eventually(
            lambda: broker.dead_letters(subscription.consumer),
            until=lambda records: len(records) == count,
        )

    # The server's absence

    async def test_while_the_server_is_away_publishing_fails_fast_and_afterwards_all_goes_on(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """What was confirmed is kept, consumers come back, and a declaration waits in between."""
        waiting, running = names.subscription("waiting"), names.subscription("running")
        newcomer = names.subscription("newcomer", names.type_named("Late"))
        await broker.declare([waiting, running])
        recorder = Recorder()
        async with consuming(broker, running, recorder) as task:
            assert await broker.publish(names.messages(20)) == [CONFIRMED] * 20
            await eventually(lambda: len(recorder.numbers) >= 20)
            await backend.stop()
            try:
                began = time.monotonic()
                outcomes = await broker.publish(names.messages(3, first=100))
                assert time.monotonic() - began < LIMITS.publish_seconds_max + 1.5
                assert set(outcomes) <= {PublishOutcome.REFUSED, PublishOutcome.UNKNOWN}
                with pytest.raises(BrokerUnavailableError):
                    await broker.ping()
                with pytest.raises(BrokerUnavailableError):
                    await broker.declare([waiting])
                assert not task.done()
                declaring = asyncio.create_task(self._declare_patiently(backend.url, newcomer))
            finally:
                await backend.start()
            async with asyncio.timeout(RESTART_SECONDS):
                await declaring
            await eventually(lambda: self._pings(broker), RESTART_SECONDS)
            late_message = names.message(300, names.type_named("Late"))
            assert await broker.publish([names.message(200), late_message]) == [CONFIRMED] * 2
            await eventually(lambda: 200 in recorder.numbers, RESTART_SECONDS)
        late = Recorder()
        async with consuming(broker, waiting, late):
            await eventually(lambda: 200 in late.numbers)
        assert set(range(20)) <= set(late.numbers)

    async def test_what_was_confirmed_survives_the_death_of_the_server(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """The server is killed while publishing goes on: no confirmed message is lost.

        Not sooner than a second after the queue was declared: a RabbitMQ 3.10 that is killed
        within a moment of a queue's declaration cannot serve that queue again.
        """
        subscription = names.subscription()
        await broker.declare([subscription])
        settled = time.monotonic() + 1.0
        confirmed: set[int] = set()
        broken = asyncio.Event()

        async def publish_on() -> None:
            first = 0
            while not broken.is_set():
                outcomes = await broker.publish(names.messages(10, first))
                numbers = range(first, first + 10)
                confirmed.update(
                    number
                    for number, outcome in zip(numbers, outcomes, strict=True)
                    if outcome is CONFIRMED
                )
                if PublishOutcome.UNKNOWN in outcomes or PublishOutcome.REFUSED in outcomes:
                    broken.set()
                first += 10

        publishing = asyncio.create_task(publish_on())
        await eventually(lambda: len(confirmed) >= 100 and time.monotonic() > settled)
        await backend.kill()
        try:
            async with asyncio.timeout(30):
                await publishing
        finally:
            await backend.start()
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: confirmed <= set(recorder.numbers), RESTART_SECONDS)

    @staticmethod
    async def _declare_patiently(url: str, subscription: Subscription) -> None:
        limits = replace(LIMITS, declare_seconds_max=float(RESTART_SECONDS))
        async with connect(url, name="starting", limits=limits) as broker:
            await broker.declare([subscription])

    @staticmethod
    async def _pings(broker: Broker) -> bool:
        await broker.ping()
        return True


class ServerBrokerSuite(BrokerSuite):
    """What can be asked only of a broker that other processes reach too."""

    async def test_a_message_that_kills_its_process_is_buried_and_its_neighbours_are_handled(
        self, broker: Broker, backend: Backend, names: Names
    ) -> None:
        """Each death counts against the culprit alone, though the process held others too."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish(names.messages(12))
        handled: list[int] = []
        deaths = 0
        for _ in range(10):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.suites.broker_process",
                backend.url,
                subscription.consumer,
                names.type,
                "5",
                stdout=asyncio.subprocess.PIPE,
            )
            async with asyncio.timeout(30):
                output, _ = await process.communicate()
            handled += [int(line) for line in output.split()]
            if process.returncode == 0:
                break
            deaths += 1
        [dead] = await self._dead_letters(broker, subscription, 1)
        assert dead.message.body == b"5"
        assert dead.error_class == DELIVERY_LIMIT_EXCEEDED
        assert set(handled) == set(range(12)) - {5}
        assert deaths == LIMITS.delivery_limit + 1
