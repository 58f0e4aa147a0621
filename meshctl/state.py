"""The state folder: everything that one mesh keeps, and the lock that says who runs it.

::

    .mesh/              0700
      lock              held (flock) by the supervisor while it lives, whatever its end
      mesh.json         id, ports, passwords: kept, so that a restart keeps URL, CA and orders
      run.json          what runs now, for `meshctl status`; there only while the lock is held
      events.log        what the supervisor did and saw, one line each
      logs/             one file per process, and the edge's access log
      tls/ jwt/         the development CA, certificates, the tokens' key and JWKS
      merchants.json    the merchants; edit it, then restart the mesh
      postgres/ valkey/ rabbitmq/ mail/ envoy/
"""

from __future__ import annotations

import datetime as dt
import fcntl
import json
import os
import secrets
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from meshctl.credentials import Certificates, TokenKey, write_private
from meshctl.leftovers import Found, look
from meshctl.processes import MeshError, hold_free_port, port_is_free

DEFAULT_FOLDER = ".mesh"
VARIABLE = "MESH_STATE"
"""Environment variable that picks the state folder where ``--state`` does not."""

_TIDYING_SECONDS_MAX = 8.0
_LOG_BYTES_MAX = 16 * 1024 * 1024

_MERCHANTS: list[dict[str, str]] = [
    {
        "id": "default",
        "name": "Default Shop",
        "email": "merchant@default.example",
        "settlement_currency": "EUR",
        "capture_method": "automatic",
        "locale": "en",
    },
    {
        "id": "acme",
        "name": "Acme Trading",
        "email": "merchant@acme.example",
        "settlement_currency": "USD",
        "capture_method": "automatic",
        "locale": "en",
    },
]


class AlreadyRunningError(MeshError):
    """Another supervisor holds the state folder."""

    exit_code = 2


class NotRunningError(MeshError):
    """No mesh runs in this state folder."""

    exit_code = 3


@dataclass(slots=True, kw_only=True)
class ProcessStatus:
    """One process of a running mesh, as `meshctl status` shows it."""

    name: str
    pid: int | None
    address: str
    health: str
    """``starting``, ``healthy``, ``unhealthy``, ``restarting`` or ``stopping``."""
    detail: str = ""
    """Why it is not healthy, when it is not."""
    restarts: int = 0
    since: str = ""
    """When this process was started, RFC 3339."""


@dataclass(slots=True, kw_only=True)
class RunStatus:
    """A running mesh, as its supervisor last wrote it."""

    state: str
    """``starting``, ``running`` or ``stopping``."""
    supervisor_pid: int
    supervisor_started: str
    """When the kernel says that it started: a reused pid is told apart by it."""
    url: str
    admin_url: str
    ca: str
    broker: str
    """``postgres``, ``amqp`` (a private RabbitMQ) or ``external``."""
    broker_url: str
    mail_folder: str
    since: str
    processes: list[ProcessStatus] = field(default_factory=list)

    @classmethod
    def from_json(cls, text: str) -> RunStatus:
        """Reads what `to_json` wrote."""
        values: dict[str, Any] = json.loads(text)
        processes = [ProcessStatus(**process) for process in values.pop("processes")]
        return cls(**values, processes=processes)

    def to_json(self) -> str:
        """Answers the status as JSON."""
        return json.dumps(asdict(self), indent=2)


