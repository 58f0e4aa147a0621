"""The order service as a process: `python -m order_svc`, its signals and its exit codes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import grpc
import pytest_asyncio

from chassis.broker import Broker, Subscription, connect
from chassis.migrations import migrate
from meshctl.servers import Postgres
from meshctl.servers.base import http_request
from meshctl.servers.throwaway import throwaway
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.order.v1 import order_service_pb2_grpc as pb_grpc
from tests.builders import a_create_order_request, merchants_file
from tests.component.order_svc.app import ORDER_EVENTS, identity, running
from tests.component.order_svc.conftest import MIGRATIONS
from tests.databases import Databases
from tests.eventually import eventually
from tests.refusals import refused

PATIENCE_SECONDS = 30.0
OTHERS = Subscription(consumer="others", types=ORDER_EVENTS.names)


class Process:
    """A process of the service: what it says, and where it listens."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for raw in self.process.stdout:
            self.lines.append(json.loads(raw))

    async def said(self, event: str) -> dict[str, Any]:
        """Waits for a log line."""

        def found() -> dict[str, Any] | None:
            return next((line for line in self.lines if line["event"] == event), None)

        line = await eventually(found, PATIENCE_SECONDS, describe=f"the log line {event!r}")
        assert line is not None
        return line

    async def port(self, kind: str) -> int:
        """Where it listens for `grpc` or `http`."""
        return int((await self.said("ready"))[f"{kind}_port"])

    async def until_ready(self) -> None:
        """Waits until its probe agrees."""
        port = await self.port("http")

        async def is_ready() -> bool:
            status, _ = await http_request(port, "/readyz")
            return status == 200

        await eventually(is_ready, PATIENCE_SECONDS)

    def signal(self, number: signal.Signals) -> None:
        """Signals it."""
        self.process.send_signal(number)

    async def ended(self) -> int:
        """Waits for its end; its exit code."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            code = await self.process.wait()
            await self._reading
        return code

    async def output(self) -> str:
        """What it wrote to standard error, once it has ended."""
        assert self.process.stderr is not None
        return (await self.process.stderr.read()).decode()


class Service:
    """The service on a database and a broker of its own; starts as many processes as asked."""

    def __init__(self, database_url: str, broker_url: str, folder: Path) -> None:
        self.database_url = database_url
        self.broker_url = broker_url
        self.environment = {
            "MESH_DATABASE_URL": database_url,
            "MESH_BROKER_URL": broker_url,
            "MESH_INSECURE": "true",
            "MESH_MERCHANTS": str(merchants_file(folder)),
            "MESH_PAGE_TOKEN_KEY": "secret",
            "MESH_DRAIN_SECONDS": "0",
        }

    @asynccontextmanager
    async def started(self, command: str, **environment: str) -> AsyncIterator[Process]:
        """Runs `python -m order_svc` with a command; kills it when the block ends before it."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "order_svc", command),
            env={**os.environ, **self.environment, **environment},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            yield Process(process)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    @asynccontextmanager
    async def database(self) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A look into its database."""
        connection = await asyncpg.connect(self.database_url)
        try:
            yield connection
        finally:
            await connection.close()

    @asynccontextmanager
    async def broker(self) -> AsyncIterator[Broker]:
        """The broker, with somebody who listens to the service's events."""
        async with connect(self.broker_url, name="test") as broker:
            await broker.declare([OTHERS])
            yield broker

    async def heard(self) -> int:
        """How many events wait for whoever listens."""
        connection = await asyncpg.connect(self.broker_url)
        try:
            count: int = await connection.fetchval(
                "SELECT count(*) FROM mesh_broker.message JOIN mesh_broker.queue q"
                " ON q.id = queue_id WHERE consumer = 'others'"
            )
        finally:
            await connection.close()
        return count


@pytest_asyncio.fixture
async def service(
    databases: Databases, own_order_database: str, tmp_path: Path
) -> AsyncIterator[Service]:
    """The service, with nothing running yet."""
    async with databases.cloned() as broker_url:
        yield Service(own_order_database, broker_url, tmp_path)


@asynccontextmanager
async def calling(process: Process) -> AsyncIterator[pb_grpc.OrderServiceAsyncStub]:
    """A caller of a process."""
    port = await process.port("grpc")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: pb_grpc.OrderServiceAsyncStub = pb_grpc.OrderServiceStub(channel)
        yield stub


async def create(orders: pb_grpc.OrderServiceAsyncStub) -> pb.Order:
    """Places an order."""
    request = a_create_order_request()
    return await orders.CreateOrder(request, metadata=identity(request.parent))


