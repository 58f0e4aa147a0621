"""Servers of a test: started empty, removed afterwards, restarted and killed in between."""

from __future__ import annotations

import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Generic, TypeVar

from meshctl.processes import Child, free_port
from meshctl.servers.base import start
from meshctl.servers.postgres import Postgres
from meshctl.servers.rabbitmq import Epmd, RabbitMQ
from meshctl.servers.valkey import Valkey

S = TypeVar("S", Postgres, Valkey, RabbitMQ)


class Throwaway(Generic[S]):
    """A running server of a test, that can be ended and started again with its data kept."""

    def __init__(self, server: S, companions: list[Child]) -> None:
        self.server: S = server
        """The server as described: its port, folder and passwords."""
        self._companions = companions
        self._child: Child | None = None

    @property
    def url(self) -> str:
        """The URL of the server; the superuser's where there are roles."""
        return self.server.url()

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        if self._child is None:
            raise RuntimeError(f"{self.server.name} is not running")
        return self._child.pid

    async def start(self) -> None:
        """Starts the server and waits until it is ready."""
        self._child = await start(self.server)

    async def stop(self) -> None:
        """Ends the server in an orderly way; does nothing when it is not running."""
        if self._child is not None:
            await self._child.stop()
            self._child = None

    async def kill(self) -> None:
        """Ends the server as a power cut would, with everything it started."""
        if self._child is not None:
            self._child.kill_group()
            await self._child.wait()
            self._child = None

    async def restart(self) -> None:
        """Stops and starts the server; the data stays."""
        await self.stop()
        await self.start()

    async def close(self) -> None:
        """Ends the server and what it leans on, for good."""
        # What a test leaves is deleted, so nobody waits for a tidy end of it; PostgreSQL has to
        # be asked, as its backends are in groups of their own.
        if isinstance(self.server, Postgres):
            await self.stop()
        await self.kill()
        for companion in reversed(self._companions):
            companion.kill_group()
            await companion.wait()


@asynccontextmanager
async def throwaway(kind: type[S]) -> AsyncIterator[Throwaway[S]]:
    """Runs a server of this kind with nothing in it, for tests, and removes it afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="mesh-"))
    companions: list[Child] = []
    held: Throwaway[S] | None = None
    try:
        server = await _empty_server(kind, folder, companions)
        held = Throwaway(server, companions)
        await held.start()
        yield held
    finally:
        if held is not None:
            await held.close()
        else:
            for companion in companions:
                companion.kill_group()
                await companion.wait()
        shutil.rmtree(folder, ignore_errors=True)


async def _empty_server(kind: type[S], folder: Path, companions: list[Child]) -> S:
    password = secrets.token_hex(12)
    if issubclass(kind, Postgres):
        return kind(folder, port=free_port(), password=password, durable=False)
    if issubclass(kind, Valkey):
        return kind(folder, port=free_port(), password=password)
    epmd_port = free_port()
    companions.append(await start(Epmd(folder, port=epmd_port)))
    port = free_port(but={epmd_port})
    return kind(
        folder,
        port=port,
        epmd_port=epmd_port,
        distribution_port=free_port(but={epmd_port, port}),
        password=password,
    )


@asynccontextmanager
async def throwaway_postgres() -> AsyncIterator[str]:
    """Runs an empty PostgreSQL and yields its superuser's URL."""
    async with throwaway(Postgres) as held:
        yield held.url


@asynccontextmanager
async def throwaway_valkey() -> AsyncIterator[str]:
    """Runs an empty Valkey and yields its URL."""
    async with throwaway(Valkey) as held:
        yield held.url


@asynccontextmanager
async def throwaway_rabbitmq() -> AsyncIterator[str]:
    """Runs an empty RabbitMQ and yields the URL of its virtual host ``mesh``."""
    async with throwaway(RabbitMQ) as held:
        yield held.url
