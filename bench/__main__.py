"""`make bench`: what an order costs, beside a bare echo and a hand-written pipeline.

One run, rounds interleaved, so that what the machine does meanwhile falls on all alike;
compare the ratios, not the figures of two runs. The load comes from a process of its
own and is not counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import click
import psutil
from rich.console import Console
from rich.table import Table

from bench.load import Load, Placed
from meshctl.processes import MeshError, free_port
from meshctl.servers.rabbitmq import RabbitMQ, require_rabbitmq
from meshctl.state import StateFolder

ROOT = Path(__file__).parent.parent
SETTLE_SECONDS = 120
MAILS_PER_ORDER = 3

console = Console()


@dataclass(slots=True)
class Measured:
    """All rounds of one subject."""

    rates: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    p50: list[float] = field(default_factory=list)
    failed: int = 0

    @property
    def rate(self) -> float:
        """Orders per second, the median of the rounds."""
        return statistics.median(self.rates)

    @property
    def cpu_ms(self) -> float:
        """Processor milliseconds per order over all its processes, the median."""
        return statistics.median(self.cpu) * 1000

    @property
    def p50_ms(self) -> float:
        """Milliseconds until half of the calls were answered, the median."""
        return statistics.median(self.p50) * 1000


class Processor:
    """Adds up the processor time of process trees, ended children included."""

    def __init__(self, roots: dict[str, int]) -> None:
        self._roots = roots

    def read(self) -> dict[str, float]:
        """Seconds used so far, by root."""
        return {name: sum(map(_seconds, _tree(pid))) for name, pid in self._roots.items()}


def _tree(pid: int) -> Iterator[psutil.Process]:
    root = psutil.Process(pid)
    yield root
    yield from root.children(recursive=True)


def _seconds(process: psutil.Process) -> float:
    try:
        return sum(process.cpu_times()[:4])
    except psutil.NoSuchProcess:
        return 0.0


@dataclass(slots=True)
class Mesh:
    """A running mesh, as the bench needs to know it."""

    state: StateFolder
    status: dict[str, Any]
    token: str

    @property
    def url(self) -> str:
        """The edge."""
        return str(self.status["url"])

    def address(self, process: str) -> str:
        """Where a process listens."""
        return next(str(p["address"]) for p in self.status["processes"] if p["name"] == process)

    def database(self, name: str) -> str:
        """The URL of a service's database."""
        return (
            f"postgresql://{name}:{self.state.secret(f'database-{name}')}"
            f"@{self.address('postgres')}/{name}"
        )

    def superuser(self, database: str) -> str:
        """The URL of a database, for whoever owns the server."""
        return (
            f"postgresql://mesh:{self.state.secret('postgres')}"
            f"@{self.address('postgres')}/{database}"
        )

    @property
    def broker(self) -> str:
        """The URL of the private RabbitMQ."""
        password = self.state.secret("rabbitmq")
        return f"amqp://{RabbitMQ.user}:{password}@{self.address('rabbitmq')}/{RabbitMQ.vhost}"

    def processor(self) -> Processor:
        """The meter of everything that the mesh runs."""
        return Processor({p["name"]: p["pid"] for p in self.status["processes"]})


@contextlib.contextmanager
def running_mesh(broker: str) -> Iterator[Mesh]:
    """A mesh of its own for the bench, ended with it."""
    with tempfile.TemporaryDirectory(prefix="ordermesh-bench-") as folder:
        environment = {**os.environ, "MESH_STATE": folder, "MESH_LOG_LEVEL": "warning"}
        meshctl = [sys.executable, "-m", "meshctl"]
        subprocess.run(
            [*meshctl, "up", "--detach", "--broker", broker], env=environment, check=True, cwd=ROOT
        )
        try:

            def output(*arguments: str) -> str:
                return subprocess.run(
                    [*meshctl, *arguments],
                    env=environment,
                    check=True,
                    cwd=ROOT,
                    capture_output=True,
                    text=True,
                ).stdout

            state = StateFolder(Path(folder))
            state.load()
            yield Mesh(
                state=state,
                status=json.loads(output("status", "--json")),
                token=output("token").strip(),
            )
        finally:
            subprocess.run([*meshctl, "down"], env=environment, check=False, cwd=ROOT)


