"""What mails say, in three languages, and that nobody from outside says anything in them."""

from __future__ import annotations

import email
import email.policy
import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from email.header import decode_header, make_header
from email.message import EmailMessage
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from uuid import UUID

import jinja2
import pytest
from babel import Locale
from babel.numbers import parse_decimal
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import SecurityError

from chassis.money import CURRENCY_CODES, MINOR_UNITS_MAX, Money, minor_unit_digits
from notify_svc.commands import MAILS, Line
from notify_svc.rendering import (
    TEMPLATES,
    Renderer,
    address_of,
    date_text,
    money_text,
    negotiated,
    one_line,
    time_text,
)
from tests.builders import NOON, a_merchant, eur
from tests.unit.notify_svc.builders import a_recipient, an_outgoing, merchants

MAIL_TEMPLATES = sorted({template for mails in MAILS.values() for _, template in mails})
LANGUAGES = ("en", "de", "fr")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    """The renderer of the shop's mails."""
    return Renderer(merchants=merchants(), mail_from="ordermesh <orders@mesh.example>")


def parsed(content: bytes) -> EmailMessage:
    """A mail as the standard library reads it; it must find nothing to complain of."""
    message = email.message_from_bytes(content, policy=email.policy.SMTP)
    assert isinstance(message, EmailMessage)
    assert [part.defects for part in message.walk()] == [[] for _ in message.walk()]
    return message


def body(message: EmailMessage, kind: str) -> str:
    """The text or the HTML of a mail, with line breaks as we wrote them."""
    part = message.get_body((kind,))
    assert part is not None
    text: str = part.get_content()
    return text.replace("\r\n", "\n")


