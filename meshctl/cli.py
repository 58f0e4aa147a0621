"""The command line: `meshctl --help` tells it all."""

from __future__ import annotations

import datetime as dt
import os
import shlex
import sys
import time
from pathlib import Path
from typing import IO, Any

import click

from meshctl.credentials import ROLES, Certificates, TokenKey
from meshctl.processes import MeshError, last_lines
from meshctl.resources import deadletter, order, payment, rate
from meshctl.session import (
    Duration,
    Group,
    Session,
    examples,
    json_option,
    session,
    state_option,
)
from meshctl.state import NotRunningError

_STOPPED: dict[str, Any] = {"state": "stopped", "url": None, "processes": []}
"""A mesh that is down, as `meshctl status --json` shows it."""
_TOKEN_LIFETIME_MAX = 24 * 3600
"""The embedded edge refuses tokens that live longer."""


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "meshctl up                    run a mesh until Ctrl-C",
        'eval "$(meshctl env)"         point this shell at it',
        "meshctl order create --line TEA-001:2:12.50",
        "meshctl order list",
    ),
)
@click.version_option(package_name="ordermesh", prog_name="meshctl")
@state_option
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Runs a whole order mesh on this machine, and talks to one."""
    ctx.ensure_object(Session)


# ---------------------------------------------------------------------------- running a mesh


@cli.command(
    epilog=examples(
        "meshctl up",
        "meshctl up --detach --state /tmp/other       a second mesh beside it",
        "meshctl up --broker amqp --replicas 2",
    )
)
@state_option
@json_option
@click.option("--detach", is_flag=True, help="Return once it is up; meshctl down ends it.")
@click.option(
    "--broker",
    type=click.Choice(["postgres", "amqp"]),
    help="Over what events travel: a queue in PostgreSQL, or a private RabbitMQ"
    " (needs the package rabbitmq-server). Default: as last time, at first postgres.",
)
@click.option(
    "--broker-url",
    envvar="MESH_BROKER_URL",
    default="",
    metavar="URL",
    help="A broker that runs already, amqp://…; else $MESH_BROKER_URL.",
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Processes of the order service, behind the edge's balancer.",
)
@click.option(
    "--port",
    type=click.IntRange(1024, 65535),
    help="Port of the edge on the loopback interface. Default: as last time, at first a free one.",
)
@click.option("--report-to", type=int, hidden=True)
def up(
    detach: bool,
    broker: str | None,
    broker_url: str,
    replicas: int,
    port: int | None,
    report_to: int | None,
) -> None:
    """Runs a mesh: PostgreSQL, Valkey, a mail sink, the four services and Envoy.

    Everything listens on 127.0.0.1 alone. Ports, passwords, keys and orders are kept in the
    state folder, so the next start has the same URL, CA and orders. A process that dies is
    started again. Ctrl-C ends everything in order, a second one at once; nothing is left running.
    """
    from meshctl import up as running
    from meshctl.mesh import Options

    shared = session()
    # A kind that is asked for in so many words wins over a URL that happens to be in the shell.
    source = click.get_current_context().get_parameter_source("broker_url")
    if broker and source is click.core.ParameterSource.ENVIRONMENT:
        broker_url = ""
    if broker and broker_url:
        raise click.UsageError("--broker and --broker-url exclude each other")
    options = Options(broker=broker or "", broker_url=broker_url, replicas=replicas, port=port)
    if report_to is not None:
        running.run_reporting(shared.state, options, report_to)
    elif detach:
        with shared.console.busy("starting the mesh"):
            url = running.start_detached(shared.state, options, shared.console)
        shared.console.say(f"the mesh is up at {url}", "good")
        running.show_up(shared.state, url, shared.console, as_json=shared.json)
        ending = f"{running.program('meshctl')} down --state {shlex.quote(str(shared.state.path))}"
        shared.console.note(f"{ending} ends it.")
    else:
        running.run_in_foreground(shared.state, options, shared.console, as_json=shared.json)


@cli.command(
    epilog=examples(
        "meshctl down",
        "meshctl down --state /tmp/other",
    )
)
@state_option
@json_option
def down() -> None:
    """Ends the mesh of a state folder, and waits until it is gone; its orders are kept."""
    from meshctl import up as running

    shared = session()
    with shared.console.busy("stopping the mesh"):
        running.stop(shared.state, shared.console)
    shared.console.say(f"the mesh in {shared.state.path} is down", "good")
    if shared.json:
        shared.console.json(_STOPPED)


@cli.command(
    epilog=examples(
        "meshctl status",
        "meshctl status --json | jq -r '.processes[] | select(.health != \"healthy\").name'",
    )
)
@state_option
@json_option
def status() -> None:
    """Shows what runs, where, and how it is."""
    shared = session()
    try:
        run = shared.state.running()
    except NotRunningError as error:
        if not shared.json:
            raise
        shared.console.json(_STOPPED)
        raise click.exceptions.Exit(error.exit_code) from error
    if shared.json:
        from dataclasses import asdict

        shown = asdict(run)
        # Passwords are for the state folder, not for whatever reads this.
        del shown["supervisor_started"]
        shown["broker_url"] = _without_password(run.broker_url)
        shown["state_folder"] = str(shared.state.path)
        shared.console.json(shown)
        return
    shared.console.result(
        f"{run.state} at {run.url} since {run.since}\n"
        f"state {shared.state.path}, broker {run.broker}, supervisor pid {run.supervisor_pid}\n"
    )
    rows = [
        [
            process.name,
            str(process.pid or "-"),
            process.address,
            process.health,
            str(process.restarts),
            process.since,
            process.detail,
        ]
        for process in run.processes
    ]
    headings = ["process", "pid", "address", "health", "restarts", "since", ""]
    shared.console.table(headings, rows)


@cli.command(
    epilog=examples(
        'eval "$(meshctl env)"',
        'curl --cacert "$MESH_CA" -H "Authorization: Bearer $MESH_TOKEN" \\',
        '  "$MESH_URL/v1/merchants/default/orders"',
    )
)
@state_option
@json_option
@click.option("--merchant", metavar="ID", default="default", show_default=True)
def env(merchant: str) -> None:
    """Prints the variables that point a shell at the mesh, with a token for 12 hours."""
    shared = session()
    run = shared.state.running()
    variables = {
        "MESH_URL": run.url,
        "MESH_CA": run.ca,
        "MESH_TOKEN": shared.state.token_key.token(merchant=merchant),
        "MESH_STATE": str(shared.state.path),
    }
    if shared.json:
        shared.console.json(variables)
        return
    for name, value in variables.items():
        shared.console.result(f"export {name}={shlex.quote(value)}")


@cli.command(
    epilog=examples(
        'MESH_TOKEN="$(meshctl token --merchant acme --role merchant --role operator)"',
    )
)
@state_option
@json_option
@click.option("--merchant", metavar="ID", default="default", show_default=True)
@click.option(
    "--role",
    "roles",
    type=click.Choice(ROLES),
    multiple=True,
    default=("merchant",),
    show_default=True,
    help="May be given twice.",
)
@click.option("--subject", default="", help="Who calls.  [default: <merchant>-cli]")
@click.option(
    "--lifetime",
    type=Duration(),
    default="12h",
    show_default=True,
    help="Such as 90s, 15m, 12h; 24h at the most.",
)
def token(merchant: str, roles: tuple[str, ...], subject: str, lifetime: int) -> None:
    """Prints a token that the edge takes; the mesh need not be up."""
    if not 0 < lifetime <= _TOKEN_LIFETIME_MAX:
        raise click.BadParameter("between 1s and 24h", param_hint="--lifetime")
    shared = session()
    if not shared.state.exists():
        shared.state.running()  # says what to do
    signed = shared.state.token_key.token(
        merchant=merchant,
        roles=roles,
        subject=subject,
        lifetime=dt.timedelta(seconds=lifetime),
    )
    if shared.json:
        shared.console.json({"token": signed})
    else:
        shared.console.result(signed)


@cli.command(
    epilog=examples(
        "meshctl mail",
        "meshctl mail --json | jq -r '.[] | .to + \"  \" + .subject'",
    )
)
@state_option
@json_option
@click.option("-n", "--newest", type=click.IntRange(1), help="Only so many of the newest.")
def mail(newest: int | None) -> None:
    """Lists the mails that the mesh has sent; its sink keeps them, nothing leaves this machine."""
    from simulators.mail.mailbox import list_mails

    shared = session()
    folder = shared.state.mail
    mails = list_mails(folder, newest=newest) if folder.exists() else []
    if shared.json:
        shared.console.json([mail.as_json() for mail in mails])
        return
    rows = [
        [
            mail.accepted_time.isoformat(timespec="seconds"),
            mail.to,
            mail.subject,
            mail.path.name,
        ]
        for mail in mails
    ]
    shared.console.table(["time", "to", "subject", "file"], rows)
    shared.console.note(f"{len(mails)} mails in {folder}")


@cli.command(
    epilog=examples(
        "meshctl logs                 what the supervisor did, and each process's last lines",
        "meshctl logs payment -f",
        "meshctl logs access          the edge's access log",
    )
)
@state_option
@click.argument("name", required=False)
@click.option("-n", "--lines", type=click.IntRange(1), default=20, show_default=True)
@click.option("-f", "--follow", is_flag=True, help="Go on until Ctrl-C.")
def logs(name: str | None, lines: int, follow: bool) -> None:
    """Shows the last lines of a process's log; of all of them when no NAME is given."""
    shared = session()
    files = {path.stem: path for path in sorted(shared.state.logs.glob("*.log"))}
    files["supervisor"] = shared.state.events_log
    if name is not None:
        if name not in files:
            raise MeshError(
                f"there is no log of {name} in {shared.state.logs}",
                hint="there are: " + ", ".join(sorted(files)),
            )
        files = {name: files[name]}
    width = max(len(stem) for stem in files)
    opened: dict[str, IO[str]] = {}
    for stem, path in files.items():
        for line in last_lines(path, lines):
            shared.console.result(line if name else f"{stem:<{width}}  {line}")
        if follow and path.exists():
            opened[stem] = path.open(errors="replace")
            opened[stem].seek(0, os.SEEK_END)
    while follow and not shared.console.unheard:
        for stem, file in opened.items():
            for line in file:
                shared.console.result(
                    line.rstrip() if name else f"{stem:<{width}}  {line.rstrip()}"
                )
        time.sleep(0.1)


