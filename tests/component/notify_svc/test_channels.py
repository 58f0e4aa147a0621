"""The SMTP channel against real servers: what their answers mean, and how few connections."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import pytest_asyncio
import trustme
from aiosmtpd.smtp import SMTP, AuthResult

from meshctl.processes import free_port
from notify_svc import channels
from notify_svc.channels import SmtpChannel, SmtpServer, without_addresses
from notify_svc.delivery import Accepted, Deferred, Mail, Refused
from tests.component.notify_svc.mail_server import MailServer
from tests.eventually import eventually

CONTENT = (
    b"From: shop@mesh.example\r\nTo: ada@example.com\r\nSubject: Your order\r\n\r\n"
    b"Hello\r\n.a line with a dot\r\n"
)


def a_channel(url: str, **changes: Any) -> contextlib.AbstractAsyncContextManager[SmtpChannel]:
    """A channel to a server, patient for five seconds."""
    options: dict[str, Any] = {
        "sender": "orders@mesh.example",
        "send_seconds": 5.0,
        "connections_max": 2,
        **changes,
    }
    return SmtpChannel.opened(SmtpServer.from_url(url), **options)


@pytest_asyncio.fixture
async def channel(mail_server: MailServer) -> AsyncIterator[SmtpChannel]:
    """A channel to the running mail server."""
    async with a_channel(mail_server.url) as opened:
        yield opened


async def test_an_accepted_mail_is_there_byte_for_byte(
    mail_server: MailServer, channel: SmtpChannel
) -> None:
    """Envelope and content, a line that begins with a dot among it."""
    assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    (mail,) = mail_server.mails
    assert (mail.envelope_from, mail.envelope_to) == ("orders@mesh.example", ("ada@example.com",))
    assert mail.path.read_bytes().endswith(CONTENT)


async def test_mails_share_a_connection(mail_server: MailServer, channel: SmtpChannel) -> None:
    """Connecting costs more than sending."""
    for number in range(20):
        assert await channel.send(Mail(f"customer-{number}@example.com", CONTENT)) == Accepted()
    assert len(mail_server.mails) == 20
    assert mail_server.connections == 1


async def test_there_are_never_more_connections_than_allowed(
    mail_server: MailServer, channel: SmtpChannel
) -> None:
    """Fifty at once go over two."""
    outcomes = await asyncio.gather(
        *(channel.send(Mail(f"customer-{number}@example.com", CONTENT)) for number in range(50))
    )
    assert outcomes == [Accepted()] * 50
    assert len(mail_server.mails) == 50
    assert mail_server.connections == 2


@pytest.mark.parametrize(
    ("address", "outcome"),
    [
        ("bounce@example.com", Refused("550 5.1.1 No such mailbox")),
        ("full@example.com", Deferred("452 4.2.2 Mailbox full")),
        ("defer@example.com", Deferred("451 4.2.1 Try again later")),
    ],
)
async def test_a_refusal_is_final_or_not_as_its_code_says(
    mail_server: MailServer, channel: SmtpChannel, address: str, outcome: Deferred | Refused
) -> None:
    """And the connection serves the next mail, which is not taken for part of this one."""
    assert await channel.send(Mail(address, CONTENT)) == outcome
    assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert [mail.envelope_to for mail in mail_server.mails] == [("ada@example.com",)]
    assert mail_server.connections == 1


async def test_a_mail_server_that_is_away_is_to_be_tried_again(mail_server: MailServer) -> None:
    """Nobody listens; then somebody does."""
    async with a_channel(mail_server.url) as channel:
        await mail_server.stop()
        outcome = await channel.send(Mail("ada@example.com", CONTENT))
        assert outcome == Deferred("the mail server cannot be reached")
        await mail_server.start()
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()


async def test_a_connection_that_was_closed_meanwhile_is_replaced(
    mail_server: MailServer, channel: SmtpChannel
) -> None:
    """A mail server closes what is idle; no mail is put off for that."""
    assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    await mail_server.stop()
    await mail_server.start()
    assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert len(mail_server.mails) == 2


async def test_an_idle_connection_is_not_used_for_ever(
    mail_server: MailServer, channel: SmtpChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between a mail server's time limit and ours lies a safe distance."""
    monkeypatch.setattr(channels, "KEEP_SECONDS", 0.0)
    for _ in range(2):
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert mail_server.connections == 2


async def test_a_slow_mail_server_is_not_waited_for_longer_than_said(
    mail_server: MailServer,
) -> None:
    """The mail is put off, the connection is given up, the next mail goes over another."""
    async with a_channel(mail_server.url, send_seconds=0.3) as channel:
        outcome = await channel.send(Mail("slow-30@example.com", CONTENT))
        assert outcome == Deferred("the mail server did not answer within 0.3 s")
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert [mail.envelope_to for mail in mail_server.mails] == [("ada@example.com",)]
    assert mail_server.connections == 2


