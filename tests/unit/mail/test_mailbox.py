"""What the sink keeps, it keeps whole, and the reader says what was in it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.message import EmailMessage
from pathlib import Path

import pytest

from simulators.mail.mailbox import Mailbox, list_mails, read_mail

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


def a_mail(subject: str = "Your order") -> EmailMessage:
    """A mail with a plain and an HTML part, as notifications are."""
    mail = EmailMessage()
    mail["From"] = "Shop <shop@example.com>"
    mail["To"] = "Ada <ada@example.com>"
    mail["Subject"] = subject
    mail["Message-ID"] = "<1@example.com>"
    mail.set_content("Thank you.\n")
    mail.add_alternative("<p>Thank you.</p>\n", subtype="html")
    return mail


def kept(mailbox: Mailbox, content: bytes, *to: str, at: datetime = NOON) -> Path:
    """Keeps a mail as the sink does."""
    return mailbox.keep(
        content, envelope_from="bounces@example.com", envelope_to=to, accepted_time=at
    )


def test_a_kept_mail_is_read_back_whole(tmp_path: Path) -> None:
    """Envelope, headers, both bodies and the time are all there."""
    path = kept(Mailbox(tmp_path), a_mail("Größe: 3 €").as_bytes(), "ada@example.com", "x@y.test")
    (mail,) = list_mails(tmp_path)
    assert mail.path == path
    assert mail.accepted_time == NOON
    assert mail.envelope_from == "bounces@example.com"
    assert mail.envelope_to == ("ada@example.com", "x@y.test")
    assert mail.from_ == "Shop <shop@example.com>"
    assert mail.to == "Ada <ada@example.com>"
    assert mail.subject == "Größe: 3 €"
    assert mail.message_id == "<1@example.com>"
    assert mail.text == "Thank you.\n"
    assert mail.html == "<p>Thank you.</p>\n"


def test_the_mail_itself_is_kept_byte_for_byte(tmp_path: Path) -> None:
    """Only the sink's own headers stand before what was sent."""
    content = b"Subject: raw\r\n\r\n\x00\xff..\r\n.\r\n"
    path = kept(Mailbox(tmp_path), content, "ada@example.com")
    assert path.read_bytes().endswith(b"+00:00\r\n" + content)


def test_many_recipients_keep_every_line_short(tmp_path: Path) -> None:
    """A hundred recipients are read back, though no line may hold 998 bytes."""
    to = tuple(f"customer-{number}@example.com" for number in range(100))
    path = kept(Mailbox(tmp_path), a_mail().as_bytes(), *to)
    assert max(len(line) for line in path.read_bytes().splitlines()) < 998
    assert read_mail(path).envelope_to == to


def test_recipients_beyond_ascii_are_kept(tmp_path: Path) -> None:
    """SMTPUTF8 allows them, so they come back as they were."""
    path = kept(Mailbox(tmp_path), a_mail().as_bytes(), "zoë@example.com")
    assert read_mail(path).envelope_to == ("zoë@example.com",)


def test_a_mail_cannot_forge_its_envelope(tmp_path: Path) -> None:
    """The sink's headers come first, so a mail's own of that name are not believed."""
    mail = a_mail()
    mail["X-Envelope-To"] = "forged@example.com"
    path = kept(Mailbox(tmp_path), mail.as_bytes(), "ada@example.com")
    assert read_mail(path).envelope_to == ("ada@example.com",)


def test_mails_are_listed_in_the_order_they_came(tmp_path: Path) -> None:
    """Same microsecond or a clock set back: the later mail has the later name."""
    mailbox = Mailbox(tmp_path)
    for number, at in enumerate([NOON, NOON, NOON - timedelta(hours=1), NOON]):
        kept(mailbox, a_mail(str(number)).as_bytes(), "ada@example.com", at=at)
    assert [mail.subject for mail in list_mails(tmp_path)] == ["0", "1", "2", "3"]


def test_the_newest_mails_can_be_listed_alone(tmp_path: Path) -> None:
    """A limit keeps the end of the list; none at all and too many are fine."""
    mailbox = Mailbox(tmp_path)
    for number in range(3):
        kept(mailbox, a_mail(str(number)).as_bytes(), "ada@example.com")
    assert [mail.subject for mail in list_mails(tmp_path, newest=2)] == ["1", "2"]
    assert len(list_mails(tmp_path, newest=9)) == 3
    assert list_mails(tmp_path, newest=0) == []


def test_an_unfinished_file_is_not_a_mail(tmp_path: Path) -> None:
    """What a killed sink left half written is passed over."""
    (tmp_path / ".20261122T120000.000000Z-00000000.eml.part").write_bytes(b"Subject: ha")
    (tmp_path / ".hidden.eml").write_bytes(b"Subject: no")
    assert list_mails(tmp_path) == []


def test_an_absent_folder_holds_no_mail(tmp_path: Path) -> None:
    """A mesh that never sent a mail is no error."""
    assert list_mails(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no headers at all",
        b"Content-Type: text/plain; charset=no-such-charset\r\n\r\nThank you.\r\n",
        b'Content-Type: text/plain; charset="a\x00b"\r\n\r\nThank you.\r\n',
        b"From: <\r\nTo: a <=?utf-8?b?!?=\r\nMessage-ID: <\r\n\r\nThank you.\r\n",
        b"Content-Type: multipart/alternative\r\n\r\nno boundary\r\n",
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\nnever closed",
        b"Subject: =?utf-8?b?not base64?=\r\nFrom: @@@\r\n\r\n\xff\xfe",
    ],
)
def test_a_broken_mail_is_read_as_far_as_it_goes(tmp_path: Path, content: bytes) -> None:
    """A tester wants to see the broken mail, not a traceback."""
    path = kept(Mailbox(tmp_path), content, "ada@example.com")
    assert read_mail(path).envelope_to == ("ada@example.com",)


def test_a_mail_with_html_alone_shows_its_source_as_text(tmp_path: Path) -> None:
    """There is always something to read."""
    mail = EmailMessage()
    mail.set_content("<p>hi</p>", subtype="html")
    path = kept(Mailbox(tmp_path), mail.as_bytes(), "ada@example.com")
    assert read_mail(path).text == "<p>hi</p>\n"


def test_a_mail_put_there_by_hand_is_dated_by_its_file(tmp_path: Path) -> None:
    """Without the sink's headers the file's own time has to do."""
    path = tmp_path / "hand.eml"
    path.write_bytes(a_mail().as_bytes())
    mail = read_mail(path)
    assert mail.accepted_time == datetime.fromtimestamp(path.stat().st_mtime, UTC)
    assert mail.envelope_to == ()


def test_a_mail_as_json_names_every_part(tmp_path: Path) -> None:
    """`meshctl mail --json` prints these keys."""
    path = kept(Mailbox(tmp_path), a_mail().as_bytes(), "ada@example.com")
    assert read_mail(path).as_json() == {
        "time": "2026-11-22T12:00:00+00:00",
        "envelopeFrom": "bounces@example.com",
        "envelopeTo": ["ada@example.com"],
        "from": "Shop <shop@example.com>",
        "to": "Ada <ada@example.com>",
        "subject": "Your order",
        "messageId": "<1@example.com>",
        "text": "Thank you.\n",
        "html": "<p>Thank you.</p>\n",
        "path": str(path),
    }