# ---------------------------------------------------------------------------- using a mesh

for group in (order, payment, rate, deadletter):
    cli.add_command(group)


@cli.command(
    epilog=examples(
        "meshctl load --rate 50 --seconds 30",
    )
)
@state_option
@json_option
@click.option("--rate", type=click.IntRange(1, 5_000), default=20, show_default=True, help="Per s.")
@click.option("--seconds", type=click.IntRange(1, 3_600), default=10, show_default=True)
@click.option("--merchant", metavar="ID", default="default", show_default=True)
def load(rate: int, seconds: int, merchant: str) -> None:
    """Places orders at a steady rate through the edge, and tells latencies and outcomes.

    Orders start on time whether earlier ones have been answered or not, so that a slow mesh
    cannot hide behind its own slowness.
    """
    from meshctl.client import target
    from meshctl.load import run_load

    shared = session()
    run_load(
        target(shared.state_option).as_merchant(merchant),
        merchant=merchant,
        per_second=rate,
        seconds=seconds,
        console=shared.console,
        as_json=shared.json,
    )


@cli.command(
    epilog="\b\nExamples:\n  meshctl demo\n"
    "  meshctl demo --keep /tmp/demo && meshctl up --state /tmp/demo\n"
    "\nExit codes:\n  0  every order went its way\n"
    "  1  one did not; the table and the last lines say which and how\n"
    "  130  stopped by Ctrl-C before its end\n"
)
@json_option
@click.option("--keep", metavar="DIR", type=click.Path(path_type=Path), help="Keep the state here.")
@click.option("--broker", type=click.Choice(["postgres", "amqp"]), default="postgres")
def demo(keep: Path | None, broker: str) -> None:
    """Runs a mesh of its own, places 20 varied orders, shows each one's way, stops everything.

    Half of the orders go over REST and half over gRPC, through the TLS edge. Among them are a
    declined card, a repeat of one request, a bad request, a cancelled order, and an order that is
    settled in another currency. Touches no other mesh.
    """
    from meshctl.demo import run_demo

    shared = session()
    differences = run_demo(shared.console, keep=keep, broker=broker, as_json=shared.json)
    if differences:
        raise click.exceptions.Exit(1)


@cli.command(
    epilog=examples(
        "meshctl credentials /var/lib/ordermesh/tls",
        "meshctl credentials /var/lib/ordermesh/tls --token default",
    )
)
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--token", "merchant", metavar="ID", help="Print a token of this merchant.")
def credentials(folder: Path, merchant: str | None) -> None:
    """Makes a development CA, all certificates and the tokens' key, where they are missing.

    docker-compose.yml runs it once; meshctl up does the same for its own state folder.
    """
    certificates, key = Certificates(folder), TokenKey(folder)
    certificates.ensure()
    key.ensure()
    click.echo(key.token(merchant=merchant) if merchant else f"certificates in {folder}")


def _without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    return f"{head.rpartition(':')[0]}:***@{tail}" if at and ":" in head else url


def main() -> None:
    """The console script `meshctl`."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Abort:
        code = 130
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    sys.exit(code if isinstance(code, int) else 0)
