"""The order service in this process: real gRPC, a real PostgreSQL, a broker in memory.

It is wired by the service's own `wiring.build`; a double stands in for the exchange rates,
where Envoy's internal listener would be.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import grpc

from chassis.broker import Message, Subscription
from chassis.broker.memory import MemoryBroker, MemoryServer, server_named
from chassis.database import Database
from chassis.events import Event, EventTypes
from chassis.grpc_server import serving
from order_svc.settings import OrderSettings
from order_svc.wiring import build
from ordermesh.order.v1 import order_events_pb2
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.order.v1 import order_service_pb2_grpc as pb_grpc
from ordermesh.payment.v1 import payment_events_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from tests.builders import NOON, a_create_order_request, merchants_file
from tests.eventually import eventually

ORDER_EVENTS = EventTypes(
    [
        order_events_pb2.OrderCreated,
        order_events_pb2.OrderConfirmed,
        order_events_pb2.OrderFailed,
        order_events_pb2.OrderCancellationRequested,
        order_events_pb2.OrderCancelled,
    ]
)

PATIENCE_SECONDS = 20.0


class Rates(rates_grpc.ExchangeRateServiceServicer):
    """Answers the rate that a test sets, or the error."""

    def __init__(self) -> None:
        self.rate = "1.0837"
        self.error: grpc.StatusCode | None = None
        self.asked: list[rates_pb2.GetExchangeRateRequest] = []

    async def GetExchangeRate(self, request: Any, context: Any) -> rates_pb2.ExchangeRate:
        """The rate of every pair."""
        self.asked.append(request)
        if self.error is not None:
            await context.abort(self.error, "not today")
        rate = rates_pb2.ExchangeRate(name=request.name, rate=self.rate, provider="ecb")
        rate.as_of_time.FromDatetime(NOON)
        return rate


class OrderApp:
    """A running order service, and everything that a test may want to do to it."""

    def __init__(
        self, channel: grpc.aio.Channel, broker: MemoryBroker, database: Database, rates: Rates
    ) -> None:
        self.channel = channel
        self.orders: pb_grpc.OrderServiceAsyncStub = pb_grpc.OrderServiceStub(channel)
        self.broker = broker
        self.database = database
        self.rates = rates

    # --- calls ------------------------------------------------------------------------

    async def create(
        self, request: pb.CreateOrderRequest | None = None, *headers: tuple[str, str]
    ) -> pb.Order:
        """Places an order as the merchant that the request names."""
        request = request or a_create_order_request()
        return await self.orders.CreateOrder(
            request, metadata=(*identity(request.parent), *headers), timeout=PATIENCE_SECONDS
        )

    async def get(self, name: str) -> pb.Order:
        """Reads an order as the merchant in its name."""
        return await self.orders.GetOrder(
            pb.GetOrderRequest(name=name), metadata=identity(name), timeout=PATIENCE_SECONDS
        )

    async def cancel(self, name: str, *, request_id: str = "", **fields: str) -> pb.Order:
        """Asks for an order to be undone."""
        request = pb.CancelOrderRequest(name=name, request_id=request_id or str(uuid4()), **fields)
        return await self.orders.CancelOrder(
            request, metadata=identity(name), timeout=PATIENCE_SECONDS
        )

    async def list_orders(self, parent: str = "merchants/default", **fields: Any) -> Any:
        """A page of a merchant's orders."""
        return await self.orders.ListOrders(
            pb.ListOrdersRequest(parent=parent, **fields), metadata=identity(parent)
        )

    async def timeline(self, name: str, **fields: Any) -> Any:
        """A page of an order's timeline."""
        return await self.orders.ListOrderEvents(
            pb.ListOrderEventsRequest(parent=name, **fields), metadata=identity(name)
        )

    # --- events -----------------------------------------------------------------------

    async def told(self, payload: Any) -> UUID:
        """Publishes an event of the payment service; answers its id."""
        event = Event(
            event_id=uuid4(),
            merchant="default",
            aggregate=payload.payment,
            version=1,
            occur_time=NOON,
            payload=payload,
            correlation_id="corr-payment",
        )
        await self.publish(event)
        return event.event_id

    async def publish(self, event: Event) -> None:
        """Publishes an event, as often as a test likes."""
        message = Message(event_id=event.event_id, type=event.type, body=event.encoded())
        await self.broker.publish([message])

    async def paid(self, order: pb.Order) -> None:
        """Payment reports the order's money as taken."""
        await self.told(
            payment_events_pb2.PaymentSucceeded(
                payment="merchants/default/payments/1", order=order.name, amount=order.total
            )
        )

    @property
    def heard(self) -> list[Event]:
        """What the order service has told others so far, in order; told twice is told once."""
        queue = self.broker.server.queues["others"]
        events = [ORDER_EVENTS.decode(held.message.body) for held in queue.ready]
        return list({event.event_id: event for event in events}.values())

    async def until_heard(self, *names: str) -> list[Event]:
        """Waits until exactly these events have been told, in any order of aggregates."""

        def types() -> list[str]:
            return sorted(event.type.rpartition(".")[2] for event in self.heard)

        await eventually(types, PATIENCE_SECONDS, until=lambda seen: seen == sorted(names))
        return self.heard

    async def until(self, order: pb.Order, state: pb.Order.State.ValueType) -> pb.Order:
        """Waits until an order is in a state."""
        return await eventually(
            lambda: self.get(order.name), PATIENCE_SECONDS, until=lambda seen: seen.state == state
        )

    async def count(self, table: str) -> int:
        """How many rows a table has."""
        async with self.database.reading() as connection:
            found: int = await connection.fetchval(f"SELECT count(*) FROM {table}")
        return found


