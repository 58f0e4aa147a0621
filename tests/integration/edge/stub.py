"""Services of the real contracts that do what the request says, to put behind the edge.

Run as `python -m tests.integration.edge.stub --certificates DIR --replica a order=50051`.
Each answer tells what the service saw: the call's metadata (`x-mesh-merchant` and the
rest), the time it had left, and which replica answered.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from meshctl.credentials import Certificates
from ordermesh.common.v1 import money_pb2
from ordermesh.notification.v1 import notification_service_pb2 as notification
from ordermesh.notification.v1 import notification_service_pb2_grpc as notification_grpc
from ordermesh.order.v1 import order_service_pb2 as order
from ordermesh.order.v1 import order_service_pb2_grpc as order_grpc
from ordermesh.payment.v1 import payment_service_pb2 as payment
from ordermesh.payment.v1 import payment_service_pb2_grpc as payment_grpc
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc

NAMES = {
    "order": "ordermesh.order.v1.OrderService",
    "payment": "ordermesh.payment.v1.PaymentService",
    "notification": "ordermesh.notification.v1.NotificationService",
    "rates": "ordermesh.rates.v1.ExchangeRateService",
}

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


def seen(context: Context, service: str, replica: str) -> dict[str, str]:
    """What the service saw of a call, as text."""
    found = {
        str(key): value if isinstance(value, str) else value.hex()
        for key, value in context.invocation_metadata() or ()
    }
    left: float | None = context.time_remaining()  # None where there is no deadline
    found["stub-seconds-left"] = "" if left is None else f"{left:.3f}"
    found["stub-replica"] = replica
    peer = context.auth_context().get("x509_subject_alternative_name", ())
    found["stub-peer"] = ",".join(name.decode() for name in peer)
    found["stub-service"] = service
    return found


async def refuse(
    context: Context, code: grpc.StatusCode, message: str, reason: str, wait_seconds: int = 0
) -> None:
    """Ends a call as the real services do: a status with details."""
    status = status_pb2.Status(code=code.value[0], message=message)
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="ordermesh"))
    status.details.append(info)
    metadata: list[tuple[str, str | bytes]] = []
    if wait_seconds:
        wait = any_pb2.Any()
        delay = duration_pb2.Duration(seconds=wait_seconds)
        wait.Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        status.details.append(wait)
        metadata.append(("retry-after", str(wait_seconds)))
    metadata.append(("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(code, message, trailing_metadata=tuple(metadata))


async def act(word: str, context: Context, replica: str) -> None:
    """Does what the last part of a resource's name says, if it says something."""
    verb, _, argument = word.partition("-")
    if verb == "sleep":
        await asyncio.sleep(int(argument) / 1000)
    elif verb == "sleepon" and argument.startswith(replica):
        await asyncio.sleep(30)
    elif verb == "dieon" and argument == replica:
        os.kill(os.getpid(), signal.SIGKILL)
    elif verb == "missing":
        await refuse(context, grpc.StatusCode.NOT_FOUND, "no such order", "ORDER_NOT_FOUND")
    elif verb == "busy":
        await refuse(
            context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too much", "OVERLOADED", wait_seconds=7
        )
    elif verb == "awayon" and argument in (replica, "all"):
        await refuse(
            context, grpc.StatusCode.UNAVAILABLE, "away", "DEPENDENCY_UNAVAILABLE", wait_seconds=3
        )
    elif verb == "broken":
        raise RuntimeError("broken on request")


