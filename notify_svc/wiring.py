"""The composition root: the only module that knows every concrete class."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

from chassis import inbox, migrations
from chassis.broker import connect
from chassis.database import Database
from chassis.ids import new_id
from chassis.mediator import Mediator, Registration, usual_behaviours
from chassis.paging import PageTokens
from chassis.periodic import repeatedly
from chassis.runtime import App, Background, Role
from notify_svc.channels import SmtpChannel
from notify_svc.commands import Hear, HearHandler
from notify_svc.consumers import SUBSCRIPTION, event_consumer
from notify_svc.delivery import IN_HAND_PER_CONNECTION, Delivery
from notify_svc.queries import GetNotification, ListNotifications, NotificationQueries
from notify_svc.rendering import Renderer, address_of
from notify_svc.servicer import NotificationServicer
from notify_svc.settings import NotificationSettings
from notify_svc.storage import PostgresNotifications
from ordermesh.notification.v1 import notification_service_pb2, notification_service_pb2_grpc

NAME = "notification"
SWEEP_SECONDS = 300.0
MEASURE_SECONDS = 15.0


prepare = partial(
    migrations.prepare,
    service=NAME,
    migrations=Path(__file__).parent / "migrations",
    subscription=SUBSCRIPTION,
)
"""Migrates the database and declares what is listened to, before anything is served."""


@contextlib.asynccontextmanager
async def build(settings: NotificationSettings) -> AsyncIterator[App]:
    """Opens everything the service uses, wires it, and closes it in reverse."""
    async with contextlib.AsyncExitStack() as stack:
        database = await stack.enter_async_context(
            Database.opened(
                settings.database_url.get_secret_value(),
                application_name=NAME,
                pool_max=settings.database_pool_max,
            )
        )
        broker = await stack.enter_async_context(
            connect(settings.broker_url.get_secret_value(), name=NAME)
        )
        channel = await stack.enter_async_context(
            SmtpChannel.opened(
                settings.smtp_server,
                sender=address_of(settings.mail_from)[1],
                send_seconds=settings.smtp_timeout_seconds,
                connections_max=settings.smtp_connections_max,
            )
        )
        merchants = settings.merchants_by_id
        renderer = Renderer(merchants=merchants, mail_from=settings.mail_from)
        store = PostgresNotifications(database, new_id=new_id)
        delivery = Delivery(
            store=store,
            renderer=renderer,
            channel=channel,
            in_hand_max=settings.smtp_connections_max * IN_HAND_PER_CONNECTION,
        )
        store.hand_over_to(
            delivery.offer, room=lambda: delivery.room, lease_seconds=delivery.lease_seconds
        )
        queries = NotificationQueries(
            database, PageTokens(settings.page_token_key.get_secret_value())
        )
        mediator = Mediator(
            [
                Registration(
                    Hear,
                    HearHandler(
                        store=store,
                        merchants=merchants,
                        negotiate_locale=renderer.negotiate_locale,
                        new_id=new_id,
                    ),
                ),
                Registration(GetNotification, queries.get),
                Registration(ListNotifications, queries.list),
            ],
            usual_behaviours(tracing=bool(settings.otlp_endpoint)),
        )
        servicer = NotificationServicer(mediator)
        consumer = event_consumer(mediator)

        yield App(
            servicers=[
                (
                    notification_service_pb2.DESCRIPTOR.services_by_name[
                        "NotificationService"
                    ].full_name,
                    partial(
                        notification_service_pb2_grpc.add_NotificationServiceServicer_to_server,
                        servicer,
                    ),
                )
            ],
            background=[
                Background(Role.CONSUME, "consume", partial(consumer.run, broker)),
                Background(Role.RELAY, "delivery", delivery.worker.run),
                Background(
                    Role.SWEEP,
                    "sweep",
                    repeatedly(SWEEP_SECONDS, partial(inbox.drop_old, database)),
                ),
                Background(Role.SWEEP, "measure", repeatedly(MEASURE_SECONDS, store.measure)),
            ],
            checks={"database": database.ping},
        )
