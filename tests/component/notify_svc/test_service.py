"""The notification service as its neighbours meet it: events in, mails out, reads in between."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
import pytest_asyncio
from google.rpc import error_details_pb2, status_pb2
from pydantic import ValidationError

from chassis.broker import Broker, Message, PublishOutcome, connect
from chassis.database import Database
from chassis.events import Event
from chassis.grpc_server import serving
from chassis.runtime import Role
from notify_svc.settings import NotificationSettings
from notify_svc.wiring import build, prepare
from ordermesh.notification.v1 import notification_service_pb2 as pb
from ordermesh.notification.v1 import notification_service_pb2_grpc
from simulators.mail.mailbox import Mail
from tests.builders import a_merchant, merchants_file
from tests.component.notify_svc.mail_server import MailServer
from tests.databases import Databases
from tests.eventually import eventually
from tests.unit.notify_svc.builders import (
    an_order_name,
    message_of,
    order_cancelled,
    order_confirmed,
    order_created,
    order_failed,
    payment_succeeded,
    refund_succeeded,
)

ALL = frozenset(Role)
SENT, DEAD, RETRYING = pb.Notification.SENT, pb.Notification.DEAD, pb.Notification.RETRYING


@dataclass
class Service:
    """The service, run in this process in the roles that a test asks for."""

    settings: NotificationSettings
    broker: Broker
    mail_server: MailServer
    _running: AsyncExitStack | None = None
    _channels: list[grpc.aio.Channel] = field(default_factory=list)

    async def start(self, roles: Collection[Role] = ALL) -> None:
        """Starts the service."""
        async with AsyncExitStack() as stack:
            app = await stack.enter_async_context(build(self.settings))
            if Role.SERVE in roles:
                server = await stack.enter_async_context(serving(self.settings, app.servicers))
                channel = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")
                stack.push_async_callback(channel.close)
                self._channels.append(channel)
            # Entered in the order in which they start, so left in the reverse: what
            # brings work in stops first.
            for background in reversed(app.background):
                if background.role in roles:
                    await stack.enter_async_context(_until_left(background.run))
            self._running = stack.pop_all()

    async def stop(self) -> None:
        """Stops it in an orderly way."""
        if self._running is not None:
            await self._running.aclose()
            self._running = None

    async def publish(self, *events: Event) -> None:
        """Publishes events as other services do."""
        await self.publish_messages(*(message_of(event) for event in events))

    async def publish_messages(self, *messages: Message) -> None:
        """Publishes whatever it is given."""
        outcomes = await self.broker.publish(messages)
        assert outcomes == [PublishOutcome.CONFIRMED] * len(messages)

    @property
    def stub(self) -> Any:
        """The generated client of the service started last."""
        return notification_service_pb2_grpc.NotificationServiceStub(self._channels[-1])

    async def notifications(self, order: str = "", **fields: Any) -> list[pb.Notification]:
        """What the service says that it told, the newest first."""
        merchant = order.split("/")[1] if order else "default"
        answer = await self.stub.ListNotifications(
            pb.ListNotificationsRequest(
                parent=f"merchants/{merchant}",
                filter=f'order = "{order}"' if order else "",
                **fields,
            ),
            metadata=identity(merchant),
        )
        return list(answer.notifications)

    async def states(self, order: str) -> dict[str, int]:
        """Template to state of an order's notifications."""
        return {n.template: n.state for n in await self.notifications(order)}

    def mails_to(self, address: str) -> list[Mail]:
        """What the mail server has accepted for an address."""
        return [mail for mail in self.mail_server.mails if mail.envelope_to == (address,)]


@asynccontextmanager
async def _until_left(run: Callable[[asyncio.Event], Awaitable[None]]) -> AsyncIterator[None]:
    stopping = asyncio.Event()

    async def until_stopped() -> None:
        await run(stopping)

    task = asyncio.create_task(until_stopped())
    try:
        yield
    finally:
        stopping.set()
        await asyncio.wait_for(task, 30)