class _Outline(HTMLParser):
    """Notes tags that are left open or closed too often, and the text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Opens a tag."""
        self.text += " "
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Closes the tag that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Keeps what is read."""
        self.text += data


def outline(html: str) -> _Outline:
    """The structure of a page; it must be well-formed."""
    reader = _Outline()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


# --- what they say ------------------------------------------------------------------


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("template", MAIL_TEMPLATES)
@pytest.mark.parametrize("payment_state", ["", "NONE", "AUTHORIZED", "PAID", "REFUNDED"])
def test_every_mail_is_complete_in_every_language(
    renderer: Renderer, template: str, language: str, payment_state: str
) -> None:
    """Order, lines and total stand in each; the page is well-formed; no gaps, no nulls."""
    recipient = a_recipient(
        locale=language, lines=(Line(2, "Darjeeling 100 g"), Line(1, "Tasse Ø 8 cm"))
    )
    outgoing = an_outgoing(
        template, recipient=recipient, payment_state=payment_state, detail="expired_card"
    )
    said = renderer.say(outgoing)
    page = outline(said.html)
    for text in (said.text, page.text):
        assert "4711" in text
        assert "2 \N{MULTIPLICATION SIGN} Darjeeling 100 g" in re.sub(r"\s+", " ", text)
        assert "1 \N{MULTIPLICATION SIGN} Tasse Ø 8 cm" in re.sub(r"\s+", " ", text)
        assert money_text(eur(2500), language) in text
        assert "Teehaus & Söhne" in text
        assert "None" not in text
        assert "{" not in text
    assert "4711" in said.subject
    assert "\n\n\n" not in said.text
    assert f'<html lang="{language}">' in said.html
    assert "<p></p>" not in said.html


def test_every_template_of_the_rules_is_there_in_every_language() -> None:
    """And none that no rule names."""
    folders = {path.name for path in TEMPLATES.iterdir()} - {"shared"}
    assert folders == set(MAIL_TEMPLATES)
    for template in MAIL_TEMPLATES:
        assert {path.name for path in (TEMPLATES / template).iterdir()} == set(LANGUAGES)


def test_a_confirmed_order_reads_like_this(renderer: Renderer) -> None:
    """One whole text, as a customer gets it."""
    recipient = a_recipient(lines=(Line(2, "Darjeeling 100 g"), Line(1, "Tea strainer")))
    said = renderer.say(an_outgoing(recipient=recipient))
    assert said.subject == "Your order 4711 at Teehaus & Söhne is confirmed"
    assert said.text == (
        "Hello,\n"
        "\n"
        "Thank you for your order at Teehaus & Söhne. It is confirmed and paid.\n"
        "\n"
        "Order 4711 of November 20, 2026\n"
        "  2 \N{MULTIPLICATION SIGN} Darjeeling 100 g\n"
        "  1 \N{MULTIPLICATION SIGN} Tea strainer\n"
        "Total: €25.00\n"
        "\n"
        "We will now prepare it.\n"
        "\n"
        "-- \n"
        "This mail was sent automatically by Teehaus & Söhne.\n"
    )


def test_an_austrian_receipt_reads_like_this(renderer: Renderer) -> None:
    """German words, Austrian numbers."""
    recipient = a_recipient(locale="de-AT", total=eur(125_000))
    said = renderer.say(an_outgoing("payment_receipt", recipient=recipient))
    assert said.subject == "Zahlung für Ihre Bestellung 4711 bei Teehaus & Söhne erhalten"
    assert (
        "wir haben Ihre Zahlung über € 1.250,00 erhalten (20. November 2026, 12:00 UTC)."
        in said.text.replace("\xa0", " ")
    )


@pytest.mark.parametrize("language", ["en", "fr"])
@pytest.mark.parametrize("template", [name for name in MAIL_TEMPLATES if "merchant" not in name])
def test_after_the_greeting_a_sentence_begins(
    renderer: Renderer, template: str, language: str
) -> None:
    """English and French write on with a capital; German goes on with the sentence."""
    said = renderer.say(an_outgoing(template, recipient=a_recipient(locale=language)))
    greeting, first = said.text.split("\n\n")[:2]
    assert greeting in ("Hello,", "Bonjour,")
    assert first[0].isupper()
    assert f"<p>{greeting}</p>\n<p>{first[0]}" in said.html


@pytest.mark.parametrize("template", MAIL_TEMPLATES)
@pytest.mark.parametrize("payment_state", ["NONE", "AUTHORIZED", "PAID", "REFUNDED"])
def test_french_signs_stand_apart_from_their_words(
    renderer: Renderer, template: str, payment_state: str
) -> None:
    """A space that does not break stands before each of `: ; ! ?`, and no straight quote."""
    outgoing = an_outgoing(
        template,
        recipient=a_recipient(locale="fr"),
        payment_state=payment_state,
        detail="expired_card",
    )
    said = renderer.say(outgoing)
    for text in (said.subject, said.text, outline(said.html).text):
        without_times = re.sub(r"\d\d:\d\d", "", text)
        assert re.findall(r"(?<!\xa0)[:;!?]", without_times) == []
        assert "'" not in text
        assert '"' not in text


@pytest.mark.parametrize("minor_units", [100, 2500])
@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("en", "{} is reserved on your card."),
        ("de", "Der Betrag von {} ist auf Ihrer Karte reserviert."),
        ("fr", "Le montant de {} est réservé sur votre carte."),
    ],
)
def test_one_euro_and_many_are_reserved_in_the_same_words(
    renderer: Renderer, language: str, said: str, minor_units: int
) -> None:
    """The verb does not depend on the amount."""
    outgoing = an_outgoing(
        recipient=a_recipient(locale=language, total=eur(minor_units)), payment_state="AUTHORIZED"
    )
    assert said.format(money_text(eur(minor_units), language)) in renderer.say(outgoing).text


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("en", "There was not enough money on the card."),
        ("de", "Auf der Karte war nicht genug Geld."),
        ("fr", "Le solde de la carte était insuffisant."),
    ],
)
def test_a_declined_card_is_told_in_plain_words(
    renderer: Renderer, language: str, said: str
) -> None:
    """Not by the provider's code."""
    outgoing = an_outgoing(
        "order_failed", recipient=a_recipient(locale=language), detail="insufficient_funds"
    )
    mail = renderer.say(outgoing)
    assert said in mail.text
    assert said in mail.html
    assert "insufficient_funds" not in mail.text + mail.html


@pytest.mark.parametrize("code", ["stolen_card", "lost_card", "fraudulent", "unheard_of", ""])
def test_a_suspected_thief_learns_nothing(renderer: Renderer, code: str) -> None:
    """Every code without words of its own gets the general ones."""
    general = renderer.say(an_outgoing("order_failed", detail="card_declined"))
    assert renderer.say(an_outgoing("order_failed", detail=code)).text == general.text