async def test_waiting_for_a_connection_counts_as_waiting(mail_server: MailServer) -> None:
    """A mail in hand never takes longer than the time limit, however many are before it."""
    async with a_channel(mail_server.url, send_seconds=0.4, connections_max=1) as channel:
        slow = asyncio.create_task(channel.send(Mail("slow-30@example.com", CONTENT)))
        outcomes = await asyncio.gather(
            *(channel.send(Mail(f"customer-{number}@example.com", CONTENT)) for number in range(5))
        )
        assert all(isinstance(outcome, Deferred) for outcome in (*outcomes, await slow))


async def test_a_cut_after_the_content_leaves_the_outcome_open(
    mail_server: MailServer, channel: SmtpChannel
) -> None:
    """The mail server has it and could not say so: it is tried again and comes twice."""
    outcome = await channel.send(Mail("hangup@example.com", CONTENT))
    assert outcome == Deferred("the connection to the mail server was lost")
    assert await channel.send(Mail("hangup@example.com", CONTENT)) == Accepted()
    assert len(mail_server.mails) == 2


@pytest.mark.parametrize(
    "address",
    [
        "ada@example.com>\r\nRCPT TO:<bob@example.com",
        "ada@example.com\r\n.\r\nMAIL FROM:<x@y.example>",
        "ädä@example.com",
        "nobody",
        "",
    ],
)
async def test_what_is_no_address_is_never_told_to_a_mail_server(
    mail_server: MailServer, channel: SmtpChannel, address: str
) -> None:
    """It would be a command of its own; it is given up at once."""
    outcome = await channel.send(Mail(address, CONTENT))
    assert outcome == Refused("the address is none that mail can be sent to")
    assert mail_server.connections == 0


async def test_leaving_says_goodbye(mail_server: MailServer) -> None:
    """Idle connections are closed in an orderly way."""
    async with a_channel(mail_server.url) as channel:
        await channel.send(Mail("ada@example.com", CONTENT))
        kept = channel._kept[0].smtp
    assert not kept.is_connected


# --- servers of other kinds -----------------------------------------------------------


class Keeper:
    """Accepts every mail and counts them."""

    def __init__(self) -> None:
        self.accepted = 0

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:
        """Accepts."""
        self.accepted += 1
        return "250 OK"


