"""How a process runs and ends: roles, readiness, signals, the order in which it stops."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen
from uuid import uuid4
from wsgiref.simple_server import WSGIServer

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import runtime
from chassis.errors import UnavailableError
from chassis.runtime import App, Background, Role, main, run_app
from chassis.settings import ServiceSettings
from meshctl.processes import free_port
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.order.v1 import order_service_pb2_grpc as pb_grpc
from tests.builders import merchants_file
from tests.eventually import eventually

ORDERS = pb.DESCRIPTOR.services_by_name["OrderService"].full_name
ORDER = f"merchants/default/orders/{uuid4()}"
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING

Check = Callable[[], Awaitable[None]]


class Orders(pb_grpc.OrderServiceServicer):
    """Answers as long as its gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.calls = 0

    async def GetOrder(self, request: Any, context: Any) -> pb.Order:
        """An order without anything."""
        self.calls += 1
        await self.gate.wait()
        return pb.Order(name=request.name)


class Process:
    """A process of a service, except that it is a task of the test."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.grpc_port, self.http_port = free_port(), free_port()
        self.settings = ServiceSettings(
            merchants=merchants_file(folder),
            insecure=True,
            page_token_key="secret",
            grpc_address=f"127.0.0.1:{self.grpc_port}",
            http_address=f"127.0.0.1:{self.http_port}",
            **{"drain_seconds": 0, "grace_seconds": 5, **settings},
        )
        self.servicer = Orders()  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
        self.events: list[str] = []
        self.background: list[Background] = []
        self.checks: dict[str, Check] = {}
        self.task: asyncio.Task[None] | None = None

    def works(
        self, name: str, role: Role = Role.CONSUME, *, until: asyncio.Event | None = None
    ) -> None:
        """Adds a background task, which ends when it is told to, or when `until` is set too."""

        async def run(stopping: asyncio.Event) -> None:
            self.events.append(f"{name} begins")
            await stopping.wait()
            self.events.append(f"{name} stops")
            if until is not None:
                await until.wait()
            self.events.append(f"{name} ends")

        self.background.append(Background(role, name, run))

    def start(self, *roles: Role) -> asyncio.Task[None]:
        """Runs the process in these roles, or in all of them."""
        add = pb_grpc.add_OrderServiceServicer_to_server
        app = App(
            servicers=[(ORDERS, lambda server: add(self.servicer, server))],
            background=self.background,
            checks=self.checks,
        )
        self.task = asyncio.create_task(run_app(app, self.settings, set(roles or Role)))
        return self.task

    async def readiness(self) -> tuple[int, str]:
        """What `/readyz` says."""

        def ask() -> tuple[int, str]:
            try:
                with urlopen(f"http://127.0.0.1:{self.http_port}/readyz", timeout=5) as answer:
                    return answer.status, answer.read().decode().strip()
            except HTTPError as error:
                with error:
                    return error.code, error.read().decode().strip()

        return await asyncio.to_thread(ask)

    async def until_ready(self) -> None:
        """Waits until it says that it is ready."""
        await eventually(self.readiness, until=lambda said: said == (200, "ready"))


@asynccontextmanager
async def calling(process: Process) -> AsyncIterator[tuple[Any, Any]]:
    """A caller of orders, and one of health."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{process.grpc_port}") as channel:
        yield pb_grpc.OrderServiceStub(channel), health_pb2_grpc.HealthStub(channel)


async def get(orders: Any) -> pb.Order:
    """Reads an order."""
    order: pb.Order = await orders.GetOrder(
        pb.GetOrderRequest(name=ORDER), metadata=(("x-mesh-merchant", "default"),), timeout=10
    )
    return order


async def health_of(stub: Any) -> int:
    """What health says of the whole process."""
    answer = await stub.Check(health_pb2.HealthCheckRequest())
    return int(answer.status)