def identity(merchant: str = "default") -> tuple[tuple[str, str], ...]:
    """What the edge says of a caller."""
    return (("x-mesh-merchant", merchant), ("x-request-id", str(uuid4())))


def environment(
    folder: Path, *, database_url: str, broker_url: str, smtp_url: str
) -> dict[str, str]:
    """The service's settings."""
    merchants = merchants_file(
        folder,
        a_merchant(name="Teehaus & Söhne"),
        a_merchant(id="acme", name="Acme", email="orders@acme.example", locale="de"),
    )
    return {
        "MESH_INSECURE": "true",
        "MESH_DATABASE_URL": database_url,
        "MESH_BROKER_URL": broker_url,
        "MESH_SMTP_URL": smtp_url,
        "MESH_SMTP_TIMEOUT_SECONDS": "5",
        "MESH_MAIL_FROM": "ordermesh <orders@mesh.example>",
        "MESH_MERCHANTS": str(merchants),
        "MESH_PAGE_TOKEN_KEY": "secret",
        "MESH_DRAIN_SECONDS": "0",
    }


@asynccontextmanager
async def a_service(
    values: dict[str, str], mail_server: MailServer, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Service]:
    """The service, prepared and not started; stopped when the block ends."""
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    settings = NotificationSettings()
    # Connected first: a broker in memory lives as long as somebody is connected.
    async with connect(values["MESH_BROKER_URL"], name="test") as broker:
        await prepare(settings)
        service = Service(settings, broker, mail_server)
        try:
            yield service
        finally:
            await service.stop()


@pytest_asyncio.fixture
async def stopped_service(
    own_database_url: str,
    mail_server: MailServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Service]:
    """The service over the broker in memory, prepared and not started."""
    values = environment(
        tmp_path,
        database_url=own_database_url,
        broker_url=f"memory://{uuid4().hex}",
        smtp_url=mail_server.url,
    )
    async with a_service(values, mail_server, monkeypatch) as service:
        yield service


@pytest_asyncio.fixture
async def service(stopped_service: Service) -> Service:
    """The service over the broker in memory, in all its roles."""
    await stopped_service.start()
    return stopped_service