@pytest.mark.parametrize(
    ("payment_state", "said"),
    [("REFUNDED", "has been refunded"), ("NONE", "Nothing was charged"), ("", "cancelled on")],
)
def test_a_cancelled_order_says_where_the_money_is(
    renderer: Renderer, payment_state: str, said: str
) -> None:
    """And nothing about it when the event says nothing."""
    text = renderer.say(an_outgoing("order_cancelled", payment_state=payment_state)).text
    assert said in text
    assert ("refunded" in text) is (payment_state == "REFUNDED")
    assert ("charged" in text) is (payment_state == "NONE")


def test_only_the_merchant_reads_the_reason_of_a_cancellation(renderer: Renderer) -> None:
    """Callers write it for themselves; it may say more than a customer should read."""
    merchant = renderer.say(an_outgoing("merchant_order_cancelled", detail="looks like fraud"))
    customer = renderer.say(an_outgoing("order_cancelled", detail="looks like fraud"))
    assert "looks like fraud" in merchant.text
    assert "looks like fraud" not in customer.text + customer.html


def test_an_order_without_a_number_of_the_shop_is_told_by_its_id(renderer: Renderer) -> None:
    """So that both sides can name it."""
    recipient = a_recipient(client_order_ref="")
    assert str(recipient.order_id) in renderer.say(an_outgoing(recipient=recipient)).subject


# --- to whom, and how it travels ----------------------------------------------------


def test_a_mail_carries_what_mail_programs_go_by(renderer: Renderer) -> None:
    """Read back by the standard library, header by header."""
    outgoing = an_outgoing(
        notification_id=UUID("01934f00-0000-7000-8000-000000000009"),
        create_time=datetime(2026, 11, 22, 17, 11, 27, tzinfo=timezone(timedelta(hours=1))),
    )
    mail = renderer.render(outgoing)
    assert mail is not None
    assert mail.address == "ada@example.com"
    message = parsed(mail.content)
    assert message["From"] == "ordermesh <orders@mesh.example>"
    assert message["To"] == "ada@example.com"
    assert message["Subject"] == "Your order 4711 at Teehaus & Söhne is confirmed"
    assert message["Date"].datetime == datetime(2026, 11, 22, 16, 11, 27, tzinfo=UTC)
    assert message["Message-ID"] == "<01934f00-0000-7000-8000-000000000009@mesh.example>"
    assert message["Auto-Submitted"] == "auto-generated"
    assert message["Content-Language"] == "en"
    assert message["X-Ordermesh-Order"] == f"merchants/default/orders/{outgoing.order_id}"
    assert message["X-Ordermesh-Event"] == str(outgoing.event_id)
    assert message["MIME-Version"] == "1.0"
    said = renderer.say(outgoing)
    assert message.get_content_type() == "multipart/alternative"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]
    assert body(message, "plain") == said.text
    assert body(message, "html") == said.html


def test_sending_a_mail_again_sends_the_same_bytes() -> None:
    """In another process too, so that a mail program can tell it from a second mail."""
    outgoing = an_outgoing()
    contents = set()
    for _ in range(2):
        renderer = Renderer(merchants=merchants(), mail_from="orders@mesh.example")
        mail = renderer.render(outgoing)
        assert mail is not None
        contents.add(mail.content)
    assert len(contents) == 1


def test_a_merchants_mail_goes_to_the_merchant(renderer: Renderer) -> None:
    """Also when the customer has been erased: it is not personal data of theirs."""
    recipient = a_recipient(email=None, customer_id="")
    mail = renderer.render(an_outgoing("merchant_order_confirmed", recipient=recipient))
    assert mail is not None
    assert mail.address == "merchant@default.example"
    assert "Customer" not in body(parsed(mail.content), "plain")


def test_nobody_writes_to_an_erased_customer(renderer: Renderer) -> None:
    """Neither when the address is gone, nor when the whole row is."""
    assert renderer.render(an_outgoing(recipient=a_recipient(email=None))) is None
    assert renderer.render(replace(an_outgoing(), recipient=None)) is None


def test_a_template_that_asks_for_what_is_not_there_fails(tmp_path: Path) -> None:
    """A gap in a mail would be found by the customer."""
    folder = tmp_path / "order_confirmed" / "en"
    folder.mkdir(parents=True)
    for name in ("subject.txt.j2", "body.txt.j2", "body.html.j2"):
        (folder / name).write_text("{{ discount }}")
    renderer = Renderer(merchants=merchants(), mail_from="orders@mesh.example", templates=tmp_path)
    with pytest.raises(jinja2.UndefinedError, match="discount"):
        renderer.render(an_outgoing())


