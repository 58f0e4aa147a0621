"""Rates are the bank's own, exact, of one day, and never made up."""

from __future__ import annotations

import zipfile
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import pytest

from rates_svc.providers import (
    EcbHistory,
    MalformedHistoryError,
    PublishedRate,
    end_of,
    is_target_closed,
    next_business_day,
    published_at,
)
from tests.unit.rates_svc.a_history import A_HISTORY, FRIDAY_EVENING, a_history


@pytest.fixture(scope="module")
def shipped() -> EcbHistory:
    """The history as the installed package ships it."""
    return EcbHistory.read()


def found(base: str, quote: str, on: date | None = None) -> PublishedRate:
    """The rate of a pair in the small history, which must be there."""
    rate = a_history().find(base, quote, on=on)
    assert rate is not None
    return rate


def test_a_rate_against_the_euro_is_passed_on_as_published() -> None:
    """No division touches what the bank wrote."""
    assert str(found("EUR", "USD").rate) == "1.25"
    assert str(found("EUR", "JPY").rate) == "160"


@pytest.mark.parametrize(
    ("base", "quote", "rate"),
    [
        ("USD", "EUR", "0.8"),
        ("USD", "JPY", "128"),
        ("GBP", "USD", "1.5625"),
        ("KWD", "EUR", "3.00030003000300030"),
        ("EUR", "EUR", "1"),
        ("USD", "USD", "1"),
    ],
)
def test_other_pairs_are_divided_to_eighteen_digits(base: str, quote: str, rate: str) -> None:
    """A cross rate is the quotient of two rates against the euro, rounded half to even."""
    assert found(base, quote).rate == Decimal(rate)


def test_the_last_of_eighteen_digits_is_rounded() -> None:
    """Two thirds end in a seven: nothing is cut off."""
    rate = a_history("Date,USD,\n2026-10-30,1.5,\n").find("USD", "EUR")
    assert rate is not None
    assert str(rate.rate) == "0.666666666666666667"


def test_a_surrounding_decimal_context_has_no_say() -> None:
    """Three digits of precision set elsewhere shorten no rate."""
    with localcontext(prec=3):
        assert found("KWD", "EUR").rate == Decimal("3.00030003000300030")


def test_the_newest_rate_is_the_newest_days() -> None:
    """Without a day the last row answers."""
    assert found("EUR", "USD").day == date(2026, 10, 30)


@pytest.mark.parametrize(
    ("asked", "answered"),
    [
        (date(2026, 10, 29), date(2026, 10, 29)),
        (date(2026, 10, 31), date(2026, 10, 30)),
        (date(2026, 10, 27), date(2026, 10, 16)),
        (date(2024, 2, 29), date(2022, 12, 30)),
        (date(9999, 12, 31), date(2026, 10, 30)),
    ],
)
def test_a_day_without_a_publication_has_the_rate_of_the_last_before(
    asked: date, answered: date
) -> None:
    """Weekends and holidays keep the rate that was in force."""
    assert found("EUR", "USD", asked).day == answered


@pytest.mark.parametrize("day", [date(2022, 12, 28), date(1, 1, 1)])
def test_before_the_first_publication_there_is_no_rate(day: date) -> None:
    """The oldest rate is not stretched backwards."""
    assert a_history().find("EUR", "USD", on=day) is None


@pytest.mark.parametrize("pair", [("EUR", "XXX"), ("XXX", "EUR"), ("XXX", "XXX")])
def test_a_currency_that_was_never_published_has_no_rate(pair: tuple[str, str]) -> None:
    """Not even against itself: nobody published it."""
    assert a_history().find(*pair) is None


def test_a_withdrawn_currency_has_rates_of_its_time_only() -> None:
    """The kuna's last rate does not live on after the kuna."""
    assert found("EUR", "HRK", date(2023, 1, 1)).rate == Decimal("7.5365")
    assert a_history().find("EUR", "HRK") is None
    assert a_history().find("EUR", "HRK", on=date(2026, 10, 16)) is None


