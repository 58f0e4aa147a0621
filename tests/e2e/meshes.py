"""A whole mesh as a user runs it: started, asked, hurt and ended by meshctl alone.

Nothing of the mesh is imported to find it: what a user has (the printed lines, `meshctl
env`, `meshctl status`) is what a test has. The databases and the folder of mails are
looked into beside that, to see what no answer shows.
"""

from __future__ import annotations

import email
import email.policy
import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import pytest

from tests.processes import is_alive, processes_of_mesh

Json = dict[str, Any]

CHECKOUT = Path(__file__).resolve().parents[2]
UP_SECONDS_MAX = 110
DOWN_SECONDS_MAX = 40
RESTART_SECONDS_MAX = 5.0
"""How long a process that died may be away."""

on_both_brokers = pytest.mark.parametrize(
    "mesh", ["postgres", pytest.param("amqp", marks=pytest.mark.rabbitmq)], indirect=True
)
"""Runs a test on the mesh of each broker."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller needs: `meshctl env` prints it."""

    url: str
    ca: Path
    token: str


@dataclass(frozen=True, slots=True)
class SentMail:
    """One mail in the sink: to whom, about which event of which order."""

    to: str
    subject: str
    text: str
    order: str
    event: str


@dataclass
class Mesh:
    """One mesh on a state folder of its own."""

    state: Path
    broker: str
    shown: str = ""
    """What `meshctl up` printed."""
    env: dict[str, dict[str, str]] = field(default_factory=dict)
    """What `meshctl env` said for each merchant."""
    _mails: dict[str, SentMail] = field(default_factory=dict, repr=False)

    def run(
        self,
        *arguments: str,
        code: int | None = 0,
        within_seconds: float = 60,
        more: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs meshctl on this mesh to its end, and checks its exit code unless that is None."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "meshctl", *arguments],
            cwd=CHECKOUT,
            env={**self.environment(), **(more or {})},
            capture_output=True,
            text=True,
            timeout=within_seconds,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"meshctl {arguments}:\n{done.stdout}\n{done.stderr}"
        return done

    def environment(self) -> dict[str, str]:
        """A shell's environment in which this mesh is picked and no other."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("MESH_", "OTEL_")) and not name.lower().endswith("_proxy")
        }
        roots = os.pathsep.join([str(CHECKOUT), str(CHECKOUT / "generated")])
        return {**kept, "MESH_STATE": str(self.state), "PYTHONPATH": roots, "COLUMNS": "200"}

    # ------------------------------------------------------------------ its life

    def up(self, *arguments: str, broker_url: str = "", otlp_endpoint: str = "") -> None:
        """Starts it, detached, and remembers what was printed.

        Args:
            arguments: Further ones for `meshctl up`.
            broker_url: A broker that runs already; the mesh's own when empty.
            otlp_endpoint: Where spans go; nothing is traced when empty.
        """
        self.env = {}
        broker = () if broker_url else ("--broker", self.broker)
        done = self.run(
            "up",
            "--detach",
            *broker,
            *arguments,
            within_seconds=UP_SECONDS_MAX,
            more={"MESH_BROKER_URL": broker_url, "MESH_OTLP_ENDPOINT": otlp_endpoint},
        )
        self.shown = done.stdout

    def down(self) -> list[psutil.Process]:
        """Ends it, and answers those of its processes that run still."""
        running = self.processes()
        self.run("down", within_seconds=DOWN_SECONDS_MAX)
        _, alive = psutil.wait_procs(running, timeout=5)
        return [*filter(is_alive, alive), *self.processes()]

    def kill_leftovers(self) -> None:
        """Ends what a failed test may have left, so that the next one starts clean."""
        if (self.state / "run.json").exists():
            self.run("down", code=None, within_seconds=DOWN_SECONDS_MAX)
        for process in self.processes():
            process.kill()

    def processes(self) -> list[psutil.Process]:
        """Every process of the mesh, its supervisor among them, by what it carries."""
        return processes_of_mesh(self.state)

    # ------------------------------------------------------------------ asking it

    def access(self, merchant: str = "default") -> Access:
        """What a caller of this merchant needs."""
        if merchant not in self.env:
            self.env[merchant] = exported(self.run("env", "--merchant", merchant).stdout)
        env = self.env[merchant]
        return Access(env["MESH_URL"], Path(env["MESH_CA"]), env["MESH_TOKEN"])

    def token(self, *arguments: str) -> str:
        """What `meshctl token` prints."""
        return self.run("token", *arguments).stdout.strip()

    def status(self) -> Json:
        """What `meshctl status --json` says."""
        answer: Json = json.loads(self.run("status", "--json").stdout)
        return answer

    def process(self, name: str) -> Json:
        """What `meshctl status --json` says of one process."""
        found: Json = next(p for p in self.status()["processes"] if p["name"] == name)
        return found

    def pid_of(self, name: str) -> int:
        """The pid of a process, to be killed as the kernel does when memory runs out."""
        return int(self.process(name)["pid"])

    def said(self, text: str) -> datetime:
        """When the supervisor last said something, as its log of events has it."""
        lines = (self.state / "events.log").read_text().splitlines()
        last = next((line for line in reversed(lines) if text in line), None)
        assert last is not None, f"{text!r} was never said"
        return datetime.fromisoformat(last.split()[0])

    # ------------------------------------------------------------------ looking into it

    @property
    def _memory(self) -> Json:
        memory: Json = json.loads((self.state / "mesh.json").read_text())
        return memory

    def port(self, purpose: str) -> int:
        """The port that the state folder remembers for a purpose."""
        return int(self._memory["ports"][purpose])

    @asynccontextmanager
    async def database(self, name: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """A connection to a service's database, under the service's own role."""
        password = self._memory["secrets"][f"database-{name}"]
        address = f"127.0.0.1:{self.port('postgres')}"
        connection = await asyncpg.connect(f"postgresql://{name}:{password}@{address}/{name}")
        try:
            yield connection
        finally:
            await connection.close()

    async def rows(self, database: str, query: str, *values: object) -> list[asyncpg.Record]:
        """What a query of one service's database answers."""
        async with self.database(database) as connection:
            return list(await connection.fetch(query, *values))

    async def count(self, database: str, query: str, *values: object) -> int:
        """The number that a query of one service's database answers."""
        async with self.database(database) as connection:
            return int(await connection.fetchval(query, *values))

    def mails(self, order: str = "") -> list[SentMail]:
        """Every mail that has reached the sink, or those about one order; the oldest first."""
        for path in sorted((self.state / "mail").glob("[0-9]*.eml")):
            if path.name not in self._mails:
                self._mails[path.name] = _read_mail(path.read_bytes())
        return [mail for mail in self._mails.values() if order in ("", mail.order)]

    def accesses(self, *, after: int = 0) -> list[Json]:
        """The entries of the edge's access log behind a position (see `log_position`)."""
        with (self.state / "logs" / "access.log").open() as file:
            file.seek(after)
            return [json.loads(line) for line in file if line.endswith("\n")]

    def log_position(self) -> int:
        """How much of the access log has been written."""
        log = self.state / "logs" / "access.log"
        return log.stat().st_size if log.exists() else 0


def exported(lines: str) -> dict[str, str]:
    """The variables that lines of `export NAME=value` set."""
    variables = {}
    for line in lines.splitlines():
        word, assignment = shlex.split(line)
        assert word == "export", line
        name, _, value = assignment.partition("=")
        variables[name] = value
    return variables


def repeated(mails: Sequence[SentMail]) -> dict[tuple[str, str, str], int]:
    """What somebody was told more than once: event, recipient and subject, and how often."""
    told = Counter((mail.event, mail.to, mail.subject) for mail in mails)
    return {which: times for which, times in told.items() if times > 1}


def _read_mail(content: bytes) -> SentMail:
    message = email.message_from_bytes(content, policy=email.policy.default)
    body = message.get_body(("plain",))
    assert body is not None, content
    return SentMail(
        to=str(message["To"]),
        subject=str(message["Subject"]),
        text=str(body.get_content()),
        order=str(message["X-Ordermesh-Order"]),
        event=str(message["X-Ordermesh-Event"]),
    )
