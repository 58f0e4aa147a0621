"""One mesh: which parts it has, how each is told about the others, and when it is up.

The environment of the services is written here and nowhere else; docs/settings.md says what each
variable means.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from meshctl.credentials import AUDIENCE, ISSUER, write_private
from meshctl.leftovers import look
from meshctl.processes import (
    Command,
    MeshError,
    NotReadyError,
    checkout,
    import_roots,
    port_answers,
    run_to_end,
)
from meshctl.servers import (
    Envoy,
    Epmd,
    Postgres,
    RabbitMQ,
    Server,
    Valkey,
    http_request,
    http_status,
    require_rabbitmq,
)
from meshctl.state import RunStatus, StateFolder, timestamp
from meshctl.supervisor import Part, Say, Supervisor, clear_leftovers

SERVICES = {
    "order": "order_svc",
    "payment": "payment_svc",
    "notification": "notify_svc",
    "rates": "rates_svc",
}
"""Short name (certificates, databases, roles) to Python package, in the order of the table."""

# One read per service: the edge is up when it reaches all of them.
_EDGE_CHECKS = (
    "/v1/merchants/default/orders?pageSize=1",
    "/v1/merchants/default/payments?pageSize=1",
    "/v1/merchants/default/notifications?pageSize=1",
    "/v1/currencies?pageSize=1",
)
_EDGE_SECONDS_MAX = 20.0
_DRAIN_SECONDS = 0.8


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `meshctl up` was asked for."""

    broker: str = ""
    """``postgres``, ``amqp``, or empty: as last time, at first ``postgres``."""
    broker_url: str = ""
    """A broker that runs already; wins over `broker`."""
    replicas: int = 1
    """How many processes of the order service."""
    port: int | None = None
    """Port of the edge; None: as last time, at first any free one."""


class PythonServer:
    """A server written in Python, run by this very interpreter."""

    def __init__(
        self,
        name: str,
        arguments: tuple[str, ...],
        *,
        folder: Path,
        environment: dict[str, str],
        ready: Callable[[], Awaitable[None]],
        grace_seconds: float,
    ) -> None:
        """Describes ``python -m <arguments>``."""
        self.name = name
        self.ready_within_seconds = 45.0
        self._arguments = arguments
        self._folder = folder
        self._environment = environment
        self._ready = ready
        self._grace_seconds = grace_seconds

    async def prepare(self) -> None:
        """Nothing to do: services migrate their databases themselves."""

    def command(self) -> Command:
        """Answers the command."""
        return Command(
            name=self.name,
            argv=(sys.executable, "-P", "-m", *self._arguments),
            directory=self._folder,
            log=self._folder / f"{self.name}.log",
            environment={
                "PYTHONPATH": import_roots(),
                "PYTHONUNBUFFERED": "1",
                "HOME": str(self._folder),
                **self._environment,
            },
            grace_seconds=self._grace_seconds,
        )

    async def ready(self) -> None:
        """Raises `NotReadyError` until the server answers."""
        await self._ready()


class Edge(Envoy):
    """Envoy on a configuration rendered from the state folder."""

    def __init__(self, folder: Path, *, settings: dict[str, object], admin_port: int) -> None:
        """Describes the edge; `settings` are those of ``envoy/render.py``."""
        super().__init__(folder, configuration=folder / "envoy.yaml", admin_port=admin_port)
        self._settings = settings
        self._rendered = False

    async def prepare(self) -> None:
        """Renders the configuration, once."""
        await super().prepare()
        if self._rendered:
            return
        settings = self.folder / "settings.json"
        write_private(settings, json.dumps(self._settings, indent=2).encode() + b"\n")
        renderer = checkout() / "envoy" / "render.py"
        arguments = ("embedded", "--settings", str(settings), "--out", str(self.configuration))
        await run_to_end(
            Command(
                name="envoy/render.py",
                argv=(sys.executable, str(renderer), *arguments),
                directory=self.folder,
                log=self.folder / "render.log",
                environment={"PYTHONPATH": import_roots()},
            )
        )
        self._rendered = True

    async def drain(self) -> None:
        """Asks the clients to go and waits a moment until no request is in flight."""
        await http_request(self.admin_port, "/healthcheck/fail", method="POST")
        await http_request(self.admin_port, "/drain_listeners?graceful&skip_exit", method="POST")
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _DRAIN_SECONDS
        while loop.time() < deadline:
            _, body = await http_request(
                self.admin_port, "/stats?filter=^http\\..*downstream_rq_active$"
            )
            active = sum(
                int(line.rpartition(b":")[2]) for line in body.splitlines() if b":" in line
            )
            # The question itself is one request, on the admin interface.
            if active <= 1:
                return
            await asyncio.sleep(0.05)


