"""Calls to other services: what travels along with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis.context import CallContext, Caller, entered
from chassis.errors import DeadlineError
from chassis.grpc_client import channel_to_mesh
from chassis.settings import ServiceSettings
from meshctl.credentials import Certificates
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc

REQUEST = rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR")
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Rates(rates_grpc.ExchangeRateServiceServicer):
    """Remembers what came with each call, and who made it."""

    def __init__(self) -> None:
        self.headers: list[dict[str, Any]] = []
        self.names: list[tuple[str, ...]] = []
        self.seconds: list[float | None] = []

    async def GetExchangeRate(self, request: Any, context: Any) -> rates_pb2.ExchangeRate:
        """Any pair is worth one."""
        self.headers.append(dict(context.invocation_metadata()))
        self.seconds.append(context.time_remaining())
        found = context.auth_context().get("x509_subject_alternative_name", ())
        self.names.append(tuple(name.decode() for name in found))
        return rates_pb2.ExchangeRate(rate="1")


@asynccontextmanager
async def answering(credentials: grpc.ServerCredentials | None) -> AsyncIterator[tuple[Rates, int]]:
    """A server in Envoy's place: what answers, and its port."""
    rates = Rates()  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
    server = grpc.aio.server()
    rates_grpc.add_ExchangeRateServiceServicer_to_server(rates, server)
    port = (
        server.add_secure_port("127.0.0.1:0", credentials)
        if credentials is not None
        else server.add_insecure_port("127.0.0.1:0")
    )
    await server.start()
    try:
        yield rates, port
    finally:
        await server.stop(None)


def settings(port: int, **changes: Any) -> ServiceSettings:
    """Settings of a service that calls others by way of this port."""
    return ServiceSettings(
        internal_address=f"127.0.0.1:{port}",
        page_token_key="secret",
        **{"insecure": True, **changes},
    )


async def test_a_call_carries_on_what_it_belongs_to() -> None:
    """Correlation, trace, and the merchant for whom it is made."""
    call = CallContext(
        correlation_id="corr-1", traceparent=TRACE, caller=Caller(merchant="acme", subject="ada")
    )
    async with answering(None) as (rates, port), channel_to_mesh(settings(port)) as channel:
        with entered(call):
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(REQUEST)
    (headers,) = rates.headers
    assert headers["x-correlation-id"] == "corr-1"
    assert headers["traceparent"] == TRACE
    assert headers["x-mesh-merchant"] == "acme"


async def test_a_call_outside_of_any_carries_nothing() -> None:
    """A sweeper belongs to nobody."""
    async with answering(None) as (rates, port), channel_to_mesh(settings(port)) as channel:
        await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(REQUEST)
    (headers,) = rates.headers
    assert not {"x-correlation-id", "traceparent", "x-mesh-merchant"} & headers.keys()


async def test_what_a_caller_gives_along_is_kept() -> None:
    """And a trace that is being traced is not replaced."""
    async with answering(None) as (rates, port), channel_to_mesh(settings(port)) as channel:
        with entered(CallContext(correlation_id="corr-1", traceparent=TRACE)):
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(
                REQUEST, metadata=(("traceparent", "00-own-span-01"), ("x-own", "1"))
            )
    (headers,) = rates.headers
    assert (headers["traceparent"], headers["x-own"]) == ("00-own-span-01", "1")
    assert headers["x-correlation-id"] == "corr-1"


@pytest.mark.parametrize(
    ("has_left", "asks_for", "given"),
    [(None, None, None), (None, 20, 20), (10, None, 10), (10, 20, 10), (20, 10, 10)],
)
async def test_a_call_gets_no_more_time_than_its_own_caller_has(
    has_left: float | None, asks_for: float | None, given: float | None
) -> None:
    """Less what the hop needs; what nobody waits for any more is not gone on with."""
    now = asyncio.get_running_loop().time()
    call = CallContext(deadline=None if has_left is None else now + has_left)
    async with answering(None) as (rates, port), channel_to_mesh(settings(port)) as channel:
        with entered(call):
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(
                REQUEST, timeout=asks_for
            )
    (seconds,) = rates.seconds
    if given is None:
        assert seconds is None
    else:
        assert seconds is not None
        assert given / 2 < seconds < given + 0.1


async def test_a_call_whose_callers_time_is_over_is_not_made() -> None:
    """It fails as one that took too long."""
    call = CallContext(deadline=asyncio.get_running_loop().time())
    async with answering(None) as (rates, port), channel_to_mesh(settings(port)) as channel:
        with entered(call), pytest.raises(DeadlineError):
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(REQUEST)
    assert rates.headers == []


async def test_a_service_shows_its_certificate_and_expects_envoys(tmp_path: Path) -> None:
    """Both sides know whom they talk to."""
    certificates = Certificates(tmp_path / "certificates")
    certificates.ensure()
    envoy, order = certificates.of("envoy"), certificates.of("order")
    credentials = grpc.ssl_server_credentials(
        [(envoy.key.read_bytes(), envoy.certificate.read_bytes())],
        root_certificates=certificates.ca.read_bytes(),
        require_client_auth=True,
    )
    secured = {
        "insecure": False,
        "tls_cert": order.certificate,
        "tls_key": order.key,
        "tls_ca": certificates.ca,
    }
    async with answering(credentials) as (rates, port):
        async with channel_to_mesh(settings(port, **secured)) as channel:
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(REQUEST)
        assert rates.names == [("order.mesh",)]
        async with channel_to_mesh(
            settings(port, internal_name="payment.mesh", **secured)
        ) as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(
                    REQUEST, timeout=10
                )
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