async def test_a_process_does_everything_and_ends_in_order(
    databases: Databases, tmp_path: Path
) -> None:
    """On an empty database; told to stop, it finishes the call in flight and exits with 0."""
    async with databases.cloned() as database_url, databases.cloned() as broker_url:
        service = Service(database_url, broker_url, tmp_path)
        async with service.broker(), service.started("all") as process:
            await process.until_ready()
            async with calling(process) as orders, service.database() as other:
                order = await create(orders)
                await eventually(service.heard, until=lambda count: count == 1)
                async with other.transaction():
                    await other.execute("SELECT FROM orders FOR UPDATE")
                    in_flight = asyncio.create_task(cancel(orders, order.name))
                    await eventually(lambda: waits_for_a_lock(service))
                    process.signal(signal.SIGTERM)
                    await process.said("stopping")
                assert (await in_flight).state == pb.Order.CANCELLING
            assert await process.ended() == 0
            events = [line["event"] for line in process.lines]
            assert events[0] == "starting"
            assert events.index("migrated") < events.index("ready") < events.index("stopping")
            assert events[-1] == "stopped"
            assert await service.heard() == 2, "the last event is published before the end"


async def cancel(orders: pb_grpc.OrderServiceAsyncStub, name: str) -> pb.Order:
    """Asks for an order to be undone."""
    return await orders.CancelOrder(
        pb.CancelOrderRequest(name=name, request_id=str(uuid4())), metadata=identity(name)
    )


async def waits_for_a_lock(service: Service) -> bool:
    """Whether a session of the service's database waits for a lock."""
    async with service.database() as connection:
        count = await connection.fetchval(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
    return bool(count)


async def test_roles_may_run_in_processes_of_their_own(service: Service) -> None:
    """One serves and is killed; what it has written is published by one that relays."""
    async with service.broker():
        async with service.started("serve") as serving:
            async with calling(serving) as orders:
                await create(orders)
            serving.signal(signal.SIGKILL)
            assert await serving.ended() == -signal.SIGKILL
        assert await service.heard() == 0
        async with service.started("relay") as relaying:
            await eventually(service.heard, PATIENCE_SECONDS, until=lambda count: count == 1)
            relaying.signal(signal.SIGTERM)
            assert await relaying.ended() == 0


async def test_a_process_whose_background_dies_ends_with_1(service: Service) -> None:
    """Something that cannot be is found in the database: a fresh process may know better."""
    async with service.started("all") as process:
        await process.until_ready()
        async with service.database() as connection:
            await connection.execute("ALTER TABLE outbox RENAME TO gone")
        assert await process.ended() == 1
        failed = await process.said("background.failed")
        assert 'relation "outbox" does not exist' in failed["exception"]


async def test_a_bad_environment_ends_with_2_and_names_the_variables(
    service: Service,
) -> None:
    """All of them at once, and never what they hold."""
    async with service.started(
        "all",
        MESH_DATABASE_URL="mysql://order:hunter2@host/order",
        MESH_RATE_MAX_AGE_SECONDS="-1",
        MESH_LOG_LEVEL="loud",
    ) as process:
        assert await process.ended() == 2
        said = await process.output()
    for name in ("MESH_DATABASE_URL", "MESH_RATE_MAX_AGE_SECONDS", "MESH_LOG_LEVEL"):
        assert f"{name}: " in said
    assert "hunter2" not in said


async def test_a_database_that_restarts_is_survived(tmp_path: Path) -> None:
    """While it is away callers hear UNAVAILABLE and events wait; afterwards all goes on."""
    async with throwaway(Postgres) as server:
        await migrate(server.url, MIGRATIONS)
        async with running(server.url, tmp_path) as app:
            order = await app.create()
            await app.until_heard("OrderCreated")
            await server.stop()
            refusal = await refused(app.create())
            assert refusal.code is grpc.StatusCode.UNAVAILABLE
            assert refusal.reason == "DEPENDENCY_UNAVAILABLE"
            assert refusal.metadata == {"dependency": "database"}
            await app.paid(order)
            await server.start()
            request = a_create_order_request()

            async def is_back() -> bool:
                return bool(await app.create(request))

            await eventually(is_back, PATIENCE_SECONDS)
            await app.until(order, pb.Order.CONFIRMED)
            async with app.database.reading() as connection:
                # What the relay could not mark as sent waits for its claim's end: not here.
                await connection.execute("UPDATE outbox SET claimed_until = now()")
            await app.until_heard("OrderCreated", "OrderCreated", "OrderConfirmed")
