"""Child processes: how meshctl starts one, waits for it, and makes sure that it ends.

Every child is the leader of its own session, so a Ctrl-C in the terminal reaches meshctl alone,
which then ends the children in order. Every child also asks the kernel to be signalled when
meshctl dies (``PR_SET_PDEATHSIG``), so that not even ``kill -9`` of meshctl leaves one behind.
The kernel forgets that wish when a process changes its user, so it is made last, inside whatever
changes the user; and because meshctl may die in the moment before it is made, the child looks
afterwards whether meshctl is still its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Below Linux's range for outgoing connections (32768-60999), so that a port remembered from the
# last run is not taken by chance as the near end of somebody's connection.
_PORTS = range(18_000, 32_000)
_POLL_SECONDS = 0.015
_LINE_LENGTH_MAX = 300

# Run by sh with meshctl's pid as $0; a child that was orphaned before it could ask for the
# signal gives up instead of running on alone.
_STILL_OUR_CHILD = 'test "$PPID" = "$0" || exit 125; exec "$@"'


class MeshError(Exception):
    """Something that meshctl tells its user in one sentence, and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        """What the user can do about it; may be empty."""


class MissingProgramError(MeshError):
    """A program that has to be installed is not there."""

    exit_code = 2


class NotReadyError(Exception):
    """A server does not answer yet; the message says what was seen last."""


