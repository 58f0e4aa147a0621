"""What reaches which service, as what, and how its answer comes back."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from google.protobuf import descriptor_pb2

from ordermesh.order.v1 import order_service_pb2 as order
from ordermesh.order.v1 import order_service_pb2_grpc as order_grpc
from tests.eventually import eventually
from tests.integration.edge.harness import (
    ROOT,
    Edge,
    details_of,
    reason_of,
    sent_raw,
    status_of,
    told,
)

ORDERS = "/v1/merchants/default/orders"
ORDER = f"{ORDERS}/0190a0a0-0000-7000-8000-000000000001"
BUF = Path(sys.executable).with_name("buf")


def public_methods() -> list[str]:
    """The gRPC paths of all public methods."""
    files = descriptor_pb2.FileDescriptorSet.FromString(
        (ROOT / "generated" / "ordermesh.binpb").read_bytes()
    )
    return [
        f"/{file.package}.{service.name}/{method.name}"
        for file in files.file
        for service in file.service
        if file.package.startswith("ordermesh.")
        for method in service.method
    ]


@pytest.mark.parametrize("path", public_methods())
async def test_every_public_method_reaches_its_service_over_grpc(edge: Edge, path: str) -> None:
    """None is forgotten on its way through routes, permissions and clusters."""
    async with edge.channel() as channel:
        status = await status_of(channel, path, edge.metadata())
    assert status == "ok"


@pytest.mark.parametrize(
    ("path", "service"),
    [
        (ORDER, "order.mesh"),
        ("/v1/merchants/default/payments/1", "payment.mesh"),
        ("/v1/merchants/default/notifications/1", "notification.mesh"),
        ("/v1/exchangeRates/USD-EUR", "rates.mesh"),
    ],
)
async def test_a_rest_call_reaches_the_service_of_its_path(
    edge: Edge, path: str, service: str
) -> None:
    """Each service is behind its own cluster, reached with the edge's certificate."""
    async with edge.client() as client:
        answer = await client.get(path)
    assert answer.status_code == 200
    seen = told(answer.json())
    assert seen["stub-service"] == service
    assert seen["stub-peer"] == "edge.mesh"


async def test_rest_and_grpc_answer_the_same_order_on_one_port(edge: Edge) -> None:
    """The transcoder adds and loses nothing."""
    name = ORDER.removeprefix("/v1/")
    async with edge.client() as client, edge.channel() as channel:
        over_rest = (await client.get(ORDER)).json()
        stub = order_grpc.OrderServiceStub(channel)
        over_grpc = await stub.GetOrder(order.GetOrderRequest(name=name), metadata=edge.metadata())
    assert over_rest["name"] == over_grpc.name == name
    assert over_rest["state"] == order.Order.State.Name(over_grpc.state) == "CONFIRMED"


async def test_rest_json_has_camel_case_names_text_for_64_bits_and_zero_values(edge: Edge) -> None:
    """A zero amount and an empty list are answers, so they are printed."""
    async with edge.client() as client:
        found = (await client.get(ORDER)).json()
        listed = (await client.get(ORDERS)).json()
    assert found["total"] == {"currencyCode": "EUR", "minorUnits": "0"}
    assert found["paymentState"] == "PAYMENT_STATE_UNSPECIFIED"
    assert listed == {"orders": [], "nextPageToken": ""}


