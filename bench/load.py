"""The load: clients that place one order after another, in a process of their own.

`python -m bench.load JSON` with the keys of `Load`; prints the outcome as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import uvloop

from ordermesh.common.v1.money_pb2 import Money
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.order.v1 import order_service_pb2_grpc


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to place, and where.

    Attributes:
        kind: `grpc`, `rest` (the mesh's edge) or `baseline`.
        target: `host:port` for gRPC, a URL otherwise.
        orders: How many, over all clients.
        clients: How many at once.
        headers: Metadata of every call.
        ca: The authority to trust; none for plain text.
        certificate: Client certificate and key, where mutual TLS asks for one.
        server_name: The name in the server's certificate, where it is not the host's.
    """

    kind: str
    target: str
    orders: int
    clients: int = 16
    headers: dict[str, str] = field(default_factory=dict)
    ca: str = ""
    certificate: tuple[str, str] | None = None
    server_name: str = ""


@dataclass(frozen=True, slots=True)
class Placed:
    """How it went: times in seconds."""

    orders: int
    failed: int
    began: float
    seconds: float
    p50: float
    p99: float


def request() -> pb.CreateOrderRequest:
    """One order of two lines."""
    return pb.CreateOrderRequest(
        parent="merchants/default",
        order=pb.Order(
            customer=pb.Customer(customer_id="cust-42", email="ada@example.com", locale="en"),
            currency_code="EUR",
            lines=[
                pb.OrderLine(
                    sku=sku,
                    title=title,
                    quantity=quantity,
                    unit_price=Money(currency_code="EUR", minor_units=price),
                )
                for sku, title, quantity, price in (
                    ("TEA-001", "Darjeeling 100 g", 2, 1250),
                    ("CUP-007", "Cup, blue", 1, 990),
                )
            ],
        ),
        payment_method="pm_card_visa",
        request_id=str(uuid.uuid4()),
    )


async def place(load: Load) -> Placed:
    """Places the orders."""
    latencies: list[float] = []
    failed = 0
    remaining = load.orders

    async def client(once: Callable[[], Awaitable[None]]) -> None:
        nonlocal remaining, failed
        while remaining > 0:
            remaining -= 1
            begun = time.perf_counter()
            try:
                await once()
            except (grpc.aio.AioRpcError, httpx.HTTPError) as error:
                failed += 1
                sys.stderr.write(f"{error!r}\n"[:500])
            latencies.append(time.perf_counter() - begun)

    channels: list[grpc.aio.Channel] = []
    sessions: list[httpx.AsyncClient] = []

    def caller() -> Callable[[], Awaitable[None]]:
        if load.kind == "grpc":
            channels.append(_channel(load, len(channels)))
            stub = order_service_pb2_grpc.OrderServiceStub(channels[-1])
            metadata = tuple(load.headers.items())

            async def over_grpc() -> None:
                await stub.CreateOrder(request(), metadata=metadata, timeout=30)

            return over_grpc
        sessions.append(httpx.AsyncClient(verify=load.ca or False, headers=load.headers))
        session = sessions[-1]

        async def over_http() -> None:
            answer = await session.post(load.target, **_body(load.kind), timeout=30)
            answer.raise_for_status()

        return over_http

    calls = [caller() for _ in range(load.clients)]
    began_wall, began = time.time(), time.perf_counter()
    await asyncio.gather(*(client(once) for once in calls))
    seconds = time.perf_counter() - began
    for channel in channels:
        await channel.close()
    for session in sessions:
        await session.aclose()
    latencies.sort()
    return Placed(
        orders=load.orders - failed,
        failed=failed,
        began=began_wall,
        seconds=seconds,
        p50=latencies[len(latencies) // 2],
        p99=latencies[int(len(latencies) * 0.99)],
    )


def _channel(load: Load, number: int) -> grpc.aio.Channel:
    # Without an option of its own, gRPC would give all clients one connection.
    options: list[tuple[str, int | str]] = [("mesh.client", number)]
    if not load.ca:
        return grpc.aio.insecure_channel(load.target, options=options)
    if load.server_name:
        options.append(("grpc.ssl_target_name_override", load.server_name))
    certificate, key = (
        (Path(load.certificate[0]).read_bytes(), Path(load.certificate[1]).read_bytes())
        if load.certificate
        else (None, None)
    )
    credentials = grpc.ssl_channel_credentials(Path(load.ca).read_bytes(), key, certificate)
    return grpc.aio.secure_channel(load.target, credentials, options=options)


def _body(kind: str) -> dict[str, Any]:
    if kind == "baseline":
        return {
            "json": {
                "customer_id": "cust-42",
                "currency": "EUR",
                "lines": [
                    {"sku": "TEA-001", "quantity": 2, "unit_minor": 1250},
                    {"sku": "CUP-007", "quantity": 1, "unit_minor": 990},
                ],
            }
        }
    return {
        "headers": {"idempotency-key": str(uuid.uuid4())},
        "json": {
            "order": {
                "customer": {"customerId": "cust-42", "email": "ada@example.com", "locale": "en"},
                "currencyCode": "EUR",
                "lines": [
                    {
                        "sku": sku,
                        "title": title,
                        "quantity": quantity,
                        "unitPrice": {"currencyCode": "EUR", "minorUnits": price},
                    }
                    for sku, title, quantity, price in (
                        ("TEA-001", "Darjeeling 100 g", 2, "1250"),
                        ("CUP-007", "Cup, blue", 1, "990"),
                    )
                ],
            },
            "paymentMethod": "pm_card_visa",
        },
    }


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(place(Load(**json.loads(sys.argv[1])))))))
