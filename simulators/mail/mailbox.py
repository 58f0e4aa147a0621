"""The folder of kept mails: how one is written, and how all are read.

One mail is one file, `20261122T161127.123456Z-9f86d081.eml`: the time at which it was
accepted (UTC), then eight random digits, so that names sort by time. The file is the
mail as it came, byte for byte, behind three headers of the sink's own:

    X-Envelope-From: shop@example.com
    X-Envelope-To: ada@example.com, grace@example.com
    X-Accepted-Time: 2026-11-22T16:11:27.123456+00:00

A file appears under its name when it is whole, never before.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from pathlib import Path

_SUFFIX = ".eml"
_PARSER = BytesParser(policy=policy.default)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    """One kept mail.

    `envelope_from` and `envelope_to` are what the sender said in SMTP; `from_` and `to`
    are the headers, decoded. `text` is the plain part, or the HTML source of a mail that
    has no plain part; `html` is empty when there is none.
    """

    path: Path
    accepted_time: datetime
    envelope_from: str
    envelope_to: tuple[str, ...]
    from_: str
    to: str
    subject: str
    message_id: str
    text: str
    html: str

    def as_json(self) -> dict[str, object]:
        """The mail as JSON values, for tools."""
        return {
            "time": self.accepted_time.isoformat(),
            "envelopeFrom": self.envelope_from,
            "envelopeTo": list(self.envelope_to),
            "from": self.from_,
            "to": self.to,
            "subject": self.subject,
            "messageId": self.message_id,
            "text": self.text,
            "html": self.html,
            "path": str(self.path),
        }


class Mailbox:
    """A folder of mails, for the one process that writes into it.

    The folder is made when it is missing. Reading needs no `Mailbox`; see `list_mails`.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._newest = datetime.min.replace(tzinfo=UTC)

    def keep(
        self,
        content: bytes,
        *,
        envelope_from: str,
        envelope_to: Sequence[str],
        accepted_time: datetime,
    ) -> Path:
        """Writes one mail and answers the path of its file.

        The file outlives the process, killed or not. It is not synced to the disk, so
        the machine's own crash may lose it: a price worth paying in a test double.

        Args:
            content: The mail as it came, headers and body.
            envelope_from: The reverse path; empty for a bounce.
            envelope_to: Every recipient that was accepted.
            accepted_time: When it was accepted; a time zone is needed. Two mails of one
                microsecond are told apart, and a clock that was set back is not
                followed, so that names keep the order in which mails came.

        Raises:
            OSError: The folder cannot be written.
        """
        self._newest = max(accepted_time.astimezone(UTC), self._newest + timedelta(microseconds=1))
        stamp = f"{self._newest:%Y%m%dT%H%M%S.%f}Z"
        path = self._directory / f"{stamp}-{secrets.token_hex(4)}{_SUFFIX}"
        headers = (
            f"X-Envelope-From: {envelope_from}\r\n"
            # One recipient a line: a line of mail may hold 998 bytes at the most.
            f"X-Envelope-To: {f',{chr(13)}{chr(10)} '.join(envelope_to)}\r\n"
            f"X-Accepted-Time: {self._newest.isoformat()}\r\n"
        )
        unfinished = path.with_name(f".{path.name}.part")
        unfinished.write_bytes(headers.encode("utf-8", "surrogateescape") + content)
        unfinished.rename(path)
        return path


def list_mails(directory: Path, *, newest: int | None = None) -> list[Mail]:
    """Every mail in a folder, oldest first; an absent folder holds none.

    Args:
        directory: Where the sink keeps its mails.
        newest: How many of the newest to read; None means all.

    Raises:
        OSError: The folder is there but cannot be read.
    """
    if not directory.is_dir():
        return []
    paths = sorted(path for path in directory.glob(f"*{_SUFFIX}") if path.name[0] != ".")
    if newest is not None:
        paths = paths[max(len(paths) - newest, 0) :]
    return [read_mail(path) for path in paths]


def read_mail(path: Path) -> Mail:
    """Reads one kept mail; broken MIME is read as far as it goes.

    Raises:
        OSError: The file cannot be read.
    """
    message = _PARSER.parsebytes(path.read_bytes())
    # The sink's headers stand first, so `get` finds them even when the mail holds some
    # of the same names.
    recipients = str(message.get("X-Envelope-To", "")).split(",")
    return Mail(
        path=path,
        accepted_time=_accepted_time(message, path),
        envelope_from=str(message.get("X-Envelope-From", "")).strip(),
        envelope_to=tuple(address.strip() for address in recipients if address.strip()),
        from_=_shown(message, "from"),
        to=_shown(message, "to"),
        subject=_shown(message, "subject"),
        message_id=_shown(message, "message-id").strip(),
        text=_body(message, "plain") or _body(message, "html"),
        html=_body(message, "html"),
    )


def _accepted_time(message: EmailMessage, path: Path) -> datetime:
    """When the sink took the mail; the file's own time for one that others put there."""
    try:
        return datetime.fromisoformat(str(message.get("X-Accepted-Time", "")).strip())
    except ValueError:
        return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _shown(message: EmailMessage, name: str) -> str:
    """The text of a header, decoded as a subject is.

    The library's parsers of addresses and message ids raise on broken ones.
    """
    raw = next((value for key, value in message.raw_items() if key.lower() == name), "")
    return str(policy.default.header_fetch_parse("Subject", raw))


def _body(message: EmailMessage, kind: str) -> str:
    """The text of the first part of a kind; empty when there is none."""
    part = message.get_body((kind,))
    if part is None:
        return ""
    payload = part.get_payload(decode=True)
    if not isinstance(payload, bytes):
        return ""
    try:
        text = payload.decode(part.get_content_charset("utf-8"), "replace")
    except (LookupError, ValueError):  # a character set that does not exist, or cannot
        text = payload.decode("utf-8", "replace")
    return text.replace("\r\n", "\n")