def test_templates_reach_nothing_behind_their_values(tmp_path: Path) -> None:
    """Jinja's sandbox holds, should a template ever be edited by the wrong hands."""
    folder = tmp_path / "order_confirmed" / "en"
    folder.mkdir(parents=True)
    for name in ("subject.txt.j2", "body.txt.j2", "body.html.j2"):
        (folder / name).write_text("{{ order.__class__.__mro__ }}")
    renderer = Renderer(merchants=merchants(), mail_from="orders@mesh.example", templates=tmp_path)
    with pytest.raises(SecurityError):
        renderer.render(an_outgoing())


# --- nobody from outside says anything ----------------------------------------------


def test_a_title_is_escaped_in_html_and_plain_in_text(renderer: Renderer) -> None:
    """It is shown as it was written, and does nothing."""
    title = '<script>alert("hi")</script> & <b>tea</b>'
    said = renderer.say(an_outgoing(recipient=a_recipient(lines=(Line(1, title),))))
    assert title in said.text
    page = outline(said.html)
    assert title in page.text
    assert "script" not in page.tags
    assert "b" not in page.tags


def test_a_title_is_no_template(renderer: Renderer) -> None:
    """What stands in braces stays there."""
    title = "{{ 7 * 7 }}{% include 'shared/en/footer.txt.j2' %}"
    assert title in renderer.say(an_outgoing(recipient=a_recipient(lines=(Line(1, title),)))).text


def test_a_title_stays_on_its_line(renderer: Renderer) -> None:
    """It cannot pretend to be the next paragraph, in any spelling of a line break."""
    title = "Tea\r\n\r\nPay again at\u2028https://evil.example\x85now\x0b!"
    said = renderer.say(an_outgoing(recipient=a_recipient(lines=(Line(2, title),))))
    assert "  2 \N{MULTIPLICATION SIGN} Tea Pay again at https://evil.example now !\n" in said.text


def test_a_title_cannot_turn_the_text_around(renderer: Renderer) -> None:
    """Marks of direction are dropped; joiners, which scripts and emoji need, are kept."""
    assert one_line("abc\u202egpj.exe\u202c") == "abcgpj.exe"
    assert one_line("👩\u200d🚀 \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645") == (
        "👩\u200d🚀 \u0646\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645"
    )


INJECTION = "4711\r\nBcc: everyone@example.com\r\n\r\nhello"


@pytest.mark.parametrize("field", ["client_order_ref", "email", "customer_id"])
def test_no_field_begins_a_header(renderer: Renderer, field: str) -> None:
    """A line break within a header's value would let a caller write headers."""
    changes: dict[str, Any] = {field: INJECTION}
    recipient = a_recipient(**changes)
    mail = renderer.render(an_outgoing(recipient=recipient))
    assert mail is not None
    head = mail.content.partition(b"\r\n\r\n")[0]
    message = email.message_from_bytes(mail.content, policy=email.policy.SMTP)
    assert message["Bcc"] is None
    assert b"\r\nBcc" not in head
    assert [key for key in message if key.startswith("X-")] == [
        "X-Ordermesh-Order",
        "X-Ordermesh-Event",
    ]


def test_a_shops_name_begins_no_header_either() -> None:
    """Nor does what an operator set."""
    shop = a_merchant(name="Tea\r\nBcc: x@example.com")
    renderer = Renderer(merchants={"default": shop}, mail_from='"Te\u2028a" <orders@mesh.example>')
    mail = renderer.render(an_outgoing())
    assert mail is not None
    message = parsed(mail.content)
    assert message["Bcc"] is None
    assert message["From"] == "Te a <orders@mesh.example>"
    assert message["Subject"] == "Your order 4711 at Tea Bcc: x@example.com is confirmed"


_any_shop = merchants()
_of_any_shop = Renderer(merchants=_any_shop, mail_from="orders@mesh.example")


