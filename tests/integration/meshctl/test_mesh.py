"""A whole mesh, but for its services: started, restarted, killed in every way, and ended."""

import asyncio
import contextlib
import ipaddress
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest

from meshctl.mesh import Mesh, Options
from meshctl.processes import free_port
from meshctl.state import StateFolder
from meshctl.up import run_mesh
from tests.eventually import soon
from tests.integration.meshctl.conftest import (
    CHECKOUT,
    Meshctl,
    await_gone,
    send,
    supervisor_of,
)
from tests.processes import processes_where

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

STANDING = {"postgres", "valkey", "mail", "order", "payment", "notification", "rates", "envoy"}


def test_a_detached_mesh_comes_up_shows_its_processes_and_goes_down(meshctl: Meshctl) -> None:
    """Up, status, env and down do what they say, and nothing is left."""
    done = meshctl.up()
    status = meshctl.status()
    assert status["state"] == "running"
    assert status["url"] in done.stdout
    assert {p["name"] for p in status["processes"]} == STANDING
    for process in status["processes"]:
        assert process["health"] == "healthy"
        assert process["restarts"] == 0
        assert psutil.pid_exists(process["pid"])
    running = meshctl.processes()
    assert len(running) >= len(STANDING)
    meshctl.run("down")
    await_gone(running, within=1)
    assert meshctl.processes() == []
    assert meshctl.run("status", code=3).stdout == ""
    assert meshctl.run("down", code=3).stdout == ""


def test_everything_listens_on_the_loopback_interface_alone(meshctl: Meshctl) -> None:
    """No process of the mesh is reachable from another machine."""
    meshctl.up()
    for process in meshctl.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL's workers come and go
            assert _strangers_to_the_loopback(process) == []


