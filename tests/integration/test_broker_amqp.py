"""The broker RabbitMQ: the suite, and what only RabbitMQ can do to it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiormq
import pytest
import pytest_asyncio
from aiormq.abc import AbstractChannel

from chassis.broker import (
    Ack,
    Broker,
    ConsumerStuckError,
    DeadLetter,
    Delivery,
    Message,
    PublishOutcome,
    Retry,
    TopologyError,
    Verdict,
    connect,
)
from chassis.broker.amqp.session import MALFORMED_MESSAGE, Session
from chassis.broker.amqp.topology import EXCHANGE
from meshctl.servers import RabbitMQ
from meshctl.servers.throwaway import Throwaway, throwaway
from tests.eventually import eventually
from tests.suites.broker import (
    CONFIRMED,
    LIMITS,
    Backend,
    Names,
    Recorder,
    ServerBrokerSuite,
    consuming,
    number_of,
    outcome_counts,
)

REFUSED, UNKNOWN, UNROUTABLE = (
    PublishOutcome.REFUSED,
    PublishOutcome.UNKNOWN,
    PublishOutcome.UNROUTABLE,
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Throwaway[RabbitMQ]]:
    """A RabbitMQ server for this module: it takes seven seconds to start."""
    async with throwaway(RabbitMQ) as held:
        yield held


@asynccontextmanager
async def channel(server: Throwaway[RabbitMQ]) -> AsyncIterator[AbstractChannel]:
    """A channel of the test's own, beside the broker's."""
    connection = await aiormq.connect(server.url)
    try:
        yield await connection.channel()
    finally:
        await connection.close()


@pytest.mark.rabbitmq
@pytest.mark.asyncio(loop_scope="module")
class TestAmqpBroker(ServerBrokerSuite):
    """The suite, over RabbitMQ."""

    @pytest.fixture
    def backend(self, server: Throwaway[RabbitMQ]) -> Backend:
        """The module's server."""
        return server

    async def test_a_queue_that_was_unbound_makes_its_type_unroutable_until_it_is_bound_again(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """A fault of the topology is told to the publisher; nothing counts as sent."""
        subscription = names.subscription()
        queue = f"ordermesh.{subscription.consumer}"
        await broker.declare([subscription])
        async with channel(server) as operators:
            await operators.queue_unbind(queue, EXCHANGE, names.type)
            assert await broker.publish(names.messages(2)) == [UNROUTABLE] * 2
            await operators.queue_bind(queue, EXCHANGE, names.type)
            assert await broker.publish(names.messages(2)) == [CONFIRMED] * 2

    async def test_a_consumer_comes_back_when_its_queue_is_deleted(
        self, server: Throwaway[RabbitMQ], names: Names
    ) -> None:
        """Told that it is cancelled, it makes the queue anew and consumes from that."""
        subscription = names.subscription()
        recorder = Recorder()
        limits = replace(LIMITS, watchdog_seconds=600.0)
        async with (
            channel(server) as operators,
            connect(server.url, name="suite", limits=limits) as broker,
            consuming(broker, subscription, recorder),
        ):
            await eventually(lambda: self._routable(broker, names))
            await eventually(lambda: recorder.numbers == [0])
            await operators.queue_delete(f"ordermesh.{subscription.consumer}")
            await eventually(lambda: self._routable(broker, names), 15)
            await eventually(lambda: recorder.numbers == [0, 0])

    async def test_connections_that_an_operator_closes_come_back(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """Publishing and consuming go on after `rabbitmqctl close_all_connections`."""
        subscription = names.subscription()
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: self._routable(broker, names))
            await server.server.ctl("close_all_connections", "an operator's whim")
            await eventually(lambda: self._routable(broker, names))
            await broker.publish([names.message(7)])
            await eventually(lambda: 7 in recorder.numbers)

    async def test_a_publisher_that_is_blocked_by_an_alarm_fails_fast_while_consumers_go_on(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """The first publish under an alarm is unknown, further ones are refused at once."""
        subscription = names.subscription(batch_size=1)
        await broker.declare([subscription])
        await broker.publish(names.messages(5))
        await server.server.ctl("set_vm_memory_high_watermark", "absolute", "1000000")
        try:
            # The alarm reaches connections a moment after it is set.
            await self._comes_to(UNKNOWN, broker, names.message(100))
            began = time.monotonic()
            assert await broker.publish(names.messages(3, 200)) == [REFUSED] * 3
            assert time.monotonic() - began < 1.0
            # Publishers alone are blocked: a service may start, and an operator may look.
            await broker.declare([names.subscription("late")])
            assert await broker.dead_letters(subscription.consumer) == []
            recorder = Recorder()
            async with consuming(broker, subscription, recorder):
                await eventually(lambda: {0, 1, 2, 3, 4} <= set(recorder.numbers))
        finally:
            await server.server.ctl("set_vm_memory_high_watermark", "absolute", "512MB")
        await self._comes_to(CONFIRMED, broker, names.message(300))
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: 300 in recorder.numbers)
        # What was unknown had been sent: it is why an unknown outcome is no failure.
        assert 100 in recorder.numbers
        assert 200 not in recorder.numbers

    @staticmethod
    async def _comes_to(outcome: PublishOutcome, broker: Broker, message: Message) -> None:
        """Publishes a message until its outcome is this one."""

        async def published() -> bool:
            return await broker.publish([message]) == [outcome]

        await eventually(published, describe=f"the outcome {outcome}")

    async def test_a_frozen_broker_makes_outcomes_unknown_and_is_used_again_when_it_thaws(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """A stopped process keeps its sockets open: only time limits find that out."""
        subscription = names.subscription()
        recorder = Recorder()
        async with consuming(broker, subscription, recorder) as task:
            await eventually(lambda: self._routable(broker, names))
            os.killpg(server.pid, signal.SIGSTOP)
            try:
                for expected in (UNKNOWN, REFUSED):
                    began = time.monotonic()
                    assert await broker.publish(names.messages(3, 10)) == [expected] * 3
                    assert time.monotonic() - began < LIMITS.publish_seconds_max + 1.5
            finally:
                os.killpg(server.pid, signal.SIGCONT)
            await self._comes_to(CONFIRMED, broker, names.message(99))
            await eventually(lambda: 99 in recorder.numbers, 15)
            assert not task.done()

    async def test_a_broker_that_is_stuck_for_longer_than_its_heartbeats_ends_nobodys_task(
        self, server: Throwaway[RabbitMQ], names: Names
    ) -> None:
        """The client then cancels what waits for the connection, which is no cancellation."""
        subscription = names.subscription()
        recorder = Recorder()
        limits = replace(LIMITS, publish_seconds_max=60.0, watchdog_seconds=600.0)
        url = f"{server.url}?heartbeat=1"
        async with (
            connect(url, name="suite", limits=limits) as broker,
            consuming(broker, subscription, recorder) as task,
        ):
            await eventually(lambda: self._routable(broker, names))
            os.killpg(server.pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(30):
                    assert await broker.publish(names.messages(3, 10)) == [UNKNOWN] * 3
            finally:
                os.killpg(server.pid, signal.SIGCONT)
            await self._comes_to(CONFIRMED, broker, names.message(99))
            await eventually(lambda: 99 in recorder.numbers, 15)
            assert not task.done()

    async def test_a_proof_of_life_that_is_given_up_costs_no_publish_its_confirm(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """Health checks have little patience, and must not make a slow broker's work worse."""
        await broker.declare([names.subscription()])
        assert await broker.publish([names.message()]) == [CONFIRMED]
        os.killpg(server.pid, signal.SIGSTOP)
        try:
            publishing = asyncio.create_task(broker.publish(names.messages(50)))
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.5):
                    await broker.ping()
        finally:
            os.killpg(server.pid, signal.SIGCONT)
        assert await publishing == [CONFIRMED] * 50

    async def test_a_full_queue_refuses_its_publishers(
        self, server: Throwaway[RabbitMQ], names: Names
    ) -> None:
        """Nothing is dropped to make room."""
        subscription = names.subscription()
        limits = replace(LIMITS, queue_bytes_max=1000)
        async with connect(server.url, name="suite", limits=limits) as broker:
            await broker.declare([subscription])
            big = replace(names.message(1), body=b"1".zfill(600))

            async def refused() -> bool:
                return REFUSED in await broker.publish([big])

            await eventually(refused)
            recorder = Recorder()
            async with consuming(broker, subscription, recorder):
                await self._comes_to(CONFIRMED, broker, names.message(2))

    async def test_a_message_that_is_no_event_is_buried(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """What somebody put into the queue by hand does not stop the consumer."""
        subscription = names.subscription()
        await broker.declare([subscription])
        recorder = Recorder()
        async with channel(server) as operators, consuming(broker, subscription, recorder):
            await operators.basic_publish(
                b"hello?", routing_key=f"ordermesh.{subscription.consumer}"
            )
            await broker.publish([names.message(1)])
            [dead] = await self._dead_letters(broker, subscription, 1)
            await eventually(lambda: recorder.numbers == [1])
        assert dead.error_class == MALFORMED_MESSAGE
        assert dead.message.body == b"hello?"

    async def test_a_queue_with_other_properties_is_an_error_of_the_topology(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """A queue that somebody made otherwise is not used as if it were ours."""
        subscription = names.subscription()
        async with channel(server) as operators:
            await operators.queue_declare(f"ordermesh.{subscription.consumer}", durable=True)
        with pytest.raises(TopologyError, match="inequivalent arg"):
            await broker.declare([subscription])
        limits = replace(LIMITS, stuck_seconds_max=0.5)
        async with connect(server.url, name="suite", limits=limits) as hasty, asyncio.timeout(20):
            with pytest.raises(ConsumerStuckError):
                await hasty.consume(subscription, Recorder(), stopping=asyncio.Event())
        # The publisher's own channel has not suffered.
        assert await broker.publish([names.message()]) == [UNROUTABLE]

    async def test_a_retry_waits_for_its_queue_to_exist_again(
        self, server: Throwaway[RabbitMQ], broker: Broker, names: Names
    ) -> None:
        """The original is not acknowledged before its copy is confirmed somewhere."""
        subscription = names.subscription()
        queue = f"ordermesh.{subscription.consumer}"

        def judge(delivery: Delivery) -> Verdict:
            if number_of(delivery) == 0:
                return Ack()
            return DeadLetter("BAD", "never") if delivery.message.attempt else Retry("later")

        recorder = Recorder(judge)
        async with channel(server) as operators, consuming(broker, subscription, recorder):
            await eventually(lambda: self._routable(broker, names))
            await eventually(lambda: recorder.numbers == [0])
            await operators.queue_delete(f"{queue}.dlq")
            await operators.queue_delete(f"{queue}.retry.200ms")
            await broker.publish([names.message(1)])
            [dead] = await self._dead_letters(broker, subscription, 1)
        assert dead.message.attempt == 1
        assert recorder.numbers == [0, 1, 1]

    async def test_a_watchdog_finds_a_consumer_that_the_broker_has_forgotten(
        self, broker: Broker, names: Names, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A consumer that is gone without a word is made anew."""
        taken_up: list[tuple[Session, AbstractChannel]] = []
        take_up = Session._take_up

        async def noted(session: Session, channel: AbstractChannel, *, prefetch: int) -> None:
            await take_up(session, channel, prefetch=prefetch)
            taken_up.append((session, channel))

        monkeypatch.setattr(Session, "_take_up", noted)
        subscription = names.subscription()
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: self._routable(broker, names))
            await eventually(lambda: recorder.numbers == [0] and len(taken_up) == 2)
            # Cancelled behind the session's back, as if it had been lost on the way.
            session, its_channel = taken_up[-1]
            await its_channel.basic_cancel(session._tag)
            await broker.publish([names.message(1)])
            await eventually(lambda: recorder.numbers == [0, 1], 15)

    async def test_a_batch_of_thousands_is_confirmed_and_kept_in_order(
        self, broker: Broker, names: Names
    ) -> None:
        """Pipelining has no limit that a large batch could meet."""
        subscription = names.subscription()
        await broker.declare([subscription])
        outcomes = await broker.publish(names.messages(3000))
        assert outcome_counts(outcomes) == {CONFIRMED: 3000}
        recorder = Recorder()
        async with consuming(broker, subscription, recorder):
            await eventually(lambda: len(recorder.numbers) >= 3000, 30)
        assert recorder.numbers == list(range(3000))
