"""What holds for every test: a clean environment, and nothing left running behind it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

# The fixtures that tests of several folders share.
from tests.databases import databases, empty_database  # noqa: F401
from tests.processes import is_alive, processes_where

RABBITMQ_SERVER = Path("/usr/lib/rabbitmq/bin/rabbitmq-server")

MARK = "ORDERMESH_TEST_RUN"
"""The variable by which processes started by one run of the tests know each other."""

LEAVE_SECONDS = 10
"""How long a process that its test has told to stop may take after the last test."""


# A busy machine is no bug in the code under test. In CI the same examples are tried each
# time, so that what fails there fails again; at home hypothesis goes on searching.
settings.register_profile("home", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "home")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides a developer's own mesh and proxies, so that a test says all that it depends on."""
    for name in list(os.environ):
        if name.startswith(("MESH_", "OTEL_", "RABBITMQ_", "PG")) or name.lower().endswith(
            "_proxy"
        ):
            monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a program that is not installed; never in CI, which installs them."""
    if os.environ.get("CI"):
        return
    there = {"rabbitmq": RABBITMQ_SERVER.exists(), "curl": shutil.which("curl") is not None}
    for item in items:
        for name in (name for name, is_there in there.items() if not is_there):
            if item.get_closest_marker(name):
                reason = f"{name} is not installed; `make test-servers` installs it"
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_configure() -> None:
    """Marks every process that tests start, by way of the environment they inherit."""
    os.environ[MARK] = str(os.getpid())


def _is_started_by_us(process: psutil.Process) -> bool:
    """Whether it is one of the tests' processes, also where it has lost its parent."""
    marked = process.environ().get(MARK) == os.environ[MARK]
    return bool(marked and process.pid != os.getpid())


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """Fails the run, and ends them, when tests leave processes behind."""
    yield
    started = processes_where(_is_started_by_us)
    _, running = psutil.wait_procs(started, timeout=LEAVE_SECONDS if started else 0)
    left = [*filter(is_alive, running)]
    if not left:
        return
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline() or [process.name()])
            if reporter is not None:
                reporter.ensure_newline()
                reporter.write_line(f"left running: {process.pid} {command}", red=True)
            process.kill()
    session.exitstatus = pytest.ExitCode.TESTS_FAILED
