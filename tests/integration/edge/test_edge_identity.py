"""Who is let in, what the services learn of them, and what nobody can pretend."""

from __future__ import annotations

import base64
import datetime as dt
import hmac
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from meshctl.credentials import Certificates
from ordermesh.order.v1 import order_service_pb2 as order
from ordermesh.order.v1 import order_service_pb2_grpc as order_grpc
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from tests.eventually import eventually
from tests.integration.edge.harness import (
    Edge,
    an_envoy,
    reason_of,
    reason_over_grpc,
    settings_for,
    told,
)

ORDER = "/v1/merchants/default/orders/1"
RATE = rates.GetExchangeRateRequest(name="exchangeRates/USD-EUR")


def base64url(data: bytes) -> str:
    """As the parts of a token are written."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def signed_with_secret(claims: dict[str, Any], secret: bytes) -> str:
    """A token signed by HMAC; by hand, because pyjwt refuses a public key as a secret."""
    head = base64url(b'{"alg":"HS256","typ":"JWT"}')
    body = base64url(json.dumps(claims).encode())
    signature = hmac.digest(secret, f"{head}.{body}".encode(), "sha256")
    return f"{head}.{body}.{base64url(signature)}"


def forged(edge: Edge, kind: str) -> str:
    """A token that must not be taken."""
    now = dt.datetime.now(dt.UTC)
    good = edge.token()
    claims = jwt.decode(good, options={"verify_signature": False})
    if kind == "without an expiry":
        return edge.token(exp=None)
    if kind == "expired":
        return edge.token(iat=now - dt.timedelta(hours=2), exp=now - dt.timedelta(minutes=1))
    if kind == "not yet valid":
        return edge.token(nbf=now + dt.timedelta(minutes=5))
    if kind == "valid for too long":
        return edge.token(exp=now + dt.timedelta(hours=25))
    if kind == "for another audience":
        return edge.token(aud="billing")
    if kind == "of another issuer":
        return edge.token(iss="https://evil.example")
    if kind == "unsigned":
        return jwt.encode(claims, "", algorithm="none")
    if kind == "signed by another key":
        return jwt.encode(claims, ec.generate_private_key(ec.SECP256R1()), algorithm="ES256")
    if kind == "signed with the public key as a secret":
        public = edge.tokens._key().public_key()
        pem = public.public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return signed_with_secret(claims, pem)
    if kind == "with another's claims":
        head, _, signature = good.split(".")
        body = base64url(json.dumps(claims | {"merchant": "acme"}).encode())
        return f"{head}.{body}.{signature}"
    assert kind == "no token at all"
    return "x"


if TYPE_CHECKING:
    Bytes = grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]

KINDS = [
    "without an expiry",
    "expired",
    "not yet valid",
    "valid for too long",
    "for another audience",
    "of another issuer",
    "unsigned",
    "signed by another key",
    "signed with the public key as a secret",
    "with another's claims",
    "no token at all",
]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_token_that_is_not_good_is_answered_unauthenticated(edge: Edge, kind: str) -> None:
    """Over REST and over gRPC, with the same reason, and nothing about what was wrong."""
    token = forged(edge, kind)
    async with edge.client(token) as client, edge.channel() as channel:
        answer = await client.get(ORDER)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await order_grpc.OrderServiceStub(channel).GetOrder(
                order.GetOrderRequest(name="merchants/default/orders/1"),
                metadata=edge.metadata(token=token),
            )
    assert answer.status_code == 401
    assert answer.json()["code"] == 16
    assert reason_of(answer.json()) == "UNAUTHENTICATED"
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert reason_over_grpc(caught.value) == "UNAUTHENTICATED"


@pytest.mark.parametrize(
    "headers", [{}, {"authorization": "Basic YWRhOnB3"}, {"cookie": "token=x"}, {"x-api-key": "x"}]
)
async def test_a_call_without_a_bearer_token_is_answered_401(
    edge: Edge, headers: dict[str, str]
) -> None:
    """There is one way to say who one is."""
    async with edge.client(token=None) as client:
        assert (await client.get(ORDER, headers=headers)).status_code == 401
        assert (await client.get(f"{ORDER}?access_token={edge.token()}")).status_code == 401


async def test_a_service_learns_merchant_subject_and_roles_from_the_token(edge: Edge) -> None:
    """As plain words, whatever the caller says of themselves."""
    token = edge.token(merchant="acme", sub="bob", roles=["operator", "merchant"])
    async with edge.client(token) as client:
        seen = told((await client.get(ORDER)).json())
    assert seen["x-mesh-merchant"] == "acme"
    assert seen["x-mesh-subject"] == "bob"
    assert seen["x-mesh-roles"] == "merchant,operator"


@pytest.mark.parametrize(
    ("roles", "passed_on"),
    [(["merchant"], "merchant"), (["operator"], "operator"), (["auditor", "merchant"], "merchant")],
)
async def test_only_roles_that_the_edge_knows_are_passed_on(
    edge: Edge, roles: list[str], passed_on: str
) -> None:
    """A role that somebody's identity provider invents means nothing here."""
    async with edge.client(edge.token(roles=roles)) as client:
        assert told((await client.get(ORDER)).json())["x-mesh-roles"] == passed_on


