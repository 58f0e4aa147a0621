"""Mails from templates: one text, one HTML page, one subject per template and language.

`templates/<template>/<language>/{subject.txt,body.txt,body.html}.j2` is what a mail says.
Someone who asked for `de-AT` is written to in the first of de-AT, de and en that has the
template, with numbers and dates as Austria writes them where the language allows it.

A mail is a function of its notification alone: date, identity and part boundary come
from there, so sending it again sends the same bytes. What stands in it from outside (a
title, a reason, a reference) has lost its control characters before it gets here, is
escaped in HTML by Jinja, and is never a template.
"""

from __future__ import annotations

import binascii
import copy
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime as format_mail_date
from email.utils import formataddr, parseaddr
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from babel import Locale
from babel.core import UnknownLocaleError
from babel.dates import format_date, format_time
from babel.numbers import get_currency_precision
from jinja2 import FileSystemLoader, StrictUndefined, Template
from jinja2.sandbox import SandboxedEnvironment

from chassis.money import Money, minor_unit_digits
from chassis.settings import Merchant
from notify_svc.commands import Audience, is_address
from notify_svc.delivery import Mail, Outgoing

TEMPLATES: Final = Path(__file__).parent / "templates"
LAST_RESORT: Final = "en"
"""The language that every template has."""

# Where a paragraph is left out, its empty lines stay behind.
_GAPS: Final = re.compile(r"\n{3,}")

# CLDR's currencySpacing, which Babel leaves out: $12.50, but CHF 12.50.
_LETTER_BEFORE_DIGIT: Final = re.compile(r"(?<=[^\W\d_])(?=\d)")

# French puts a space that does not break before a colon, and into amounts.
_BREAKABLE: Final = re.compile(r"[^\S\xa0\u202f]+")

# Without these, some scripts and emoji fall apart; they cannot mislead anyone.
_JOINERS: Final = "\u200c\u200d"

_LINE_MAX = 78
# 48 characters of base64, so that the first line has room for the header's name.
_WORD_BYTES_MAX = 36

_LOCALES_MAX = 256
_AMOUNTS_MAX = 4096


@dataclass(frozen=True, slots=True)
class Rendered:
    """What a mail says."""

    subject: str
    text: str
    html: str


@dataclass(frozen=True, slots=True)
class _Templates:
    subject: Template
    text: Template
    html: Template


