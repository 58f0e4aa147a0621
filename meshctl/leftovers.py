"""Processes that a mesh left behind, found by what they carry and not by their names.

Every child of a mesh has the mesh's id in its environment. PostgreSQL's backends overwrite theirs
with their title, but their working directory is the cluster. Standard library only: the guardian
runs on this, and has to be small.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

MARK = "ORDERMESH_STATE_ID"
"""Environment variable that holds the mesh's id in each of its processes."""


@dataclass(frozen=True, slots=True)
class Found:
    """A process as it was seen in /proc; a reused pid is told apart by its time of start."""

    pid: int
    command: str
    started: str

    def alive(self) -> bool:
        """Tells whether this very process still runs; a zombie does not."""
        return look(self.pid) == self

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has gone."""
        if self.alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def look(pid: int) -> Found | None:
    """Answers a process, or None when there is none or only a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    command, _, rest = stat.partition("(")[2].rpartition(")")
    fields = rest.split()
    if fields[0] in {"Z", "X"}:
        return None
    return Found(pid, command, fields[19])


def processes_of(state_id: str, cluster: Path) -> list[Found]:
    """Answers the processes of a mesh, ourselves left out.

    Args:
        state_id: The mesh's id.
        cluster: PostgreSQL's data folder.
    """
    mark = f"{MARK}={state_id}".encode()

    def belongs(entry: Path) -> bool:
        return mark in (entry / "environ").read_bytes().split(b"\0")

    marked = {process.pid: process for process in _matching(belongs)}
    for process in processes_in(cluster):
        if process.command == "postgres":
            marked[process.pid] = process
    marked.pop(os.getpid(), None)
    return sorted(marked.values(), key=lambda process: process.pid)


def processes_in(folder: Path) -> list[Found]:
    """Answers the processes whose working directory is exactly this folder."""
    wanted = folder.resolve()
    return list(_matching(lambda entry: (entry / "cwd").readlink() == wanted))


def end(processes: Iterable[Found], *, within_seconds: float) -> list[Found]:
    """Ends processes: asks politely, PostgreSQL in its own way, and kills what stays.

    Returns:
        Those that had to be killed.
    """
    remaining = [process for process in processes if process.alive()]
    for process in remaining:
        # PostgreSQL takes SIGTERM for a wish to wait until every client has gone.
        polite = signal.SIGQUIT if process.command == "postgres" else signal.SIGTERM
        process.signal(polite)
    deadline = time.monotonic() + within_seconds
    while remaining and time.monotonic() < deadline:
        time.sleep(0.05)
        remaining = [process for process in remaining if process.alive()]
    for process in remaining:
        process.signal(signal.SIGKILL)
    return remaining


def _matching(belongs: Callable[[Path], bool]) -> Iterator[Found]:
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            matches = belongs(entry)
        except OSError:
            continue  # gone, or another user's: then it is not one of ours either
        if matches and (process := look(int(entry.name))) is not None:
            yield process