@pytest.mark.parametrize("roles", [[], ["auditor"], "merchant", None, {"merchant": True}])
async def test_a_token_without_a_known_role_is_denied_every_method(edge: Edge, roles: Any) -> None:
    """Who is known and has no role may do nothing."""
    async with edge.client(edge.token(roles=roles)) as client:
        answer = await client.get(ORDER)
    assert answer.status_code == 403
    assert answer.json()["code"] == 7
    assert reason_of(answer.json()) == "METHOD_DENIED"


SPOOFED = {
    "x-mesh-merchant": "acme",
    "X-Mesh-Roles": "operator",
    "x-mesh-anything": "1",
    "x-jwt-sub": "admin",
    "x-envoy-original-path": "/evil",
    "x-envoy-upstream-rq-timeout-ms": "1",
    "x-envoy-retry-on": "5xx",
    "x-forwarded-client-cert": "DNS=order.mesh",
    "grpc-retry-pushback-ms": "1",
    "x-forwarded-for": "203.0.113.9",
    "cookie": "a=b",
}


async def test_headers_that_only_the_mesh_may_set_are_taken_off(edge: Edge) -> None:
    """Over REST and over gRPC the service sees the token's claims and nothing else."""
    async with edge.client() as client, edge.channel() as channel:
        over_rest = told((await client.get(ORDER, headers=SPOOFED)).json())
        found = await order_grpc.OrderServiceStub(channel).GetOrder(
            order.GetOrderRequest(name="merchants/default/orders/1"),
            metadata=edge.metadata(*((key.lower(), value) for key, value in SPOOFED.items())),
        )
    for seen in (over_rest, dict(found.labels)):
        assert seen["x-mesh-merchant"] == "default"
        assert seen["x-mesh-roles"] == "merchant"
        assert seen.get("x-envoy-original-path", ORDER) == ORDER
        for name in (
            "x-mesh-anything",
            "x-jwt-sub",
            "x-envoy-upstream-rq-timeout-ms",
            "x-envoy-retry-on",
            "x-forwarded-client-cert",
            "grpc-retry-pushback-ms",
            "x-forwarded-for",
            "cookie",
        ):
            assert name not in seen


async def test_the_token_goes_no_further_than_the_edge(edge: Edge) -> None:
    """A service cannot leak what it never had."""
    async with edge.client() as client:
        seen = told((await client.get(ORDER, headers={"cookie": "session=1"})).json())
    assert not {"authorization", "cookie", "x-forwarded-for"} & seen.keys()
    assert not any("Bearer" in value for value in seen.values())


def anything(channel: grpc.aio.Channel, path: str) -> Bytes:
    """A method by its path, whatever its messages are."""
    return channel.unary_unary(path)