@given(
    reference=st.text(max_size=64),
    title=st.text(max_size=200),
    shop=st.text(min_size=1, max_size=200),
)
def test_whatever_stands_in_it_a_mail_is_a_mail(reference: str, title: str, shop: str) -> None:
    """Any text at all: two parts, our headers alone, short lines, and the text comes back."""
    renderer = _of_any_shop
    _any_shop["default"] = a_merchant(name=shop)
    outgoing = an_outgoing(
        recipient=a_recipient(client_order_ref=reference, lines=(Line(1, title),))
    )
    mail = renderer.render(outgoing)
    assert mail is not None
    message = parsed(mail.content)
    said = renderer.say(outgoing)
    assert len(message.keys()) == 11
    assert message["Subject"] == said.subject
    assert body(message, "plain") == said.text
    assert body(message, "html") == said.html
    lines = mail.content.split(b"\r\n")
    # RFC 5322, 2.1.1: a line of a mail holds 998 bytes at the most, and should hold 78.
    assert max(len(line) for line in lines) <= 150
    assert all(b"\n" not in line and b"\r" not in line for line in lines)
    assert mail.content.isascii()
    outline(said.html)


# --- languages, numbers, dates --------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ("en", "en"),
        ("de", "de"),
        ("de-AT", "de-AT"),
        ("DE-at", "de-AT"),
        ("de-CH-1996", "de-CH"),
        ("de-Latn-AT", "de-AT"),
        ("de-XX", "de"),
        ("fr-CA", "fr-CA"),
        ("en-GB", "en-GB"),
        ("ja", "en"),
        ("ja-JP", "en"),
        ("zh-Hans-CN", "en"),
        ("xx-YY", "en"),
        ("", "en"),
    ],
)
def test_a_locale_falls_back_to_what_there_is(asked: str, written: str) -> None:
    """From the region to the language to English, words and numbers together."""
    found = negotiated(asked, frozenset(LANGUAGES))
    assert found == written
    assert str(Locale.parse(found, sep="-")).replace("_", "-") == found


def test_a_template_for_a_region_is_preferred_to_that_of_its_language(tmp_path: Path) -> None:
    """So that one mail can be worded for one country."""
    for language, text in (("en", "english"), ("de", "german"), ("de-AT", "austrian")):
        folder = tmp_path / "order_confirmed" / language
        folder.mkdir(parents=True)
        for name in ("subject.txt.j2", "body.txt.j2", "body.html.j2"):
            (folder / name).write_text(text)
    renderer = Renderer(merchants=merchants(), mail_from="a@b.example", templates=tmp_path)
    found = {}
    for asked in ("de-AT", "de-CH", "de", "fr"):
        locale = renderer.negotiate_locale("order_confirmed", asked)
        found[asked] = renderer.say(an_outgoing(locale=locale)).subject
    assert found == {"de-AT": "austrian", "de-CH": "german", "de": "german", "fr": "english"}


def test_an_amount_in_a_subject_does_not_break(renderer: Renderer) -> None:
    """Neither between its thousands nor before its currency, nor before the colon."""
    recipient = a_recipient(locale="fr", total=eur(125_000))
    outgoing = an_outgoing("merchant_order_confirmed", recipient=recipient)
    subject = "Nouvelle commande 4711\xa0: 1\u202f250,00\xa0€"
    assert renderer.say(outgoing).subject == subject
    mail = renderer.render(outgoing)
    assert mail is not None
    assert parsed(mail.content)["Subject"] == subject


@pytest.mark.parametrize(
    ("money", "locale", "text"),
    [
        (Money("EUR", 2500), "en", "€25.00"),
        (Money("EUR", 2500), "de", "25,00 €"),
        (Money("EUR", 125_000), "de-AT", "€ 1.250,00"),
        (Money("EUR", 125_000), "fr", "1\u202f250,00 €"),
        (Money("JPY", 1250), "en", "¥1,250"),
        (Money("KWD", 1250), "de", "1,250 KWD"),
        (Money("USD", 5), "en", "$0.05"),
        (Money("USD", 5), "de", "0,05 $"),
        (Money("IQD", 1234), "de", "1,234 IQD"),
        (Money("IQD", 1200), "en", "IQD 1.200"),
        (Money("AFN", 1250), "de", "12,50 AFN"),
        (Money("AFN", 120_000), "de", "1.200 AFN"),
        (Money("CHF", 1250), "en", "CHF 12.50"),
        (Money("CHF", 125_000), "de-CH", "CHF 1’250.00"),
        (Money("CAD", 1250), "en", "CA$12.50"),
        (Money("CAD", 125_000), "fr-CA", "1 250,00 $"),
        (Money("EUR", 0), "en", "€0.00"),
        (Money("EUR", MINOR_UNITS_MAX), "en", "€10,000,000,000,000.00"),
    ],
)
def test_money_is_written_as_the_locale_writes_it(money: Money, locale: str, text: str) -> None:
    """Symbol, place, separators and digits."""
    assert money_text(money, locale).replace("\xa0", " ") == text