async def has_come_to(service: Service, order: str, expected: dict[str, int]) -> None:
    """Waits until the notifications of an order are in these states."""
    await eventually(
        lambda: service.states(order),
        within_seconds=20,
        until=lambda states: states == expected,
        describe=f"notifications of {order} in {expected}",
    )


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo]:
    """The status and the reason with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(bytes(trailing["grpc-status-details-bin"]))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "ordermesh"
    return caught.value.code(), info


# --- the way of an order --------------------------------------------------------------


async def test_a_paid_order_is_told_to_its_customer_and_its_merchant(service: Service) -> None:
    """Three mails: a receipt, a confirmation, and word to the shop."""
    order = an_order_name()
    await service.publish(order_created(order, locale="de-AT"))
    await service.publish(payment_succeeded(order))
    await service.publish(order_confirmed(order))
    await has_come_to(
        service,
        order,
        {"payment_receipt": SENT, "order_confirmed": SENT, "merchant_order_confirmed": SENT},
    )
    assert {mail.subject for mail in service.mails_to("ada@example.com")} == {
        "Zahlung für Ihre Bestellung 4711 bei Teehaus & Söhne erhalten",
        "Ihre Bestellung 4711 bei Teehaus & Söhne ist bestätigt",
    }
    (merchants,) = service.mails_to("merchant@default.example")
    assert merchants.subject == "New order 4711: €25.00"
    assert len(service.mail_server.mails) == 3
    assert service.mail_server.connections <= 3


async def test_a_notification_says_what_became_of_the_mail(service: Service) -> None:
    """And the mail names the notification."""
    order = an_order_name()
    event = payment_succeeded(order)
    await service.publish(order_created(order, locale="fr"), event)
    await has_come_to(service, order, {"payment_receipt": SENT})
    (told,) = await service.notifications(order)
    assert told.order == order
    assert told.event_id == str(event.event_id)
    assert told.recipient == "a**@example.com"
    assert (told.channel, told.audience) == (pb.Notification.EMAIL, pb.Notification.CUSTOMER)
    assert (told.locale, told.attempts, told.failure_reason) == ("fr", 1, "")
    assert told.send_time.ToDatetime() >= told.create_time.ToDatetime()
    (mail,) = service.mail_server.mails
    assert mail.message_id == f"<{told.name.rpartition('/')[2]}@mesh.example>"
    assert mail.envelope_from == "orders@mesh.example"


async def test_each_end_of_an_order_is_told(service: Service) -> None:
    """A failure to the customer; a cancellation to both; a refund to the customer."""
    failed, undone = an_order_name(), an_order_name()
    await service.publish(
        order_created(failed),
        order_created(undone),
        order_failed(failed, "insufficient_funds"),
        order_cancelled(undone, "wrong size"),
        refund_succeeded(undone),
    )
    await has_come_to(service, failed, {"order_failed": SENT})
    await has_come_to(
        service,
        undone,
        {"order_cancelled": SENT, "merchant_order_cancelled": SENT, "refund_issued": SENT},
    )
    texts = {mail.subject: mail.text for mail in service.mail_server.mails}
    failure = texts["Your order 4711 at Teehaus & Söhne could not be paid"]
    assert "There was not enough money on the card." in failure
    assert "The reason given: wrong size" in texts["Order 4711 is cancelled"]
    assert "€10.00" in texts["Refund for your order 4711 at Teehaus & Söhne"]


async def test_each_merchants_mail_is_their_own(service: Service) -> None:
    """Acme reads German, under its own address."""
    order = an_order_name("acme")
    await service.publish(order_created(order), order_confirmed(order))
    await has_come_to(service, order, {"order_confirmed": SENT, "merchant_order_confirmed": SENT})
    (mail,) = service.mails_to("orders@acme.example")
    assert mail.subject == "Neue Bestellung 4711: 25,00\xa0€"


async def test_the_same_runs_over_postgresql(
    own_database_url: str,
    databases: Databases,
    mail_server: MailServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker is a port; this is the embedded mesh's."""
    async with databases.cloned() as broker_url:
        values = environment(
            tmp_path,
            database_url=own_database_url,
            broker_url=broker_url,
            smtp_url=mail_server.url,
        )
        async with a_service(values, mail_server, monkeypatch) as service:
            await service.start()
            orders = [an_order_name() for _ in range(20)]
            for order in orders:
                await service.publish(order_created(order), payment_succeeded(order))
            for order in orders:
                await has_come_to(service, order, {"payment_receipt": SENT})
            assert len(mail_server.mails) == 20


# --- once, whatever happens -----------------------------------------------------------


async def test_an_event_that_comes_five_times_is_one_mail(service: Service) -> None:
    """In one batch and in later ones."""
    order = an_order_name()
    created, paid = order_created(order), payment_succeeded(order)
    await service.publish(created, paid, paid, created, paid)
    await has_come_to(service, order, {"payment_receipt": SENT})
    await service.publish(paid, created, paid)
    other = an_order_name()
    await service.publish(order_created(other), payment_succeeded(other))
    await has_come_to(service, other, {"payment_receipt": SENT})
    assert len(service.mail_server.mails) == 2


async def test_a_bad_event_becomes_a_dead_letter_and_its_neighbours_have_their_effect(
    stopped_service: Service,
) -> None:
    """All in one batch: bytes that are no event, another merchant's order, unknown money."""
    service = stopped_service
    orders = [an_order_name() for _ in range(5)]
    foreign = payment_succeeded(orders[0])
    payload: Any = foreign.payload
    payload.order = an_order_name("acme")
    unknown = payment_succeeded(orders[0])
    payload = unknown.payload
    payload.amount.currency_code = "XYZ"
    garbage = Message(event_id=uuid4(), type=unknown.type, body=b"\xffno envelope")
    await service.publish(*(order_created(order) for order in orders))
    await service.publish_messages(
        message_of(payment_succeeded(orders[0])),
        garbage,
        message_of(payment_succeeded(orders[1])),
        message_of(foreign),
        message_of(payment_succeeded(orders[2])),
        message_of(unknown),
        *(message_of(payment_succeeded(order)) for order in orders[3:]),
    )
    await service.start()
    for order in orders:
        await has_come_to(service, order, {"payment_receipt": SENT})
    letters = await eventually(
        lambda: service.broker.dead_letters("notification"), until=lambda found: len(found) == 3
    )
    assert {letter.message.event_id for letter in letters} == {
        garbage.event_id,
        foreign.event_id,
        unknown.event_id,
    }
    assert len(service.mail_server.mails) == 5


