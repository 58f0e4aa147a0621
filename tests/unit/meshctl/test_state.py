"""The state folder: what it remembers, whom it lets in, and whom it refuses."""

import fcntl
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from meshctl.leftovers import look
from meshctl.processes import MeshError, checkout, free_port, port_is_free
from meshctl.state import (
    AlreadyRunningError,
    NotRunningError,
    PortTakenError,
    ProcessStatus,
    RunStatus,
    StateFolder,
)
from tests.eventually import soon


def _a_run(pid: int) -> RunStatus:
    found = look(pid)
    assert found is not None
    return RunStatus(
        state="running",
        supervisor_pid=pid,
        supervisor_started=found.started,
        url="https://localhost:20000",
        admin_url="http://127.0.0.1:20001",
        ca="/ca.pem",
        broker="postgres",
        broker_url="postgresql://broker:secret@127.0.0.1:20002/broker",
        mail_folder="/mail",
        since="2026-01-01T00:00:00.000Z",
        processes=[ProcessStatus(name="order", pid=7, address="127.0.0.1:1", health="healthy")],
    )


def test_ports_and_passwords_are_the_same_at_the_next_start(tmp_path: Path) -> None:
    """What a folder was asked for once, it answers again."""
    first = StateFolder(tmp_path / "state")
    lock = first.take()
    asked = (first.id, first.port("edge")[0], first.secret("postgres"))
    lock.release()
    second = StateFolder(tmp_path / "state")
    second.take().release()
    assert (second.id, second.port("edge")[0], second.secret("postgres")) == asked


def test_different_purposes_have_different_ports_and_passwords(tmp_path: Path) -> None:
    """Nothing is shared by mistake."""
    state = StateFolder(tmp_path / "state")
    state.take().release()
    assert len({state.port(purpose)[0] for purpose in "abcdefgh"}) == 8
    assert state.secret("one") != state.secret("other")


def test_a_port_that_is_taken_meanwhile_is_replaced_and_told(tmp_path: Path) -> None:
    """The answer names the port that it was."""
    state = StateFolder(tmp_path / "state")
    state.take().release()
    port, _ = state.port("edge")
    with socket.create_server(("127.0.0.1", port)):
        other, before = state.port("edge")
    assert (other != port, before) == (True, port)
    assert state.port("edge") == (other, None)


def test_a_port_that_is_insisted_on_and_taken_is_refused(tmp_path: Path) -> None:
    """No other one is chosen then."""
    state = StateFolder(tmp_path / "state")
    state.take().release()
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortTakenError) as refused:
        state.port("edge", wanted=taken.getsockname()[1])
    assert refused.value.exit_code == 2


def test_two_meshes_that_start_in_the_same_moment_are_given_different_ports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port counts as taken from when it is chosen, and not only once a server listens there."""
    port = free_port()
    drawn = [port, *(other for other in range(port + 1, port + 20) if port_is_free(other))]
    monkeypatch.setattr("random.SystemRandom.sample", lambda *_: drawn)
    one, other = StateFolder(tmp_path / "one"), StateFolder(tmp_path / "other")
    for state in (one, other):
        state.take().release()
    assert one.port("edge")[0] == port
    assert other.port("edge")[0] != port
    with socket.create_server(("127.0.0.1", port)):
        assert one.lost_ports() == [port]
    one.release_ports()
    other.release_ports()
    assert free_port() == port


def test_a_port_that_is_insisted_on_is_taken_from_the_part_that_had_it(tmp_path: Path) -> None:
    """Nobody listens on the database's port while ports are chosen; it is still one port."""
    first = StateFolder(tmp_path / "state")
    first.take().release()
    port, _ = first.port("postgres")
    first.release_ports()
    second = StateFolder(tmp_path / "state")
    second.take().release()
    assert second.port("edge", wanted=port) == (port, None)
    chosen, before = second.port("postgres")
    assert (chosen != port, before) == (True, port)
    with pytest.raises(PortTakenError):
        second.port("admin", wanted=port)
    second.release_ports()


