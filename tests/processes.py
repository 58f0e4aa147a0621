"""Finding processes of which some may end while they are looked at."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import psutil


def is_alive(process: psutil.Process) -> bool:
    """Whether a process is more than an entry that its parent has not read yet."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def processes_where(holds: Callable[[psutil.Process], bool]) -> list[psutil.Process]:
    """The living processes of which something holds; what ends meanwhile is left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if holds(process) and is_alive(process):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended just now, or is nobody's business here
    return found


def processes_of_mesh(state: Path) -> list[psutil.Process]:
    """Every process of the mesh in a state folder, by what it carries, known to meshctl or not."""
    memory = state / "mesh.json"
    mark = json.loads(memory.read_text())["id"] if memory.exists() else "-"

    def is_ours(process: psutil.Process) -> bool:
        return (
            process.environ().get("ORDERMESH_STATE_ID") == mark
            or str(state) in " ".join(process.cmdline())
            # PostgreSQL's own children keep neither.
            or (process.name() == "postgres" and str(state) in process.cwd())
        )

    return processes_where(is_ours)