@contextlib.asynccontextmanager
async def running(
    *command: str, environment: dict[str, str] | None = None, ready: str
) -> AsyncIterator[int]:
    """A Python module as a process; yields its pid once `ready` (host:port) answers."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        *command,
        env={**os.environ, **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try:
        host, _, port = ready.rpartition(":")
        for _ in range(400):
            if process.returncode is not None:
                raise click.ClickException(f"{command[0]} ended at once; its error stands above")
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.close()
                break
            await asyncio.sleep(0.05)
        yield process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def place(load: Load) -> Placed:
    """Runs the load in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "bench.load",
        json.dumps(asdict(load)),
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise click.ClickException("the load failed; its error stands above")
    return Placed(**json.loads(out))


async def until(connection: asyncpg.Connection[Any], query: str, wanted: int) -> None:
    """Waits until a count is reached.

    Raises:
        click.ClickException: It was not, in two minutes.
    """
    deadline = time.monotonic() + SETTLE_SECONDS
    while (seen := await connection.fetchval(query)) < wanted:
        if time.monotonic() > deadline:
            raise click.ClickException(f"{seen} of {wanted} after {SETTLE_SECONDS} s: {query}")
        await asyncio.sleep(0.02)


class Bench:
    """Everything that runs while it is measured, and what was measured."""

    def __init__(self, mesh: Mesh, orders: int) -> None:
        self.mesh = mesh
        self.orders = orders
        self.results: dict[str, Measured] = {}
        self.shares: dict[str, list[float]] = {}

    async def calls(self, name: str, load: Load, processor: Processor) -> None:
        """Measures calls alone: until the last is answered."""
        before = processor.read()
        placed = await place(load)
        after = processor.read()
        self._keep(name, placed, placed.seconds, sum(after.values()) - sum(before.values()))

    async def to_paid(
        self,
        name: str,
        load: Load,
        processor: Processor,
        paid: tuple[asyncpg.Connection[Any], str],
        settled: tuple[asyncpg.Connection[Any], str, int] | None = None,
    ) -> None:
        """Measures orders until all are PAID; their processor time until all is quiet."""
        connection, query = paid
        already = await connection.fetchval(query)
        quiet = await settled[0].fetchval(settled[1]) if settled is not None else 0
        before = processor.read()
        placed = await place(load)
        await until(connection, query, already + placed.orders)
        seconds = time.time() - placed.began
        if settled is not None:
            await until(settled[0], settled[1], quiet + placed.orders * settled[2])
        after = processor.read()
        self._keep(name, placed, seconds, sum(after.values()) - sum(before.values()))
        for process in after:
            self.shares.setdefault(f"{name}: {process}", []).append(
                (after[process] - before[process]) / max(placed.orders, 1)
            )

    def _keep(self, name: str, placed: Placed, seconds: float, cpu: float) -> None:
        measured = self.results.setdefault(name, Measured())
        measured.rates.append(placed.orders / seconds)
        measured.cpu.append(cpu / max(placed.orders, 1))
        measured.p50.append(placed.p50)
        measured.failed += placed.failed


ECHO = "bare gRPC echo"
DIRECT = "CreateOrder, order service alone"
EDGE_GRPC = "CreateOrder, edge, gRPC"
EDGE_REST = "CreateOrder, edge, REST"
PAID = "order to PAID, whole mesh, edge gRPC"
BASELINE = "order to PAID, hand-written pipeline"


