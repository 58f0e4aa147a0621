"""A real Envoy with the embedded rendering, stub services behind it, and clients of both."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx
import jwt
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from meshctl.credentials import AUDIENCE, ISSUER, Certificates, TokenKey
from tests.eventually import soon

ROOT = Path(__file__).resolve().parents[3]
RENDER = ROOT / "envoy" / "render.py"
PATIENCE_SECONDS = 20.0
GENEROUS = {"requests_per_second_per_client": 100_000, "burst_per_client": 100_000}


def free_port() -> int:
    """A loopback port that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Stub:
    """A process of stub services."""

    process: subprocess.Popen[str]
    ports: dict[str, int]

    def kill(self) -> None:
        """Ends it as a power cut would."""
        self.process.kill()
        self.process.wait(PATIENCE_SECONDS)

    def stop(self) -> None:
        """Lets it drain and end."""
        self.process.terminate()
        self.process.wait(PATIENCE_SECONDS)


@contextmanager
def a_stub(
    certificates: Path, services: Sequence[str], replica: str = "a", ports: Sequence[int] = ()
) -> Iterator[Stub]:
    """Runs stub services until the block ends."""
    chosen = dict(zip(services, ports or [free_port() for _ in services], strict=True))
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.integration.edge.stub",
            "--certificates",
            str(certificates),
            "--replica",
            replica,
            *(f"{service}={port}" for service, port in chosen.items()),
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'generated'}"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n", "the stub did not start"
        yield Stub(process, chosen)
    finally:
        process.kill()
        process.wait(PATIENCE_SECONDS)
        if process.stdout is not None:
            process.stdout.close()


@dataclass
class Edge:
    """A running Envoy and what its callers need."""

    folder: Path
    port: int
    internal_port: int
    admin_port: int
    certificates: Certificates
    tokens: TokenKey
    process: subprocess.Popen[bytes]
    order_stubs: list[Stub] = field(default_factory=list)

    @property
    def url(self) -> str:
        """The base of every REST path."""
        return f"https://localhost:{self.port}"

    def token(self, headers: dict[str, Any] | None = None, **changes: Any) -> str:
        """A good token, but for the changed claims; None takes a claim out."""
        now = dt.datetime.now(dt.UTC)
        claims: dict[str, Any] = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "ada",
            "merchant": "default",
            "roles": ["merchant"],
            "iat": now,
            "exp": now + dt.timedelta(hours=1),
        } | changes
        return jwt.encode(
            {name: value for name, value in claims.items() if value is not None},
            self.tokens._key(),
            algorithm="ES256",
            headers={"kid": self.tokens._key_id()} | (headers or {}),
        )

    def client(
        self, token: str | None = "", *, http2: bool = True, **options: Any
    ) -> httpx.AsyncClient:
        """A REST client with a good token, another one, or none (None)."""
        context = ssl.create_default_context(cafile=str(self.certificates.ca))
        headers = {} if token is None else {"authorization": f"Bearer {token or self.token()}"}
        return httpx.AsyncClient(
            base_url=self.url, verify=context, http2=http2, headers=headers, timeout=15, **options
        )

    def channel(self) -> grpc.aio.Channel:
        """A gRPC channel without retries of its own; the token goes with each call."""
        credentials = grpc.ssl_channel_credentials(self.certificates.ca.read_bytes())
        return grpc.aio.secure_channel(
            f"localhost:{self.port}", credentials, options=[("grpc.enable_retries", 0)]
        )

    def metadata(self, *more: tuple[str, str], token: str = "") -> tuple[tuple[str, str], ...]:
        """Call metadata with a good token, or another."""
        return (("authorization", f"Bearer {token or self.token()}"), *more)

    def internal_channel(self, service: str) -> grpc.aio.Channel:
        """A channel to the internal listener with a service's certificate."""
        pair = self.certificates.of(service)
        credentials = grpc.ssl_channel_credentials(
            self.certificates.ca.read_bytes(), pair.key.read_bytes(), pair.certificate.read_bytes()
        )
        options = [("grpc.ssl_target_name_override", "envoy.mesh"), ("grpc.enable_retries", 0)]
        return grpc.aio.secure_channel(
            f"127.0.0.1:{self.internal_port}", credentials, options=options
        )

    def admin(self, path: str, method: str = "GET") -> httpx.Response:
        """Asks the admin server."""
        return httpx.request(method, f"http://127.0.0.1:{self.admin_port}{path}", timeout=5)

    def counters(self, pattern: str) -> dict[str, int]:
        """Envoy's counters whose names match a regular expression."""
        listed = self.admin(f"/stats?filter={pattern}").text.splitlines()
        pairs = (line.split(": ") for line in listed if ": " in line)
        return {name: int(value) for name, value in pairs if value.isdigit()}

    def access_log(self) -> list[dict[str, Any]]:
        """The access log's lines so far."""
        text = (self.folder / "access.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.endswith("}")]

    def healthy(self, cluster: str) -> int:
        """How many hosts of a cluster are taken for healthy."""
        found = self.counters(f"^cluster.{cluster}.membership_healthy$")
        return next(iter(found.values()), 0)


def told(answer: dict[str, Any]) -> dict[str, str]:
    """What the stub saw of a call, from its answer as REST JSON."""
    if "labels" in answer:
        return dict(answer["labels"])
    for field_name in ("providerReference", "failureReason", "rounding", "provider"):
        if answer.get(field_name, "").startswith("{"):
            return dict(json.loads(answer[field_name]))
    raise AssertionError(f"this answer tells nothing: {answer}")


