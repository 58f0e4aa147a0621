"""The payment service as it runs, with a broker and a provider that a test holds."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import asyncpg
import grpc

from chassis.broker import Ack, Broker, Delivery, Limits, Subscription, Verdict, connect
from chassis.events import Event, EventTypes
from chassis.grpc_server import serving
from chassis.runtime import Background, Role
from ordermesh.payment.v1 import (
    payment_events_pb2,
    payment_service_pb2,
    payment_service_pb2_grpc,
)
from payment_svc.consumers import SUBSCRIPTION
from payment_svc.messages import split_payment_name
from payment_svc.settings import PaymentSettings
from payment_svc.wiring import build
from tests.builders import merchants_file
from tests.eventually import eventually
from tests.payments import FaultyGateway, message_of

TOLD = EventTypes(
    [
        payment_events_pb2.PaymentAuthorized,
        payment_events_pb2.PaymentSucceeded,
        payment_events_pb2.PaymentFailed,
        payment_events_pb2.PaymentVoided,
        payment_events_pb2.RefundSucceeded,
        payment_events_pb2.RefundFailed,
    ]
)

CONSUMING = frozenset({Role.CONSUME, Role.RELAY})
"""Charges, lets go, gives back and tells."""

LIMITS = Limits(retry_tiers_seconds=(0.1, 0.2))

ALL = CONSUMING | {Role.SWEEP}
"""The same, and resolves what is unknown."""


class PaymentService:
    """A database, a broker, a provider, and the service between them while it runs.

    Attributes:
        gateway: The provider; its ledger says what truly happened.
        events: Every event of the service, in the order in which others heard of it.
    """

    def __init__(self, settings: PaymentSettings, broker: Broker) -> None:
        self.settings = settings
        self.broker = broker
        self.gateway = FaultyGateway()
        self.events: list[Event] = []

    @classmethod
    @asynccontextmanager
    async def between(cls, database_url: str, folder: Path) -> AsyncIterator[PaymentService]:
        """A service that does not run yet, on an empty database and an empty broker."""
        url = f"memory://{secrets.token_hex(6)}"
        settings = PaymentSettings(
            database_url=database_url,
            broker_url=url,
            merchants=merchants_file(folder),
            page_token_key="for tests",
            insecure=True,
        )
        async with connect(url, name="test") as broker:
            service = cls(settings, broker)
            others = Subscription(consumer="others", types=TOLD.names)
            await broker.declare([SUBSCRIPTION, others])
            stopping = asyncio.Event()
            hearing = asyncio.create_task(broker.consume(others, service._hear, stopping=stopping))
            try:
                yield service
            finally:
                stopping.set()
                await hearing

    async def _hear(self, deliveries: Sequence[Delivery]) -> list[Verdict]:
        self.events += [TOLD.decode(delivery.message.body) for delivery in deliveries]
        return [Ack()] * len(deliveries)

    @asynccontextmanager
    async def running(
        self, roles: frozenset[Role] = CONSUMING, *, only: Collection[str] = ()
    ) -> AsyncIterator[Crash]:
        """Runs the service in these roles, or only the tasks named, and ends it in order."""
        async with build(self.settings, gateway=self.gateway, limits=LIMITS) as app:
            crash = Crash()
            started = [b for b in app.background if (b.name in only if only else b.role in roles)]
            tasks = []
            for background in started:
                stopping = asyncio.Event()
                task = asyncio.create_task(_run(background, stopping), name=background.name)
                tasks.append((task, stopping))
                crash.tasks.append(task)
            await asyncio.sleep(0)
            try:
                yield crash
            finally:
                for task, stopping in tasks:
                    stopping.set()
                    await asyncio.wait([task], timeout=5)
            for task, _ in tasks:
                if not task.cancelled():
                    task.result()

    async def hears(self, *events: Event) -> None:
        """Publishes events of orders."""
        await self.broker.publish([message_of(event) for event in events])

    def told_of(self, order_id: UUID) -> list[str]:
        """The short names of the events that were told of an order's payment."""
        return [
            event.type.rpartition(".")[2]
            for event in self.events
            if event.payload.order.endswith(str(order_id))  # type: ignore[attr-defined]
        ]

    async def tells(self, order_id: UUID, *expected: str, within_seconds: float = 10.0) -> None:
        """Waits until exactly these events were told of an order's payment."""
        await eventually(
            lambda: self.told_of(order_id),
            within_seconds,
            until=lambda told: told == list(expected),
            describe=f"that {', '.join(expected)} is told",
        )

    async def rows(self, query: str, *arguments: Any) -> list[dict[str, Any]]:
        """What the database says."""
        connection = await asyncpg.connect(self.settings.database_url.get_secret_value())
        try:
            return [dict(row) for row in await connection.fetch(query, *arguments)]
        finally:
            await connection.close()

    async def payment_of(self, order_id: UUID) -> payment_service_pb2.Payment:
        """The payment of an order as callers read it."""
        rows = await self.rows(
            "SELECT r.resource FROM payments AS p JOIN payment_reads AS r"
            " USING (merchant, payment_id) WHERE p.order_id = $1",
            order_id,
        )
        assert len(rows) == 1, f"{len(rows)} payments of order {order_id}"
        return payment_service_pb2.Payment.FromString(rows[0]["resource"])

    async def stands(self, order_id: UUID, state: str) -> payment_service_pb2.Payment:
        """Waits until the payment of an order is in a state, and answers it."""

        async def look() -> payment_service_pb2.Payment:
            return await self.payment_of(order_id)

        return await eventually(
            look,
            until=lambda payment: payment_service_pb2.Payment.State.Name(payment.state) == state,
            describe=f"that the payment is {state}",
        )

    async def lets_time_pass(self, *, minutes: int) -> None:
        """Moves everything that is due, or was sent, so far into the past."""
        await self.rows(
            "UPDATE payments SET due_time = due_time - make_interval(mins => $1)", minutes
        )
        for table in ("payment_attempts", "refunds"):
            await self.rows(
                f"UPDATE {table} SET sent_time = sent_time - make_interval(mins => $1)", minutes
            )

    def charged(self, order_id: UUID) -> int:
        """How many charges of an order stand in the provider's books."""
        return sum(
            1
            for entry in self.gateway.provider.ledger.values()
            if entry.captured and entry.charge.order.endswith(str(order_id))
        )

    @asynccontextmanager
    async def serving(self, merchant: str = "default") -> AsyncIterator[Callable[[str, Any], Any]]:
        """Serves gRPC; yields what calls a method as this merchant."""
        async with (
            build(self.settings, gateway=self.gateway, limits=LIMITS) as app,
            serving(self.settings, app.servicers) as server,
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub: Any = payment_service_pb2_grpc.PaymentServiceStub(channel)

            async def call(method: str, request: Any) -> Any:
                return await getattr(stub, method)(
                    request, metadata=(("x-mesh-merchant", merchant),), timeout=10
                )

            yield call


async def _run(background: Background, stopping: asyncio.Event) -> None:
    await background.run(stopping)


class Crash:
    """Ends a running service as a power cut would: nothing more is said or written."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    async def now(self) -> None:
        """Ends it now."""
        for task in self.tasks:
            task.cancel()
        await asyncio.wait(self.tasks)
        # What a worker had begun is a task of its own; it dies with the process too.
        current = asyncio.current_task()
        begun = [
            task
            for task in asyncio.all_tasks()
            if task is not current and "Worker._round" in repr(task.get_coro())
        ]
        for task in begun:
            task.cancel()
        if begun:
            await asyncio.wait(begun)


def payment_id_of(payment: payment_service_pb2.Payment) -> UUID:
    """The id in a payment's name."""
    return split_payment_name(payment.name)[1]