async def measure(mesh: Mesh, *, orders: int, rounds: int, clients: int) -> Bench:
    """Runs every subject once a round."""
    bench = Bench(mesh, orders)
    tls = mesh.state.certificates
    proxy = tls.of("edge")
    token = {"authorization": f"Bearer {mesh.token}"}
    host = mesh.url.removeprefix("https://")
    echo_port, web_port = free_port(), free_port()
    echo_address, web_address = f"127.0.0.1:{echo_port}", f"127.0.0.1:{web_port}"
    edge = Load(
        kind="grpc", target=host, orders=orders, clients=clients, headers=token, ca=str(tls.ca)
    )
    order = await asyncpg.connect(mesh.database("order"))
    notification = await asyncpg.connect(mesh.database("notification"))
    async with contextlib.AsyncExitStack() as stack:
        echo = await stack.enter_async_context(
            running("bench.echo", echo_address, ready=echo_address)
        )
        baseline: Processor | None = None
        baseline_paid = None
        if mesh.status["broker"] == "amqp":
            owner = await asyncpg.connect(mesh.superuser("postgres"))
            await owner.execute("CREATE DATABASE baseline")
            await owner.close()
            environment = {
                "BASELINE_DATABASE": mesh.superuser("baseline").replace(
                    "postgresql://", "postgresql+asyncpg://"
                ),
                "BASELINE_AMQP": mesh.broker,
            }
            worker = await stack.enter_async_context(
                running("bench.baseline.worker", environment=environment, ready=echo_address)
            )
            web = await stack.enter_async_context(
                running(
                    "uvicorn",
                    "bench.baseline.app:app",
                    "--port",
                    str(web_port),
                    "--log-level",
                    "warning",
                    environment=environment,
                    ready=web_address,
                )
            )
            servers = {
                p["name"]: p["pid"]
                for p in mesh.status["processes"]
                if p["name"] in ("postgres", "rabbitmq")
            }
            baseline = Processor({"web": web, "worker": worker, **servers})
            counting = await asyncpg.connect(mesh.superuser("baseline"))
            baseline_paid = (counting, "SELECT count(*) FROM orders WHERE state = 'PAID'")
        subjects = 5 + (baseline is not None)
        with console.status("warming up") as shown:
            await place(Load(kind="grpc", target=echo_address, orders=200, clients=clients))
            await place(Load(**{**asdict(edge), "orders": 200}))
            for number in range(rounds):
                step = iter(range(1, subjects + 1))

                def tell(name: str, number: int = number, step: Iterator[int] = step) -> None:
                    shown.update(f"round {number + 1}/{rounds}, {next(step)}/{subjects}: {name}")

                tell(ECHO)
                await bench.calls(
                    ECHO,
                    Load(kind="grpc", target=echo_address, orders=orders, clients=clients),
                    Processor({"echo": echo}),
                )
                tell(DIRECT)
                order_only = Processor(
                    {
                        p["name"]: p["pid"]
                        for p in mesh.status["processes"]
                        if p["name"] in ("order", "order-1", "postgres")
                    }
                )
                await bench.calls(
                    DIRECT,
                    Load(
                        kind="grpc",
                        target=mesh.address("order"),
                        orders=orders,
                        clients=clients,
                        headers={"x-mesh-merchant": "default"},
                        ca=str(tls.ca),
                        certificate=(str(proxy.certificate), str(proxy.key)),
                        server_name="order.mesh",
                    ),
                    order_only,
                )
                await _quiet(order, notification)
                tell(EDGE_GRPC)
                await bench.calls(EDGE_GRPC, edge, mesh.processor())
                await _quiet(order, notification)
                tell(EDGE_REST)
                await bench.calls(
                    EDGE_REST,
                    Load(
                        kind="rest",
                        target=f"{mesh.url}/v1/merchants/default/orders",
                        orders=orders,
                        clients=clients,
                        headers=token,
                        ca=str(tls.ca),
                    ),
                    mesh.processor(),
                )
                await _quiet(order, notification)
                tell(PAID)
                await bench.to_paid(
                    PAID,
                    edge,
                    mesh.processor(),
                    (order, _PAID_ORDERS),
                    (notification, _SENT_MAILS, MAILS_PER_ORDER),
                )
                if baseline is not None and baseline_paid is not None:
                    tell(BASELINE)
                    await bench.to_paid(
                        BASELINE,
                        Load(
                            kind="baseline",
                            target=f"http://{web_address}/orders",
                            orders=orders,
                            clients=clients,
                        ),
                        baseline,
                        baseline_paid,
                    )
    return bench


_PAID_ORDERS = "SELECT count(*) FROM orders WHERE payment_state = 'PAID'"
_SENT_MAILS = "SELECT count(*) FROM notifications WHERE state = 'SENT'"


async def _quiet(order: asyncpg.Connection[Any], notification: asyncpg.Connection[Any]) -> None:
    """Lets the orders of one subject end, so that the next is not charged for them."""
    placed = await order.fetchval("SELECT count(*) FROM orders")
    await until(order, _PAID_ORDERS, placed)
    await until(notification, _SENT_MAILS, placed * MAILS_PER_ORDER)