def tell_to_stop(number: signal.Signals = signal.SIGTERM) -> None:
    """Signals this process, which plays the service's."""
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def _quick_to_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of probes notices within half a second that it is closed; here, at once."""
    attentive = functools.partialmethod(WSGIServer.serve_forever, poll_interval=0.01)
    monkeypatch.setattr("chassis.telemetry._Server.serve_forever", attentive)


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[Process]:
    """A process that is not started yet."""
    made = Process(tmp_path)
    yield made
    if made.task is not None:
        made.task.cancel()
        await asyncio.wait([made.task])


async def ended(task: asyncio.Task[None]) -> None:
    """The process ends within a time, and in order."""
    async with asyncio.timeout(10):
        await task


# --- stopping -------------------------------------------------------------------------


async def test_a_process_that_is_told_to_stop_drains_in_order(tmp_path: Path) -> None:
    """Health first, then it goes on for a while, then it finishes, then its work ends."""
    process = Process(tmp_path, drain_seconds=1.0)
    process.works("consume")
    process.works("relay", Role.RELAY)
    task = process.start()
    async with calling(process) as (orders, health):
        await process.until_ready()
        assert await health_of(health) == SERVING
        process.servicer.gate.clear()
        in_flight = asyncio.create_task(get(orders))
        await eventually(lambda: process.servicer.calls == 1)
        tell_to_stop()
        await eventually(lambda: health_of(health), until=lambda said: said == NOT_SERVING)
        assert await process.readiness() == (503, "stopping")
        during_drain = asyncio.create_task(get(orders))
        await eventually(lambda: process.servicer.calls == 2)

        async def is_closed() -> bool:
            async with calling(process) as (_, stranger):
                try:
                    await health_of(stranger)
                except grpc.aio.AioRpcError as error:
                    return error.code() is grpc.StatusCode.UNAVAILABLE
            return False

        await eventually(is_closed)
        assert process.events == ["consume begins", "relay begins"]
        process.servicer.gate.set()
        assert (await in_flight).name == (await during_drain).name == ORDER
    await ended(task)
    assert process.events[2:] == ["consume stops", "consume ends", "relay stops", "relay ends"]


async def test_what_brings_work_in_has_ended_before_what_carries_it_out_is_stopped(
    process: Process,
) -> None:
    """The relay still publishes what the last consumed events have led to."""
    gate = asyncio.Event()
    process.works("consume", until=gate)
    process.works("relay", Role.RELAY)
    task = process.start()
    await process.until_ready()
    tell_to_stop()
    await eventually(lambda: "consume stops" in process.events)
    assert "relay stops" not in process.events
    gate.set()
    await ended(task)
    assert process.events[-3:] == ["consume ends", "relay stops", "relay ends"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_either_signal_ends_a_process_in_order(
    process: Process, number: signal.Signals
) -> None:
    """A supervisor's and a terminal's."""
    process.works("sweep", Role.SWEEP)
    task = process.start()
    await process.until_ready()
    tell_to_stop(number)
    await ended(task)
    assert process.events == ["sweep begins", "sweep stops", "sweep ends"]


async def test_work_that_does_not_end_in_time_is_cancelled(tmp_path: Path) -> None:
    """A process ends when it must, and what it leaves is somebody else's to go on with."""
    process = Process(tmp_path, grace_seconds=0.05)
    process.works("stuck", until=asyncio.Event())
    process.works("relay", Role.RELAY)
    task = process.start()
    await process.until_ready()
    tell_to_stop()
    await ended(task)
    assert "stuck ends" not in process.events
    assert process.events[-1] == "relay ends"


# --- roles ----------------------------------------------------------------------------


async def test_a_process_does_what_its_roles_say_and_nothing_else(process: Process) -> None:
    """Without `serve` there is no gRPC; probes and metrics are there for every role."""
    process.works("consume")
    process.works("relay", Role.RELAY)
    process.works("sweep", Role.SWEEP)
    task = process.start(Role.RELAY)
    await process.until_ready()
    assert process.events == ["relay begins"]
    async with calling(process) as (orders, _):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await get(orders)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    tell_to_stop()
    await ended(task)


# --- dying ----------------------------------------------------------------------------


async def test_a_background_task_that_fails_ends_the_process(process: Process) -> None:
    """Half a service is worse than none: whoever supervises it starts a whole one."""

    async def fail(stopping: asyncio.Event) -> None:
        await eventually(lambda: "relay begins" in process.events)
        raise ZeroDivisionError("by zero")

    process.background.append(Background(Role.CONSUME, "consume", fail))
    process.works("relay", Role.RELAY)
    with pytest.raises(ExceptionGroup) as caught:
        await ended(process.start())
    assert [str(error) for error in caught.value.exceptions] == ["by zero"]
    with pytest.raises(OSError, match="refused"):
        await process.readiness()


async def test_a_background_task_that_ends_too_early_ends_the_process(process: Process) -> None:
    """Nobody would notice otherwise that nothing is consumed any more."""

    async def end(stopping: asyncio.Event) -> None:
        return

    process.background.append(Background(Role.CONSUME, "consume", end))
    with pytest.raises(ExceptionGroup) as caught:
        await ended(process.start())
    (error,) = caught.value.exceptions
    assert str(error) == "consume ended without being told to"


# --- readiness ------------------------------------------------------------------------