async def test_news_that_overtakes_its_order_waits_for_it_alone(service: Service) -> None:
    """The neighbours' mails go at once; its own goes when OrderCreated has come."""
    early, other = an_order_name(), an_order_name()
    await service.publish(order_created(other), payment_succeeded(early), payment_succeeded(other))
    await has_come_to(service, other, {"payment_receipt": SENT})
    assert await service.states(early) == {}
    await service.publish(order_created(early))
    await has_come_to(service, early, {"payment_receipt": SENT})
    assert len(service.mail_server.mails) == 2
    assert await service.broker.dead_letters("notification") == []


async def test_a_mail_server_that_was_away_gets_each_mail_once(service: Service) -> None:
    """Meanwhile the notifications say that they are tried again, and why."""
    await service.mail_server.stop()
    order = an_order_name()
    await service.publish(order_created(order), order_confirmed(order))
    await has_come_to(
        service, order, {"order_confirmed": RETRYING, "merchant_order_confirmed": RETRYING}
    )
    for notification in await service.notifications(order):
        assert notification.failure_reason == "the mail server cannot be reached"
    await service.mail_server.start()
    await has_come_to(service, order, {"order_confirmed": SENT, "merchant_order_confirmed": SENT})
    assert len(service.mail_server.mails) == 2
    for notification in await service.notifications(order):
        assert notification.attempts >= 2
        assert notification.failure_reason == ""


async def test_a_deferred_mail_is_tried_again_and_a_refused_one_is_not(service: Service) -> None:
    """By what the mail server said; the reason names nobody."""
    deferred, refused = an_order_name(), an_order_name()
    await service.publish(
        order_created(deferred, email="defer-2@example.com"),
        order_created(refused, email="bounce@example.com"),
        payment_succeeded(deferred),
        payment_succeeded(refused),
    )
    await has_come_to(service, refused, {"payment_receipt": DEAD})
    await has_come_to(service, deferred, {"payment_receipt": SENT})
    (notification,) = await service.notifications(refused)
    assert notification.failure_reason == "550 5.1.1 No such mailbox"
    assert notification.attempts == 1
    (notification,) = await service.notifications(deferred)
    assert notification.attempts == 3


async def test_an_acceptance_that_was_never_heard_is_a_second_copy_of_the_same_mail(
    service: Service,
) -> None:
    """SMTP leaves no other way; both copies carry one Message-ID, and the record is one."""
    order = an_order_name()
    await service.publish(
        order_created(order, email="hangup@example.com"), payment_succeeded(order)
    )
    await has_come_to(service, order, {"payment_receipt": SENT})
    first, second = service.mails_to("hangup@example.com")
    assert first.message_id == second.message_id
    assert first.text == second.text
    assert len(await service.notifications(order)) == 1


async def test_what_one_process_queues_another_sends(stopped_service: Service) -> None:
    """Consuming and sending may be processes of their own; a restart loses nothing."""
    service = stopped_service
    orders = [an_order_name() for _ in range(10)]
    await service.start({Role.SERVE, Role.CONSUME})
    for order in orders:
        await service.publish(order_created(order), payment_succeeded(order))
    for order in orders:
        await has_come_to(service, order, {"payment_receipt": pb.Notification.QUEUED})
    assert service.mail_server.mails == []
    await service.stop()
    await service.start({Role.SERVE, Role.RELAY})
    for order in orders:
        await has_come_to(service, order, {"payment_receipt": SENT})
    assert len(service.mail_server.mails) == 10