async def test_a_large_answer_passes(edge: Edge) -> None:
    """A page of a thousand orders fits, far over every buffer on its way."""
    async with edge.client() as client:
        answer = await client.get(f"{ORDERS}?pageSize=1000")
    assert answer.status_code == 200
    assert len(answer.json()["orders"]) == 1000
    assert len(answer.content) > 1_000_000


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/nope"),
        ("GET", "/"),
        ("GET", "/V1/merchants/default/orders"),
        ("PUT", ORDER),
        ("DELETE", ORDER),
        ("OPTIONS", ORDER),
        ("GET", f"{ORDER}:cancel"),
        ("GET", f"{ORDER}:frob"),
        ("POST", f"{ORDER}:frob"),
        ("POST", "/ordermesh.order.v1.OrderService/GetOrder"),
    ],
)
async def test_an_unknown_path_or_verb_is_answered_404_as_json(
    edge: Edge, method: str, path: str
) -> None:
    """REST callers get google.rpc.Status from the edge as they do from the services."""
    async with edge.client() as client:
        answer = await client.request(method, path)
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["code"] == 5
    assert reason_of(answer.json()) == "ROUTE_NOT_FOUND"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("//v1//merchants/default/orders/1", 200),
        ("/v1/x/../merchants/default/orders/1", 200),
        ("/v1/x/%2e%2e/merchants/default/orders/1", 200),
        ("/v1/merchants/default/orders/..%2f1", 400),
        ("/v1/merchants/default/orders/a%5cb", 400),
        ("/v1/merchants/default/orders/a%00b", 400),
        ("/v1/merchants/default/..;/orders/1", 404),
    ],
)
async def test_a_crooked_path_is_straightened_or_refused(
    edge: Edge, path: str, status: int
) -> None:
    """No spelling of a path gets past the table of routes, and none breaks anything."""
    request = f"GET {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {edge.token()}\r\n"
    answer = await sent_raw(edge, f"{request}connection: close\r\n\r\n".encode())
    assert answer.split(b"\r\n")[0].split(b" ")[1].decode() == str(status)
    if status == 200:
        body = json.loads(answer[answer.index(b"{") : answer.rindex(b"}") + 1])
        assert body["name"] == "merchants/default/orders/1"


async def test_a_host_that_is_not_ours_is_answered_404(edge: Edge) -> None:
    """Only the names that the settings list are served."""
    async with edge.client() as client:
        answer = await client.get(ORDER, headers={"host": "evil.example"})
    assert answer.status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "body", "told_of"),
    [
        ("GET", f"{ORDERS}?nope=1", None, "nope"),
        ("GET", f"{ORDERS}?pageSize=many", None, "many"),
        ("POST", ORDERS, b'{"order": {"lines": [', "Unexpected end"),
        ("POST", ORDERS, b'{"order": {"currencyCode": 5}}', "order.currency_code"),
        ("POST", ORDERS, b'{"order": {"total": {"minorUnits": "1.5"}}}', "1.5"),
        ("POST", ORDERS, b'{"order": {"total": {"minorUnits": 9223372036854775808}}}', ""),
        ("POST", ORDERS, b'{"order": {"captureMethod": "automatic"}}', "automatic"),
        ("POST", ORDERS, b'{"parent": "merchants/acme"}', "parent"),
        ("POST", ORDERS, b"[" * 300, ""),
        ("POST", ORDERS, b'{"paymentMethod": "\xff\xfe"}', ""),
    ],
)
async def test_what_cannot_be_read_is_answered_400_and_says_where(
    edge: Edge, method: str, path: str, body: bytes | None, told_of: str
) -> None:
    """Malformed JSON and parameters end at the edge, with a hint."""
    async with edge.client() as client:
        answer = await client.request(method, path, content=body)
    assert answer.status_code == 400
    assert answer.json()["code"] == 3
    assert reason_of(answer.json()) == "MALFORMED_REQUEST"
    assert told_of in answer.json()["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{ORDER}?name=merchants/acme/orders/1"),
        ("GET", f"{ORDER}?name="),
        ("GET", f"{ORDER}?n%61me=merchants/acme/orders/1"),
        ("GET", f"{ORDERS}?pageSize=1&parent=merchants/acme"),
        ("GET", f"{ORDERS}?pageSize=1&%70%61re%6Et=merchants/acme"),
        ("POST", f"{ORDERS}?parent=merchants/acme"),
        ("POST", f"{ORDER}:cancel?name=merchants/acme/orders/1"),
    ],
)
async def test_a_query_that_says_what_the_path_says_is_refused(
    edge: Edge, method: str, path: str
) -> None:
    """The transcoder would take the query's value, and the access log would show the path's."""
    async with edge.client() as client:
        answer = await client.request(method, path, json={} if method == "POST" else None)
    assert answer.status_code == 400
    assert answer.json()["code"] == 3
    assert reason_of(answer.json()) == "MALFORMED_REQUEST"
    assert "path" in answer.json()["message"]