def test_a_folder_is_taken_by_one_supervisor_at_a_time(tmp_path: Path) -> None:
    """The second is told who the first is."""
    state = StateFolder(tmp_path / "state")
    lock = state.take()
    state.write_run(_a_run(os.getpid()))
    with pytest.raises(AlreadyRunningError, match=str(os.getpid())) as refused:
        StateFolder(tmp_path / "state").take()
    assert refused.value.exit_code == 2
    lock.release()
    StateFolder(tmp_path / "state").take().release()


def test_a_folder_with_strange_things_in_it_is_left_alone(tmp_path: Path) -> None:
    """``meshctl up --state ~`` does not make a home folder private and full of databases."""
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(MeshError, match="neither empty nor"):
        StateFolder(tmp_path).take()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_path_that_is_a_file_is_refused_in_words(tmp_path: Path) -> None:
    """Not with a traceback."""
    (tmp_path / "file").touch()
    with pytest.raises(MeshError, match="cannot use the state folder"):
        StateFolder(tmp_path / "file").take()


def test_a_status_without_a_supervisor_is_not_running(tmp_path: Path) -> None:
    """A file that a killed supervisor left says nothing."""
    state = StateFolder(tmp_path / "state")
    lock = state.take()
    state.write_run(_a_run(os.getpid()))
    assert state.running() == _a_run(os.getpid())
    lock.release()
    with pytest.raises(NotRunningError) as refused:
        state.running()
    assert refused.value.exit_code == 3


def test_a_process_that_got_the_pid_of_a_dead_supervisor_is_not_taken_for_it(
    tmp_path: Path,
) -> None:
    """`meshctl down` signals whom the status names: only the very process that wrote it."""
    state = StateFolder(tmp_path / "state")
    lock = state.take()
    state.write_run(replace(_a_run(os.getpid()), supervisor_started="1"))
    with pytest.raises(NotRunningError):
        state.running()
    lock.release()


def test_a_guardian_outwaits_whoever_looks_whether_the_lock_is_held(tmp_path: Path) -> None:
    """`meshctl status` in that very moment does not keep it from tidying up."""
    state = StateFolder(tmp_path / "state")
    state.take().release()
    state.write_run(_a_run(os.getpid()))
    argv = [sys.executable, "-m", "meshctl.guardian", str(state.path), state.id, "/nonexistent"]
    with (state.path / "lock").open("r+") as looking:
        fcntl.flock(looking, fcntl.LOCK_EX)
        guardian = subprocess.Popen(argv, stdin=subprocess.DEVNULL, cwd=checkout())
        soon(lambda: _has_open(guardian.pid, state.path / "lock"), describe="it asks for the lock")
    assert guardian.wait(10) == 0
    assert not (state.path / "run.json").exists()


def _has_open(pid: int, file: Path) -> bool:
    links = Path(f"/proc/{pid}/fd").iterdir()
    return any(link.resolve() == file for link in links)


def test_the_option_wins_over_the_variable_and_that_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--state, then MESH_STATE, then .mesh in the working directory."""
    monkeypatch.chdir(tmp_path)
    assert StateFolder.chosen(None).path == tmp_path / ".mesh"
    monkeypatch.setenv("MESH_STATE", str(tmp_path / "variable"))
    assert StateFolder.chosen(None).path == tmp_path / "variable"
    assert StateFolder.chosen("option").path == tmp_path / "option"


def test_an_edited_merchants_file_is_kept(tmp_path: Path) -> None:
    """The file is the user's after the first start."""
    state = StateFolder(tmp_path / "state")
    state.take().release()
    state.merchants.write_text('{"merchants": []}')
    StateFolder(tmp_path / "state").take().release()
    assert state.merchants.read_text() == '{"merchants": []}'


def test_a_log_that_has_grown_is_moved_aside(tmp_path: Path) -> None:
    """A mesh that runs for weeks does not fill the disk at every restart."""
    state = StateFolder(tmp_path / "state")
    state.take().release()
    log = state.log_of("order")
    log.touch()
    os.truncate(log, 17 * 1024 * 1024)
    assert not state.log_of("order").exists()
    assert (state.logs / "order.log.1").stat().st_size == 17 * 1024 * 1024
