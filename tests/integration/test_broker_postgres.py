"""The broker in PostgreSQL: the suite, and what only a database can do to it."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import asyncpg
import pytest
import pytest_asyncio

from chassis.broker import (
    Broker,
    ConsumerStuckError,
    Delivery,
    PublishOutcome,
    Subscription,
    Verdict,
    connect,
)
from meshctl.servers import Postgres
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
)

_MESSAGES = (
    "FROM mesh_broker.message WHERE queue_id ="
    " (SELECT id FROM mesh_broker.queue WHERE consumer = $1)"
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server() -> AsyncIterator[Throwaway[Postgres]]:
    """A PostgreSQL server for this module."""
    async with throwaway(Postgres) as held:
        yield held


@asynccontextmanager
async def session(server: Throwaway[Postgres]) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """A database session of the test's own, beside the broker's."""
    connection = await asyncpg.connect(server.url)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.mark.asyncio(loop_scope="module")
class TestPostgresBroker(ServerBrokerSuite):
    """The suite, over a database."""

    @pytest.fixture
    def backend(self, server: Throwaway[Postgres]) -> Backend:
        """The module's server."""
        return server

    async def test_the_schema_is_made_once_however_many_declare_it(
        self, server: Throwaway[Postgres], names: Names
    ) -> None:
        """Services that start together on an empty database do not get in each other's way."""
        async with session(server) as connection:
            await connection.execute("CREATE DATABASE empty")
        url = server.server.url("empty")

        async def declare(consumer: str) -> PublishOutcome:
            async with connect(url, name=consumer, limits=LIMITS) as broker:
                await broker.declare([names.subscription(consumer)])
                [outcome] = await broker.publish([names.message()])
                return outcome

        async with asyncio.timeout(20):
            assert await asyncio.gather(*(declare(f"c{i}") for i in range(6))) == [CONFIRMED] * 6

    async def test_an_idle_consumer_is_woken_by_a_notification(
        self, server: Throwaway[Postgres], names: Names
    ) -> None:
        """A message does not wait for the next poll."""
        subscription = names.subscription()
        limits = replace(LIMITS, poll_seconds=60.0)
        recorder = Recorder()
        async with (
            connect(server.url, name="suite", limits=limits) as broker,
            consuming(broker, subscription, recorder),
        ):
            for number in range(1, 6):
                await eventually(lambda: self._routable(broker, names))
                began = time.monotonic()
                sent = len(recorder.calls)
                await broker.publish([names.message(number)])
                await eventually(lambda sent=sent: len(recorder.calls) > sent, 5.0)  # type: ignore[misc]
                assert time.monotonic() - began < 2.0

    async def test_an_idle_consumer_finds_what_no_notification_told_it_of(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """Notifications may be lost: the poll finds the message all the same."""
        subscription = names.subscription()
        recorder = Recorder()
        async with session(server) as connection, consuming(broker, subscription, recorder):
            await eventually(lambda: self._routable(broker, names))
            await eventually(lambda: recorder.numbers == [0])
            await connection.execute(
                "INSERT INTO mesh_broker.message (queue_id, event_id, type, headers, body, attempt)"
                " SELECT id, gen_random_uuid(), 'a.B', '{}', '42', 0"
                " FROM mesh_broker.queue WHERE consumer = $1",
                subscription.consumer,
            )
            await eventually(lambda: recorder.numbers == [0, 42])

    async def test_a_publisher_that_is_slow_to_commit_is_not_passed_over(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """A row with a lower number that commits later is found while the queue is still long."""
        subscription = names.subscription(batch_size=5)
        recorder = Recorder()

        async def busily(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            await asyncio.sleep(0.005)  # work that takes time, so that the queue stays long
            return await recorder(deliveries)

        async with session(server) as connection:
            await broker.declare([subscription])
            transaction = connection.transaction()
            await transaction.start()
            await connection.execute(
                "INSERT INTO mesh_broker.message (queue_id, event_id, type, headers, body, attempt)"
                " SELECT id, gen_random_uuid(), 'a.B', '{}', '4242', 0"
                " FROM mesh_broker.queue WHERE consumer = $1",
                subscription.consumer,
            )
            await broker.publish(names.messages(3000))
            async with consuming(broker, subscription, busily):
                await eventually(lambda: len(recorder.numbers) >= 50)
                await transaction.commit()
                await eventually(lambda: 4242 in recorder.numbers)
        assert len(recorder.numbers) < 3000

    async def test_a_lease_is_renewed_while_its_handler_works(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """A slow handler keeps its messages though another consumer looks for work."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish(names.messages(3))
        slow, other, may_end = Recorder(), Recorder(), asyncio.Event()

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            await may_end.wait()
            return await slow(deliveries)

        async with (
            session(server) as observer,
            consuming(broker, subscription, handle),
            connect(server.url, name="other", limits=LIMITS) as second,
        ):
            await self._renewed(observer, subscription, times=0)
            async with consuming(second, subscription, other):
                await self._renewed(observer, subscription, times=3)
                may_end.set()
                await eventually(lambda: slow.numbers == [0, 1, 2])
        assert other.numbers == []

    async def test_a_renewal_that_fails_once_is_not_the_last(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """A statement that the server ends leaves the session, and the claim, in use."""
        subscription = names.subscription()
        await broker.declare([subscription])
        await broker.publish(names.messages(1))
        slow, may_end = Recorder(), asyncio.Event()

        async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
            await may_end.wait()
            return await slow(deliveries)

        async with session(server) as observer, consuming(broker, subscription, handle):
            await self._renewed(observer, subscription, times=0)
            async with observer.transaction():
                await observer.execute(f"SELECT id {_MESSAGES} FOR UPDATE", subscription.consumer)
                # The renewal is waiting for the row when its statement is ended.
                cancelled = await eventually(
                    lambda: observer.fetchval(
                        "SELECT pg_cancel_backend(pid) FROM pg_stat_activity"
                        " WHERE application_name = 'suite consume' AND wait_event_type = 'Lock'"
                    )
                )
            assert cancelled
            await self._renewed(observer, subscription, times=2)
            may_end.set()
            await eventually(lambda: slow.numbers == [0])
        assert [delivery.delivery_count for delivery in slow.deliveries] == [0]

    @staticmethod
    async def _renewed(
        observer: asyncpg.Connection[asyncpg.Record], subscription: Subscription, *, times: int
    ) -> None:
        """Waits for a claim, and until it has lasted for so many leases more."""
        until = f"SELECT min(leased_until) FILTER (WHERE leased_until > now()) {_MESSAGES}"
        lease = timedelta(seconds=LIMITS.lease_seconds)
        claimed = await eventually(lambda: observer.fetchval(until, subscription.consumer))
        await eventually(
            lambda: observer.fetchval(until, subscription.consumer),
            until=lambda now: now and now - claimed >= times * lease,
        )

    async def test_sessions_that_are_ended_again_and_again_lose_nothing(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """An administrator ends all sessions under load: every confirmed message is handled."""
        subscription = names.subscription(batch_size=8)
        await broker.declare([subscription])
        recorder = Recorder()
        confirmed: set[int] = set()
        async with session(server) as administrator, consuming(broker, subscription, recorder):
            for first in range(0, 500, 50):
                outcomes = await broker.publish(names.messages(50, first))
                numbers = range(first, first + 50)
                confirmed |= {
                    number
                    for number, outcome in zip(numbers, outcomes, strict=True)
                    if outcome is CONFIRMED
                }
                await administrator.execute(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE pid <> pg_backend_pid() AND application_name LIKE 'suite %'"
                )
            assert confirmed
            await eventually(lambda: confirmed <= set(recorder.numbers), 30)

    async def test_a_session_that_hangs_makes_outcomes_unknown_and_is_replaced(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """A frozen backend costs one time limit; the next publish has another connection."""
        await broker.declare([names.subscription()])
        async with session(server) as administrator:
            backend = await administrator.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'suite publish'"
            )
        os.kill(backend, signal.SIGSTOP)
        try:
            began = time.monotonic()
            assert await broker.publish([names.message(1)]) == [PublishOutcome.UNKNOWN]
            assert time.monotonic() - began < LIMITS.publish_seconds_max + 1.5
            assert await broker.publish([names.message(2)]) == [CONFIRMED]
        finally:
            os.kill(backend, signal.SIGCONT)

    async def test_a_consumer_whose_session_hangs_consumes_over_another_one(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """A frozen backend answers nothing and closes nothing: a time limit finds that out."""
        subscription = names.subscription()
        recorder = Recorder()
        async with session(server) as administrator, consuming(broker, subscription, recorder):
            await eventually(lambda: self._routable(broker, names))
            await eventually(lambda: recorder.numbers == [0])
            backend = await administrator.fetchval(
                "SELECT pid FROM pg_stat_activity WHERE application_name = 'suite consume'"
            )
            os.kill(backend, signal.SIGSTOP)
            try:
                await broker.publish([names.message(1)])
                await eventually(lambda: 1 in recorder.numbers, 30)
            finally:
                os.kill(backend, signal.SIGCONT)

    async def test_a_value_that_no_row_can_hold_is_refused_alone(
        self, broker: Broker, names: Names
    ) -> None:
        """One impossible message does not fail the statement for its neighbours."""
        subscription = names.subscription()
        await broker.declare([subscription])
        impossible = replace(names.message(1), type="nul\0nul")
        outcomes = await broker.publish([names.message(0), impossible, names.message(2)])
        assert outcomes == [CONFIRMED, PublishOutcome.REFUSED, CONFIRMED]

    async def test_a_consumer_that_may_not_consume_gives_up_and_says_so(
        self, server: Throwaway[Postgres], names: Names
    ) -> None:
        """A server that answers and refuses for too long is no outage to wait out."""
        async with session(server) as connection:
            await connection.execute("CREATE ROLE stranger LOGIN PASSWORD 'p'")
        url = server.server.url(role="stranger", password="p")
        limits = replace(LIMITS, stuck_seconds_max=0.5)
        async with connect(url, name="stranger", limits=limits) as broker, asyncio.timeout(20):
            with pytest.raises(ConsumerStuckError):
                await broker.consume(names.subscription(), Recorder(), stopping=asyncio.Event())

    async def test_three_consumers_under_load_handle_every_message_once(
        self, server: Throwaway[Postgres], broker: Broker, names: Names
    ) -> None:
        """Claims exclude each other: without a crash nothing is handled twice."""
        subscription = names.subscription(batch_size=7)
        await broker.declare([subscription])
        recorders = [Recorder() for _ in range(3)]
        async with (
            connect(server.url, name="second", limits=LIMITS) as second,
            connect(server.url, name="third", limits=LIMITS) as third,
            consuming(broker, subscription, recorders[0]),
            consuming(second, subscription, recorders[1]),
            consuming(third, subscription, recorders[2]),
        ):
            for first in range(0, 3000, 100):
                await broker.publish(names.messages(100, first))
            await eventually(lambda: sum(len(one.numbers) for one in recorders) >= 3000, 30)
        numbers = [number for one in recorders for number in one.numbers]
        assert sorted(numbers) == list(range(3000))
        counts = {delivery.delivery_count for one in recorders for delivery in one.deliveries}
        assert counts == {0}