async def test_a_query_may_say_a_name_inside_a_filter(edge: Edge) -> None:
    """Only the parameter's own name counts, not what its value holds."""
    async with edge.client() as client:
        payments = "/v1/merchants/default/payments"
        answer = await client.get(payments, params={"filter": "name=1&parent=2"})
        raw = await client.get(f"{payments}?filter=name=1")
    assert (answer.status_code, raw.status_code) == (200, 200)


async def test_an_unknown_field_in_a_body_is_dropped_in_silence(edge: Edge) -> None:
    """Envoy has no way to refuse it; that it is so is written down, and seen here."""
    async with edge.client() as client:
        answer = await client.post(ORDERS, json={"order": {"nope": 1}, "nope": {}})
    assert answer.status_code == 200


async def test_an_error_of_a_service_keeps_its_details_over_rest(edge: Edge) -> None:
    """Status, reason and wait arrive as the service said them."""
    async with edge.client() as client:
        missing = await client.get(f"{ORDERS}/missing")
        busy = await client.get(f"{ORDERS}/busy")
    assert missing.status_code == 404
    assert missing.json()["message"] == "no such order"
    assert reason_of(missing.json()) == "ORDER_NOT_FOUND"
    assert busy.status_code == 429
    assert details_of(busy.json(), "RetryInfo")["retryDelay"] == "7s"
    assert busy.headers["retry-after"] == "7"


async def test_an_idempotency_key_reaches_the_service_and_a_replay_is_told(edge: Edge) -> None:
    """Over REST both are headers; over gRPC they are metadata; the stub is asked thrice."""
    key = str(uuid.uuid4())
    replayed = []
    async with edge.client() as client, edge.channel() as channel:
        # Two replicas with a memory each: three calls meet one of them again.
        for _ in range(3):
            answer = await client.post(ORDERS, json={}, headers={"Idempotency-Key": key})
            assert told(answer.json())["idempotency-key"] == key
            replayed.append(answer.headers.get("idempotency-replayed"))
        stub = order_grpc.OrderServiceStub(channel)
        calls: list[str | bytes | None] = []
        for _ in range(3):
            call = stub.CreateOrder(
                order.CreateOrderRequest(), metadata=edge.metadata(("idempotency-key", key))
            )
            calls.append((await call.initial_metadata()).get("idempotency-replayed"))
            assert (await call).labels["idempotency-key"] == key
    assert replayed[0] is None
    assert "true" in replayed[1:]
    assert "true" in calls


async def test_the_edge_gives_each_request_its_own_id_and_lets_the_callers_id_pass(
    edge: Edge,
) -> None:
    """x-request-id is ours, in the answer and in the service; x-correlation-id is theirs."""
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"x-request-id": "mine", "x-correlation-id": "basket-7", "traceparent": trace}
    async with edge.client() as client:
        answer = await client.get(ORDER, headers=headers)
    seen = told(answer.json())
    assert str(uuid.UUID(answer.headers["x-request-id"])) == seen["x-request-id"]
    assert seen["x-correlation-id"] == "basket-7"
    assert seen["traceparent"] == trace


