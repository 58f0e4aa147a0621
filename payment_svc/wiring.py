"""The composition root: the only module that knows every concrete class."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path
from time import monotonic

import structlog

from chassis import inbox, migrations
from chassis.broker import Limits, connect
from chassis.database import Database
from chassis.ids import new_id, now
from chassis.mediator import Mediator, Registration, usual_behaviours
from chassis.outbox import Outbox
from chassis.paging import PageTokens
from chassis.periodic import repeatedly
from chassis.runtime import App, Background, Role
from ordermesh.payment.v1 import payment_service_pb2, payment_service_pb2_grpc
from payment_svc.commands import (
    Answer,
    FollowOrders,
    FollowOrdersHandler,
    Leases,
    SettlePayments,
    SettlePaymentsHandler,
)
from payment_svc.consumers import SUBSCRIPTION, order_consumer
from payment_svc.domain.payment import Task
from payment_svc.gateways import InProcessGateway, PaymentGateway
from payment_svc.queries import GetPayment, ListPayments, PaymentQueries
from payment_svc.servicer import PaymentServicer
from payment_svc.settings import PaymentSettings
from payment_svc.storage import PostgresPayments
from payment_svc.worker import PaymentWorker, lease_seconds_for

NAME = "payment"
SWEEP_SECONDS = 30.0
MEASURE_SECONDS = 5.0

_log = structlog.get_logger("sweep")


prepare = partial(
    migrations.prepare,
    service=NAME,
    migrations=Path(__file__).parent / "migrations",
    subscription=SUBSCRIPTION,
)
"""Migrates the database and declares what is listened to, before anything is served."""


def gateway_for(settings: PaymentSettings) -> PaymentGateway:
    """The provider that the settings name."""
    match settings.payment_provider:
        case "in_process":
            return InProcessGateway()


@contextlib.asynccontextmanager
async def build(
    settings: PaymentSettings,
    *,
    gateway: PaymentGateway | None = None,
    limits: Limits | None = None,
) -> AsyncIterator[App]:
    """Opens everything the service uses, wires it, and closes it in reverse.

    Args:
        settings: From the environment.
        gateway: Another provider than the settings name; for tests.
        limits: Other numbers of the broker's behaviour than the usual ones; for tests.
    """
    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            Database.opened(
                settings.database_url.get_secret_value(),
                application_name=NAME,
                pool_max=settings.database_pool_max,
            )
        )
        broker = await stack.enter_async_context(
            connect(settings.broker_url.get_secret_value(), name=NAME, limits=limits)
        )
        provider = gateway or gateway_for(settings)
        outbox = Outbox(database, broker, new_id=new_id)
        store = PostgresPayments(database, outbox, new_id=new_id)
        queries = PaymentQueries(database, PageTokens(settings.page_token_key.get_secret_value()))
        leases = Leases(
            lease_seconds=lease_seconds_for(settings.provider_timeout_seconds),
            now=now,
            monotonic=monotonic,
        )

        async def settle(answers: Sequence[Answer]) -> None:
            await mediator.send(SettlePayments(answers=answers))

        payer, resolver = (
            PaymentWorker(
                name,
                tasks,
                gateway=provider,
                store=store,
                settle=settle,
                leases=leases,
                now=now,
                timeout_seconds=settings.provider_timeout_seconds,
                concurrency=settings.provider_concurrency,
            )
            for name, tasks in (
                ("payments", (Task.CHARGE, Task.VOID, Task.REFUND)),
                ("resolver", (Task.RESOLVE,)),
            )
        )
        mediator = Mediator(
            [
                Registration(
                    FollowOrders,
                    FollowOrdersHandler(
                        store=store,
                        queue=payer,
                        leases=leases,
                        provider=provider.name,
                        new_id=new_id,
                        now=now,
                    ),
                ),
                Registration(
                    SettlePayments,
                    SettlePaymentsHandler(
                        store=store, queue=payer, leases=leases, new_id=new_id, now=now
                    ),
                ),
                Registration(GetPayment, queries.get),
                Registration(ListPayments, queries.list),
            ],
            usual_behaviours(tracing=bool(settings.otlp_endpoint)),
        )
        servicer = PaymentServicer(mediator)
        consumer = order_consumer(mediator)

        async def sweep() -> None:
            await store.measure()
            await inbox.drop_old(database)

        yield App(
            servicers=[
                (
                    payment_service_pb2.DESCRIPTOR.services_by_name["PaymentService"].full_name,
                    partial(
                        payment_service_pb2_grpc.add_PaymentServiceServicer_to_server, servicer
                    ),
                )
            ],
            # Whoever settles comes before the relay that carries the events out.
            background=[
                Background(Role.CONSUME, "consume", partial(consumer.run, broker)),
                Background(Role.CONSUME, "payments", payer.run),
                Background(Role.SWEEP, "resolver", resolver.run),
                Background(Role.RELAY, "relay", outbox.relay.run),
                Background(Role.SWEEP, "sweep", repeatedly(SWEEP_SECONDS, sweep)),
                Background(Role.SWEEP, "sweep-outbox", repeatedly(MEASURE_SECONDS, outbox.sweep)),
            ],
            checks={"database": database.ping},
        )
