"""What every server has: a way to be prepared, a command, a sign of readiness, a user to run as."""

from __future__ import annotations

import asyncio
import functools
import importlib.util
import os
import ssl
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from meshctl.processes import Child, Command, MeshError, MissingProgramError, NotReadyError, spawn

_NOBODY = 65534


class Server(Protocol):
    """A server that meshctl can run."""

    @property
    def name(self) -> str:
        """Name in status, logs and messages."""

    @property
    def ready_within_seconds(self) -> float:
        """How long the first answer may take before the start has failed."""

    async def prepare(self) -> None:
        """Makes what the server needs on disk; harmless when it is there already."""

    def command(self) -> Command:
        """Answers the command that runs the server in the foreground."""

    async def ready(self) -> None:
        """Raises `NotReadyError` until the server answers."""


async def start(server: Server) -> Child:
    """Prepares and starts a server, and waits until it is ready.

    Raises:
        MeshError: It did not start; nothing of it is left running.
    """
    await server.prepare()
    child = await spawn(server.command())
    try:
        await child.until(server.ready, within_seconds=server.ready_within_seconds)
    except BaseException:
        await child.stop(grace_seconds=0)
        raise
    return child


class Identity:
    """The user that runs a server which refuses to be root, and owns its files."""

    def __init__(self, prefix: tuple[str, ...], owner: int | None) -> None:
        self.prefix = prefix
        """Command line prefix that becomes this user."""
        self.owner = owner
        """User id, outside, of the files; None for the current user's as they are."""

    def adopt(self, folder: Path) -> None:
        """Gives a folder and everything in it to this identity."""
        if self.owner is None or folder.stat().st_uid == self.owner:
            return
        group = 0 if self.owner == 0 else folder.stat().st_gid
        for parent, folders, files in os.walk(folder):
            for name in [".", *folders, *files]:
                os.chown(Path(parent) / name, self.owner, group, follow_symlinks=False)


# In order of preference. The first keeps everything under the root's own user id, without its
# powers; the second is for containers that forbid user namespaces, and lets the user read through
# a 0700 home; the third is for containers that forbid that too.
_IDENTITIES_FOR_ROOT: tuple[tuple[tuple[str, ...], int], ...] = (
    (("unshare", "--user", "--map-user=1000", "--map-group=1000", "--"), 0),
    (
        (
            "setpriv",
            "--securebits=+no_setuid_fixup,+noroot",
            "--reuid=nobody",
            "--regid=nogroup",
            "--clear-groups",
            "--inh-caps=-all,+dac_read_search",
            "--ambient-caps=+dac_read_search",
        ),
        _NOBODY,
    ),
    (("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"), _NOBODY),
)


@functools.cache
def unprivileged(program: Path, folder: Path) -> Identity:
    """Answers an identity other than root that can run `program` in `folder`; tried, not guessed.

    Raises:
        MeshError: We are root and this machine lets root become nobody of the kind.
    """
    if os.geteuid() != 0:
        return Identity((), None)
    refusals = []
    for prefix, owner in _IDENTITIES_FOR_ROOT:
        trial = ["/bin/sh", "-c", 'cd "$1" && exec "$0" --version', str(program), str(folder)]
        try:
            done = subprocess.run(
                [*prefix, *trial], capture_output=True, text=True, timeout=10, check=False
            )
        except (FileNotFoundError, subprocess.TimeoutExpired) as error:
            refusals.append(str(error))
            continue
        if done.returncode == 0:
            return Identity(prefix, owner)
        refusals.append(done.stderr.strip())
    raise MeshError(
        f"{program.name} must not run as root, and this machine refuses every other way: "
        + "; ".join(refusals),
        hint="run meshctl as an ordinary user",
    )


async def http_status(port: int, path: str) -> int:
    """Answers the status of a plain HTTP GET on a loopback port.

    Raises:
        NotReadyError: Nobody answers HTTP there.
    """
    status, _ = await http_request(port, path)
    return status


async def http_request(
    port: int,
    path: str,
    *,
    method: str = "GET",
    headers: Mapping[str, str] | None = None,
    tls: ssl.SSLContext | None = None,
) -> tuple[int, bytes]:
    """Answers status and body of an HTTP request on a loopback port; plain unless `tls` is given.

    Raises:
        NotReadyError: Nobody answers HTTP there within 3 s.
    """
    lines = {"Host": f"localhost:{port}", "Content-Length": "0", "Connection": "close"}
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    try:
        async with asyncio.timeout(3.0):
            reader, writer = await asyncio.open_connection(
                "127.0.0.1", port, ssl=tls, server_hostname="localhost" if tls else None
            )
            try:
                writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode())
                answer = await reader.read()
            finally:
                writer.close()
    except (OSError, TimeoutError) as error:
        raise NotReadyError(f"{path}: {str(error) or 'no answer'}") from error
    head_bytes, _, body = answer.partition(b"\r\n\r\n")
    words = head_bytes.split(None, 2)
    if len(words) < 2 or not words[1].isdigit():
        raise NotReadyError(f"{path}: no HTTP answer")
    return int(words[1]), body


def wheel_folder(module: str, wheel: str) -> Path:
    """Answers the folder that a wheel's package is installed in.

    Raises:
        MissingProgramError: It is not installed.
    """
    # Found, not imported: the packages do much at import that is not wanted here.
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise MissingProgramError(f"the wheel {wheel} is not installed", hint="make setup")
    return Path(spec.submodule_search_locations[0])