@pytest.mark.curl
def test_the_lines_of_env_can_be_evaluated_by_a_shell_and_call_the_edge(
    meshctl_in: Callable[[Path], Meshctl], tmp_path: Path
) -> None:
    """A state folder with spaces, quotes and a long path works, down to the curl line."""
    state = tmp_path / "a folder, 'quoted' & \"long\" $HOME" / ("deep" * 20) / "é"
    meshctl = meshctl_in(state)
    meshctl.up()
    argv = shlex.join(meshctl.argv("env"))
    script = (
        f'eval "$({argv})" && curl --silent --fail --cacert "$MESH_CA"'
        ' -H "Authorization: Bearer $MESH_TOKEN" "$MESH_URL/v1/merchants/default/orders"'
        ' && printf "\\n%s" "$MESH_STATE"'
    )
    done = subprocess.run(
        ["/bin/sh", "-c", script],
        env=meshctl.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    answer, _, shown_state = done.stdout.rpartition("\n")
    assert json.loads(answer) == {"orders": [], "nextPageToken": ""}
    assert shown_state == str(state)


def test_the_state_folder_is_ours_alone_and_so_are_its_keys(meshctl: Meshctl) -> None:
    """Folder 0700, keys and passwords 0600, and no password in any command line."""
    meshctl.up()
    assert meshctl.state.stat().st_mode & 0o777 == 0o700
    private = [
        *meshctl.state.rglob("*.key"),
        meshctl.state / "mesh.json",
        meshctl.state / "run.json",
    ]
    assert len(private) > 8
    for path in private:
        assert path.stat().st_mode & 0o077 == 0, path
    secrets = json.loads((meshctl.state / "mesh.json").read_text())["secrets"].values()
    for process in meshctl.processes():
        with contextlib.suppress(psutil.NoSuchProcess):  # PostgreSQL's workers come and go
            shown = " ".join(process.cmdline())
            assert not any(secret in shown for secret in secrets), shown


def test_a_second_start_in_the_same_folder_is_refused(meshctl: Meshctl) -> None:
    """One supervisor per state folder; the refusal names the one that is there."""
    meshctl.up()
    refused = meshctl.up(code=2)
    assert "already up" in refused.stderr
    assert str(supervisor_of(meshctl)) in refused.stderr
    assert meshctl.status()["state"] == "running"


def test_two_meshes_run_side_by_side(meshctl_in: Callable[[Path], Meshctl], tmp_path: Path) -> None:
    """Two folders, two meshes; ending one leaves the other."""
    one, other = meshctl_in(tmp_path / "one"), meshctl_in(tmp_path / "other")
    one.up()
    other.up()
    assert one.status()["url"] != other.status()["url"]
    one.run("down")
    soon(lambda: one.processes() == [], within_seconds=5, describe="nothing of the one is left")
    assert {p["health"] for p in other.status()["processes"]} == {"healthy"}


def test_a_restart_keeps_url_ca_and_data(meshctl: Meshctl) -> None:
    """What a client knows of a mesh outlives a restart, and so does the database."""
    meshctl.up()
    before, ca = meshctl.status(), (meshctl.state / "tls" / "ca.pem").read_bytes()
    _sql(meshctl, "CREATE TABLE kept (id int); INSERT INTO kept VALUES (42)")
    meshctl.run("down")
    meshctl.up()
    assert meshctl.status()["url"] == before["url"]
    assert (meshctl.state / "tls" / "ca.pem").read_bytes() == ca
    assert _sql(meshctl, "SELECT id FROM kept") == "42"


def test_a_port_that_was_taken_meanwhile_is_replaced_and_said_so(meshctl: Meshctl) -> None:
    """The edge's port is gone: another one is used, and the user is told."""
    meshctl.up()
    port = int(meshctl.status()["url"].rpartition(":")[2])
    meshctl.run("down")
    with socket.create_server(("127.0.0.1", port)):
        done = meshctl.up()
        assert f"port {port} (edge) is taken now" in done.stderr
        assert meshctl.status()["url"] != f"https://localhost:{port}"


def test_a_start_outlives_a_stranger_who_takes_a_port_that_was_chosen(
    fakes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between choosing a port and listening on it; the mesh comes up on another, and says so."""
    monkeypatch.setenv("PYTHONPATH", f"{fakes}{os.pathsep}{CHECKOUT}")
    state = StateFolder(tmp_path / "state")
    said: list[str] = []
    strangers: list[socket.socket] = []
    urls: list[str] = []

    def say(text: str, _: str) -> None:
        said.append(text)
        if text.startswith("valkey ready") and not strangers:
            taken = json.loads((state.path / "mesh.json").read_text())["ports"]["edge"]
            strangers.append(socket.create_server(("127.0.0.1", taken)))

    async def up(mesh: Mesh, stopping: asyncio.Event) -> None:
        urls.append(mesh.url)
        stopping.set()

    run_mesh(state, Options(), say=say, up=up)
    with strangers[0] as stranger:
        lost = stranger.getsockname()[1]
    assert len(urls) == 1
    assert not urls[0].endswith(f":{lost}")
    assert any("a port was taken meanwhile" in text for text in said)
    assert any(text.startswith(f"port {lost} (edge) is taken now") for text in said)


def test_a_demo_that_is_interrupted_keeps_nothing_and_exits_130(
    meshctl: Meshctl, tmp_path: Path
) -> None:
    """Ctrl-C is no failure to look into."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    demo = subprocess.Popen(
        meshctl.argv("demo"),
        env=meshctl.environment | {"TMPDIR": str(scratch)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert demo.stdout is not None
    for line in demo.stdout:
        if "valkey ready" in line:
            demo.send_signal(signal.SIGINT)
    demo.stdout.close()
    assert demo.wait(30) == 130
    assert list(scratch.glob("ordermesh-demo-*")) == []


def test_a_port_that_the_user_insists_on_is_used_or_refused(meshctl: Meshctl) -> None:
    """--port is taken literally."""
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        refused = meshctl.up("--port", str(port), code=2)
    assert f"port {port} is taken" in refused.stderr
    meshctl.up("--port", str(port))
    assert meshctl.status()["url"] == f"https://localhost:{port}"


@pytest.mark.parametrize("name", ["payment", "valkey", "envoy", "postgres", "mail"])
def test_a_process_that_dies_is_started_again_within_5_s_and_said_so(
    meshctl: Meshctl, name: str
) -> None:
    """Whichever process is killed, it is back; and the others were not touched."""
    meshctl.up()
    before = {p["name"]: p["pid"] for p in meshctl.status()["processes"]}
    killed = datetime.now(UTC)
    send(before[name], signal.SIGKILL)
    soon(
        lambda: _is_back(meshctl, name, before[name]), within_seconds=30, describe=f"{name} is back"
    )
    processes = meshctl.status()["processes"]
    # By the supervisor's own clock, so that the time that asking takes does not count.
    started = datetime.fromisoformat(
        next(process["since"] for process in processes if process["name"] == name)
    )
    assert (started - killed).total_seconds() < 5
    after = {p["name"]: p["pid"] for p in processes}
    assert {n: pid for n, pid in after.items() if n != name} == {
        n: pid for n, pid in before.items() if n != name
    }
    events = (meshctl.state / "events.log").read_text()
    assert f"{name} died (SIGKILL)" in events
    assert f"{name} ready again" in events


def test_what_depends_on_a_dead_process_waits_for_it(meshctl: Meshctl) -> None:
    """PostgreSQL and a service die together: PostgreSQL is back first."""
    meshctl.up()
    order, postgres = meshctl.pid_of("order"), meshctl.pid_of("postgres")
    send(postgres, signal.SIGKILL)
    send(order, signal.SIGKILL)
    soon(
        lambda: (
            {p["health"] for p in meshctl.status()["processes"]} == {"healthy"}
            and "order ready again" in (meshctl.state / "events.log").read_text()
        ),
        within_seconds=10,
        describe="everything is back",
    )
    events = (meshctl.state / "events.log").read_text()
    assert events.index("postgres ready again") < events.index("order ready again")


def test_killing_the_supervisor_leaves_nothing_running(meshctl: Meshctl) -> None:
    """Kill -9 of the supervisor: every process ends, PostgreSQL's backends and all."""
    meshctl.up()
    running = meshctl.processes()
    send(supervisor_of(meshctl), signal.SIGKILL)
    await_gone(running, within=5)
    assert meshctl.processes() == []
    meshctl.run("status", code=3)
    meshctl.up()
    assert meshctl.status()["state"] == "running"


def test_killing_the_supervisor_and_its_guardian_leaves_nothing_running(meshctl: Meshctl) -> None:
    """The kernel alone is enough when nobody is left to tidy up."""
    meshctl.up()
    running = meshctl.processes()
    supervisor = psutil.Process(supervisor_of(meshctl))
    (guardian,) = _guardians(meshctl)
    guardian.suspend()
    supervisor.kill()
    guardian.kill()
    await_gone([p for p in running if p.pid != guardian.pid], within=5)


def test_a_guardian_that_dies_is_replaced(meshctl: Meshctl) -> None:
    """There is always a guardian."""
    meshctl.up()
    (first,) = _guardians(meshctl)
    first.kill()
    soon(
        lambda: set(_guardians(meshctl)) - {first},
        within_seconds=3,
        describe="another guardian",
    )


def _guardians(meshctl: Meshctl) -> list[psutil.Process]:
    supervisor = supervisor_of(meshctl)
    return processes_where(
        lambda process: process.ppid() == supervisor and "meshctl.guardian" in process.cmdline()
    )


def test_leftovers_of_a_killed_supervisor_are_cleared_at_the_next_start(meshctl: Meshctl) -> None:
    """Even when somehow a process survived, the next start ends it and says so."""
    meshctl.up()
    mark = json.loads((meshctl.state / "mesh.json").read_text())["id"]
    meshctl.run("down")
    survivor = subprocess.Popen(["sleep", "600"], env={"ORDERMESH_STATE_ID": mark})
    try:
        done = meshctl.up()
        assert survivor.wait(timeout=1) == -signal.SIGTERM
    finally:
        survivor.kill()
        survivor.wait()
    assert "ended 1 processes that a killed supervisor had left" in done.stderr


def test_ctrl_c_ends_everything_within_10_s(meshctl: Meshctl) -> None:
    """SIGINT to the foreground: exit code 0, nothing left, no file that says it runs."""
    foreground = meshctl.start()
    soon(lambda: _is_running(meshctl), within_seconds=60, describe="the mesh is up")
    running = meshctl.processes()
    send(foreground.pid, signal.SIGINT)
    output, _ = foreground.communicate(timeout=10)
    assert foreground.returncode == 0
    assert "everything is stopped" in output
    await_gone(running, within=0.5)
    assert not (meshctl.state / "run.json").exists()


def test_a_second_ctrl_c_ends_everything_at_once(meshctl: Meshctl) -> None:
    """A process that ignores SIGTERM does not hold up somebody in a hurry."""
    foreground = meshctl.start()
    soon(lambda: _is_running(meshctl), within_seconds=60, describe="the mesh is up")
    running = meshctl.processes()
    # Stopped, it cannot even notice that it is asked to end.
    send(meshctl.pid_of("payment"), signal.SIGSTOP)
    send(foreground.pid, signal.SIGINT)
    soon(lambda: _state(meshctl) == "stopping", within_seconds=3, describe="it stops")
    send(foreground.pid, signal.SIGINT)
    output, _ = foreground.communicate(timeout=3)
    assert "at once" in output
    await_gone(running, within=0.5)


def test_ctrl_c_while_starting_leaves_nothing_running(meshctl: Meshctl) -> None:
    """The start is cut short in the middle."""
    foreground = meshctl.start()
    soon(lambda: len(meshctl.processes()) > 2, within_seconds=30, describe="something runs")
    send(foreground.pid, signal.SIGINT)
    foreground.communicate(timeout=10)
    soon(lambda: meshctl.processes() == [], within_seconds=1, describe="nothing runs")


def test_a_service_that_does_not_start_is_named_with_its_last_words(meshctl: Meshctl) -> None:
    """The error names process, exit code, log and the log's end; everything is stopped."""
    meshctl.environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    broken = meshctl.state.parent / "broken"
    broken.mkdir()
    for package in ("order_svc", "payment_svc", "notify_svc", "rates_svc"):
        (broken / f"{package}.py").write_text("raise SystemExit('no database of mine today')\n")
    meshctl.environment["PYTHONPATH"] = str(broken)
    done = meshctl.up(code=1)
    assert "ended with exit code 1" in done.stderr
    assert "no database of mine today" in done.stderr
    assert str(meshctl.state / "logs") in done.stderr
    assert meshctl.processes() == []
    meshctl.run("status", code=3)


def test_rabbitmq_that_is_not_installed_is_named_with_its_package(meshctl: Meshctl) -> None:
    """--broker amqp without RabbitMQ exits 2 and says what to install."""
    meshctl.environment["PATH"] = "/nonexistent"
    refused = meshctl.up("--broker", "amqp", code=2)
    assert "apt install rabbitmq-server" in refused.stderr


@pytest.mark.rabbitmq
def test_a_private_rabbitmq_runs_on_the_loopback_and_ends_with_its_epmd(meshctl: Meshctl) -> None:
    """beam.smp, erl_child_setup and epmd are ours, and gone with the mesh within 10 s."""
    meshctl.up("--broker", "amqp")
    assert {"rabbitmq", "epmd"} < {p["name"] for p in meshctl.status()["processes"]}
    running = meshctl.processes()
    for process in running:
        assert _strangers_to_the_loopback(process) == []
    meshctl.run("down", within=12)
    await_gone(running, within=0.5)


@pytest.mark.rabbitmq
def test_killing_the_supervisor_ends_a_private_rabbitmq_too(meshctl: Meshctl) -> None:
    """Kill -9 of the supervisor: no beam.smp, no epmd, no erl_child_setup stays."""
    meshctl.up("--broker", "amqp")
    running = meshctl.processes()
    assert {"beam.smp", "epmd", "erl_child_setup"} <= {process.name() for process in running}
    send(supervisor_of(meshctl), signal.SIGKILL)
    await_gone(running, within=8)


def test_replicas_are_processes_of_their_own_behind_the_edge(meshctl: Meshctl) -> None:
    """--replicas 2 runs two order services, and the edge knows both."""
    meshctl.up("--replicas", "2")
    names = {p["name"] for p in meshctl.status()["processes"]}
    assert {"order-1", "order-2"} < names
    settings = json.loads((meshctl.state / "envoy" / "settings.json").read_text())
    assert len(settings["upstreams"]["order"]) == 2


def _sql(meshctl: Meshctl, statements: str) -> str:
    """Runs SQL as the superuser, in a process of its own."""
    memory = json.loads((meshctl.state / "mesh.json").read_text())
    url = (
        f"postgresql://mesh:{memory['secrets']['postgres']}@127.0.0.1:{memory['ports']['postgres']}"
    )
    script = (
        "import asyncio, asyncpg, sys\n"
        "async def main():\n"
        f"    connection = await asyncpg.connect({url + '/postgres'!r})\n"
        "    if sys.argv[1].startswith('SELECT'):\n"
        "        print(await connection.fetchval(sys.argv[1]))\n"
        "    else:\n"
        "        await connection.execute(sys.argv[1])\n"
        "    await connection.close()\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, statements], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _strangers_to_the_loopback(process: psutil.Process) -> list[str]:
    """The addresses beyond the loopback interface that a process listens on."""
    listening = [
        connection.laddr.ip
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    addresses = [ipaddress.ip_address(ip.removeprefix("::ffff:")) for ip in listening]
    return [str(address) for address in addresses if not address.is_loopback]


def _is_back(meshctl: Meshctl, name: str, before: int) -> bool:
    process = next(p for p in meshctl.status()["processes"] if p["name"] == name)
    return process["pid"] not in {None, before} and process["health"] == "healthy"


def _state(meshctl: Meshctl) -> str:
    done = meshctl.run("status", "--json", code=None)
    return str(json.loads(done.stdout)["state"]) if done.returncode == 0 else ""


def _is_running(meshctl: Meshctl) -> bool:
    return _state(meshctl) == "running"
