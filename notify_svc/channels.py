"""The ways by which messages leave: SMTP, over a few connections that are kept open.

What a mail server's answer means (docs/adr/0042): 250 to the content is acceptance. A
5xx about this mail (its sender, recipient or content) is final. Everything else, from a
refused connection to a wrong or missing password, is trouble that may pass, and the mail is tried
again. What follows the content and is no answer, a cut connection or silence, leaves
open whether the mail server has the mail; it is tried again too, as mail has no other
way to be sure.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final
from urllib.parse import unquote, urlsplit

import structlog
from aiosmtplib import (
    SMTP,
    SMTPAuthenticationError,
    SMTPDataError,
    SMTPException,
    SMTPResponse,
    SMTPResponseException,
)
from prometheus_client import Counter

from notify_svc.commands import is_address, shortened
from notify_svc.delivery import Accepted, Deferred, Mail, Refused, SendOutcome

KEEP_SECONDS: Final = 30.0
"""An idle connection is used again for so long: mail servers close them after minutes."""

REASON_CHARACTERS_MAX: Final = 300
_PARTING_SECONDS = 1.0
"""How long an answer to RSET or QUIT is waited for; no mail depends on it."""

_CLOSING = 421
_LOGIN_WANTED = frozenset({530, 534, 535, 538})
"""Codes by which a server asks for a login or for encryption (RFC 4954, RFC 3207)."""

_PORTS: Final = MappingProxyType({"smtp": 25, "smtps": 465, "starttls": 587})
_ADDRESS = re.compile(r"[^\s<>@,;:\"']+@[^\s<>@,;:\"']+")

_log = structlog.get_logger("smtp")
_CONNECTIONS = Counter(
    "mesh_smtp_connections_total", "Connections to the mail server, by outcome.", ["outcome"]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SmtpServer:
    """A mail server, as `MESH_SMTP_URL` names it."""

    host: str
    port: int
    username: str | None
    password: str | None
    tls: bool
    starttls: bool

    @classmethod
    def from_url(cls, url: str) -> SmtpServer:
        """Reads `smtp://host:port`, `smtp://user:password@host?starttls` or `smtps://…`.

        Without a port it is 25, 587 with STARTTLS, 465 with TLS from the start.

        Raises:
            ValueError: It is none of these, or would send a password in the clear.
        """
        parts = urlsplit(url)
        starttls = parts.query == "starttls"
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname:
            raise ValueError("must be smtp://host:port or smtps://host:port")
        if (parts.query and not starttls) or parts.fragment or parts.path.strip("/"):
            raise ValueError("nothing but ?starttls may follow the port")
        if starttls and parts.scheme == "smtps":
            raise ValueError("smtps:// is encrypted from the start; leave ?starttls out")
        # A name with an empty or overlong label fails here, not at every connection.
        parts.hostname.encode("idna")
        loopback = parts.hostname in ("localhost", "127.0.0.1", "::1")
        if parts.username and parts.scheme == "smtp" and not starttls and not loopback:
            raise ValueError("would send the password in the clear; use smtps:// or ?starttls")
        return cls(
            host=parts.hostname,
            port=parts.port or _PORTS["starttls" if starttls else parts.scheme],
            username=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            tls=parts.scheme == "smtps",
            starttls=starttls,
        )


class _StaleConnectionError(Exception):
    """A kept connection had been closed; nothing of the mail has been taken."""


@dataclass(frozen=True, slots=True)
class _Kept:
    smtp: SMTP
    since: float


class SmtpChannel:
    """Hands mails to one mail server. Use `async with SmtpChannel.opened(…) as channel`.

    Args:
        server: The mail server.
        sender: The address to which it reports failures (the reverse path).
        send_seconds: Time limit of one mail, waiting for a connection included.
        connections_max: Connections at once.
        tls_context: Whom to trust; by default the system's authorities.
    """

    def __init__(
        self,
        server: SmtpServer,
        *,
        sender: str,
        send_seconds: float,
        connections_max: int,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self._server = server
        self._mail_from = f"FROM:<{sender}>".encode("ascii")
        self._our_name = sender.rpartition("@")[2]
        self._send_seconds = send_seconds
        self._slots = asyncio.Semaphore(connections_max)
        self._kept: list[_Kept] = []
        self._tls_context = tls_context
        if tls_context is None and (server.tls or server.starttls):
            self._tls_context = ssl.create_default_context()

    @classmethod
    @contextlib.asynccontextmanager
    async def opened(
        cls,
        server: SmtpServer,
        *,
        sender: str,
        send_seconds: float,
        connections_max: int,
        tls_context: ssl.SSLContext | None = None,
    ) -> AsyncIterator[SmtpChannel]:
        """A channel that says goodbye when the block ends. Connects when there is mail."""
        channel = cls(
            server,
            sender=sender,
            send_seconds=send_seconds,
            connections_max=connections_max,
            tls_context=tls_context,
        )
        try:
            yield channel
        finally:
            await channel.close()

    @property
    def send_seconds(self) -> float:
        """The longest that `send` takes."""
        return self._send_seconds

    async def send(self, mail: Mail) -> SendOutcome:
        """Hands over one mail and answers what became of it."""
        if not is_address(mail.address):
            return Refused("the address is none that mail can be sent to")
        try:
            async with asyncio.timeout(self._send_seconds), self._slots:
                return await self._send(mail)
        except TimeoutError:
            return Deferred(f"the mail server did not answer within {self._send_seconds:g} s")

    async def close(self) -> None:
        """Says goodbye on every idle connection."""
        while self._kept:
            smtp = self._kept.pop().smtp
            try:
                await smtp.quit(timeout=_PARTING_SECONDS)
            except (SMTPException, OSError):
                smtp.close()

    async def _send(self, mail: Mail) -> SendOutcome:
        while (kept := self._take_kept()) is not None:
            with contextlib.suppress(_StaleConnectionError):
                return await self._transact(kept, mail, fresh=False)
        try:
            smtp = await self._connect()
        except SMTPAuthenticationError as error:
            _CONNECTIONS.labels("login_refused").inc()
            return _login_refused(self._server.host, error.code)
        except (SMTPException, OSError) as error:
            _CONNECTIONS.labels("failed").inc()
            # Where our mail server stands is the operator's business alone.
            _log.warning(
                "connect.failed",
                host=self._server.host,
                port=self._server.port,
                error=type(error).__name__,
                detail=_plain(str(error)),
            )
            return Deferred("the mail server cannot be reached")
        _CONNECTIONS.labels("opened").inc()
        return await self._transact(smtp, mail, fresh=True)

    def _take_kept(self) -> SMTP | None:
        """A connection that is open and was used a moment ago."""
        now = asyncio.get_running_loop().time()
        while self._kept:
            kept = self._kept.pop()
            if kept.smtp.is_connected and now - kept.since < KEEP_SECONDS:
                return kept.smtp
            kept.smtp.close()
        return None

    async def _connect(self) -> SMTP:
        server = self._server
        smtp = SMTP(
            hostname=server.host,
            port=server.port,
            username=server.username,
            password=server.password,
            local_hostname=self._our_name,
            timeout=None,  # `send` limits the whole
            use_tls=server.tls,
            start_tls=server.starttls,
            tls_context=self._tls_context,
        )
        await smtp.connect()
        try:
            if smtp.is_ehlo_or_helo_needed:
                await smtp.ehlo()
        except BaseException:
            smtp.close()
            raise
        return smtp

    async def _transact(self, smtp: SMTP, mail: Mail, *, fresh: bool) -> SendOutcome:
        """One mail over one connection, which is kept unless it has become unusable.

        Raises:
            _StaleConnectionError: The connection is not fresh, and was closed before the
                mail server took anything.
        """
        usable = False
        try:
            outcome = await self._converse(smtp, mail, fresh=fresh)
            # What was begun and refused must not be taken for part of the next mail.
            usable = smtp.is_connected and (isinstance(outcome, Accepted) or await _reset(smtp))
            return outcome
        finally:
            if usable:
                self._kept.append(_Kept(smtp, asyncio.get_running_loop().time()))
            else:
                smtp.close()

    async def _converse(self, smtp: SMTP, mail: Mail, *, fresh: bool) -> SendOutcome:
        """Says who it is from, whom to and what, and answers what came of it.

        Raises:
            _StaleConnectionError: As `_transact`.
        """
        size = (f"SIZE={len(mail.content)}".encode(),) if smtp.supports_extension("size") else ()
        try:
            response = await smtp.execute_command(b"MAIL", self._mail_from, *size)
        except (SMTPException, OSError) as error:
            if not fresh:
                raise _StaleConnectionError from None
            return _broken(smtp, error)
        if response.code == _CLOSING and not fresh:
            raise _StaleConnectionError
        try:
            if response.code == 250:
                recipient = f"TO:<{mail.address}>".encode("ascii")
                response = await smtp.execute_command(b"RCPT", recipient)
                if response.code in (250, 251):
                    await smtp.data(mail.content)
                    return Accepted()
        except SMTPDataError as error:
            response = SMTPResponse(error.code, error.message)
        except (SMTPException, OSError) as error:
            return _broken(smtp, error)
        if response.code in _LOGIN_WANTED:
            return _login_refused(self._server.host, response.code)
        reason = f"{response.code} {without_addresses(response.message, mail.address)}"
        return Refused(reason) if 500 <= response.code < 600 else Deferred(reason)


async def _reset(smtp: SMTP) -> bool:
    """Forgets a mail that was begun; says whether the connection can be used again."""
    try:
        async with asyncio.timeout(_PARTING_SECONDS):
            await smtp.rset()
    except (SMTPException, OSError):
        return False
    return smtp.is_connected


def _login_refused(host: str, code: int) -> Deferred:
    """Tells the operator, whose login or lack of one it is; the mail can wait."""
    # The server may repeat the user name, so its words stay out of the log.
    _log.error("login.refused", host=host, code=code)
    return Deferred(f"the mail server refused our login ({code})")


def _broken(smtp: SMTP, error: Exception) -> Deferred:
    """Gives up a connection on which nothing sensible was heard."""
    smtp.close()
    _log.warning("connection.lost", error=type(error).__name__)
    if isinstance(error, SMTPResponseException):
        return Deferred("the mail server answered what no mail server says")
    return Deferred("the connection to the mail server was lost")


def without_addresses(text: str, address: str) -> str:
    """What a mail server said, on one short line and with every address shortened."""
    said = re.sub(re.escape(address), shortened(address), _plain(text), flags=re.IGNORECASE)
    said = _ADDRESS.sub(lambda found: found[0] if "**@" in found[0] else shortened(found[0]), said)
    return said[:REASON_CHARACTERS_MAX]


def _plain(text: str) -> str:
    return " ".join(
        "".join(character if character.isprintable() else " " for character in text).split()
    )