class Lock:
    """The supervisor's hold on a state folder; the kernel drops it with the process."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def release(self) -> None:
        """Lets the next supervisor in."""
        os.close(self._descriptor)


class StateFolder:
    """One mesh's folder."""

    def __init__(self, folder: Path) -> None:
        """Points at a folder; nothing is made before `take`."""
        self.path = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would follow links
        self.certificates = Certificates(self.path / "tls")
        self.token_key = TokenKey(self.path / "jwt")
        self.merchants = self.path / "merchants.json"
        self.events_log = self.path / "events.log"
        self.supervisor_log = self.path / "supervisor.log"
        """What a detached supervisor printed."""
        self.logs = self.path / "logs"
        self.mail = self.path / "mail"
        self.postgres = self.path / "postgres"
        self._memory_file = self.path / "mesh.json"
        self._run_file = self.path / "run.json"
        self._memory: dict[str, Any] = {}
        self._given: dict[str, int] = {}
        self._held_ports: list[socket.socket] = []

    @classmethod
    def chosen(cls, option: str | None) -> StateFolder:
        """Answers the folder of ``--state``, else of MESH_STATE, else ``.mesh`` right here."""
        return cls(Path(option or os.environ.get(VARIABLE) or DEFAULT_FOLDER).expanduser())

    # ------------------------------------------------------------------ what is kept

    def make_folder(self) -> None:
        """Makes the folder, for us alone, unless it is there.

        Raises:
            MeshError: The folder is another user's, or neither empty nor a state folder.
        """
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            owner, inside = self.path.stat().st_uid, {e.name for e in self.path.iterdir()}
        except OSError as error:
            raise MeshError(f"cannot use the state folder {self.path}: {error.strerror}") from error
        if inside - {self.supervisor_log.name} and "lock" not in inside:
            raise MeshError(
                f"{self.path} is neither empty nor a mesh's state folder",
                hint="give another one with --state DIR",
            )
        if owner != os.geteuid():
            raise MeshError(
                f"the state folder {self.path} belongs to another user",
                hint="give one of your own with --state DIR",
            )
        self.path.chmod(0o700)

    def take(self) -> Lock:
        """Makes the folder unless it is there, locks it, and reads what it remembers.

        Raises:
            MeshError: The folder cannot be one of ours (see `make_folder`).
            AlreadyRunningError: Another supervisor has it.
        """
        self.make_folder()
        lock = self._lock()
        self.logs.mkdir(mode=0o700, exist_ok=True)
        self.load()
        if "id" not in self._memory:
            self._memory = {"id": secrets.token_hex(8), "ports": {}, "secrets": {}}
            self._remember()
        if not self.merchants.exists():
            merchants = {"merchants": _MERCHANTS}
            write_private(self.merchants, json.dumps(merchants, indent=2).encode() + b"\n")
        return lock

    def load(self) -> None:
        """Reads what the folder remembers; it may remember nothing yet."""
        if self._memory_file.exists():
            self._memory = json.loads(self._memory_file.read_text())

    def exists(self) -> bool:
        """Tells whether a mesh was ever started here, as far as its keys."""
        return self.token_key.jwks.exists()

    @property
    def id(self) -> str:
        """Random name of this mesh, which marks its processes."""
        return str(self._memory["id"])

    def secret(self, name: str) -> str:
        """Answers a password or key of this mesh, made when first asked for."""
        known: dict[str, str] = self._memory["secrets"]
        if name not in known:
            known[name] = secrets.token_hex(20)
            self._remember()
        return known[name]

    def port(self, purpose: str, *, wanted: int | None = None) -> tuple[int, int | None]:
        """Answers the loopback port for a purpose: the same at every start, if it is free.

        A new port is held until `release_ports`, so that no other mesh chooses it in the time
        that a server needs to listen on it.

        Args:
            purpose: Such as ``edge`` or ``postgres``.
            wanted: Insist on this one.

        Returns:
            The port, and the one it had before when that is taken now.

        Raises:
            MeshError: `wanted` is taken.
        """
        known: dict[str, int] = self._memory["ports"]
        before = known.get(purpose)
        others = {port for other, port in self._given.items() if other != purpose}
        if wanted is not None and (wanted in others or not port_is_free(wanted)):
            raise PortTakenError(wanted)
        port = wanted or before
        if port is None or port in others or not port_is_free(port):
            held = hold_free_port(but={*known.values(), *others})
            self._held_ports.append(held)
            port = int(held.getsockname()[1])
        self._given[purpose] = port
        if port != before:
            known[purpose] = port
            self._remember()
        return port, before if before != port and wanted is None else None

    def lost_ports(self) -> list[int]:
        """Answers which of the ports that `port` gave somebody else listens on.

        To be asked while nothing of this mesh runs.
        """
        return [port for port in self._given.values() if not port_is_free(port)]

    def release_ports(self) -> None:
        """Holds no port any longer, and forgets which ones `port` gave."""
        for held in self._held_ports:
            held.close()
        self._held_ports.clear()
        self._given.clear()

    @property
    def broker(self) -> str:
        """The kind of broker that the mesh was last started with; empty before the first start."""
        return str(self._memory.get("broker", ""))

    @broker.setter
    def broker(self, kind: str) -> None:
        if self._memory.get("broker") != kind:
            self._memory["broker"] = kind
            self._remember()

    def _remember(self) -> None:
        write_private(self._memory_file, json.dumps(self._memory, indent=2).encode() + b"\n")

    # ------------------------------------------------------------------ who runs it

    def _lock(self) -> Lock:
        # A guardian that tidies up after a killed supervisor holds the lock as well, for a few
        # seconds at most; it is waited for.
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _TIDYING_SECONDS_MAX
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                run = self._read_run()
                alive = run is not None and self.supervisor(run) is not None
                if alive or time.monotonic() > deadline:
                    os.close(descriptor)
                    whose = f" (pid {run.supervisor_pid}, {run.url})" if run else ""
                    raise AlreadyRunningError(
                        f"a mesh is already up in {self.path}{whose}",
                        hint="meshctl status shows it, meshctl down ends it; "
                        "--state DIR starts another beside it",
                    ) from None
                time.sleep(0.05)
            else:
                return Lock(descriptor)

    def locked(self) -> bool:
        """Tells whether a supervisor holds the folder now."""
        try:
            descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        else:
            return False
        finally:
            os.close(descriptor)

    def running(self) -> RunStatus:
        """Answers the status of the mesh that runs here.

        Raises:
            NotRunningError: None does.
        """
        run = self._read_run() if self.locked() else None
        if run is None or self.supervisor(run) is None:
            raise NotRunningError(
                f"no mesh is up in {self.path}",
                hint="start one with: meshctl up   (--state DIR or MESH_STATE picks another)",
            )
        return run

    def supervisor(self, run: RunStatus) -> Found | None:
        """Answers the supervisor's process, None when it has gone."""
        found = look(run.supervisor_pid)
        return found if found and found.started == run.supervisor_started else None

    def write_run(self, run: RunStatus) -> None:
        """Publishes the status; only the holder of the lock does."""
        making = self._run_file.with_name("run.json.new")
        descriptor = os.open(making, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(run.to_json())
        making.replace(self._run_file)

    def clear_run(self) -> bool:
        """Takes the status away, and answers whether there was one."""
        try:
            self._run_file.unlink()
        except FileNotFoundError:
            return False
        return True

    def _read_run(self) -> RunStatus | None:
        try:
            return RunStatus.from_json(self._run_file.read_text())
        except FileNotFoundError:
            return None

    # ------------------------------------------------------------------ what it says

    def log_of(self, process: str) -> Path:
        """Answers the log file of a process, moved aside when it has grown past 16 MiB."""
        log = self.logs / f"{process}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES_MAX:
            log.replace(log.with_suffix(".log.1"))
        return log

    def record(self, text: str) -> None:
        """Adds a line, with the time in UTC, to events.log."""
        with self.events_log.open("a") as file:
            file.write(f"{timestamp()} {text}\n")


class PortTakenError(MeshError):
    """The port that the user insists on is in use."""

    exit_code = 2

    def __init__(self, port: int) -> None:
        super().__init__(
            f"port {port} is taken", hint="leave --port away, and a free one is chosen"
        )


def timestamp(unix_seconds: float | None = None) -> str:
    """Answers a time, now when none is given, as RFC 3339 in UTC with milliseconds."""
    moment = dt.datetime.fromtimestamp(unix_seconds or time.time(), dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