class Dependency:
    """Something the service depends on."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.hangs = False

    async def check(self) -> None:
        """Answers, raises or hangs."""
        if self.hangs:
            await asyncio.Event().wait()
        if self.trouble is not None:
            raise self.trouble


@pytest.fixture
def dependency(process: Process, monkeypatch: pytest.MonkeyPatch) -> Dependency:
    """The database of the process, looked at often."""
    monkeypatch.setattr(runtime, "CHECK_SECONDS", 0.05)
    made = Dependency()
    process.checks["database"] = made.check
    return made


TROUBLE = {
    "UnavailableError": UnavailableError("DEPENDENCY_UNAVAILABLE", "away"),
    "ConnectionRefusedError": ConnectionRefusedError("away"),
    "ZeroDivisionError": ZeroDivisionError("away"),
}


@pytest.mark.parametrize("kind", TROUBLE)
async def test_a_process_is_ready_only_while_it_can_work(
    process: Process, dependency: Dependency, kind: str
) -> None:
    """Balancers and probes hear of trouble, whatever it is, and of its end."""
    dependency.trouble = TROUBLE[kind]
    task = process.start()
    async with calling(process) as (_, health):
        said = (503, f"database: {kind}: away")
        await eventually(process.readiness, until=lambda seen: seen == said)
        assert await health_of(health) == NOT_SERVING
        dependency.trouble = None
        await process.until_ready()
        assert await health_of(health) == SERVING
        dependency.trouble = TROUBLE[kind]
        await eventually(process.readiness, until=lambda seen: seen == said)
        assert await health_of(health) == NOT_SERVING
    tell_to_stop()
    await ended(task)


async def test_a_dependency_that_hangs_is_trouble_too(
    process: Process, dependency: Dependency
) -> None:
    """The check has a time limit."""
    task = process.start()
    await process.until_ready()
    dependency.hangs = True
    await eventually(process.readiness, until=lambda seen: seen[0] == 503)
    dependency.hangs = False
    await process.until_ready()
    tell_to_stop()
    await ended(task)


# --- the command line -----------------------------------------------------------------


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that is enough to start; logging stays the tests' own."""
    monkeypatch.setenv("MESH_MERCHANTS", str(merchants_file(tmp_path)))
    monkeypatch.setenv("MESH_INSECURE", "true")
    monkeypatch.setenv("MESH_PAGE_TOKEN_KEY", "secret")
    monkeypatch.setenv("MESH_DRAIN_SECONDS", "0")
    monkeypatch.setattr(runtime, "configure_logs", lambda *_: None)
    return monkeypatch


class Service:
    """A service that ends itself as soon as it runs, and what it did until then."""

    def __init__(self, failing: Exception | None = None) -> None:
        self.events: list[str] = []
        self.failing = failing

    @asynccontextmanager
    async def build(self, settings: ServiceSettings) -> AsyncIterator[App]:
        """Opens, and closes."""
        self.events.append("opened")
        if self.failing is not None:
            raise self.failing

        async def work(stopping: asyncio.Event) -> None:
            self.events.append("works")
            tell_to_stop()
            await stopping.wait()

        yield App(background=[Background(Role.RELAY, "work", work)])
        self.events.append("closed")

    async def migrate(self, settings: ServiceSettings) -> None:
        """Migrates."""
        self.events.append("migrated")

    def run(self, *arguments: str) -> int:
        """Its exit code."""
        return main(
            "test",
            settings_type=ServiceSettings,
            build=self.build,
            migrate=self.migrate,
            arguments=arguments,
        )


@pytest.mark.parametrize(
    ("command", "events"),
    [
        ("all", ["migrated", "opened", "works", "closed"]),
        ("relay", ["opened", "works", "closed"]),
        ("migrate", ["migrated"]),
    ],
)
def test_a_command_does_its_part_and_ends_with_0(
    environment: pytest.MonkeyPatch, command: str, events: list[str]
) -> None:
    """Only `all` and `migrate` touch the schema."""
    service = Service()
    assert service.run(command) == 0
    assert service.events == events


def test_a_service_that_cannot_be_opened_ends_with_1(environment: pytest.MonkeyPatch) -> None:
    """Its supervisor tries again."""
    assert Service(ZeroDivisionError()).run("all") == 1


def test_an_environment_that_is_not_right_ends_with_2_and_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trying again would not help; every variable at fault is named as it is set."""
    environment.setenv("MESH_DRAIN_SECONDS", "long")
    environment.setenv("MESH_LOG_LEVEL", "loud")
    service = Service()
    assert service.run("all") == 2
    assert service.events == []
    said = capsys.readouterr().err
    assert "MESH_DRAIN_SECONDS: " in said
    assert "MESH_LOG_LEVEL: " in said


def test_an_empty_key_of_page_tokens_ends_with_2_and_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever guesses a key could forge tokens."""
    environment.setenv("MESH_PAGE_TOKEN_KEY", "")
    assert Service().run("all") == 2
    said = capsys.readouterr().err
    assert "MESH_PAGE_TOKEN_KEY: Value error, is empty; give every replica the same secret" in said


def test_merchants_that_are_not_right_end_with_2_and_are_named(
    environment: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are part of the environment."""
    (tmp_path / "merchants.json").write_text('{"merchants": [{"id": "No Name"}]}')
    assert Service().run("all") == 2
    assert "merchants.0.id: " in capsys.readouterr().err.lower()


def test_a_command_that_there_is_not_ends_with_2(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And those that there are are listed."""
    with pytest.raises(SystemExit) as caught:
        Service().run("fly")
    assert caught.value.code == 2
    assert "migrate" in capsys.readouterr().err
