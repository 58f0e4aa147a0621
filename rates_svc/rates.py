"""The nouns of the service and what can be asked of it; nothing here does I/O."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date, datetime, timedelta
from decimal import Decimal

from chassis.mediator import Query
from chassis.money import Money


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeRate:
    """How much of `quote` one unit of `base` was worth, by whom and when.

    `stale` says that the provider should have published a newer one since.
    """

    base: str
    quote: str
    rate: Decimal
    provider: str
    as_of_time: datetime
    stale: bool

    @property
    def name(self) -> str:
        """The resource name, `exchangeRates/USD-EUR`."""
        return rate_name(self.base, self.quote)


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """An amount in another currency, the rate that made it, and what rounding took.

    `unrounded_minor_units` is the exact product, in minor units of the target.
    """

    amount: Money
    exchange_rate: ExchangeRate
    unrounded_minor_units: Decimal


@dataclass(frozen=True, slots=True, kw_only=True)
class Currency:
    """A currency that can be converted, and the decimal digits of its minor unit."""

    code: str
    minor_unit_digits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CurrencyPage:
    """Some of the currencies, by code; the token leads to the next, empty on the last."""

    currencies: tuple[Currency, ...]
    next_page_token: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GetExchangeRate(Query[ExchangeRate]):
    """Asks for the newest rate of a pair, or for that of a day or the last before it."""

    base: str
    quote: str
    as_of_date: date | None = None
    max_staleness: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertMoney(Query[Conversion]):
    """Asks for an amount in another currency, at the rate that `GetExchangeRate` finds."""

    amount: Money
    target_currency_code: str
    as_of_date: date | None = None
    max_staleness: timedelta | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ListCurrencies(Query[CurrencyPage]):
    """Asks for a page of the currencies; a size of 0 means all of them."""

    page_size: int = 0
    page_token: str = ""


def rate_name(base: str, quote: str) -> str:
    """The resource name of a pair's rate."""
    return f"exchangeRates/{base}-{quote}"