def report(bench: Bench, *, rounds: int, clients: int) -> dict[str, Any]:
    """What was measured, as it is written to bench/results/."""
    echo = bench.results[ECHO].rate
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "broker": bench.mesh.status["broker"],
        "orders_per_round": bench.orders,
        "rounds": rounds,
        "clients": clients,
        "subjects": {
            name: {
                "orders_per_second": round(measured.rate, 1),
                "of_echo": round(measured.rate / echo, 3),
                "cpu_ms_per_order": round(measured.cpu_ms, 3),
                "answer_p50_ms": round(measured.p50_ms, 2),
                "failed": measured.failed,
            }
            for name, measured in bench.results.items()
        },
        "cpu_ms_per_order_by_process": {
            name: round(statistics.median(shares) * 1000, 3)
            for name, shares in sorted(bench.shares.items())
        },
    }


def markdown(results: dict[str, Any]) -> str:
    """The table for bench/results/, with what it does and does not compare."""
    rows = "".join(
        f"| {name} | {row['orders_per_second']:.0f} | {row['of_echo']:.2f} "
        f"| {row['cpu_ms_per_order']:.2f} | {row['answer_p50_ms']:.1f} | {row['failed']} |\n"
        for name, row in results["subjects"].items()
    )
    shares = "".join(
        f"| {name} | {value:.2f} |\n"
        for name, value in results["cpu_ms_per_order_by_process"].items()
    )
    return (
        f"# {results['time'][:10]}, events over {results['broker']}\n\n"
        f"`make bench`: {results['rounds']} interleaved rounds of {results['orders_per_round']} "
        f"orders, {results['clients']} callers, {results['machine']['cores']} cores, "
        f"Python {results['machine']['python']}. Compare rows of one run, not runs. The load "
        "runs on the same cores and is not counted. CreateOrder's rows through the edge "
        "include what else the mesh did meanwhile. The mesh sends three mails an order; the "
        "hand-written pipeline sends none and has no edge, TLS, tokens, idempotency keys, "
        "history or dead letters.\n\n"
        "| subject | orders/s | of echo | CPU ms/order | answer p50 ms | failed |\n"
        f"|--|--|--|--|--|--|\n{rows}\n"
        f"| CPU by process, order to PAID and mails sent | ms/order |\n|--|--|\n{shares}"
    )


def show(results: dict[str, Any]) -> None:
    """Prints the table."""
    table = Table("subject", "orders/s", "of echo", "CPU ms/order", "answer p50 ms", "failed")
    for name, row in results["subjects"].items():
        table.add_row(
            name,
            f"{row['orders_per_second']:.0f}",
            f"{row['of_echo']:.2f}",
            f"{row['cpu_ms_per_order']:.2f}",
            f"{row['answer_p50_ms']:.1f}",
            str(row["failed"]),
        )
    console.print(table)
    for name, value in results["cpu_ms_per_order_by_process"].items():
        console.print(f"  {name:<55} {value:6.2f} ms/order")


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--orders", default=1500, show_default=True, help="Orders per subject and round.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; medians are shown.")
@click.option("--clients", default=16, show_default=True, help="Callers at once.")
@click.option(
    "--broker",
    type=click.Choice(["auto", "amqp", "postgres"]),
    default="auto",
    show_default=True,
    help="auto takes RabbitMQ where it is installed; only then is the pipeline compared.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
def main(orders: int, rounds: int, clients: int, broker: str, as_json: bool) -> None:
    """Measures what an order costs, and writes the figures to bench/results/."""
    if broker == "auto":
        broker = "amqp" if _has_rabbitmq() else "postgres"
    with running_mesh(broker) as mesh:
        bench = asyncio.run(measure(mesh, orders=orders, rounds=rounds, clients=clients))
        results = report(bench, rounds=rounds, clients=clients)
    folder = ROOT / "bench" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{results['time'][:10]}-{broker}.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(results))
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        show(results)
        console.print(f"written to {path.relative_to(ROOT)}")


def _has_rabbitmq() -> bool:
    try:
        require_rabbitmq()
    except MeshError:
        return False
    return True


if __name__ == "__main__":
    main()