async def test_two_processes_send_each_mail_once(
    stopped_service: Service, mail_server: MailServer
) -> None:
    """They share the queue and the table."""
    first = stopped_service
    second = Service(first.settings, first.broker, mail_server)
    orders = [an_order_name() for _ in range(50)]
    await first.publish(*(order_created(order) for order in orders))
    await first.publish(*(order_confirmed(order) for order in orders))
    await first.start()
    await second.start()
    try:
        for order in orders:
            await has_come_to(
                first, order, {"order_confirmed": SENT, "merchant_order_confirmed": SENT}
            )
    finally:
        await second.stop()
    ids = [mail.message_id for mail in mail_server.mails]
    assert len(ids) == len(set(ids)) == 100


# --- reading --------------------------------------------------------------------------


async def test_a_list_is_paged_from_the_newest(service: Service) -> None:
    """Each once, in their order, with tokens that belong to the list."""
    order = an_order_name()
    await service.publish(order_created(order), *(payment_succeeded(order) for _ in range(7)))
    await eventually(lambda: service.notifications(order), until=lambda found: len(found) == 7)
    whole = [n.name for n in await service.notifications(order)]
    assert whole == sorted(whole, reverse=True)
    paged: list[str] = []
    token = ""
    sizes = []
    while True:
        answer = await service.stub.ListNotifications(
            pb.ListNotificationsRequest(
                parent="merchants/default",
                filter=f'order = "{order}"',
                page_size=3,
                page_token=token,
            ),
            metadata=identity(),
        )
        paged += [n.name for n in answer.notifications]
        sizes.append(len(answer.notifications))
        token = answer.next_page_token
        if not token:
            break
    assert (paged, sizes) == (whole, [3, 3, 1])


async def test_a_list_holds_one_order_or_all_of_a_merchants(service: Service) -> None:
    """And never another merchant's."""
    first, second, foreign = an_order_name(), an_order_name(), an_order_name("acme")
    for order in (first, second, foreign):
        await service.publish(order_created(order), payment_succeeded(order))
        await has_come_to(service, order, {"payment_receipt": SENT})
    assert [n.order for n in await service.notifications(first)] == [first]
    assert [n.order for n in await service.notifications()] == [second, first]
    assert [n.order for n in await service.notifications(foreign)] == [foreign]


async def test_a_page_token_belongs_to_its_list(service: Service) -> None:
    """With other arguments it would show a page that nobody asked for."""
    order = an_order_name()
    await service.publish(order_created(order), *(payment_succeeded(order) for _ in range(3)))
    await eventually(lambda: service.notifications(order), until=lambda found: len(found) == 3)
    answer = await service.stub.ListNotifications(
        pb.ListNotificationsRequest(parent="merchants/default", page_size=1), metadata=identity()
    )
    for token in (answer.next_page_token, "nonsense", answer.next_page_token[:-1]):
        code, info = await refusal(
            service.stub.ListNotifications(
                pb.ListNotificationsRequest(
                    parent="merchants/default",
                    filter=f'order = "{order}"',
                    page_token=token,
                ),
                metadata=identity(),
            )
        )
        assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")
        assert info.metadata["field"] == "page_token"


async def test_a_notification_is_read_by_its_name(service: Service) -> None:
    """As it stands in the list."""
    order = an_order_name()
    await service.publish(order_created(order), payment_succeeded(order))
    await has_come_to(service, order, {"payment_receipt": SENT})
    (listed,) = await service.notifications(order)
    read = await service.stub.GetNotification(
        pb.GetNotificationRequest(name=listed.name), metadata=identity()
    )
    assert read == listed


UNKNOWN = "018c0000-0000-7000-8000-000000000001"


