"""How much one caller may take: bytes, calls, time."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import grpc
import grpc.aio
import h2.config
import h2.connection
import h2.errors
import h2.events
import pytest

from ordermesh.order.v1 import order_service_pb2 as order
from ordermesh.order.v1 import order_service_pb2_grpc as order_grpc
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from tests.eventually import eventually
from tests.integration.edge.harness import (
    Edge,
    an_envoy,
    details_of,
    reason_of,
    reason_over_grpc,
    sent_raw,
    settings_for,
    told,
)

ORDERS = "/v1/merchants/default/orders"
ORDER = f"{ORDERS}/1"
NAME = ORDER.removeprefix("/v1/")


@pytest.fixture
def strict_edge(edge: Edge, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """An edge of its own that lets five calls pass, and one more each second."""
    folder = tmp_path_factory.mktemp("strict")
    ports = edge.order_stubs[0].ports
    settings = settings_for(
        folder, edge.certificates, edge.tokens, {name: [port] for name, port in ports.items()}
    )
    settings["limits"] |= {"requests_per_second_per_client": 1, "burst_per_client": 5}
    with an_envoy(folder, edge.certificates, edge.tokens, settings) as running:
        yield running


@pytest.mark.parametrize(("size", "http2"), [(70_000, True), (70_000, False), (1_000_000, False)])
async def test_a_body_over_64_kib_is_refused(edge: Edge, size: int, http2: bool) -> None:
    """413 over REST, INVALID_ARGUMENT over gRPC; trying again would not help."""
    async with edge.client(http2=http2) as client, edge.channel() as channel:
        answer = await client.post(ORDERS, json={"paymentMethod": "x" * size})
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await order_grpc.OrderServiceStub(channel).CreateOrder(
                order.CreateOrderRequest(payment_method="x" * size), metadata=edge.metadata()
            )
    assert answer.status_code == 413
    assert answer.json()["code"] == 3
    assert reason_of(answer.json()) == "REQUEST_TOO_LARGE"
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason_over_grpc(caught.value) == "REQUEST_TOO_LARGE"


async def test_a_much_larger_body_over_http2_is_answered_before_it_is_reset(edge: Edge) -> None:
    """The 413 comes whole, then NO_ERROR: stop sending. Some clients throw the answer away."""
    context = ssl.create_default_context(cafile=str(edge.certificates.ca))
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("localhost", edge.port, ssl=context)
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    head = [
        (":method", "POST"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", ORDERS),
        ("authorization", f"Bearer {edge.token()}"),
        ("content-type", "application/json"),
        ("content-length", "1000000"),
    ]
    client.send_headers(1, head)
    seen: list[h2.events.Event] = []
    try:
        async with asyncio.timeout(15):
            while not any(isinstance(event, h2.events.StreamReset) for event in seen):
                while (room := min(client.local_flow_control_window(1), 16_384)) > 0:
                    client.send_data(1, b"x" * room)
                writer.write(client.data_to_send())
                seen += client.receive_data(await reader.read(65_536))
    finally:
        writer.close()
    answered = [event for event in seen if isinstance(event, h2.events.ResponseReceived)]
    assert (b":status", b"413") in answered[0].headers
    assert [type(event) for event in seen[-2:]] == [h2.events.StreamEnded, h2.events.StreamReset]
    assert isinstance(seen[-1], h2.events.StreamReset)
    assert seen[-1].error_code == h2.errors.ErrorCodes.NO_ERROR


async def test_a_body_just_under_64_kib_passes(edge: Edge) -> None:
    """The limit is where it is said to be."""
    async with edge.client() as client:
        answer = await client.post(ORDERS, json={"paymentMethod": "x" * 65_400})
    assert answer.status_code == 200


async def test_too_many_or_too_large_headers_are_refused(edge: Edge) -> None:
    """64 headers and 16 KiB are enough for everyone."""
    head = f"GET {ORDER} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {edge.token()}\r\n"
    many = "".join(f"x-h{index}: 1\r\n" for index in range(70))
    for more in (many, f"x-big: {'x' * 17_000}\r\n", "x_score: 1\r\n"):
        answer = await sent_raw(edge, f"{head}{more}\r\n".encode())
        assert answer.split(b" ")[1] in {b"400", b"431"}


async def test_a_subject_over_its_limit_is_told_to_wait_and_others_are_not(
    strict_edge: Edge,
) -> None:
    """429 with retry-after over REST, RESOURCE_EXHAUSTED with RetryInfo over gRPC."""
    async with strict_edge.client(strict_edge.token(sub="greedy")) as client:
        answers = [await client.get(ORDER) for _ in range(12)]
    counted = Counter(answer.status_code for answer in answers)
    assert counted[200] in {5, 6}, "the burst, and what a second gives back"
    assert counted[429] == 12 - counted[200]
    refused = answers[-1]
    assert refused.headers["retry-after"] == "1"
    assert refused.json()["code"] == 8
    assert reason_of(refused.json()) == "RATE_LIMITED"
    assert details_of(refused.json(), "RetryInfo")["retryDelay"] == "1s"
    assert answers[0].headers["x-ratelimit-limit"] == "5"

    async with strict_edge.channel() as channel:
        stub = order_grpc.OrderServiceStub(channel)

        async def three_calls(subject: str) -> None:
            metadata = strict_edge.metadata(token=strict_edge.token(sub=subject))
            for _ in range(3):
                await stub.GetOrder(order.GetOrderRequest(name=NAME), metadata=metadata)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await three_calls("greedy")
        await three_calls("modest")
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert reason_over_grpc(caught.value) == "RATE_LIMITED"


async def test_guessing_tokens_uses_up_the_limit_of_the_address(strict_edge: Edge) -> None:
    """Ten times a subject's burst, then 429 before the token is even looked at."""
    async with strict_edge.client("not-a-token") as client:
        answers = await asyncio.gather(*(client.get(ORDER) for _ in range(80)))
    counted = Counter(answer.status_code for answer in answers)
    assert 50 <= counted[401] <= 65
    assert counted[429] == 80 - counted[401]