async def test_reflection_needs_no_token_and_lists_every_public_service(edge: Edge) -> None:
    """`buf curl`, which learns the contracts from the port itself, can list and call."""
    base = [str(BUF), "curl", "--protocol", "grpc", "--cacert", str(edge.certificates.ca)]

    async def run(*arguments: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run, [*base, *arguments], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    listed = await run("--list-methods", edge.url)
    for path in public_methods():
        assert path.removeprefix("/") in listed
    answered = await run(
        "-H",
        f"authorization: Bearer {edge.token()}",
        "-d",
        '{"name": "merchants/default/orders/1"}',
        f"{edge.url}/ordermesh.order.v1.OrderService/GetOrder",
    )
    assert json.loads(answered)["state"] == "CONFIRMED"


async def test_healthz_is_answered_without_a_token_and_not_logged(edge: Edge) -> None:
    """A load balancer asks every second; that is no news."""
    async with edge.client(token=None) as client:
        answer = await client.get("/healthz")
        assert answer.status_code == 200
        marker = (await client.get(f"{ORDER}?after=healthz")).headers["x-request-id"]
    lines = await eventually(
        edge.access_log, until=lambda lines: any(line["request_id"] == marker for line in lines)
    )
    assert "/healthz" not in {line["path"] for line in lines}


@pytest.mark.parametrize("protocol", ["h2", "http/1.1"])
async def test_both_protocols_are_negotiated(edge: Edge, protocol: str) -> None:
    """HTTP/2 for gRPC, HTTP/1.1 for whoever asks for it."""
    async with edge.client(http2=protocol == "h2") as client:
        answer = await client.get(ORDER)
    assert answer.http_version == {"h2": "HTTP/2", "http/1.1": "HTTP/1.1"}[protocol]
    context = ssl.create_default_context(cafile=str(edge.certificates.ca))
    context.set_alpn_protocols([protocol])
    _, writer = await asyncio.open_connection("localhost", edge.port, ssl=context)
    agreed = writer.get_extra_info("ssl_object").selected_alpn_protocol()
    writer.close()
    assert agreed == protocol


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion")
async def test_old_tls_is_refused(edge: Edge) -> None:
    """Nothing older than TLS 1.2 gets in."""
    context = ssl.create_default_context(cafile=str(edge.certificates.ca))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await asyncio.open_connection("localhost", edge.port, ssl=context)


async def test_a_request_is_logged_as_json_without_secrets(edge: Edge) -> None:
    """Who, what, where and how long; no token, no query, no body."""
    token = edge.token(sub="logged-subject")
    async with edge.client(token) as client:
        answer = await client.get(
            f"{ORDERS}?pageToken=secret-page", headers={"x-correlation-id": "basket-8"}
        )
    request_id = answer.headers["x-request-id"]

    def found() -> dict[str, Any] | None:
        return next((line for line in edge.access_log() if line["request_id"] == request_id), None)

    line = await eventually(found, describe="the line in the access log")
    assert line is not None
    assert line["path"] == ORDERS
    assert line["rpc"] == "/ordermesh.order.v1.OrderService/ListOrders"
    assert (line["status"], line["cluster"], line["attempts"]) == (200, "order", 1)
    assert (line["merchant"], line["subject"]) == ("default", "logged-subject")
    assert (line["correlation_id"], line["listener"]) == ("basket-8", "edge")
    text = (edge.folder / "access.log").read_text()
    assert token not in text
    assert "secret-page" not in text


async def test_the_admin_server_answers_only_what_running_the_mesh_needs(edge: Edge) -> None:
    """The configuration and the off-switch are not for everyone on the machine."""

    async def status(path: str, method: str = "GET") -> int:
        async with httpx.AsyncClient() as client:
            url = f"http://127.0.0.1:{edge.admin_port}{path}"
            return (await client.request(method, url)).status_code

    for path in ("/ready", "/server_info", "/clusters?format=json", "/stats?filter=cluster.order"):
        assert await status(path) == 200
    assert await status("/stats/prometheus?usedonly") == 200
    for path in ("/config_dump", "/certs", "/logging"):
        assert await status(path) == 403
    assert await status("/quitquitquit", "POST") == 403
    assert await status("/runtime_modify?overload.x=1", "POST") == 403


async def test_calls_are_counted_by_method(edge: Edge) -> None:
    """Dashboards read `envoy_cluster_grpc_*` with clean names of services and methods."""
    async with edge.client() as client:
        await client.get(ORDER)
    text = edge.admin("/stats/prometheus?usedonly").text
    assert 'envoy_grpc_bridge_service="ordermesh_order_v1_OrderService"' in text
    assert 'envoy_grpc_bridge_method="GetOrder"' in text