@contextlib.asynccontextmanager
async def serving(
    factory: Callable[[], asyncio.BaseProtocol], tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Serves a protocol on a free port of this machine; yields the port."""
    server = await asyncio.get_running_loop().create_server(factory, "127.0.0.1", 0, ssl=tls)
    try:
        port: int = server.sockets[0].getsockname()[1]
        yield port
    finally:
        server.close()


class Tired(Keeper):
    """Takes one mail over a connection; when the next begins it says 421, or just hangs up."""

    def __init__(self, *, politely: bool) -> None:
        super().__init__()
        self._politely = politely

    async def handle_MAIL(
        self, server: Any, session: Any, envelope: Any, address: str, options: list[str]
    ) -> str:
        """Accepts the first of a connection."""
        session.mails = getattr(session, "mails", 0) + 1
        if session.mails == 1:
            envelope.mail_from = address
            return "250 OK"
        if not self._politely:
            server.transport.abort()
        return "421 4.7.0 Enough for today"


@pytest.mark.parametrize("politely", [True, False])
async def test_a_connection_that_has_had_enough_is_replaced_at_once(politely: bool) -> None:
    """Nothing of the mail was taken, so it goes over a fresh one and is not put off."""
    tired = Tired(politely=politely)
    sessions: list[SMTP] = []

    def session() -> SMTP:
        sessions.append(SMTP(tired, hostname="mx"))
        return sessions[-1]

    async with (
        serving(session) as port,
        a_channel(f"smtp://127.0.0.1:{port}") as channel,
    ):
        for _ in range(3):
            assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert tired.accepted == 3
    assert len(sessions) == 3


@contextlib.asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[int]:
    """Greets, then gives the answers one by one, whatever is said; yields the port."""

    async def converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            writer.write(answer)
            if not await reader.readline():
                break
        writer.close()

    server = await asyncio.start_server(converse, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Who signed the mail server's certificate."""
    return trustme.CA()


def server_tls(authority: trustme.CA, name: str) -> ssl.SSLContext:
    """The server's side, under a certificate for this name."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert(name).configure_cert(context)
    return context


def client_tls(authority: trustme.CA) -> ssl.SSLContext:
    """Trusts this authority alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    authority.configure_trust(context)
    return context


def a_login(server: Any, session: Any, envelope: Any, mechanism: str, data: Any) -> AuthResult:
    """Lets the shop in by its password."""
    right = (data.login, data.password) == (b"shop@mesh", b"p@ss:word")
    return AuthResult(success=right, handled=False)


CREDENTIALS = "shop%40mesh:p%40ss%3Aword"


# The connection is encrypted before SMTP begins, which aiosmtpd does not see.
@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
async def test_tls_from_the_start_with_a_login(authority: trustme.CA) -> None:
    """`smtps://`, the user and password in the URL escaped as URLs ask."""
    keeper = Keeper()

    def factory() -> SMTP:
        return SMTP(
            keeper, hostname="mx", authenticator=a_login, auth_required=True,
            auth_require_tls=False,
        )  # fmt: skip

    async with (
        serving(factory, server_tls(authority, "localhost")) as port,
        a_channel(
            f"smtps://{CREDENTIALS}@localhost:{port}", tls_context=client_tls(authority)
        ) as channel,
    ):
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert keeper.accepted == 1


async def test_starttls_with_a_login(authority: trustme.CA) -> None:
    """`smtp://…?starttls`: nothing is said in the clear but the wish to encrypt."""
    keeper = Keeper()

    def factory() -> SMTP:
        return SMTP(
            keeper, hostname="mx", tls_context=server_tls(authority, "localhost"),
            require_starttls=True, authenticator=a_login, auth_required=True,
        )  # fmt: skip

    async with (
        serving(factory) as port,
        a_channel(
            f"smtp://{CREDENTIALS}@localhost:{port}?starttls", tls_context=client_tls(authority)
        ) as channel,
    ):
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()
    assert keeper.accepted == 1


@pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
async def test_a_wrong_password_is_not_the_mails_fault(authority: trustme.CA) -> None:
    """An operator puts it right; until then mails are put off, not given up."""

    def factory() -> SMTP:
        return SMTP(
            Keeper(), hostname="mx", authenticator=a_login, auth_required=True,
            auth_require_tls=False,
        )  # fmt: skip

    async with (
        serving(factory, server_tls(authority, "localhost")) as port,
        a_channel(
            f"smtps://shop:wrong@localhost:{port}", tls_context=client_tls(authority)
        ) as channel,
    ):
        outcome = await channel.send(Mail("ada@example.com", CONTENT))
    assert outcome == Deferred("the mail server refused our login (535)")


@pytest.mark.parametrize("url", ["smtps://localhost:{port}", "smtp://localhost:{port}?starttls"])
async def test_a_server_that_is_not_who_it_says_gets_no_mail(
    authority: trustme.CA, url: str
) -> None:
    """Its certificate is for another name."""
    keeper = Keeper()
    other = server_tls(authority, "elsewhere.example")
    encrypted = url.startswith("smtps")

    def factory() -> SMTP:
        return SMTP(keeper, hostname="mx", tls_context=None if encrypted else other)

    async with (
        serving(factory, other if encrypted else None) as port,
        a_channel(url.format(port=port), tls_context=client_tls(authority)) as channel,
    ):
        outcome = await channel.send(Mail("ada@example.com", CONTENT))
    assert outcome == Deferred("the mail server cannot be reached")
    assert keeper.accepted == 0


async def test_a_server_without_starttls_gets_no_mail_when_it_was_asked_for() -> None:
    """Somebody in between may have taken the offer out."""
    keeper = Keeper()
    async with (
        serving(lambda: SMTP(keeper, hostname="mx")) as port,
        a_channel(f"smtp://localhost:{port}?starttls") as channel,
    ):
        assert isinstance(await channel.send(Mail("ada@example.com", CONTENT)), Deferred)
    assert keeper.accepted == 0


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ([b"554 No service here\r\n"], Deferred("the mail server cannot be reached")),
        ([b"220 mx\r\n", b"421 Busy\r\n"], Deferred("the mail server cannot be reached")),
        ([b"220 mx\r\n", b"250 mx\r\n", b"550 You are spam\r\n"], Refused("550 You are spam")),
        (
            [b"220 mx\r\n", b"250 mx\r\n", b"530 5.7.0 Authentication required\r\n"],
            Deferred("the mail server refused our login (530)"),
        ),
        (
            [b"220 mx\r\n", b"250 mx\r\n", b"250 OK\r\n", b"538 Encryption required\r\n"],
            Deferred("the mail server refused our login (538)"),
        ),
        ([b"220 mx\r\n", b"250 mx\r\n", b"421 Closing\r\n"], Deferred("421 Closing")),
        (
            [b"220 mx\r\n", b"250 mx\r\n", b"250 OK\r\n", b"250 OK\r\n", b"554 No\r\n"],
            Refused("554 No"),
        ),
        (
            [b"220 mx\r\n", b"250 mx\r\n", b"250 OK\r\n", b"299 What\r\n"],
            Deferred("299 What"),
        ),
        (
            [b"220 mx\r\n", b"250 mx\r\n", b"nonsense\r\n"],
            Deferred("the mail server answered what no mail server says"),
        ),
        (
            [b"220 mx\r\n", b"250 mx\r\n", b"250 OK\r\n"],
            Deferred("the connection to the mail server was lost"),
        ),
    ],
)
async def test_only_what_is_said_of_this_mail_is_final(
    answers: list[bytes], outcome: Deferred | Refused
) -> None:
    """A mail server that is unwell says nothing about the mail."""
    async with answering(*answers) as port, a_channel(f"smtp://127.0.0.1:{port}") as channel:
        assert await channel.send(Mail("ada@example.com", CONTENT)) == outcome