@pytest.mark.parametrize(
    "path",
    [
        "/ordermesh.order.v1.OrderService/Sweep",
        "/ordermesh.ops.v1.OperationsService/ListDeadLetters",
        "/grpc.health.v1.Health/Check",
        "/grpc.channelz.v1.Channelz/GetServers",
        "/ordermesh.order.v1.OrderService/getorder",
        "/ordermesh.order.v1.OrderService/GetOrder/",
    ],
)
async def test_a_grpc_method_that_is_not_public_is_denied(edge: Edge, path: str) -> None:
    """What the table does not list does not exist for callers, whatever the services serve."""
    async with edge.channel() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await anything(channel, path)(b"", metadata=edge.metadata())
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert reason_over_grpc(caught.value) == "METHOD_DENIED"


# --- the internal listener --------------------------------------------------------------


async def test_a_service_may_call_another_and_is_known_by_its_certificate(edge: Edge) -> None:
    """Rates learns that the order service calls, and for which merchant."""
    spoofed = ("x-forwarded-client-cert", "DNS=payment.mesh")
    sent = (("x-mesh-merchant", "acme"), ("x-request-id", "r-1"), ("x-correlation-id", "c-1"))
    async with edge.internal_channel("order") as channel:
        answer = await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(
            RATE, metadata=(*sent, spoofed), timeout=5
        )
    seen = json.loads(answer.provider)
    assert seen["x-forwarded-client-cert"].split(";")[1:] == ["DNS=order.mesh"]
    assert "payment.mesh" not in seen["x-forwarded-client-cert"]
    assert seen["stub-peer"] == "edge.mesh"
    assert {key: seen[key] for key, _ in sent} == dict(sent)
    assert 1.5 < float(seen["stub-seconds-left"]) <= 2.0


@pytest.mark.parametrize("caller", ["payment", "notification", "rates", "edge", "envoy"])
async def test_a_service_that_the_table_does_not_name_may_not_call(edge: Edge, caller: str) -> None:
    """A certificate of the mesh alone opens nothing."""
    async with edge.internal_channel(caller) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(RATE, timeout=5)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_a_service_may_call_only_what_the_table_gives_it(edge: Edge) -> None:
    """The order service may ask for rates and nothing else, itself included."""
    async with edge.internal_channel("order") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await order_grpc.OrderServiceStub(channel).GetOrder(order.GetOrderRequest(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("certificate", ["none", "of another authority"])
async def test_nobody_enters_the_internal_listener_without_a_certificate_of_the_mesh(
    edge: Edge, tmp_path: Path, certificate: str
) -> None:
    """The handshake itself fails."""
    ca = edge.certificates.ca.read_bytes()
    credentials = grpc.ssl_channel_credentials(ca)
    if certificate != "none":
        strangers = Certificates(tmp_path)
        strangers.ensure()
        pair = strangers.of("order")
        credentials = grpc.ssl_channel_credentials(
            ca, pair.key.read_bytes(), pair.certificate.read_bytes()
        )
    async with grpc.aio.secure_channel(
        f"127.0.0.1:{edge.internal_port}",
        credentials,
        options=[("grpc.ssl_target_name_override", "envoy.mesh")],
    ) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(RATE, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_with_another_services_certificate_is_not_trusted(
    edge: Edge, tmp_path: Path
) -> None:
    """Whoever takes over an address cannot answer for the service that lived there."""
    stub = edge.order_stubs[0]
    wrong = {name: [stub.ports["rates"]] for name in ("order", "payment", "notification", "rates")}
    settings = settings_for(tmp_path, edge.certificates, edge.tokens, wrong)
    with an_envoy(tmp_path, edge.certificates, edge.tokens, settings) as other:
        async with other.client() as client:
            answer = await client.get(ORDER)
            right = await client.get("/v1/exchangeRates/USD-EUR")

        def refused() -> bool:
            return any(other.counters("^cluster.order.ssl.fail_verify_san$").values())

        assert await eventually(refused, describe="the certificate's name is refused")
    assert answer.status_code == 503
    assert right.status_code == 200
