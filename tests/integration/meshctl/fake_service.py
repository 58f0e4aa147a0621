"""A service that knows nothing of orders: ready over HTTP, and mutual TLS with health over gRPC.

The supervisor's tests run four of these, so that what they show is the supervisor's doing. Any
method is answered with an empty message, which every read of the edge's check takes.
"""

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc import aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

_SERVICES = (
    "ordermesh.order.v1.OrderService",
    "ordermesh.payment.v1.PaymentService",
    "ordermesh.notification.v1.NotificationService",
    "ordermesh.rates.v1.ExchangeRateService",
)


class AnswersEverything(grpc.GenericRpcHandler):
    """Takes any unary method and answers an empty message."""

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[bytes, bytes] | None":
        """Leaves health to its own servicer."""
        if "grpc.health" in handler_call_details.method:
            return None

        async def answer(request: bytes, context: object) -> bytes:
            del request, context
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


async def serve() -> None:
    """Serves until SIGTERM."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    server = aio.server()
    servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_generic_rpc_handlers((AnswersEverything(),))
    read: Callable[[str], bytes] = lambda name: Path(os.environ[name]).read_bytes()  # noqa: E731
    credentials = grpc.ssl_server_credentials(
        [(read("MESH_TLS_KEY"), read("MESH_TLS_CERT"))],
        root_certificates=read("MESH_TLS_CA"),
        require_client_auth=True,
    )
    server.add_secure_port(os.environ["MESH_GRPC_ADDRESS"], credentials)
    await server.start()
    for service in _SERVICES:
        await servicer.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
        await writer.drain()
        writer.close()

    host, _, port = os.environ["MESH_HTTP_ADDRESS"].rpartition(":")
    async with await asyncio.start_server(http, host, int(port)):
        await stopping.wait()
    await server.stop(0.5)


def main() -> None:
    """Runs the service, or ends at once when the test wants it to."""
    if os.environ["MESH_TLS_CERT"].endswith(f"{os.environ.get('FAKE_FAILS', '-')}.pem"):
        raise SystemExit("the environment is not right: a fake says so")
    asyncio.run(serve())