class ProcessFailedError(MeshError):
    """A child ended, or never became ready; `log_lines` are the last lines that it wrote."""

    def __init__(self, name: str, what: str, log: Path) -> None:
        self.process_name = name
        self.log = log
        self.log_lines = [_readable(line) for line in last_lines(log)]
        tail = "".join(f"\n    {line}" for line in self.log_lines)
        super().__init__(f"{name} {what}; its log ({log}) ends with:{tail or ' (nothing)'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A program to run as a child, and how it wants to be ended."""

    name: str
    argv: tuple[str, ...]
    directory: Path
    """Working directory of the child."""
    log: Path
    """File that standard output and error are appended to."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """The whole environment, but for PATH, LANG and the like (see `base_environment`)."""
    identity: tuple[str, ...] = ()
    """Prefix that changes the user, for servers that refuse to run as root."""
    stop_signal: signal.Signals = signal.SIGTERM
    """Asks for an orderly end."""
    hurry_signal: signal.Signals = signal.SIGKILL
    """Asks for an end at once, orderly or not."""
    death_signal: signal.Signals = signal.SIGKILL
    """Sent by the kernel when meshctl dies."""
    grace_seconds: float = 5.0
    """How long an orderly end may take before the process group is killed."""

    def full_argv(self, parent_pid: int) -> list[str]:
        """Answers the command line, wrapped so that the child does not outlive `parent_pid`."""
        death = self.death_signal.name.removeprefix("SIG")
        return [
            *self.identity,
            _program("setpriv", "util-linux"),
            f"--pdeathsig={death}",
            "/bin/sh",
            "-c",
            _STILL_OUR_CHILD,
            str(parent_pid),
            *self.argv,
        ]


class Child:
    """One running child process."""

    def __init__(self, command: Command, process: asyncio.subprocess.Process) -> None:
        self.command = command
        self._process = process
        self.started_at = time.time()
        """Unix time, seconds."""

    @property
    def pid(self) -> int:
        """Process id, which is the id of the process group too."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative when a signal ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """Waits for the end and answers the exit code, negative for a signal."""
        return await self._process.wait()

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to the process itself; does nothing when it has ended."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill_group(self) -> None:
        """Kills the process and everything that stayed in its group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    async def stop(self, *, grace_seconds: float | None = None) -> bool:
        """Ends the process, orderly if it can, and answers whether it was orderly.

        Args:
            grace_seconds: Patience; the command's own when None.
        """
        grace = self.command.grace_seconds if grace_seconds is None else grace_seconds
        self.signal(self.command.stop_signal)
        try:
            async with asyncio.timeout(grace):
                await self.wait()
        except TimeoutError:
            self.kill_group()
            await self.wait()
            return False
        self.kill_group()  # whatever it left behind in its group
        return True

    async def until(self, probe: Callable[[], Awaitable[None]], *, within_seconds: float) -> None:
        """Waits until `probe` raises no `NotReadyError` any more.

        Raises:
            ProcessFailedError: The process ended first, or the time ran out.
        """
        deadline = time.monotonic() + within_seconds
        while True:
            try:
                await probe()
            except NotReadyError as error:
                seen = str(error)
            else:
                return
            name, log = self.command.name, self.command.log
            if self.exit_code is not None:
                raise ProcessFailedError(name, f"ended with {exit_words(self.exit_code)}", log)
            if time.monotonic() > deadline:
                what = f"was not ready after {within_seconds:.0f} s ({seen})"
                raise ProcessFailedError(name, what, log)
            await asyncio.sleep(_POLL_SECONDS)


async def spawn(command: Command) -> Child:
    """Starts a child. It has to be called in the main thread.

    The kernel sends the death signal when the *thread* that started the child ends.

    Raises:
        MissingProgramError: The program, or one that wraps it, is not installed.
    """
    command.log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(command.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        process = await asyncio.create_subprocess_exec(
            *command.full_argv(os.getpid()),
            cwd=command.directory,
            env=base_environment() | dict(command.environment),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise MissingProgramError(f"cannot start {command.name}: {error}") from error
    finally:
        os.close(descriptor)
    return Child(command, process)


async def run_to_end(command: Command, *, within_seconds: float = 60.0) -> None:
    """Runs a command that does its work and ends, such as initdb.

    Raises:
        ProcessFailedError: It failed, or took longer than `within_seconds`.
    """
    child = await spawn(command)
    try:
        async with asyncio.timeout(within_seconds):
            code = await child.wait()
    except TimeoutError as error:
        what = f"did not end within {within_seconds:.0f} s"
        raise ProcessFailedError(command.name, what, command.log) from error
    finally:
        child.kill_group()
        await child.wait()
    if code != 0:
        raise ProcessFailedError(command.name, f"ended with {exit_words(code)}", command.log)


def base_environment() -> dict[str, str]:
    """Answers the few variables that every child gets from ours; nothing else leaks in."""
    kept = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "ORDERMESH_TEST_RUN")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment.setdefault("PATH", os.defpath)
    return environment


def import_roots() -> str:
    """Answers the PYTHONPATH by which a child imports the same code as we do."""
    root = checkout()
    ours = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([*filter(None, ours), str(root), str(root / "generated")])


def checkout() -> Path:
    """Answers the folder that holds the services, the edge's template and the contracts."""
    return Path(__file__).resolve().parents[1]


def exit_words(code: int) -> str:
    """Says an exit code in words: ``exit code 1`` or ``SIGKILL``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def last_lines(log: Path, count: int = 12) -> list[str]:
    """Answers the last lines of a log file, none when there is no such file."""
    try:
        with log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 16_384))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def _readable(line: str) -> str:
    # Services log JSON, a traceback and all in one line; its end says what happened.
    try:
        values = json.loads(line)
    except ValueError:
        return line if len(line) <= _LINE_LENGTH_MAX else line[:_LINE_LENGTH_MAX] + "…"
    if not isinstance(values, dict):
        return line
    words = [str(values.pop(name, "")) for name in ("timestamp", "level", "event")]
    exception = str(values.pop("exception", "")).strip().splitlines()
    words += [f"{name}={value}" for name, value in values.items() if name != "service"]
    shown = " ".join(filter(None, words))[:_LINE_LENGTH_MAX]
    return f"{shown}\n        {exception[-1]}" if exception else shown


def port_is_free(port: int) -> bool:
    """Tells whether a server could listen on this loopback port now.

    ``localhost`` means ::1 as well, so a port that somebody serves there is not free.
    """
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            probe = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue  # no IPv6 on this machine
        with probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except PermissionError:
                return False
            except OSError as error:
                if family == socket.AF_INET or error.errno == errno.EADDRINUSE:
                    return False
    return True


def hold_free_port(*, but: Collection[int] = ()) -> socket.socket:
    """Answers a socket on a port that nobody listens on or holds, and that is not one of `but`.

    Until the socket is closed nobody else is given the port here, while a server can listen on
    it: the socket is bound alone, which a second holder is refused, and listens never.
    """
    for port in random.SystemRandom().sample(_PORTS, 2_000):
        if port in but or not port_is_free(port):
            continue
        held = socket.socket()
        try:
            held.bind(("127.0.0.1", port))
        except OSError:
            held.close()
            continue
        # From now on others that set it may bind as well, as every server does.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return held
    raise MeshError(
        "there is no free port on the loopback interface between 18000 and 32000",
        hint="ss -ltn shows who listens",
    )


def free_port(*, but: Collection[int] = ()) -> int:
    """Answers a loopback port as `hold_free_port` does, and holds it no longer."""
    with hold_free_port(but=but) as held:
        port: int = held.getsockname()[1]
        return port


async def port_answers(port: int) -> None:
    """A probe: somebody accepts connections on this loopback port.

    Raises:
        NotReadyError: Nobody does.
    """
    try:
        async with asyncio.timeout(2.0):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
    except (OSError, TimeoutError) as error:
        raise NotReadyError(f"port {port}: {str(error) or 'no answer'}") from error
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def _program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise MissingProgramError(
            f"the program {name} is needed and not installed", hint=f"apt install {package}"
        )
    return path