@pytest.mark.parametrize(
    ("name", "code", "reason"),
    [
        (f"merchants/default/notifications/{UNKNOWN}", "NOT_FOUND", "NOTIFICATION_NOT_FOUND"),
        (f"merchants/acme/notifications/{UNKNOWN}", "PERMISSION_DENIED", "MERCHANT_DENIED"),
        (f"merchants/nobody/notifications/{UNKNOWN}", "PERMISSION_DENIED", "MERCHANT_DENIED"),
        ("merchants/default/notifications/4711", "INVALID_ARGUMENT", "INVALID_FIELD"),
        ("", "INVALID_ARGUMENT", "INVALID_FIELD"),
    ],
)
async def test_what_cannot_be_read_says_why(
    service: Service, name: str, code: str, reason: str
) -> None:
    """With the reason that the contract names."""
    status, info = await refusal(
        service.stub.GetNotification(pb.GetNotificationRequest(name=name), metadata=identity())
    )
    assert (status.name, info.reason) == (code, reason)


@pytest.mark.parametrize(
    ("fields", "code", "reason"),
    [
        ({"filter": 'state = "SENT"'}, "INVALID_ARGUMENT", "FILTER_INVALID"),
        (
            {"filter": f'order = "merchants/acme/orders/{UNKNOWN}"'},
            "INVALID_ARGUMENT",
            "FILTER_INVALID",
        ),
        ({"page_size": -1}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ({"page_token": "x" * 2000}, "INVALID_ARGUMENT", "INVALID_FIELD"),
        ({"parent": "merchants/acme"}, "PERMISSION_DENIED", "MERCHANT_DENIED"),
        ({"parent": "merchants/-"}, "INVALID_ARGUMENT", "INVALID_FIELD"),
    ],
)
async def test_what_cannot_be_listed_says_why(
    service: Service, fields: dict[str, Any], code: str, reason: str
) -> None:
    """Field by field."""
    request = pb.ListNotificationsRequest(**{"parent": "merchants/default", **fields})
    status, info = await refusal(service.stub.ListNotifications(request, metadata=identity()))
    assert (status.name, info.reason) == (code, reason)


async def test_another_merchants_notification_is_not_found_under_ones_own_name(
    service: Service,
) -> None:
    """The merchant is part of the key, not of the name alone."""
    order = an_order_name("acme")
    await service.publish(order_created(order), payment_succeeded(order))
    await has_come_to(service, order, {"payment_receipt": SENT})
    (theirs,) = await service.notifications(order)
    name = theirs.name.replace("acme", "default")
    status, info = await refusal(
        service.stub.GetNotification(pb.GetNotificationRequest(name=name), metadata=identity())
    )
    assert (status.name, info.reason) == ("NOT_FOUND", "NOTIFICATION_NOT_FOUND")


# --- as a process ---------------------------------------------------------------------


@dataclass
class Process:
    """`python -m notify_svc all`, and what it said so far."""

    process: asyncio.subprocess.Process
    said: list[str] = field(default_factory=list)

    async def listen(self) -> None:
        """Keeps what it says until it ends."""
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.said.append(line.decode())

    def has_said(self, event: str) -> bool:
        """Whether a line of this event has been logged."""
        return any(json.loads(line)["event"] == event for line in self.said)


@asynccontextmanager
async def a_process(values: dict[str, str]) -> AsyncIterator[Process]:
    """The service as a process, ready; killed when the block ends before it."""
    started = Process(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "notify_svc", "all"),
            env={**os.environ, **values},
            stdout=asyncio.subprocess.PIPE,
        )
    )
    listening = asyncio.create_task(started.listen())
    try:
        await eventually(lambda: started.has_said("ready"), within_seconds=30)
        yield started
    finally:
        if started.process.returncode is None:
            started.process.kill()
        await started.process.wait()
        await asyncio.wait_for(listening, 10)


@pytest_asyncio.fixture
async def values(
    own_database_url: str, databases: Databases, mail_server: MailServer, tmp_path: Path
) -> AsyncIterator[dict[str, str]]:
    """The settings of a process, over the queue in PostgreSQL."""
    async with databases.cloned() as broker_url:
        yield environment(
            tmp_path,
            database_url=own_database_url,
            broker_url=broker_url,
            smtp_url=mail_server.url,
        )


async def publish(values: dict[str, str], *events: Event) -> None:
    """Publishes events to a process."""
    async with connect(values["MESH_BROKER_URL"], name="test") as broker:
        outcomes = await broker.publish([message_of(event) for event in events])
        assert outcomes == [PublishOutcome.CONFIRMED] * len(events)


