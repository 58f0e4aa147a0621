"""A mail server of a test: the mesh's own sink, on a port that it keeps when restarted."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from meshctl.processes import free_port
from simulators.mail.mailbox import Mail, Mailbox, list_mails
from simulators.mail.sink import Sink, serve


class _CountingSink(Sink):
    """Also notes who said hello: one EHLO is one connection."""

    hellos = 0

    async def handle_EHLO(
        self, server: Any, session: Any, envelope: Any, hostname: str, responses: list[str]
    ) -> list[str]:
        """Counts, and answers what aiosmtpd would."""
        self.hellos += 1
        session.host_name = hostname
        return responses


class MailServer:
    """A mail server that can be stopped and started again with its mails kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = free_port()
        self._sink = _CountingSink(Mailbox(directory), now=lambda: datetime.now(UTC))
        self._serving: AsyncExitStack | None = None

    @classmethod
    @asynccontextmanager
    async def running(cls, directory: Path) -> AsyncIterator[MailServer]:
        """A mail server that runs until the block ends."""
        server = cls(directory)
        await server.start()
        try:
            yield server
        finally:
            await server.stop()

    @property
    def url(self) -> str:
        """Its `MESH_SMTP_URL`."""
        return f"smtp://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        """How many connections it has had."""
        return self._sink.hellos

    @property
    def mails(self) -> Sequence[Mail]:
        """What it has accepted, the oldest first."""
        return list_mails(self.directory)

    async def start(self) -> None:
        """Begins to listen."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(serve(self._sink, "127.0.0.1", self.port))
            self._serving = stack.pop_all()

    async def stop(self) -> None:
        """Closes its port and every connection."""
        if self._serving is not None:
            await self._serving.aclose()
            self._serving = None