class Mesh:
    """The mesh of one state folder."""

    def __init__(self, state: StateFolder, options: Options, say: Say) -> None:
        """Plans the mesh: chooses ports and passwords, or takes those of the last start.

        Args:
            state: Its lock is held by the caller.
            options: What the user asked for.
            say: Tells the user.

        Raises:
            MeshError: A port is taken, or RabbitMQ is asked for and not installed.
        """
        self._state = state
        self._say = say
        left = clear_leftovers(state)
        if left:
            self._tell(f"ended {left} processes that a killed supervisor had left", warning=True)
        self._replicas = options.replicas
        self._broker_kind, self._broker_given = self._choose_broker(options)
        self._edge_port = self._port("edge", wanted=options.port)
        self._admin_port = self._port("admin")
        self._internal_port = self._port("internal")
        self._postgres = Postgres(
            state.postgres, port=self._port("postgres"), password=state.secret("postgres")
        )
        self._valkey = Valkey(
            state.path / "valkey", port=self._port("valkey"), password=state.secret("valkey")
        )
        self._rabbitmq: RabbitMQ | None = None
        self._epmd: Epmd | None = None
        if self._broker_kind == "amqp":
            self._epmd = Epmd(state.path / "rabbitmq", port=self._port("epmd"))
            self._rabbitmq = RabbitMQ(
                state.path / "rabbitmq",
                port=self._port("rabbitmq"),
                epmd_port=self._epmd.port,
                distribution_port=self._port("rabbitmq-distribution"),
                password=state.secret("rabbitmq"),
            )
        self._smtp_port = self._port("mail")
        self._upstreams: dict[str, list[tuple[str, int]]] = {}
        self._edge: Edge | None = None
        self._started_at = timestamp()
        us = look(os.getpid())
        self._process_started = us.started if us else ""
        self._phase = "starting"
        self._supervisor: Supervisor | None = None

    @property
    def url(self) -> str:
        """The edge's URL."""
        return f"https://localhost:{self._edge_port}"

    @property
    def broker_url(self) -> str:
        """The URL of the broker that the services use."""
        if self._broker_given:
            return self._broker_given
        if self._rabbitmq is not None:
            return self._rabbitmq.url()
        return self._database_url("broker")

    def status(self) -> RunStatus:
        """Answers the mesh as it stands now."""
        parts = self._supervisor.parts if self._supervisor else []
        return RunStatus(
            state=self._phase,
            supervisor_pid=os.getpid(),
            supervisor_started=self._process_started,
            url=self.url,
            admin_url=f"http://127.0.0.1:{self._admin_port}",
            ca=str(self._state.certificates.ca),
            broker=self._broker_kind,
            broker_url=self.broker_url,
            mail_folder=str(self._state.mail),
            since=self._started_at,
            processes=[part.status() for part in parts],
        )

    async def run(
        self, *, stopping: asyncio.Event, hurry: asyncio.Event, up: Callable[[], Awaitable[None]]
    ) -> None:
        """Runs the mesh until `stopping` is set, calling `up` once it answers.

        Args:
            stopping: Set to end the mesh in order.
            hurry: Set to end it at once.
            up: Called when every service answers through the edge.

        Raises:
            MeshError: Something did not start; everything is stopped again.
        """
        state = self._state
        self._publish()
        await asyncio.to_thread(self._make_credentials)
        parts = self._parts()
        supervisor = self._supervisor = Supervisor(
            parts, state=state, say=self._say, changed=self._publish
        )

        async def answered() -> None:
            await self._edge_answers()
            await self._postgres.kept()
            self._phase = "running"
            self._publish()
            state.record(f"the mesh is up at {self.url}")
            await up()

        async def noticed() -> None:
            await stopping.wait()
            self._phase = "stopping"
            self._publish()

        async def hurried() -> None:
            await hurry.wait()
            supervisor.hurry.set()

        watchers = [asyncio.create_task(noticed()), asyncio.create_task(hurried())]
        try:
            await supervisor.run(up=answered, stopping=stopping)
        finally:
            for watcher in watchers:
                watcher.cancel()
            state.clear_run()
            state.record("the mesh is down")

    # ------------------------------------------------------------------ planning

    def _choose_broker(self, options: Options) -> tuple[str, str]:
        if options.broker_url:
            return "external", options.broker_url
        kind = options.broker or self._state.broker or "postgres"
        if kind == "amqp":
            require_rabbitmq()
        self._state.broker = kind
        return kind, ""

    def _port(self, purpose: str, *, wanted: int | None = None) -> int:
        port, before = self._state.port(purpose, wanted=wanted)
        if before is not None:
            self._tell(f"port {before} ({purpose}) is taken now, using {port}", warning=True)
        return port

    def _tell(self, text: str, *, warning: bool = False) -> None:
        self._state.record(text)
        self._say(text, "warning" if warning else "progress")

    def _publish(self) -> None:
        self._state.write_run(self.status())

    def _make_credentials(self) -> None:
        self._state.certificates.ensure()
        self._state.token_key.ensure()

    def _parts(self) -> list[Part]:
        """Answers the parts, those that others need first."""
        stores: list[Part] = [
            Part(
                server=self._postgres,
                address=f"127.0.0.1:{self._postgres.port}",
                stop_rank=2,
                once_ready=self._make_databases,
            ),
            Part(server=self._valkey, address=f"127.0.0.1:{self._valkey.port}", stop_rank=2),
        ]
        leaned_on = ["postgres"]
        if self._rabbitmq is not None and self._epmd is not None:
            stores += [
                Part(server=self._epmd, address=f"127.0.0.1:{self._epmd.port}", stop_rank=3),
                Part(
                    server=self._rabbitmq,
                    address=f"127.0.0.1:{self._rabbitmq.port}",
                    stop_rank=2,
                    needs=("epmd",),
                ),
            ]
            leaned_on.append("rabbitmq")
        mail = Part(server=self._mail_sink(), address=f"127.0.0.1:{self._smtp_port}", stop_rank=2)
        services = [
            self._service(service, name, tuple(leaned_on))
            for service in SERVICES
            for name in self._names_of(service)
        ]
        edge = Edge(
            self._state.path / "envoy", settings=self._edge_settings(), admin_port=self._admin_port
        )
        front = Part(
            server=edge,
            address=f"localhost:{self._edge_port}",
            # Started last, it finds every service at its first look instead of its second.
            first_after=tuple(service.name for service in services),
            stop_rank=0,
            before_stop=edge.drain,
        )
        return [*stores, mail, *services, front]

    def _names_of(self, service: str) -> list[str]:
        if service != "order" or self._replicas == 1:
            return [service]
        return [f"{service}-{number}" for number in range(1, self._replicas + 1)]

    async def _make_databases(self) -> None:
        names = [*SERVICES, "broker"]
        await self._postgres.ensure_databases(
            {name: self._state.secret(f"database-{name}") for name in names}
        )

    def _database_url(self, name: str) -> str:
        password = self._state.secret(f"database-{name}")
        return self._postgres.url(name, role=name, password=password)

    def _mail_sink(self) -> Server:
        self._state.mail.mkdir(mode=0o700, exist_ok=True)
        address = f"127.0.0.1:{self._smtp_port}"
        arguments = (
            "simulators.mail", "--address", address, "--dir", str(self._state.mail)
        )  # fmt: skip

        async def ready() -> None:
            await port_answers(self._smtp_port)

        return PythonServer(
            "mail",
            arguments,
            folder=self._working_folder(),
            environment={},
            ready=ready,
            grace_seconds=2.0,
        )

    def _service(self, service: str, name: str, needs: tuple[str, ...]) -> Part:
        grpc_port, http_port = self._port(f"{name}-grpc"), self._port(f"{name}-http")
        self._upstreams.setdefault(service, []).append(("127.0.0.1", grpc_port))
        pair = self._state.certificates.of(service)
        environment = {
            "MESH_DATABASE_URL": self._database_url(service),
            "MESH_BROKER_URL": self.broker_url,
            "MESH_REDIS_URL": self._valkey.url(),
            "MESH_GRPC_ADDRESS": f"127.0.0.1:{grpc_port}",
            "MESH_HTTP_ADDRESS": f"127.0.0.1:{http_port}",
            "MESH_TLS_CERT": str(pair.certificate),
            "MESH_TLS_KEY": str(pair.key),
            "MESH_TLS_CA": str(self._state.certificates.ca),
            "MESH_INTERNAL_ADDRESS": f"127.0.0.1:{self._internal_port}",
            "MESH_MERCHANTS": str(self._state.merchants),
            "MESH_PAGE_TOKEN_KEY": self._state.secret("page-tokens"),
            "MESH_LOG_LEVEL": os.environ.get("MESH_LOG_LEVEL", "info"),
            "MESH_OTLP_ENDPOINT": os.environ.get("MESH_OTLP_ENDPOINT", ""),
            # The edge is drained before the services are asked to end.
            "MESH_DRAIN_SECONDS": "0.1",
            "MESH_GRACE_SECONDS": "2",
            # The rates ship with the mesh, so that it works offline; they are as old as that.
            "MESH_RATE_MAX_AGE_SECONDS": "0",
        }
        if service == "notification":
            environment |= {
                "MESH_SMTP_URL": f"smtp://127.0.0.1:{self._smtp_port}",
                "MESH_MAIL_FROM": "orders@ordermesh.example",
            }

        async def ready() -> None:
            status = await http_status(http_port, "/readyz")
            if status != 200:
                raise NotReadyError(f"/readyz says {status}")

        server = PythonServer(
            name,
            (SERVICES[service], "all"),
            folder=self._working_folder(),
            environment=environment,
            ready=ready,
            grace_seconds=3.5,
        )
        return Part(server=server, address=f"127.0.0.1:{grpc_port}", stop_rank=1, needs=needs)

    def _working_folder(self) -> Path:
        folder = self._state.path / "work"
        folder.mkdir(mode=0o700, exist_ok=True)
        return folder

    def _edge_settings(self) -> dict[str, object]:
        certificates = self._state.certificates
        edge, internal = certificates.of("edge-server"), certificates.of("envoy")
        client = certificates.of("edge")
        otlp = urlsplit(os.environ.get("MESH_OTLP_ENDPOINT", ""))
        return {
            "edge": {
                "host": "127.0.0.1",
                "port": self._edge_port,
                "certificate": str(edge.certificate),
                "key": str(edge.key),
            },
            "internal": {
                "host": "127.0.0.1",
                "port": self._internal_port,
                "certificate": str(internal.certificate),
                "key": str(internal.key),
            },
            "admin": {"host": "127.0.0.1", "port": self._admin_port},
            "ca": str(certificates.ca),
            "upstream_client": {"certificate": str(client.certificate), "key": str(client.key)},
            "upstreams": self._upstreams,
            "descriptor": str(checkout() / "generated" / "ordermesh.binpb"),
            "jwks": str(self._state.token_key.jwks),
            "jwt": {"issuer": ISSUER, "audience": AUDIENCE},
            "access_log": str(self._state.log_of("access")),
            "otlp": {"host": otlp.hostname, "port": otlp.port or 4317} if otlp.hostname else None,
            # One machine's tests and benchmarks all come from one address.
            "limits": {
                "requests_per_second_per_client": 5_000,
                "burst_per_client": 10_000,
                "max_request_bytes": 65_536,
                "max_connections": 1_024,
            },
            "concurrency": 2,
        }

    # ------------------------------------------------------------------ is it up?

    async def _edge_answers(self) -> None:
        """Waits until every service answers a caller through the edge.

        Raises:
            MeshError: One does not, within `_EDGE_SECONDS_MAX`.
        """
        tls = ssl.create_default_context(cafile=str(self._state.certificates.ca))
        headers = {"Authorization": f"Bearer {self._state.token_key.token()}"}
        loop = asyncio.get_running_loop()
        deadline = loop.time() + _EDGE_SECONDS_MAX
        for path in _EDGE_CHECKS:
            while True:
                try:
                    status, body = await http_request(
                        self._edge_port, path, headers=headers, tls=tls
                    )
                    seen = f"{status} {body[-300:].decode(errors='replace')}"
                except NotReadyError as error:
                    status, seen = 0, str(error)
                if status == 200:
                    break
                if loop.time() > deadline:
                    raise MeshError(f"the edge does not answer GET {path}: {seen}")
                await asyncio.sleep(0.05)