async def test_a_limited_health_check_still_works(strict_edge: Edge) -> None:
    """A load balancer that shares an address with a flood must not take the edge out."""
    async with strict_edge.client(token=None) as client:
        await asyncio.gather(*(client.get(ORDER) for _ in range(60)))
        assert (await client.get("/healthz")).status_code == 200


async def test_more_connections_than_allowed_are_refused_and_the_mesh_goes_on(
    edge: Edge, tmp_path: Path
) -> None:
    """A flood of connections at the edge leaves the internal listener and the admin alone."""
    ports = edge.order_stubs[0].ports
    settings = settings_for(
        tmp_path, edge.certificates, edge.tokens, {name: [port] for name, port in ports.items()}
    )
    settings["limits"]["max_connections"] = 8
    with an_envoy(tmp_path, edge.certificates, edge.tokens, settings) as small:
        held = [await asyncio.open_connection("127.0.0.1", small.port) for _ in range(8)]
        try:

            async def turned_away() -> bool:
                reader, writer = await asyncio.open_connection("127.0.0.1", small.port)
                try:
                    return await asyncio.wait_for(reader.read(1), 0.5) == b""
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True
                finally:
                    writer.close()

            assert await eventually(turned_away)
            assert small.admin("/ready").status_code == 200
            async with small.internal_channel("order") as channel:
                await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(
                    rates.GetExchangeRateRequest(name="exchangeRates/USD-EUR"), timeout=5
                )
        finally:
            for _, writer in held:
                writer.close()

        async def let_in() -> bool:
            async with small.client() as client:
                return (await client.get(ORDER)).status_code == 200

        assert await eventually(let_in)


async def test_a_client_that_resets_what_it_opens_is_cut_off(edge: Edge) -> None:
    """Rapid reset (CVE-2023-44487): a connection full of abandoned streams is ended."""
    context = ssl.create_default_context(cafile=str(edge.certificates.ca))
    context.set_alpn_protocols(["h2"])
    reader, writer = await asyncio.open_connection("localhost", edge.port, ssl=context)
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    head = [
        (":method", "GET"),
        (":scheme", "https"),
        (":authority", "localhost"),
        (":path", ORDER),
        ("authorization", f"Bearer {edge.token()}"),
    ]
    opened = 0
    try:
        async with asyncio.timeout(20):
            while opened < 5000 and not reader.at_eof():
                for _ in range(50):
                    stream = client.get_next_available_stream_id()
                    client.send_headers(stream, head, end_stream=True)
                    client.reset_stream(stream)
                    opened += 1
                writer.write(client.data_to_send())
                await writer.drain()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(65_536), 0.01)
    except ConnectionError:
        pass  # cut off while writing
    finally:
        writer.close()
    assert opened < 5000
    name = "http.edge.downstream_rq_too_many_premature_resets"
    await eventually(lambda: edge.counters(f"^{name}$").get(name) == 1)


# --- time -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "seconds"),
    [("GET", ORDER, 2), ("POST", ORDERS, 10), ("POST", f"{ORDER}:cancel", 10)],
)
async def test_a_service_knows_how_long_it_has_over_rest(
    edge: Edge, method: str, path: str, seconds: int
) -> None:
    """2 s for a read, 10 s for a mutation, though REST has no header for it."""
    async with edge.client() as client:
        answer = await client.request(method, path, json={} if method == "POST" else None)
    left = float(told(answer.json())["stub-seconds-left"])
    assert seconds - 0.5 < left <= seconds


@pytest.mark.parametrize(("asked", "least", "most"), [(1.0, 0.7, 1.0), (100.0, 1.5, 2.0)])
async def test_a_grpc_caller_may_ask_for_less_time_and_not_for_more(
    edge: Edge, asked: float, least: float, most: float
) -> None:
    """The caller's deadline travels, cut to the method's limit."""
    async with edge.channel() as channel:
        found = await order_grpc.OrderServiceStub(channel).GetOrder(
            order.GetOrderRequest(name=NAME), metadata=edge.metadata(), timeout=asked
        )
    assert least < float(found.labels["stub-seconds-left"]) <= most


async def test_a_read_that_takes_too_long_is_answered_in_time(edge: Edge) -> None:
    """504 over REST and DEADLINE_EXCEEDED over gRPC after two seconds, not after thirty."""

    async def over_grpc() -> grpc.aio.AioRpcError:
        async with edge.channel() as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await order_grpc.OrderServiceStub(channel).GetOrder(
                    order.GetOrderRequest(name="merchants/default/orders/sleep-30000"),
                    metadata=edge.metadata(),
                )
            return caught.value

    started = time.monotonic()
    async with edge.client() as client:
        answer, error = await asyncio.gather(client.get(f"{ORDERS}/sleep-30000"), over_grpc())
    assert time.monotonic() - started < 3
    assert answer.status_code == 504
    assert answer.json()["code"] == 4
    assert reason_of(answer.json()) == "DEADLINE_EXCEEDED"
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert reason_over_grpc(error) == "DEADLINE_EXCEEDED"
