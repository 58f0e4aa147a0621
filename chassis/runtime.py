"""How any service runs: roles, signals, readiness, and an orderly end.

`python -m order_svc serve|consume|relay|sweep|migrate|all`. A process that is told to
stop (SIGTERM, SIGINT) says NOT_SERVING, goes on serving while balancers notice, takes
no more calls and finishes those in flight, stops consuming, finishes its durable work,
and closes what it opened. A background task that fails ends the process: whoever
supervises it starts a fresh one, and the records say where to go on.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Container, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TypeVar

import structlog
import uvloop
from pydantic import ValidationError

from chassis.grpc_server import GrpcServer, Registrations, serving
from chassis.settings import ServiceSettings
from chassis.telemetry import HealthServer, configure_logs, configure_tracing

CHECK_SECONDS = 2.0

_log = structlog.get_logger("runtime")


class Role(Enum):
    """What a process of a service does."""

    SERVE = "serve"
    CONSUME = "consume"
    RELAY = "relay"
    SWEEP = "sweep"


@dataclass(frozen=True, slots=True)
class Background:
    """A task that runs until its event is set, and then ends in an orderly way."""

    role: Role
    name: str
    run: Callable[[asyncio.Event], Awaitable[None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class App:
    """A wired service.

    Attributes:
        servicers: What it serves over gRPC.
        background: Its other work, in the order in which it is to stop: what brings
            work in first, what carries results out last.
        checks: What must answer for the service to be ready, by name.
    """

    servicers: Registrations = ()
    background: Sequence[Background] = ()
    checks: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)


S = TypeVar("S", bound=ServiceSettings)


def main(
    service: str,
    *,
    settings_type: type[S],
    build: Callable[[S], AbstractAsyncContextManager[App]],
    migrate: Callable[[S], Awaitable[None]] | None = None,
    arguments: Sequence[str] | None = None,
) -> int:
    """The command line of a service; answers the exit code.

    0 after an orderly end, 1 when something failed, 2 when the command line or the
    environment is wrong.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {Path(sys.argv[0]).parent.name}",
        description="Settings come from the environment; docs/settings.md lists them.",
    )
    parser.add_argument(
        "command",
        choices=[*(role.value for role in Role), "migrate", "all"],
        help="what to do: one role, `migrate` the database and end, or `all` of it",
    )
    asked = parser.parse_args(arguments).command
    try:
        settings = settings_type()
        merchants = settings.merchants_by_id
    except (ValueError, OSError) as error:
        said = str(error)
        if isinstance(error, ValidationError):
            said = _named(error, settings_type.model_fields)
        sys.stderr.write(f"{service}: the environment is not right:\n{said}\n")
        return 2
    configure_logs(settings, service)
    flush_spans = configure_tracing(settings, service)
    roles = set(Role) if asked == "all" else {role for role in Role if role.value == asked}

    async def run() -> None:
        if migrate is not None and asked in ("migrate", "all"):
            await migrate(settings)
        if asked != "migrate":
            async with build(settings) as app:
                await run_app(app, settings, roles)

    try:
        _log.info("starting", command=asked, merchants=len(merchants))
        uvloop.run(run())
    except KeyboardInterrupt:
        return 130
    except BaseException as error:  # noqa: BLE001 - the last line of a process's log
        _log.error("failed", exc_info=error)
        return 1
    finally:
        flush_spans()
    _log.info("stopped")
    return 0


def _named(error: ValidationError, settings: Container[str]) -> str:
    """What is wrong, a line for each variable, under the names by which they are set.

    What they hold is not repeated: it may be a secret.
    """
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        place = [str(part) for part in problem["loc"]]
        if place and place[0] in settings:
            place[0] = f"MESH_{place[0].upper()}"
        lines.append(": ".join(filter(None, [".".join(place), problem["msg"]])))
    return "\n".join(lines)


async def run_app(app: App, settings: ServiceSettings, roles: set[Role]) -> None:
    """Runs an app in these roles until a signal asks it to stop.

    Raises:
        ExceptionGroup: A background task failed.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    health = HealthServer(settings.http_address)
    try:
        async with contextlib.AsyncExitStack() as stack:
            server = None
            if Role.SERVE in roles and app.servicers:
                server = await stack.enter_async_context(serving(settings, app.servicers))
            async with _background([b for b in app.background if b.role in roles], stop) as ends:
                _log.info("ready", grpc_port=server.port if server else 0, http_port=health.port)
                checker = asyncio.create_task(_keep_checking(app, health, server, stop))
                try:
                    await stop.wait()
                finally:
                    checker.cancel()
                health.not_ready = "stopping"
                _log.info("stopping")
                if server is not None:
                    await server.report(serving=False)
                    await asyncio.sleep(settings.drain_seconds)
                    await server.stop(settings.grace_seconds)
                for end in ends:
                    await end(settings.grace_seconds)
    finally:
        health.close()


@contextlib.asynccontextmanager
async def _background(
    tasks: Sequence[Background], stop: asyncio.Event
) -> AsyncIterator[list[Callable[[float], Awaitable[None]]]]:
    """Runs tasks; yields, in their order, what ends each within a time."""

    async def watched(background: Background, stopping: asyncio.Event) -> None:
        try:
            await background.run(stopping)
        except Exception as error:
            _log.error("background.failed", task=background.name, exc_info=error)
            stop.set()
            raise
        if not stopping.is_set():
            stop.set()
            raise RuntimeError(f"{background.name} ended without being told to")

    async with asyncio.TaskGroup() as group:
        ends: list[Callable[[float], Awaitable[None]]] = []
        for background in tasks:
            stopping = asyncio.Event()
            task = group.create_task(watched(background, stopping), name=background.name)

            async def end(
                grace_seconds: float,
                *,
                task: asyncio.Task[None] = task,
                stopping: asyncio.Event = stopping,
            ) -> None:
                stopping.set()
                _, unfinished = await asyncio.wait([task], timeout=grace_seconds)
                if unfinished:
                    _log.warning("background.cancelled", task=task.get_name())
                    task.cancel()

            ends.append(end)
        yield ends


async def _keep_checking(
    app: App, health: HealthServer, server: GrpcServer | None, stop: asyncio.Event
) -> None:
    """Keeps readiness true to what the service depends on."""
    ready = False
    while not stop.is_set():
        failed = None
        for name, check in app.checks.items():
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await check()
            except Exception as error:  # noqa: BLE001 - whatever it is, we cannot work with it
                failed = f"{name}: {type(error).__name__}: {error}"
                break
        if (failed is None) != ready:
            ready = failed is None
            _log.info("readiness", ready=ready, reason=failed)
            if server is not None:
                await server.report(serving=ready)
        health.not_ready = failed
        await asyncio.sleep(CHECK_SECONDS if ready else 0.1)
