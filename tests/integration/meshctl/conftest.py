"""Meshes with fake services, so that what the tests see is the supervisor's doing."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.processes import is_alive, processes_of_mesh

CHECKOUT = Path(__file__).resolve().parents[3]
PACKAGES = ("order_svc", "payment_svc", "notify_svc", "rates_svc")


class Meshctl:
    """Runs meshctl on one state folder."""

    def __init__(self, state: Path, environment: dict[str, str]) -> None:
        self.state = state
        self.environment = environment

    def argv(self, *arguments: str) -> list[str]:
        """The command line for these arguments."""
        return [sys.executable, "-P", "-m", "meshctl", *arguments]

    def run(
        self, *arguments: str, code: int | None = 0, within: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end and checks its exit code."""
        done = subprocess.run(
            self.argv(*arguments),
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=within,
            check=False,
        )
        if code is not None:
            assert done.returncode == code, f"{arguments}:\n{done.stdout}\n{done.stderr}"
        return done

    def up(self, *arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        """Starts a detached mesh."""
        return self.run("up", "--detach", *arguments, code=code, within=90)

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """Starts a mesh in the foreground of a session of its own."""
        return subprocess.Popen(
            self.argv("up", *arguments),
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def status(self) -> dict[str, Any]:
        """What `meshctl status --json` says."""
        answer: dict[str, Any] = json.loads(self.run("status", "--json").stdout)
        return answer

    def pid_of(self, name: str) -> int:
        """The pid of a process of the mesh; 0 while it has none."""
        processes = self.status()["processes"]
        return next((p["pid"] or 0 for p in processes if p["name"] == name), 0)

    def processes(self) -> list[psutil.Process]:
        """Every process of the mesh, found by what it carries."""
        return processes_of_mesh(self.state)


def await_gone(processes: list[psutil.Process], within: float) -> None:
    """Waits until all of these have ended, and says which have not."""
    _, alive = psutil.wait_procs(processes, timeout=within)
    left = [*filter(is_alive, alive)]
    assert not left, f"still running: {left}"


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose order_svc and so on are `fake_service`; to be first on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("fakes")
    for package in PACKAGES:
        (folder / f"{package}.py").write_text(
            "from tests.integration.meshctl.fake_service import main\n\nmain()\n"
        )
    return folder


@pytest.fixture
def meshctl_in(fakes: Path) -> Iterator[Callable[[Path], Meshctl]]:
    """Makes a `Meshctl` for a folder; its mesh is ended with the test."""
    made: list[Meshctl] = []

    def make(state: Path) -> Meshctl:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{fakes}{os.pathsep}{CHECKOUT}",
            "MESH_STATE": str(state),
        }
        made.append(Meshctl(state, environment))
        return made[-1]

    yield make
    for meshctl in made:
        meshctl.run("down", code=None)
        for process in meshctl.processes():
            process.kill()


@pytest.fixture
def meshctl(meshctl_in: Callable[[Path], Meshctl], tmp_path: Path) -> Meshctl:
    """Meshctl on an empty state folder."""
    return meshctl_in(tmp_path / "state")


def supervisor_of(meshctl: Meshctl) -> int:
    """The supervisor's pid."""
    return int(meshctl.status()["supervisor_pid"])


def send(pid: int, number: signal.Signals) -> None:
    """Sends a signal."""
    os.kill(pid, number)