class Renderer:
    """Makes the mails of notifications.

    Args:
        merchants: Whose names and addresses the mails carry.
        mail_from: Who they come from, `Name <address>` or an address.
        templates: The folder of the templates.

    Raises:
        ValueError: `mail_from` holds no address.
    """

    def __init__(
        self, *, merchants: Mapping[str, Merchant], mail_from: str, templates: Path = TEMPLATES
    ) -> None:
        self._merchants = merchants
        self._folder = templates
        name, address = address_of(mail_from)
        # The library makes one encoded word of any name; RFC 2047 allows it 75 characters.
        self._from = (
            formataddr((name, address))
            if name.isascii()
            else f"{_encoded(name, 'From')} <{address}>"
        )
        self._domain = address.rpartition("@")[2]
        self._environment = SandboxedEnvironment(
            loader=FileSystemLoader(templates),
            autoescape=lambda name: name is not None and name.endswith(".html.j2"),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            # Templates do not change while the process runs; each is compiled once.
            auto_reload=False,
            cache_size=-1,
        )
        self._compiled: dict[tuple[str, str], _Templates] = {}
        self._locales: dict[tuple[str, str], str] = {}

    def negotiate_locale(self, template: str, asked: str) -> str:
        """The locale in which a template is written to someone who asked for `asked`.

        Of the languages that the template has, the most specific one that was asked for,
        else English; of its regions the one that was asked for, if it is known.
        """
        found = self._locales.get((template, asked))
        if found is None:
            found = negotiated(asked, frozenset(self._languages(template)))
            if len(self._locales) < _LOCALES_MAX:  # callers choose what they ask for
                self._locales[template, asked] = found
        return found

    def render(self, outgoing: Outgoing) -> Mail | None:
        """The mail of a notification; None when the recipient has been erased.

        Raises:
            LookupError: The merchant or the template is unknown.
            jinja2.TemplateError: The template asks for something that is not there.
        """
        if outgoing.recipient is None:
            return None
        if outgoing.audience is Audience.MERCHANT:
            address: str | None = self._merchants[outgoing.merchant].email
        else:
            address = outgoing.recipient.email
        if address is None:
            return None
        return Mail(address, self._mime(outgoing, address, self.say(outgoing)))

    def say(self, outgoing: Outgoing) -> Rendered:
        """What the mail of a notification says.

        Raises:
            LookupError: The merchant or the template is unknown, or nothing is known of
                the order.
            jinja2.TemplateError: The template asks for something that is not there.
        """
        recipient = outgoing.recipient
        if recipient is None:
            raise LookupError(f"nothing is known of order {outgoing.order_id}")
        templates = self._templates(outgoing.template, outgoing.locale)
        locale = outgoing.locale
        context: dict[str, Any] = {
            "language": locale,
            "shop": one_line(self._merchants[outgoing.merchant].name),
            "order": one_line(recipient.client_order_ref) or str(outgoing.order_id),
            "order_date": date_text(recipient.order_time, locale),
            "lines": [(line.quantity, one_line(line.title)) for line in recipient.lines],
            "total": money_text(recipient.total, locale),
            "customer_id": one_line(recipient.customer_id),
            "amount": money_text(outgoing.amount, locale),
            "time": time_text(outgoing.occur_time, locale),
            "payment_state": outgoing.payment_state,
            "detail": one_line(outgoing.detail),
        }
        return Rendered(
            subject=one_line(templates.subject.render(context)),
            text=_GAPS.sub("\n\n", templates.text.render(context)).strip() + "\n",
            html=templates.html.render(context).strip() + "\n",
        )

    def _templates(self, template: str, locale: str) -> _Templates:
        compiled = self._compiled.get((template, locale))
        if compiled is None:
            language = _longest_of(locale, frozenset(self._languages(template))) or LAST_RESORT
            folder = f"{template}/{language}"
            compiled = self._compiled[template, locale] = _Templates(
                subject=self._environment.get_template(f"{folder}/subject.txt.j2"),
                text=self._environment.get_template(f"{folder}/body.txt.j2"),
                html=self._environment.get_template(f"{folder}/body.html.j2"),
            )
        return compiled

    def _languages(self, template: str) -> list[str]:
        folder = self._folder / template
        return [path.name for path in folder.iterdir()] if folder.is_dir() else []

    def _mime(self, outgoing: Outgoing, address: str, said: Rendered) -> bytes:
        """The mail on the wire (RFC 5322, RFC 2046), written by hand.

        The standard library's EmailMessage parses each header and folds each line, which
        takes 3.5 ms a mail; this takes a fiftieth of it (docs/adr/0041). The tests read
        it back with that library.
        """
        boundary = f"=_{outgoing.notification_id.hex}"
        headers = (
            f"From: {self._from}",
            f"To: {one_line(address)}",
            f"Subject: {_encoded(said.subject, 'Subject')}",
            f"Date: {format_mail_date(outgoing.create_time.astimezone(UTC))}",
            f"Message-ID: <{outgoing.notification_id}@{self._domain}>",
            "Auto-Submitted: auto-generated",
            f"Content-Language: {outgoing.locale}",
            f"X-Ordermesh-Order: merchants/{outgoing.merchant}/orders/{outgoing.order_id}",
            f"X-Ordermesh-Event: {outgoing.event_id}",
            "MIME-Version: 1.0",
            f'Content-Type: multipart/alternative; boundary="{boundary}"',
        )
        return b"".join(
            (
                # Only an address that no mail server would take is not ASCII here.
                "\r\n".join(headers).encode("ascii", "replace"),
                f"\r\n\r\n--{boundary}\r\n".encode(),
                _part("plain", said.text),
                f"\r\n--{boundary}\r\n".encode(),
                _part("html", said.html),
                f"\r\n--{boundary}--\r\n".encode(),
            )
        )


def address_of(mail_from: str) -> tuple[str, str]:
    """Name and address of `Name <address>`, or of an address alone.

    Raises:
        ValueError: There is no address in it.
    """
    name, address = parseaddr(mail_from)
    if not is_address(address):
        raise ValueError(f"{mail_from!r} holds no mail address")
    return one_line(name), address


def one_line(text: str) -> str:
    """A text without line breaks and other characters that print nothing.

    So nothing from outside begins a header, a paragraph or a change of direction of its
    own.
    """
    if text.isascii() and text.isprintable():
        return text.strip()
    kept = "".join(
        character
        for character in text
        # Cc: controls; Cf: marks of direction and the like; Cs, Co, Cn: not characters.
        if character.isspace() or character in _JOINERS or unicodedata.category(character)[0] != "C"
    )
    return _BREAKABLE.sub(" ", kept).strip()