async def state_in(values: dict[str, str]) -> list[tuple[str, int]]:
    """State and attempts of every notification."""
    async with (
        Database.opened(values["MESH_DATABASE_URL"], application_name="test") as database,
        database.reading() as connection,
    ):
        found = await connection.fetch("SELECT state, attempts FROM notifications")
    return [(row["state"], row["attempts"]) for row in found]


async def test_a_process_that_is_killed_while_it_sends_loses_no_mail(
    values: dict[str, str], mail_server: MailServer
) -> None:
    """The next one takes the mail over when the dead one's lease has ended."""
    order = an_order_name()
    async with a_process(values) as first:
        await publish(
            values, order_created(order, email="slow-3@example.com"), payment_succeeded(order)
        )
        await eventually(lambda: mail_server.connections == 1)
        first.process.send_signal(signal.SIGKILL)
        await first.process.wait()
    assert mail_server.mails == []
    assert await state_in(values) == [("SENDING", 1)]
    async with (
        Database.opened(values["MESH_DATABASE_URL"], application_name="test") as database,
        database.reading() as connection,
    ):
        # As time would have it.
        await connection.execute("UPDATE notifications SET due_time = now()")
    async with a_process(values):
        await eventually(lambda: state_in(values), 20, until=lambda s: s == [("SENT", 2)])
    assert len(mail_server.mails) == 1


async def test_a_process_that_is_told_to_stop_finishes_the_mail_it_is_sending(
    values: dict[str, str], mail_server: MailServer
) -> None:
    """And says that it has ended well; nothing that it said names anybody."""
    order = an_order_name()
    async with a_process(values) as running:
        await publish(
            values, order_created(order, email="slow-1@example.com"), payment_succeeded(order)
        )
        await eventually(lambda: mail_server.connections == 1)
        running.process.terminate()
        assert await asyncio.wait_for(running.process.wait(), 20) == 0
    assert await state_in(values) == [("SENT", 1)]
    assert len(mail_server.mails) == 1
    assert running.has_said("notification")
    assert "@example.com" not in "".join(running.said)


async def test_a_process_that_reports_trouble_names_nobody(
    values: dict[str, str], mail_server: MailServer
) -> None:
    """Refusals, events that fail, and everything at debug: no address is logged."""
    values = {**values, "MESH_LOG_LEVEL": "debug"}
    orders = [an_order_name() for _ in range(3)]
    unknown = payment_succeeded(orders[0])
    payload: Any = unknown.payload
    payload.amount.currency_code = "XYZ"
    async with a_process(values) as running:
        await publish(
            values,
            order_created(orders[0], email="bounce@example.com"),
            order_created(orders[1], email="full@example.com"),
            order_created(orders[2], email="hangup@example.com"),
            *(payment_succeeded(order) for order in orders),
            unknown,
        )
        await eventually(
            lambda: state_in(values),
            20,
            until=lambda found: {state for state, _ in found} == {"DEAD", "RETRYING", "SENT"},
        )
        await eventually(lambda: running.has_said("event.dead"))
    assert "@example.com" not in "".join(running.said)


# --- settings -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MESH_SMTP_URL", "http://mx.example"),
        ("MESH_SMTP_URL", "smtp://user:secret@mx.example"),
        ("MESH_MAIL_FROM", "nobody"),
        ("MESH_SMTP_TIMEOUT_SECONDS", "0"),
        ("MESH_SMTP_CONNECTIONS_MAX", "0"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_at_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """By its name, and without a word of a secret."""
    values = environment(
        tmp_path,
        database_url="postgresql://localhost/notification",
        broker_url="postgresql://localhost/broker",
        smtp_url="smtp://localhost",
    )
    for each, given in {**values, name: value}.items():
        monkeypatch.setenv(each, given)
    with pytest.raises(ValidationError) as caught:
        NotificationSettings()
    assert name.removeprefix("MESH_").lower() in str(caught.value)
    assert "secret" not in str(caught.value)