def identity(name: str) -> tuple[tuple[str, str], ...]:
    """The headers of the merchant in a resource name."""
    return (("x-mesh-merchant", name.split("/")[1]), ("x-correlation-id", "corr-call"))


@asynccontextmanager
async def running(url: str, folder: Path, **settings: Any) -> AsyncIterator[OrderApp]:
    """Runs the service on a database until the block ends."""
    name = f"order-{uuid4().hex}"
    server: MemoryServer = server_named(name)
    broker = MemoryBroker(server)
    await broker.declare([Subscription(consumer="others", types=ORDER_EVENTS.names)])
    rates = Rates()  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
    async with AsyncExitStack() as stack:
        rates_server = grpc.aio.server()
        rates_grpc.add_ExchangeRateServiceServicer_to_server(rates, rates_server)
        rates_port = rates_server.add_insecure_port("127.0.0.1:0")
        await rates_server.start()
        stack.push_async_callback(rates_server.stop, None)
        configured = OrderSettings(
            database_url=url,
            broker_url=f"memory://{name}",
            insecure=True,
            merchants=merchants_file(folder),
            page_token_key="secret",
            internal_address=f"127.0.0.1:{rates_port}",
            **settings,
        )
        app = await stack.enter_async_context(build(configured))
        grpc_server = await stack.enter_async_context(serving(configured, app.servicers))
        await stack.enter_async_context(_at_work([b.run for b in app.background]))
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{grpc_server.port}")
        await stack.enter_async_context(channel)
        database = await stack.enter_async_context(
            Database.opened(url, application_name="onlooker", pool_max=2)
        )
        yield OrderApp(channel, broker, database, rates)


@asynccontextmanager
async def _at_work(work: Sequence[Any]) -> AsyncIterator[None]:
    """Runs the service's background tasks, and stops them in their order."""
    async with asyncio.TaskGroup() as group:
        tasks = []
        for run in work:
            stopping = asyncio.Event()
            tasks.append((group.create_task(run(stopping)), stopping))
        try:
            yield
        finally:
            for task, stopping in tasks:
                stopping.set()
                await asyncio.wait([task], timeout=PATIENCE_SECONDS)
