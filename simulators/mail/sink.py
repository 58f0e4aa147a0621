"""The sink's SMTP side: what is accepted, what is refused, and how it stops.

A recipient whose local part is one of these words is treated as said here. A
label may follow a `+`, so that tests running side by side do not share a count
(`defer-2+order7@example.com`); capitals do not matter.

`bounce`
    550 5.1.1 to RCPT, always: a dead address, to be given up.
`full`
    452 4.2.2 to RCPT, always: trouble that never ends.
`defer`, `defer-N`
    451 4.2.1 to RCPT, the first 1 or N times per address: greylisting.
`slow-N`
    The mail is kept after N seconds (60 at most), unless the sender has gone: timeouts.
`hangup`, `hangup-N`
    The mail is kept, then the connection is cut instead of answering, the first 1 or N
    times per address: a sender that cannot know.

Counts live in memory: a restarted sink starts again.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Final

from aiosmtpd.smtp import SMTP, Envelope, Session

from simulators.mail.mailbox import Mailbox

SIZE_MAX_BYTES: Final = 10 * 1024 * 1024
"""Size of a mail above which DATA (or MAIL with a SIZE) is refused with 552."""

RECIPIENTS_MAX: Final = 100
"""Recipients of one mail; RFC 5321 section 4.5.3.1.8 asks for no fewer."""

SLOW_MAX_SECONDS: Final = 60
"""The longest that a `slow-N` recipient keeps its sender waiting."""

IDLE_SECONDS: Final = 300
"""A connection on which nothing is said for so long is closed (RFC 5321, 4.5.3.2.7)."""

_SCRIPTED = re.compile(
    r"(?P<word>bounce|full|defer|slow|hangup)(?:-(?P<count>\d{1,4}))?(?:\+.*)?", re.IGNORECASE
)


class Sink:
    """Decides about recipients and keeps mails; aiosmtpd calls it command by command.

    Args:
        mailbox: Where accepted mails are kept.
        now: The clock that dates them, with a time zone.
        recipients_max: Recipients of one mail; more are answered 452, so that the
            sender brings the rest in a mail of its own.
    """

    def __init__(
        self,
        mailbox: Mailbox,
        *,
        now: Callable[[], datetime],
        recipients_max: int = RECIPIENTS_MAX,
    ) -> None:
        self._mailbox = mailbox
        self._now = now
        self._recipients_max = recipients_max
        self._times_seen: Counter[tuple[str, str]] = Counter()

    async def handle_RCPT(
        self,
        server: SMTP,
        session: Session,
        envelope: Envelope,
        address: str,
        options: list[str],
    ) -> str:
        """Accepts or refuses one recipient, as said above."""
        if len(envelope.rcpt_tos) >= self._recipients_max:
            return "452 4.5.3 Too many recipients"
        word, count = _script_of(address)
        if word == "bounce":
            return "550 5.1.1 No such mailbox"
        if word == "full":
            return "452 4.2.2 Mailbox full"
        if word == "defer" and self._is_among_the_first(count, word, address):
            return "451 4.2.1 Try again later"
        envelope.rcpt_tos.append(address)
        envelope.rcpt_options.extend(options)
        return "250 2.1.5 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        """Keeps the mail; only then does the sender hear that it was accepted."""
        scripts = [(_script_of(address), address) for address in envelope.rcpt_tos]
        seconds = max((count for (word, count), _ in scripts if word == "slow"), default=0)
        if seconds:
            # A sender that goes away meanwhile cancels this, and nothing is kept.
            await asyncio.sleep(min(seconds, SLOW_MAX_SECONDS))
        content = envelope.original_content
        if content is None:
            return "554 5.6.0 No content"
        try:
            path = self._mailbox.keep(
                content,
                envelope_from=envelope.mail_from or "",
                envelope_to=envelope.rcpt_tos,
                accepted_time=self._now(),
            )
        except OSError as error:
            # The sender keeps the mail and tries again; the folder may be writable then.
            return f"451 4.3.0 Cannot keep the mail: {error.strerror}"
        for (word, count), address in scripts:
            if (
                word == "hangup"
                and self._is_among_the_first(count, word, address)
                and isinstance(server.transport, asyncio.WriteTransport)
            ):
                server.transport.abort()
        return f"250 2.0.0 Kept as {path.name}"

    def _is_among_the_first(self, count: int, word: str, address: str) -> bool:
        """Whether this is one of the first `count` times that the address asks for `word`."""
        self._times_seen[word, address.lower()] += 1
        return self._times_seen[word, address.lower()] <= count


def _script_of(address: str) -> tuple[str, int]:
    """The scripted word of an address and its count; an ordinary address has none."""
    found = _SCRIPTED.fullmatch(address.rpartition("@")[0])
    if found is None:
        return "", 0
    return found["word"].lower(), int(found["count"] or 1)


@contextlib.asynccontextmanager
async def serve(
    sink: Sink, host: str, port: int, *, size_max_bytes: int = SIZE_MAX_BYTES
) -> AsyncIterator[tuple[str, int]]:
    """Serves SMTP while the block runs; yields the address it listens on.

    Leaving closes the port first and then every connection. A mail of which the end had
    not come yet is not kept, and its sender, unanswered, still has it.

    Args:
        sink: Decides and keeps.
        host: Name or address to listen on.
        port: Port to listen on; 0 takes a free one.
        size_max_bytes: Larger mails are refused with 552.

    Raises:
        OSError: The address cannot be listened on.
    """
    loop = asyncio.get_running_loop()
    sessions: weakref.WeakSet[SMTP] = weakref.WeakSet()

    def new_session() -> SMTP:
        session = SMTP(
            sink,
            data_size_limit=size_max_bytes,
            enable_SMTPUTF8=True,
            # Without a name it would ask the resolver for ours, at every connection.
            hostname="mail.mesh",
            ident="ordermesh mail sink",
            timeout=IDLE_SECONDS,
            loop=loop,
        )
        sessions.add(session)
        return session

    server = await loop.create_server(new_session, host, port)
    try:
        bound_host, bound_port = server.sockets[0].getsockname()[:2]
        yield bound_host, bound_port
    finally:
        server.close()
        for session in list(sessions):
            if session.transport is not None:
                session.transport.close()
        await server.wait_closed()
