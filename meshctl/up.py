"""`meshctl up` and `meshctl down`: a mesh in the foreground, or detached from the terminal.

A detached mesh is a second meshctl in a session of its own; it reports over a pipe, a line of JSON
for each thing that happens, until the mesh is up or has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from meshctl.console import Console
from meshctl.mesh import Mesh, Options
from meshctl.processes import MeshError, ProcessFailedError, import_roots, last_lines
from meshctl.state import StateFolder
from meshctl.supervisor import Level

_DOWN_SECONDS_MAX = 30.0
_ORDER = (
    '{"order": {"customer": {"customerId": "cust-42", "email": "ada@example.com", "locale": "en"},'
    ' "currencyCode": "EUR", "lines": [{"sku": "TEA-001", "title": "Darjeeling 100 g",'
    ' "quantity": 2, "unitPrice": {"currencyCode": "EUR", "minorUnits": "1250"}}]},'
    ' "paymentMethod": "pm_card_visa"%s}'
)


def run_mesh(
    state: StateFolder,
    options: Options,
    *,
    say: Callable[[str, Level], None],
    up: Callable[[Mesh, asyncio.Event], Awaitable[None]],
) -> None:
    """Runs a mesh in this process until a signal, or `up`, ends it.

    SIGINT, SIGTERM and SIGHUP end it in order; a second one ends it at once.

    Args:
        state: The folder; locked for as long as the mesh runs.
        options: What was asked for.
        say: Told what happens.
        up: Called when the mesh is up, with an event to set when it may end.

    Raises:
        MeshError: It could not start; nothing is left running.
    """
    lock = state.take()
    try:
        while _loses_a_port(state, options, say=say, up=up):
            pass
    finally:
        lock.release()


def _loses_a_port(
    state: StateFolder,
    options: Options,
    *,
    say: Callable[[str, Level], None],
    up: Callable[[Mesh, asyncio.Event], Awaitable[None]],
) -> bool:
    """Runs a mesh, and answers whether it failed to start for a port that was taken meanwhile.

    Ports are chosen free, and listened on a moment later: a stranger may be quicker. The next
    plan of the mesh finds that port taken, and chooses another.
    """
    try:
        asyncio.run(_run(Mesh(state, options, say), up, say))
    except ProcessFailedError as error:
        if not state.lost_ports():
            raise
        say(f"{str(error).splitlines()[0]}: a port was taken meanwhile, starting anew", "warning")
        return True
    finally:
        state.release_ports()
    return False


async def _run(
    mesh: Mesh,
    up: Callable[[Mesh, asyncio.Event], Awaitable[None]],
    say: Callable[[str, Level], None],
) -> None:
    stopping, hurry = asyncio.Event(), asyncio.Event()

    def on_signal(name: str) -> None:
        if stopping.is_set():
            say(f"{name} again: ending everything at once", "warning")
            hurry.set()
        else:
            say(f"{name}: stopping", "progress")
            stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, on_signal, number.name)

    async def on_up() -> None:
        await up(mesh, stopping)

    await mesh.run(stopping=stopping, hurry=hurry, up=on_up)


def run_in_foreground(
    state: StateFolder, options: Options, console: Console, *, as_json: bool
) -> None:
    """Runs a mesh until Ctrl-C, saying on the console what happens."""
    with contextlib.ExitStack() as starting:
        starting.enter_context(console.busy("starting the mesh"))

        async def up(mesh: Mesh, stopping: asyncio.Event) -> None:
            starting.close()
            console.say(f"the mesh is up at {mesh.url}", "good")
            show_up(state, mesh.url, console, as_json=as_json)
            console.note("Ctrl-C stops everything.")

        run_mesh(state, options, say=console.say, up=up)
    console.say("everything is stopped", "good")


def run_reporting(state: StateFolder, options: Options, descriptor: int) -> None:
    """Runs a mesh as the detached half: reports on a pipe until it is up."""
    with contextlib.ExitStack() as stack:
        pipe = stack.enter_context(os.fdopen(descriptor, "w", buffering=1))

        def report(**event: Any) -> None:
            if not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.write(json.dumps(event) + "\n")

        async def up(mesh: Mesh, stopping: asyncio.Event) -> None:
            report(up=mesh.url)
            pipe.close()

        try:
            run_mesh(state, options, say=lambda text, level: report(say=text, level=level), up=up)
        except MeshError as error:
            report(failed=str(error), hint=error.hint, exit_code=error.exit_code)
            raise


def start_detached(state: StateFolder, options: Options, console: Console) -> str:
    """Starts a mesh that outlives this process, and answers its URL once it is up.

    Raises:
        MeshError: It could not start, and nothing of it is left running.
    """
    state.make_folder()
    reading, writing = os.pipe()
    arguments = ["up", "--state", str(state.path), "--report-to", str(writing)]
    if options.broker:
        arguments += ["--broker", options.broker]
    if options.port is not None:
        arguments += ["--port", str(options.port)]
    arguments += ["--replicas", str(options.replicas)]
    environment = os.environ | {"PYTHONPATH": import_roots()}
    # In the environment, not in the arguments: it holds a password.
    environment["MESH_BROKER_URL"] = options.broker_url
    log = state.supervisor_log
    with os.fdopen(reading) as pipe:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "meshctl", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                pass_fds=(writing,),
                cwd="/",
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
            os.close(writing)
        try:
            for line in pipe:
                event: dict[str, Any] = json.loads(line)
                if "say" in event:
                    console.say(event["say"], event["level"])
                elif "up" in event:
                    return str(event["up"])
                elif "failed" in event:
                    child.wait()
                    raise ReportedError(event["failed"], event["hint"], int(event["exit_code"]))
        except KeyboardInterrupt:
            child.terminate()
            child.wait()
            raise
    child.wait()
    raise ProcessFailedError("the supervisor", f"ended with exit code {child.returncode}", log)


class ReportedError(MeshError):
    """What made a detached mesh fail, as it reported it."""

    def __init__(self, message: str, hint: str, exit_code: int) -> None:
        super().__init__(message, hint=hint)
        self.exit_code = exit_code


def stop(state: StateFolder, console: Console) -> None:
    """Ends the mesh of a state folder and waits until it is gone.

    Raises:
        NotRunningError: No mesh runs there.
        MeshError: It did not end in time.
    """
    run = state.running()
    supervisor = state.supervisor(run)
    if supervisor is not None:
        supervisor.signal(signal.SIGTERM)
    began = time.monotonic()
    hurried = False
    while state.locked():
        waited = time.monotonic() - began
        if supervisor is not None and waited > _DOWN_SECONDS_MAX / 2 and not hurried:
            console.say("it takes long; ending everything at once", "warning")
            supervisor.signal(signal.SIGTERM)
            hurried = True
        if waited > _DOWN_SECONDS_MAX:
            raise MeshError(
                f"the mesh in {state.path} did not end within {_DOWN_SECONDS_MAX:.0f} s:\n"
                + "\n".join(last_lines(state.events_log)),
                hint=f"kill -9 {run.supervisor_pid} ends it; everything else ends with it",
            )
        time.sleep(0.03)


def show_up(state: StateFolder, url: str, console: Console, *, as_json: bool) -> None:
    """Prints how to call the mesh that is up at this URL."""
    if as_json:
        ca = str(state.certificates.ca)
        console.json({"state": "running", "url": url, "ca": ca, "state_folder": str(state.path)})
    else:
        console.result(sample_lines(state, url))


def sample_lines(state: StateFolder, url: str) -> str:
    """Answers lines for people to paste: how to call the mesh that is up at this URL."""
    meshctl = program("meshctl")
    buf = program("buf")
    where = "" if buf != "buf" or shutil.which(buf) else " (buf comes with: make setup-dev)"
    place = shlex.quote(str(state.path))
    host = url.removeprefix("https://")
    order, order_grpc = _ORDER % "", _ORDER % ', "parent": "merchants/default"'
    authorization = '-H "Authorization: Bearer $MESH_TOKEN"'
    key = '"idempotency-key: $(cat /proc/sys/kernel/random/uuid)"'
    method = "ordermesh.order.v1.OrderService/CreateOrder"
    return f"""
# the mesh is up at {url}

# first, in the shell that is to call the mesh:
eval "$({meshctl} env --state {place})"

# place an order over REST
curl --cacert "$MESH_CA" {authorization} -H {key} -H "Content-Type: application/json" \\
  -d '{order}' \\
  "$MESH_URL/v1/merchants/default/orders"

# the same over gRPC, by reflection{where}
{buf} curl --protocol grpc --cacert "$MESH_CA" {authorization} -H {key} \\
  -d '{order_grpc}' \\
  "$MESH_URL/{method}"

# or with grpcurl, if you have it
grpcurl -cacert "$MESH_CA" {authorization} -H {key} \\
  -d '{order_grpc}' \\
  {host} {method}

# the same with meshctl, and what became of it
{meshctl} order create --line TEA-001:2:12.50 --email ada@example.com
{meshctl} order list
{meshctl} mail          # mails are kept in {shlex.quote(str(state.mail))}
"""


def program(name: str) -> str:
    """Answers how a program of our environment is called from the shell that called us."""
    beside = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not beside.exists() or (found and Path(found).resolve() == beside.resolve()):
        return name
    with contextlib.suppress(ValueError):
        return shlex.quote(str(beside.relative_to(Path.cwd())))
    return shlex.quote(str(beside))