class Orders(order_grpc.OrderServiceServicer):
    """Orders that tell what was seen in their labels."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._keys: set[str] = set()

    async def CreateOrder(self, request: order.CreateOrderRequest, context: Context) -> order.Order:
        """Answers the order; the second time with one key, it says so."""
        await act(request.order.client_order_ref, context, self._replica)
        labels = seen(context, "order.mesh", self._replica)
        key = labels.get("idempotency-key", request.request_id)
        if key in self._keys:
            await context.send_initial_metadata((("idempotency-replayed", "true"),))
        self._keys.add(key)
        answer = order.Order()
        answer.CopyFrom(request.order)
        answer.name = f"{request.parent}/orders/0190a0a0-0000-7000-8000-000000000001"
        answer.labels.update(labels)
        return answer

    async def GetOrder(self, request: order.GetOrderRequest, context: Context) -> order.Order:
        """Answers an order of this name."""
        await act(request.name.rpartition("/")[2], context, self._replica)
        return order.Order(
            name=request.name,
            state=order.Order.State.CONFIRMED,
            total=money_pb2.Money(currency_code="EUR", minor_units=0),
            labels=seen(context, "order.mesh", self._replica),
        )

    async def ListOrders(
        self, request: order.ListOrdersRequest, context: Context
    ) -> order.ListOrdersResponse:
        """Answers page_size orders of about a kilobyte each."""
        one = order.Order(name=f"{request.parent}/orders/x", failure_reason="x" * 1000)
        return order.ListOrdersResponse(
            orders=[one] * request.page_size, next_page_token=request.page_token
        )

    async def CancelOrder(self, request: order.CancelOrderRequest, context: Context) -> order.Order:
        """Answers the order with its reason."""
        await act(request.reason, context, self._replica)
        return order.Order(
            name=request.name,
            cancel_reason=request.reason,
            labels=seen(context, "order.mesh", self._replica),
        )

    async def ListOrderEvents(
        self, request: order.ListOrderEventsRequest, context: Context
    ) -> order.ListOrderEventsResponse:
        """Answers one event that tells what was seen."""
        event = order.OrderEvent(
            correlation_id=json.dumps(seen(context, "order.mesh", self._replica))
        )
        return order.ListOrderEventsResponse(events=[event])


class Payments(payment_grpc.PaymentServiceServicer):
    """Payments that tell what was seen in their provider reference."""

    def __init__(self, replica: str) -> None:
        self._replica = replica

    async def GetPayment(
        self, request: payment.GetPaymentRequest, context: Context
    ) -> payment.Payment:
        """Answers a payment of this name."""
        await act(request.name.rpartition("/")[2], context, self._replica)
        told = json.dumps(seen(context, "payment.mesh", self._replica))
        return payment.Payment(name=request.name, provider_reference=told)

    async def ListPayments(
        self, request: payment.ListPaymentsRequest, context: Context
    ) -> payment.ListPaymentsResponse:
        """Answers an empty page."""
        return payment.ListPaymentsResponse()


class Notifications(notification_grpc.NotificationServiceServicer):
    """Notifications that tell what was seen in their failure reason."""

    def __init__(self, replica: str) -> None:
        self._replica = replica

    async def GetNotification(
        self, request: notification.GetNotificationRequest, context: Context
    ) -> notification.Notification:
        """Answers a notification of this name."""
        told = json.dumps(seen(context, "notification.mesh", self._replica))
        return notification.Notification(name=request.name, failure_reason=told)

    async def ListNotifications(
        self, request: notification.ListNotificationsRequest, context: Context
    ) -> notification.ListNotificationsResponse:
        """Answers an empty page."""
        return notification.ListNotificationsResponse()


class Rates(rates_grpc.ExchangeRateServiceServicer):
    """Rates that tell what was seen in their provider."""

    def __init__(self, replica: str) -> None:
        self._replica = replica

    async def ListCurrencies(
        self, request: rates.ListCurrenciesRequest, context: Context
    ) -> rates.ListCurrenciesResponse:
        """Answers an empty page."""
        return rates.ListCurrenciesResponse()

    async def GetExchangeRate(
        self, request: rates.GetExchangeRateRequest, context: Context
    ) -> rates.ExchangeRate:
        """Answers a rate of this name."""
        return rates.ExchangeRate(
            name=request.name,
            rate="1.25",
            provider=json.dumps(seen(context, "rates.mesh", self._replica)),
        )

    async def ConvertMoney(
        self, request: rates.ConvertMoneyRequest, context: Context
    ) -> rates.ConvertMoneyResponse:
        """Answers the same amount."""
        return rates.ConvertMoneyResponse(
            amount=request.amount, rounding=json.dumps(seen(context, "rates.mesh", self._replica))
        )


def server_of(service: str, port: int, replica: str, certificates: Certificates) -> grpc.aio.Server:
    """A server of one service that wants the edge's certificate, not yet started."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    if service == "order":
        order_grpc.add_OrderServiceServicer_to_server(Orders(replica), server)
    elif service == "payment":
        payment_grpc.add_PaymentServiceServicer_to_server(Payments(replica), server)
    elif service == "notification":
        notification_grpc.add_NotificationServiceServicer_to_server(Notifications(replica), server)
    else:
        rates_grpc.add_ExchangeRateServiceServicer_to_server(Rates(replica), server)
    reflection.enable_server_reflection([*NAMES.values(), reflection.SERVICE_NAME], server)
    pair = certificates.of(service)
    credentials = grpc.ssl_server_credentials(
        [(pair.key.read_bytes(), pair.certificate.read_bytes())],
        root_certificates=certificates.ca.read_bytes(),
        require_client_auth=True,
    )
    server.add_secure_port(f"127.0.0.1:{port}", credentials)
    return server


async def serve(ports: Mapping[str, int], replica: str, certificates: Certificates) -> None:
    """Serves until SIGTERM, then drains as the real services do."""
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    servers = []
    healths = []
    for service, port in ports.items():
        server = server_of(service, port, replica, certificates)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        await checks.set(NAMES[service], health_pb2.HealthCheckResponse.SERVING)
        await server.start()
        servers.append(server)
        healths.append(checks)
    print("serving", flush=True)  # noqa: T201  - the tests wait for this line
    await stopping.wait()
    for checks in healths:
        await checks.enter_graceful_shutdown()
    await asyncio.sleep(2.5)
    await asyncio.gather(*(server.stop(5) for server in servers))


def main() -> None:
    """Reads the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--certificates", type=Path, required=True)
    parser.add_argument("--replica", default="a")
    parser.add_argument("services", nargs="+", help="SERVICE=PORT")
    options = parser.parse_args()
    ports = {name: int(port) for name, _, port in (one.partition("=") for one in options.services)}
    asyncio.run(serve(ports, options.replica, Certificates(options.certificates)))


if __name__ == "__main__":
    main()
