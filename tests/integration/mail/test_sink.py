"""The sink as its users meet it: a process, an SMTP port and a folder of mails."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import pytest

from simulators.mail.mailbox import list_mails

PATIENCE_SECONDS = 20


@dataclass
class RunningSink:
    """A sink's process, its port and its folder."""

    process: asyncio.subprocess.Process
    port: int
    directory: Path

    async def send(self, *recipients: str, body: str = "Thank you.\n") -> str:
        """Sends one mail over a connection of its own; answers what the sink said."""
        mail = EmailMessage()
        mail["From"] = "shop@example.com"
        mail["Subject"] = "Your order"
        mail.set_content(body)
        _, answer = await aiosmtplib.send(
            mail,
            sender="shop@example.com",
            recipients=list(recipients),
            hostname="127.0.0.1",
            port=self.port,
            timeout=PATIENCE_SECONDS,
        )
        return answer

    async def refusal(self, recipient: str) -> int:
        """Sends one mail that the sink refuses; answers the code of the refusal."""
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as caught:
            await self.send(recipient)
        (refused,) = caught.value.recipients
        return refused.code


@asynccontextmanager
async def a_sink(directory: Path, *options: str) -> AsyncIterator[RunningSink]:
    """Runs the program on a free port until the block ends."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "simulators.mail", "--address", "127.0.0.1:0", "--dir", str(directory), *options),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_SECONDS)
        ready = json.loads(line)
        assert ready["event"] == "ready"
        assert ready["pid"] == process.pid
        assert ready["dir"] == str(directory)
        yield RunningSink(process, int(ready["address"].rpartition(":")[2]), directory)
    finally:
        if process.returncode is None:
            process.terminate()
        assert await asyncio.wait_for(process.wait(), PATIENCE_SECONDS) == 0


@pytest.fixture
async def sink(tmp_path: Path) -> AsyncIterator[RunningSink]:
    """A sink with a folder of its own."""
    async with a_sink(tmp_path / "mail") as running:
        yield running


async def test_an_accepted_mail_is_in_the_folder(sink: RunningSink) -> None:
    """Once the sender has its 250, the file is there, whole."""
    answer = await sink.send("ada@example.com", body="Grüße\n.a line with a dot\n")
    (mail,) = list_mails(sink.directory)
    assert mail.path.name in answer
    assert mail.envelope_from == "shop@example.com"
    assert mail.envelope_to == ("ada@example.com",)
    assert mail.subject == "Your order"
    assert mail.text == "Grüße\n.a line with a dot\n"


async def test_a_mail_to_several_is_kept_once(sink: RunningSink) -> None:
    """One DATA is one file, whoever it goes to."""
    await sink.send("ada@example.com", "grace@example.com")
    (mail,) = list_mails(sink.directory)
    assert mail.envelope_to == ("ada@example.com", "grace@example.com")


@pytest.mark.parametrize("recipient", ["bounce@example.com", "Bounce+order7@example.com"])
async def test_a_bouncing_recipient_is_refused_for_ever(sink: RunningSink, recipient: str) -> None:
    """550 says that trying again is no use."""
    assert await sink.refusal(recipient) == 550
    assert await sink.refusal(recipient) == 550
    assert list_mails(sink.directory) == []


async def test_a_full_mailbox_is_refused_for_now(sink: RunningSink) -> None:
    """452 asks to try again, every time."""
    assert [await sink.refusal("full@example.com") for _ in range(3)] == [452, 452, 452]


async def test_a_deferring_recipient_accepts_after_its_count(sink: RunningSink) -> None:
    """Twice 451, then the mail; another label counts for itself."""
    assert await sink.refusal("defer-2+a@example.com") == 451
    assert await sink.refusal("defer-2+b@example.com") == 451
    assert await sink.refusal("defer-2+a@example.com") == 451
    await sink.send("defer-2+a@example.com")
    assert await sink.refusal("defer-2+b@example.com") == 451
    assert [mail.envelope_to for mail in list_mails(sink.directory)] == [("defer-2+a@example.com",)]


async def test_a_recipient_that_only_resembles_a_word_is_ordinary(sink: RunningSink) -> None:
    """Deborah Bouncer gets her mail."""
    await sink.send("bouncer@example.com", "bounce.one@example.com", "defer-x@example.com")
    assert len(list_mails(sink.directory)) == 1


async def test_a_recipient_beyond_ascii_gets_mail(sink: RunningSink) -> None:
    """SMTPUTF8 is spoken, and the address is kept as it was."""
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=sink.port) as client:
        await client.sendmail(
            "shop@example.com",
            ["zoë@example.com"],
            "Subject: x\r\n\r\nhi",
            mail_options=["SMTPUTF8"],
        )
    (mail,) = list_mails(sink.directory)
    assert mail.envelope_to == ("zoë@example.com",)


async def test_refused_recipients_do_not_keep_others_from_their_mail(sink: RunningSink) -> None:
    """The envelope names those who were accepted."""
    await sink.send("ada@example.com", "bounce@example.com")
    (mail,) = list_mails(sink.directory)
    assert mail.envelope_to == ("ada@example.com",)


async def test_a_hangup_keeps_the_mail_and_tells_nobody(sink: RunningSink) -> None:
    """The sender cannot know; trying again brings a second copy, as real servers do."""
    with pytest.raises(aiosmtplib.SMTPServerDisconnected):
        await sink.send("hangup@example.com")
    assert len(list_mails(sink.directory)) == 1
    await sink.send("hangup@example.com")
    assert len(list_mails(sink.directory)) == 2


async def test_a_slow_recipient_outlasts_an_impatient_sender(sink: RunningSink) -> None:
    """Who goes away before the answer has sent nothing."""
    client = aiosmtplib.SMTP(hostname="127.0.0.1", port=sink.port, timeout=0.5)
    await client.connect()
    with pytest.raises(aiosmtplib.SMTPTimeoutError):
        await client.sendmail("shop@example.com", ["slow-30@example.com"], "Subject: x\r\n\r\nhi")
    client.close()
    await sink.send("slow-1@example.com")
    assert [mail.envelope_to for mail in list_mails(sink.directory)] == [("slow-1@example.com",)]


async def test_a_mail_above_the_limit_is_refused(tmp_path: Path) -> None:
    """552 and no file, whether the sender announces the size or not."""
    async with a_sink(tmp_path / "mail", "--size-max-bytes", "10000") as sink:
        with pytest.raises(aiosmtplib.SMTPResponseException) as caught:
            await sink.send("ada@example.com", body="x\n" * 10_000)
        assert caught.value.code == 552
        await sink.send("ada@example.com", body="x\n" * 100)
        assert len(list_mails(sink.directory)) == 1


async def test_too_many_recipients_are_sent_on_in_another_mail(sink: RunningSink) -> None:
    """The hundredth is taken, the next is told to come again."""
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=sink.port) as client:
        errors, _ = await client.sendmail(
            "shop@example.com",
            [f"customer-{number}@example.com" for number in range(101)],
            "Subject: x\r\n\r\nhi",
        )
    assert [response.code for response in errors.values()] == [452]
    (mail,) = list_mails(sink.directory)
    assert len(mail.envelope_to) == 100


async def test_a_mail_that_cannot_be_kept_is_not_accepted(sink: RunningSink) -> None:
    """While the folder is gone the sender is told to come again, and then may."""
    sink.directory.rmdir()
    with pytest.raises(aiosmtplib.SMTPDataError) as caught:
        await sink.send("ada@example.com")
    assert caught.value.code == 451
    sink.directory.mkdir()
    await sink.send("ada@example.com")
    assert len(list_mails(sink.directory)) == 1


async def test_many_senders_at_once_lose_nothing(sink: RunningSink) -> None:
    """Fifty connections, fifty files in the order of their names."""
    await asyncio.gather(*(sink.send(f"customer-{number}@example.com") for number in range(50)))
    mails = list_mails(sink.directory)
    assert {mail.envelope_to[0] for mail in mails} == {
        f"customer-{number}@example.com" for number in range(50)
    }
    assert [mail.accepted_time for mail in mails] == sorted(mail.accepted_time for mail in mails)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_sink_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """An idle connection does not hold it, and what was kept stays kept."""
    async with a_sink(tmp_path / "mail") as sink:
        await sink.send("ada@example.com")
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=sink.port) as idle:
            sink.process.send_signal(number)
            assert await asyncio.wait_for(sink.process.wait(), 5) == 0
            with pytest.raises(aiosmtplib.SMTPServerDisconnected):
                await idle.noop()
        assert len(list_mails(sink.directory)) == 1


async def test_a_restarted_sink_adds_to_its_folder(tmp_path: Path) -> None:
    """Mails of the run before are not touched."""
    for _ in range(2):
        async with a_sink(tmp_path / "mail") as sink:
            await sink.send("ada@example.com")
    assert len(list_mails(tmp_path / "mail")) == 2


async def test_an_address_in_use_is_one_line_of_explanation(tmp_path: Path) -> None:
    """It exits with 1 and no traceback."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "simulators.mail", "--address", f"127.0.0.1:{port}", "--dir", str(tmp_path)),
            stderr=asyncio.subprocess.PIPE,
        )
        _, stderr = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    assert process.returncode == 1
    assert b"address already in use" in stderr
    assert b"Traceback" not in stderr