def negotiated(asked: str, languages: frozenset[str]) -> str:
    """Where the language of a mail and the formats of its numbers meet.

    `languages` are those that there are templates in. `de-AT` gives `de-AT` though the
    templates are `de`; `de-XX` gives `de`; `ja-JP` gives `en`.
    """
    written = _longest_of(asked, languages)
    if written is None:
        return LAST_RESORT
    parts = asked.split("-")
    while len(parts) > written.count("-") + 1:
        try:
            return str(Locale.parse("-".join(parts), sep="-")).replace("_", "-")
        except (UnknownLocaleError, ValueError):
            parts.pop()
    return written


def _longest_of(asked: str, languages: frozenset[str]) -> str | None:
    """The most specific of the languages that is the one asked for, or contains it."""
    by_name = {language.casefold(): language for language in languages}
    parts = asked.casefold().split("-")
    while parts:
        if (found := by_name.get("-".join(parts))) is not None:
            return found
        parts.pop()
    return None


@lru_cache(maxsize=_LOCALES_MAX)
def _babel(locale: str) -> Locale:
    return Locale.parse(locale, sep="-")


@lru_cache(maxsize=_AMOUNTS_MAX)
def money_text(money: Money, locale: str) -> str:
    """An amount as the locale writes it, exact to the last minor unit.

    CLDR prints fewer digits than ISO 4217 counts for some currencies. That is kept for
    amounts that lose nothing by it; all others show every digit of the minor unit.
    """
    amount = money.major_units
    digits: int = get_currency_precision(money.currency_code)
    if amount != round(amount, digits):
        digits = minor_unit_digits(money.currency_code)
    pattern = copy.copy(_babel(locale).currency_formats["standard"])
    pattern.frac_prec = (digits, digits)
    text: str = pattern.apply(
        amount, _babel(locale), currency=money.currency_code, currency_digits=False
    )
    return _LETTER_BEFORE_DIGIT.sub("\N{NO-BREAK SPACE}", text)


@lru_cache(maxsize=_AMOUNTS_MAX)
def _date_text(day: tuple[int, int, int], locale: str) -> str:
    text = format_date(datetime(*day, tzinfo=UTC), "long", locale=_babel(locale))
    if _babel(locale).language == "fr" and day[2] == 1:
        # CLDR writes the first of a month like any other day; French does not.
        text = text.replace("1", "1er", 1)
    return text


def date_text(moment: datetime, locale: str) -> str:
    """A day as the locale writes it, in UTC."""
    utc = moment.astimezone(UTC)
    return _date_text((utc.year, utc.month, utc.day), locale)


def time_text(moment: datetime, locale: str) -> str:
    """A day and a time to the minute as the locale writes them, in UTC and saying so."""
    utc = moment.astimezone(UTC)
    comma = " à " if _babel(locale).language == "fr" else ", "
    return f"{date_text(utc, locale)}{comma}{_time_of_day((utc.hour, utc.minute), locale)} UTC"


@lru_cache(maxsize=_AMOUNTS_MAX)
def _time_of_day(time: tuple[int, int], locale: str) -> str:
    moment = datetime(2000, 1, 1, *time, tzinfo=UTC)
    return format_time(moment, "short", locale=_babel(locale))


def _encoded(text: str, header: str) -> str:
    """A header's text, as encoded words (RFC 2047) where ASCII or a line does not hold it."""
    if text.isascii() and "=?" not in text and len(header) + 2 + len(text) <= _LINE_MAX:
        return text
    words: list[bytes] = [b""]
    for character in text:
        encoded = character.encode("utf-8", "replace")
        if len(words[-1]) + len(encoded) > _WORD_BYTES_MAX:
            words.append(b"")  # a word never ends within a character
        words[-1] += encoded
    return "\r\n ".join(
        f"=?utf-8?b?{binascii.b2a_base64(word, newline=False).decode()}?=" for word in words
    )


def _part(kind: str, text: str) -> bytes:
    body = binascii.b2a_qp(text.replace("\n", "\r\n").encode(), istext=True)
    return (
        f'Content-Type: text/{kind}; charset="utf-8"\r\n'
        "Content-Transfer-Encoding: quoted-printable\r\n\r\n"
    ).encode() + body