async def test_a_refusal_holds_though_nothing_is_said_after_it() -> None:
    """The connection is worth nothing any more; the answer about the mail still is."""

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mx\r\n")
        while command := await reader.readline():
            if not command.startswith(b"RSET"):
                writer.write(b"550 No\r\n" if command.startswith(b"RCPT") else b"250 OK\r\n")
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, a_channel(f"smtp://127.0.0.1:{port}") as channel:
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Refused("550 No")
        assert channel._kept == []


async def test_a_server_that_accepts_and_says_nothing_is_given_up() -> None:
    """A black hole holds a mail no longer than any other."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        async with a_channel(f"smtp://127.0.0.1:{port}", send_seconds=0.3) as channel:
            outcome = await channel.send(Mail("ada@example.com", CONTENT))
    assert outcome == Deferred("the mail server did not answer within 0.3 s")


async def test_a_reason_names_nobody() -> None:
    """Mail servers like to repeat the address; it is not kept, and control characters go."""
    refusal = b"550-5.1.1 <Ada@Example.com>: user unknown\r\n550 ask bob@example.com\x1b[31m\r\n"
    async with (
        answering(b"220 mx\r\n", b"250 mx\r\n", b"250 OK\r\n", refusal) as port,
        a_channel(f"smtp://127.0.0.1:{port}") as channel,
    ):
        outcome = await channel.send(Mail("ada@example.com", CONTENT))
    assert isinstance(outcome, Refused)
    assert outcome.reason == (
        "550 5.1.1 <a**@example.com>: user unknown 550 ask b**@example.com [31m"
    ).replace("unknown 550", "unknown")


def test_a_long_reason_is_cut() -> None:
    """Some mail servers recite their terms of use."""
    assert len(without_addresses("x" * 5000, "ada@example.com")) == 300


async def test_a_cancelled_send_leaves_no_connection_behind(mail_server: MailServer) -> None:
    """What was begun on it must not become part of another mail."""
    async with a_channel(mail_server.url, connections_max=1) as channel:
        sending = asyncio.create_task(channel.send(Mail("slow-30@example.com", CONTENT)))
        await eventually(lambda: mail_server.connections == 1)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        assert channel._kept == []
        assert await channel.send(Mail("ada@example.com", CONTENT)) == Accepted()


# --- the URL --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "port", "tls", "starttls"),
    [
        ("smtp://mx.example", 25, False, False),
        ("smtp://mx.example:2525", 2525, False, False),
        ("smtp://mx.example?starttls", 587, False, True),
        ("smtps://mx.example", 465, True, False),
        ("smtp://[::1]:2525", 2525, False, False),
    ],
)
def test_a_url_names_a_mail_server(url: str, port: int, tls: bool, starttls: bool) -> None:
    """With the usual port where none is given."""
    server = SmtpServer.from_url(url)
    assert (server.port, server.tls, server.starttls) == (port, tls, starttls)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "mx.example:25",
        "http://mx.example",
        "smtp://",
        "smtp://mx.example/path",
        "smtp://mx.example?tls=1",
        "smtps://mx.example?starttls",
        "smtp://user:secret@mx.example",
        "smtp://mx.example:99999",
        "smtp://mx..example",
        f"smtp://{'x' * 64}.example",
    ],
)
def test_a_url_that_names_none_is_refused_at_start(url: str) -> None:
    """One that would send a password in the clear among them; the password is not told."""
    with pytest.raises(ValueError, match=r".") as caught:
        SmtpServer.from_url(url)
    assert "secret" not in str(caught.value)


def test_a_password_may_go_in_the_clear_within_this_machine() -> None:
    """For a mail server of a test."""
    server = SmtpServer.from_url(f"smtp://shop:secret@127.0.0.1:{free_port()}")
    assert (server.username, server.password) == ("shop", "secret")