@given(
    currency=st.sampled_from(sorted(CURRENCY_CODES)),
    minor_units=st.integers(min_value=0, max_value=MINOR_UNITS_MAX),
    locale=st.sampled_from(["en", "de", "fr", "de-CH", "fr-CA", "en-IN"]),
)
def test_no_amount_loses_a_minor_unit_on_its_way_into_a_mail(
    currency: str, minor_units: int, locale: str
) -> None:
    """Read back, the digits are the amount, exactly, for every currency of ISO 4217."""
    money = Money(currency, minor_units)
    text = money_text(money, locale)
    # The number alone: from the first digit to the last.
    number = text[re.search(r"\d", text).start() :]  # type: ignore[union-attr]
    number = re.sub(r"\D+$", "", number)
    read: Decimal = parse_decimal(number, locale=Locale.parse(locale, sep="-"))
    assert read == money.major_units
    # 12.5 of a currency with cents reads like a slip.
    assert -int(read.as_tuple().exponent) in (0, minor_unit_digits(currency))


def test_dates_are_written_in_the_locale_and_in_utc() -> None:
    """Whatever the time zone that the time came in."""
    late = datetime(2026, 11, 22, 0, 30, tzinfo=timezone(timedelta(hours=2)))
    assert date_text(late, "en") == "November 21, 2026"
    assert date_text(late, "en-GB") == "21 November 2026"
    assert date_text(NOON, "de") == "20. November 2026"
    assert date_text(NOON, "fr") == "20 novembre 2026"
    assert date_text(datetime(2026, 11, 1, tzinfo=UTC), "fr-CA") == "1er novembre 2026"
    assert date_text(datetime(2026, 11, 1, tzinfo=UTC), "de") == "1. November 2026"
    assert time_text(NOON, "fr") == "20 novembre 2026 à 12:00 UTC"
    assert time_text(late, "de") == "21. November 2026, 22:30 UTC"
    assert time_text(NOON, "en").replace("\u202f", " ") == "November 20, 2026, 12:00 PM UTC"


@pytest.mark.parametrize(
    ("mail_from", "name", "address"),
    [
        ("orders@mesh.example", "", "orders@mesh.example"),
        ("Tea <orders@mesh.example>", "Tea", "orders@mesh.example"),
        ('"Tea, Ltd." <orders@mesh.example>', "Tea, Ltd.", "orders@mesh.example"),
        ("Tée <orders@mesh.example>", "Tée", "orders@mesh.example"),
    ],
)
def test_who_mails_come_from_is_a_name_and_an_address(
    mail_from: str, name: str, address: str
) -> None:
    """Either alone or with a name, which the header then encodes."""
    assert address_of(mail_from) == (name, address)
    renderer = Renderer(merchants=merchants(), mail_from=mail_from)
    mail = renderer.render(an_outgoing())
    assert mail is not None
    sender = parsed(mail.content)["From"].addresses[0]
    assert (sender.display_name, sender.addr_spec) == (name, address)


def test_a_long_name_of_the_sender_is_encoded_word_by_word() -> None:
    """RFC 2047, 2: an encoded word has 75 characters at the most."""
    name = "Große Überseeische Teehandelsgesellschaft Müller & Söhne, vormals Ähnlich"
    renderer = Renderer(merchants=merchants(), mail_from=f'"{name}" <orders@mesh.example>')
    mail = renderer.render(an_outgoing())
    assert mail is not None
    assert max(len(word) for word in re.findall(rb"=\?utf-8\?\S+\?=", mail.content)) <= 75
    # The newer parser of Python 3.11 leaves the space between encoded words of a name.
    sender = email.message_from_bytes(mail.content)["From"]
    assert str(make_header(decode_header(sender))) == f"{name} <orders@mesh.example>"


@pytest.mark.parametrize("mail_from", ["", "nobody", "Tea <orders>", "ordérs@mesh.example"])
def test_a_sender_without_an_address_is_refused_at_start(mail_from: str) -> None:
    """Not when the first mail is to go."""
    with pytest.raises(ValueError, match="holds no mail address"):
        address_of(mail_from)