def details_of(status: dict[str, Any], kind: str) -> dict[str, Any]:
    """The detail of one type in an error as REST JSON; empty when it is not there."""
    for detail in status["details"]:
        if detail["@type"] == f"type.googleapis.com/google.rpc.{kind}":
            return dict(detail)
    return {}


def reason_of(status: dict[str, Any]) -> str:
    """The reason in an error as REST JSON."""
    info = details_of(status, "ErrorInfo")
    assert info["domain"] == "ordermesh"
    return str(info["reason"])


def reason_over_grpc(error: grpc.aio.AioRpcError) -> str:
    """The reason in the details of a gRPC error, which must repeat its code and message."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "ordermesh"
    return info.reason


async def status_of(
    channel: grpc.aio.Channel, path: str, metadata: tuple[tuple[str, str], ...]
) -> str:
    """Calls a method by its path with an empty message: "ok", or the error's message."""
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
    try:
        await call(b"", metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return str(error.details())
    return "ok"


async def sent_raw(edge: Edge, request: bytes) -> bytes:
    """Sends bytes as they are over HTTP/1.1 and answers all that comes back."""
    context = ssl.create_default_context(cafile=str(edge.certificates.ca))
    context.set_alpn_protocols(["http/1.1"])
    async with asyncio.timeout(PATIENCE_SECONDS):
        reader, writer = await asyncio.open_connection("localhost", edge.port, ssl=context)
        writer.write(request)
        answer = await reader.read()
        writer.close()
    return answer


def settings_for(
    folder: Path, certificates: Certificates, tokens: TokenKey, upstreams: dict[str, list[int]]
) -> dict[str, Any]:
    """Settings as meshctl writes them, with free ports."""
    folder.mkdir(parents=True, exist_ok=True)

    def pair(name: str) -> dict[str, str]:
        found = certificates.of(name)
        return {"certificate": str(found.certificate), "key": str(found.key)}

    return {
        "edge": {"host": "127.0.0.1", "port": free_port(), **pair("edge-server")},
        "internal": {"host": "127.0.0.1", "port": free_port(), **pair("envoy")},
        "admin": {"host": "127.0.0.1", "port": free_port()},
        "ca": str(certificates.ca),
        "upstream_client": pair("edge"),
        "upstreams": {
            name: [["127.0.0.1", port] for port in ports] for name, ports in upstreams.items()
        },
        "descriptor": str(ROOT / "generated" / "ordermesh.binpb"),
        "jwks": str(tokens.jwks),
        "jwt": {"issuer": ISSUER, "audience": AUDIENCE},
        "access_log": str(folder / "access.log"),
        "otlp": None,
        "limits": {**GENEROUS, "max_request_bytes": 65536, "max_connections": 1024},
        "concurrency": 1,
    }


def rendered(settings: dict[str, Any], folder: Path, place: str = "embedded") -> Path:
    """Envoy's configuration for these settings, rendered as meshctl does it."""
    asked, made = folder / "settings.json", folder / "envoy.yaml"
    asked.write_text(json.dumps(settings))
    subprocess.run(
        [sys.executable, str(RENDER), place, "--settings", str(asked), "--out", str(made)],
        check=True,
        cwd=ROOT,
    )
    return made


@contextmanager
def an_envoy(
    folder: Path, certificates: Certificates, tokens: TokenKey, settings: dict[str, Any]
) -> Iterator[Edge]:
    """Runs Envoy until the block ends."""
    config = rendered(settings, folder)
    process = subprocess.Popen(
        [
            str(Path(sys.executable).with_name("envoy")),
            "-c",
            str(config),
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "-l",
            "warning",
            "--file-flush-interval-msec",
            "100",
            "--log-path",
            str(folder / "envoy.log"),
        ]
    )
    edge = Edge(
        folder=folder,
        port=settings["edge"]["port"],
        internal_port=settings["internal"]["port"],
        admin_port=settings["admin"]["port"],
        certificates=certificates,
        tokens=tokens,
        process=process,
    )

    def ready() -> bool:
        assert process.poll() is None, (folder / "envoy.log").read_text()
        try:
            return edge.admin("/ready").status_code == 200
        except httpx.TransportError:
            return False

    try:
        soon(ready, PATIENCE_SECONDS, describe="Envoy is ready")
        yield edge
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE_SECONDS)


@contextmanager
def an_edge(folder: Path, *, replicas: int = 2, **limits: int) -> Iterator[Edge]:
    """Runs Envoy with stub services behind it, several of the order service."""
    folder.mkdir(parents=True, exist_ok=True)
    certificates = Certificates(folder / "tls")
    certificates.ensure()
    tokens = TokenKey(folder / "tls")
    tokens.ensure()
    with ExitStack() as stack:
        tls = folder / "tls"
        others = ["payment", "notification", "rates"]
        first = stack.enter_context(a_stub(tls, ["order", *others], "a"))
        orders = [first]
        orders += [
            stack.enter_context(a_stub(tls, ["order"], replica))
            for replica in "bcdef"[: replicas - 1]
        ]
        upstreams = {
            "order": [stub.ports["order"] for stub in orders],
            **{name: [first.ports[name]] for name in others},
        }
        settings = settings_for(folder, certificates, tokens, upstreams)
        settings["limits"] |= limits
        edge = stack.enter_context(an_envoy(folder, certificates, tokens, settings))
        edge.order_stubs = orders
        soon(
            lambda: edge.healthy("order") == replicas,
            PATIENCE_SECONDS,
            describe="every replica is healthy",
        )
        yield edge