def test_a_currency_missing_for_days_has_its_last_rate_for_a_week() -> None:
    """Both rates of a pair come from one publication, and the answer says it was outdone."""
    rate = found("RUB", "USD")
    assert (rate.day, rate.superseded) == (date(2026, 10, 28), True)
    assert Fraction(rate.rate) == pytest.approx(Fraction("1.2") / Fraction("99.5"))
    assert not found("RUB", "USD", date(2026, 10, 28)).superseded


@pytest.mark.parametrize(("last", "known"), [("2026-10-23", True), ("2026-10-22", False)])
def test_after_a_week_a_missing_currency_has_no_rate(last: str, known: bool) -> None:
    """Seven days are bridged, the eighth is not."""
    history = a_history(f"Date,USD,ISK,\n2026-10-30,1.25,N/A,\n{last},1.2,136,\n")
    assert (history.find("EUR", "ISK") is not None) is known
    assert ("ISK" in history.currencies()) is known


def test_the_currencies_are_those_with_a_rate_today() -> None:
    """A suspended one stays for a week, a withdrawn one does not; the euro is one too."""
    assert a_history().currencies() == {"EUR", "USD", "JPY", "GBP", "RUB", "KWD"}


@pytest.mark.parametrize(
    ("at", "stale"),
    [
        (FRIDAY_EVENING, False),
        (datetime(2026, 11, 1, 23, tzinfo=UTC), False),
        (datetime(2026, 11, 2, 14, 59, 59, tzinfo=UTC), False),
        (datetime(2026, 11, 2, 15, tzinfo=UTC), True),
        (datetime(2027, 1, 1, tzinfo=UTC), True),
    ],
)
def test_the_newest_rate_is_stale_from_the_next_publication_on(at: datetime, stale: bool) -> None:
    """Friday's rate is fresh over the weekend, until 16:00 in Frankfurt on Monday."""
    assert a_history().is_stale(found("EUR", "USD"), at=at) is stale


def test_a_rate_that_others_outdid_is_stale_at_once() -> None:
    """The rouble's rate is two days behind the bank's newest."""
    assert a_history().is_stale(found("EUR", "RUB"), at=FRIDAY_EVENING)


def test_a_past_days_own_rate_is_never_stale() -> None:
    """The history goes on after it, so nothing was missed."""
    rate = found("EUR", "USD", date(2026, 10, 27))
    assert not a_history().is_stale(rate, at=end_of(date(2026, 10, 27)))


def test_publication_follows_frankfurts_clocks() -> None:
    """16:00 there is 15:00 UTC in winter and 14:00 in summer, on the days of change too."""
    assert published_at(date(2026, 1, 15)) == datetime(2026, 1, 15, 15, tzinfo=UTC)
    assert published_at(date(2026, 7, 15)) == datetime(2026, 7, 15, 14, tzinfo=UTC)
    assert published_at(date(2026, 3, 29)) == datetime(2026, 3, 29, 14, tzinfo=UTC)
    assert published_at(date(2026, 10, 25)) == datetime(2026, 10, 25, 15, tzinfo=UTC)


def test_a_day_ends_at_frankfurts_midnight() -> None:
    """That is an hour or two before the day of UTC ends."""
    assert end_of(date(2026, 7, 15)) == datetime(2026, 7, 15, 22, tzinfo=UTC)
    assert end_of(date(2026, 12, 31)) == datetime(2026, 12, 31, 23, tzinfo=UTC)


@pytest.mark.parametrize(
    ("day", "following"),
    [
        (date(2026, 10, 30), date(2026, 11, 2)),
        (date(2026, 4, 2), date(2026, 4, 7)),
        (date(2026, 4, 30), date(2026, 5, 4)),
        (date(2026, 12, 24), date(2026, 12, 28)),
        (date(2026, 12, 31), date(2027, 1, 4)),
    ],
)
def test_the_next_business_day_leaves_out_targets_holidays(day: date, following: date) -> None:
    """Weekend, Easter, May Day, Christmas, New Year."""
    assert next_business_day(day) == following


def test_the_calendar_tells_every_day_of_the_shipped_history(shipped: EcbHistory) -> None:
    """Since 2002 the bank has published on exactly the days that the calendar leaves open."""
    day = date(2002, 1, 1)
    while day <= shipped.last_day:
        rate = shipped.find("EUR", "USD", on=day)
        assert rate is not None
        assert (rate.day == day) is not is_target_closed(day), day
        day += timedelta(days=1)


