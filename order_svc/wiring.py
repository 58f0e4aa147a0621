"""The composition root: the only module that knows every concrete class."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from chassis import cache as caching
from chassis import idempotency, inbox, migrations
from chassis.broker import connect
from chassis.cache import Cache
from chassis.database import Database
from chassis.grpc_client import channel_to_mesh
from chassis.ids import new_id, now
from chassis.mediator import Mediator, Registration, usual_behaviours
from chassis.outbox import Outbox
from chassis.paging import PageTokens
from chassis.periodic import repeatedly
from chassis.runtime import App, Background, Role
from order_svc.commands import (
    CancelOrder,
    CancelOrderHandler,
    CreateOrder,
    CreateOrderHandler,
    RecordPayments,
    RecordPaymentsHandler,
)
from order_svc.consumers import SUBSCRIPTION, payment_consumer
from order_svc.queries import GetOrder, ListOrderEvents, ListOrders, OrderQueries
from order_svc.rates import MeshRates
from order_svc.servicer import OrderServicer
from order_svc.settings import OrderSettings
from order_svc.storage import PostgresOrders
from ordermesh.order.v1 import order_service_pb2, order_service_pb2_grpc

NAME = "order"
SWEEP_SECONDS = 300.0
MEASURE_SECONDS = 5.0


prepare = partial(
    migrations.prepare,
    service=NAME,
    migrations=Path(__file__).parent / "migrations",
    subscription=SUBSCRIPTION,
)
"""Migrates the database and declares what is listened to, before anything is served."""


@contextlib.asynccontextmanager
async def build(settings: OrderSettings) -> AsyncIterator[App]:
    """Opens everything the service uses, wires it, and closes it in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            Database.opened(
                settings.database_url.get_secret_value(),
                application_name=NAME,
                pool_max=settings.database_pool_max,
            )
        )
        redis = caching.connect(settings.redis_url.get_secret_value())
        if redis is not None:
            stack.push_async_callback(redis.aclose)
        channel = channel_to_mesh(settings)
        stack.push_async_callback(channel.close)
        broker = await stack.enter_async_context(
            connect(settings.broker_url.get_secret_value(), name=NAME)
        )
        orders_cache = Cache(redis, "order:", ttl_seconds=settings.cache_ttl_seconds)
        outbox = Outbox(database, broker, new_id=new_id)
        store = PostgresOrders(database, outbox, orders_cache, new_id=new_id)
        queries = OrderQueries(
            database, orders_cache, PageTokens(settings.page_token_key.get_secret_value())
        )
        merchants = settings.merchants_by_id
        rates = MeshRates(
            channel,
            max_age_seconds=settings.rate_max_age_seconds,
            timeout_seconds=settings.rate_timeout_seconds,
        )
        mediator = Mediator(
            [
                Registration(
                    CreateOrder,
                    CreateOrderHandler(
                        store=store, rates=rates, merchants=merchants, new_id=new_id, now=now
                    ),
                ),
                Registration(CancelOrder, CancelOrderHandler(store=store, now=now)),
                Registration(RecordPayments, RecordPaymentsHandler(store=store, now=now)),
                Registration(GetOrder, queries.get),
                Registration(ListOrders, queries.list),
                Registration(ListOrderEvents, queries.timeline),
            ],
            usual_behaviours(tracing=bool(settings.otlp_endpoint)),
        )
        servicer = OrderServicer(mediator, merchants)
        consumer = payment_consumer(mediator)

        async def drop_old() -> None:
            await inbox.drop_old(database)
            await idempotency.drop_expired(database)

        yield App(
            servicers=[
                (
                    order_service_pb2.DESCRIPTOR.services_by_name["OrderService"].full_name,
                    partial(order_service_pb2_grpc.add_OrderServiceServicer_to_server, servicer),
                )
            ],
            background=[
                Background(Role.CONSUME, "consume", partial(consumer.run, broker)),
                Background(Role.RELAY, "relay", outbox.relay.run),
                Background(Role.SWEEP, "sweep", repeatedly(SWEEP_SECONDS, drop_old)),
                Background(Role.SWEEP, "sweep-outbox", repeatedly(MEASURE_SECONDS, outbox.sweep)),
            ],
            checks={"database": database.ping},
        )