def test_every_row_of_the_shipped_history_can_be_read(shipped: EcbHistory) -> None:
    """No damaged number waits in some old row, and no currency is missing for a few days."""
    day = shipped.first_day
    while day <= shipped.last_day:
        rate = shipped.find("USD", "EUR", on=day)
        assert rate is not None
        assert not rate.superseded
        assert Decimal("0.5") < rate.rate < Decimal(2)
        day += timedelta(days=1)


def test_the_shipped_history_holds_rates_that_are_known(shipped: EcbHistory) -> None:
    """Two days looked up by hand in the bank's publications."""
    assert shipped.first_day == date(1999, 1, 4)
    first = shipped.find("EUR", "USD", on=date(1999, 1, 4))
    assert first is not None
    assert first.rate == Decimal("1.1789")
    roubles = shipped.find("EUR", "RUB", on=date(2022, 3, 1))
    assert roubles is not None
    assert roubles.rate == Decimal("117.201")
    assert shipped.find("EUR", "RUB") is None
    assert {"EUR", "USD", "JPY", "GBP"} < shipped.currencies()


def test_a_history_is_read_zipped_or_plain(tmp_path: Path) -> None:
    """An operator gives the bank's file as it was downloaded, or unpacked."""
    plain = tmp_path / "eurofxref-hist.csv"
    plain.write_text(A_HISTORY)
    zipped = tmp_path / "eurofxref-hist.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.write(plain, plain.name)
    assert EcbHistory.read(plain).last_day == date(2026, 10, 30)
    assert EcbHistory.read(zipped).last_day == date(2026, 10, 30)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    """The service does not start without rates."""
    with pytest.raises(MalformedHistoryError, match=r"absent\.zip cannot be read"):
        EcbHistory.read(tmp_path / "absent.zip")


def test_a_damaged_archive_is_refused(tmp_path: Path) -> None:
    """Whichever byte of what is packed is wrong, it is said which file it is."""
    path = tmp_path / "eurofxref-hist.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eurofxref-hist.csv", A_HISTORY)
    whole = path.read_bytes()
    begin = whole.index(b"eurofxref-hist.csv") + len("eurofxref-hist.csv")
    for position in range(begin, begin + 40):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        with pytest.raises(MalformedHistoryError, match=r"hist\.zip cannot be read"):
            EcbHistory.read(path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Date,USD,\n",
        "Datum,USD,\n2026-10-30,1.25,\n",
        "Date,USD,\n30.10.2026,1.25,\n",
        "Date,USD,\n2026-10-29,1.25,\n2026-10-30,1.25,\n",
        "Date,USD,\n2026-10-30,1.25,\n2026-10-30,1.25,\n",
        "Date,USD,JPY,\n2026-10-30,1.25\n",
        "<html>no such page</html>\n<p>\n",
    ],
)
def test_a_file_that_is_not_the_banks_is_refused(text: str) -> None:
    """Header, dates, their order and the number of columns are checked."""
    with pytest.raises(MalformedHistoryError):
        a_history(text)


@pytest.mark.parametrize(
    "value", ["0", "0.000", "-1.25", "NaN", "Infinity", "1e3", "1,25", "", ".", " 1", "\u0661"]
)
def test_a_value_that_is_no_price_is_refused(value: str) -> None:
    """Nothing is ever priced at zero, below it, or at something that is no number."""
    with pytest.raises(MalformedHistoryError):
        a_history(f"Date,USD\n2026-10-30,{value}\n")


def test_a_damaged_old_row_spoils_only_its_own_day() -> None:
    """The service runs; that day's rates are refused, not guessed."""
    history = a_history(A_HISTORY.replace("0.83,98", "0.83,oops"))
    assert history.find("EUR", "USD") is not None
    with pytest.raises(MalformedHistoryError, match="'oops' of 2026-10-16 is no rate of RUB"):
        history.find("EUR", "USD", on=date(2026, 10, 16))
