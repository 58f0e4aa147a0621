"""Money: exact amounts in whole minor units of one ISO 4217 currency.

12.50 EUR is `Money("EUR", 1250)`, 1250 JPY is `Money("JPY", 1250)`. Amounts of
different currencies never meet except through `convert`, which rounds half to even
and does so once. No float comes near any of it, and the module does no I/O, so that
a domain may import it.
"""

from __future__ import annotations

import decimal
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Final

MINOR_UNITS_MAX: Final = 10**15
"""Largest magnitude of an amount, in minor units.

`ordermesh.common.v1.Money` has the same limit: 9,000 amounts of this size can be added
before 64 bits overflow, so a sum over an order stays exact in any language.
"""

RATE_DIGITS_MAX: Final = 60
"""Most significant digits that a conversion accepts in a rate.

A rate of a provider has at most 10, one computed by division has as many as its
service states. The limit is what keeps every product exact in the context below.
"""

# Sixteen digits of amount, the rate's, and the shift between two currencies' minor
# units fit: a product that did not would raise Inexact and never be rounded twice.
_EXACT = decimal.Context(
    prec=100,
    rounding=decimal.ROUND_HALF_EVEN,
    traps=[decimal.Inexact, decimal.InvalidOperation, decimal.Overflow],
)

# ISO 4217 list one as published on 2026-01-01, without fund codes (CLF, USN, ...) and
# without codes that have no minor unit (XAU, XDR, XXX, ...). The digits are ISO's;
# CLDR, hence babel, prints fewer for a dozen currencies (AFN, IQD, RSD, ...), so
# formatting may round what this table counts exactly.
_CODES_BY_MINOR_UNIT_DIGITS: Final = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF",
    2: """
        AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN
        BZD CAD CDF CHF CNY COP CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP
        GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR JMD KES KGS KHR KPW KYD
        KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN
        NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG
        SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH
        USD UYU UZS VED VES WST XAD XCD XCG YER ZAR ZMW ZWG
    """,
    3: "BHD IQD JOD KWD LYD OMR TND",
    4: "UYW",
}

_MINOR_UNIT_DIGITS: Final = {
    code: digits for digits, codes in _CODES_BY_MINOR_UNIT_DIGITS.items() for code in codes.split()
}

CURRENCY_CODES: Final = frozenset(_MINOR_UNIT_DIGITS)
"""The codes that `Money` knows."""


class MoneyError(ValueError):
    """An amount that cannot be, or an operation that money does not have."""


class UnknownCurrencyError(MoneyError, LookupError):
    """The code is not that of an active ISO 4217 currency with a minor unit."""

    def __init__(self, currency_code: str) -> None:
        super().__init__(f"{currency_code!r} is not an active ISO 4217 currency")
        self.currency_code = currency_code


class CurrencyMismatchError(MoneyError):
    """Two amounts of different currencies met in one operation."""

    def __init__(self, left: str, right: str) -> None:
        super().__init__(f"{left} and {right} are different currencies")
        self.left = left
        self.right = right


class AmountOutOfRangeError(MoneyError):
    """The amount's magnitude is above `MINOR_UNITS_MAX`."""

    def __init__(self, currency_code: str, minor_units: int) -> None:
        super().__init__(f"{currency_code} amount is beyond {MINOR_UNITS_MAX} minor units")
        self.currency_code = currency_code
        self.minor_units = minor_units


def minor_unit_digits(currency_code: str) -> int:
    """How many decimal digits the currency's minor unit has: 2 for EUR, 0 for JPY.

    Raises:
        UnknownCurrencyError: The code is not in the table.
    """
    try:
        return _MINOR_UNIT_DIGITS[currency_code]
    except KeyError:
        raise UnknownCurrencyError(currency_code) from None


@dataclass(frozen=True, slots=True)
class Money:
    """An exact amount of one currency; it may be negative.

    Equality compares currency and amount, so zero EUR is not zero USD. Order and
    arithmetic exist within one currency only.

    Args:
        currency_code: ISO 4217 code of an active currency, in capitals.
        minor_units: Count of the currency's smallest unit.

    Raises:
        UnknownCurrencyError: The currency is not in the table.
        AmountOutOfRangeError: The magnitude is above `MINOR_UNITS_MAX`; a sum, a
            difference or a product beyond it raises too.
        TypeError: `minor_units` is no int (a bool or a float is none).
    """

    currency_code: str
    minor_units: int

    def __post_init__(self) -> None:
        if self.currency_code not in _MINOR_UNIT_DIGITS:
            raise UnknownCurrencyError(self.currency_code)
        if type(self.minor_units) is not int:
            raise TypeError(f"minor_units is {type(self.minor_units).__name__}, not int")
        if not -MINOR_UNITS_MAX <= self.minor_units <= MINOR_UNITS_MAX:
            raise AmountOutOfRangeError(self.currency_code, self.minor_units)

    @classmethod
    def zero(cls, currency_code: str) -> Money:
        """Nothing, in the given currency."""
        return cls(currency_code, 0)

    @classmethod
    def total(cls, amounts: Iterable[Money], currency_code: str) -> Money:
        """The sum of the amounts, zero when there are none.

        Only the sum has to be in range, not what adding one after the other meets.

        Raises:
            CurrencyMismatchError: An amount is not of `currency_code`.
            AmountOutOfRangeError: The sum is beyond `MINOR_UNITS_MAX`.
        """
        minor_units = 0
        for amount in amounts:
            if amount.currency_code != currency_code:
                raise CurrencyMismatchError(currency_code, amount.currency_code)
            minor_units += amount.minor_units
        return cls(currency_code, minor_units)

    @property
    def major_units(self) -> Decimal:
        """The amount as people write it, exactly: 1250 minor units of EUR are 12.50."""
        digits = _MINOR_UNIT_DIGITS[self.currency_code]
        return Decimal(self.minor_units).scaleb(-digits, _EXACT)

    def __str__(self) -> str:
        return f"{self.major_units:f} {self.currency_code}"

    def __bool__(self) -> bool:
        return self.minor_units != 0

    def __neg__(self) -> Money:
        return Money(self.currency_code, -self.minor_units)

    def __add__(self, other: Money) -> Money:
        if not isinstance(other, Money):
            return NotImplemented
        return Money(self.currency_code, self.minor_units + self._minor_units_of(other))

    def __sub__(self, other: Money) -> Money:
        if not isinstance(other, Money):
            return NotImplemented
        return Money(self.currency_code, self.minor_units - self._minor_units_of(other))

    def __mul__(self, factor: int) -> Money:
        # bool is an int to Python, but no quantity; float would lose cents.
        if type(factor) is not int:
            return NotImplemented
        return Money(self.currency_code, self.minor_units * factor)

    __rmul__ = __mul__

    def __lt__(self, other: Money) -> bool:
        if not isinstance(other, Money):
            return NotImplemented
        return self.minor_units < self._minor_units_of(other)

    def __le__(self, other: Money) -> bool:
        if not isinstance(other, Money):
            return NotImplemented
        return self.minor_units <= self._minor_units_of(other)

    def __gt__(self, other: Money) -> bool:
        if not isinstance(other, Money):
            return NotImplemented
        return self.minor_units > self._minor_units_of(other)

    def __ge__(self, other: Money) -> bool:
        if not isinstance(other, Money):
            return NotImplemented
        return self.minor_units >= self._minor_units_of(other)

    def _minor_units_of(self, other: Money) -> int:
        if other.currency_code != self.currency_code:
            raise CurrencyMismatchError(self.currency_code, other.currency_code)
        return other.minor_units


def convert_unrounded(money: Money, rate: Decimal, to: str) -> Decimal:
    """The exact product of an amount and a rate, in minor units of `to`.

    Args:
        money: What to convert.
        rate: Price of one major unit of the amount's currency in major units of
            `to`; positive, finite, at most `RATE_DIGITS_MAX` digits.
        to: ISO 4217 code of the target.

    Raises:
        UnknownCurrencyError: The target is not in the table.
        MoneyError: The rate is not positive, not finite or has too many digits.
    """
    shift = minor_unit_digits(to) - _MINOR_UNIT_DIGITS[money.currency_code]
    if not rate.is_finite() or rate <= 0:
        # A rate of zero would give goods away; NaN and infinity are a provider's fault.
        raise MoneyError(f"{rate} is not a price")
    if len(rate.as_tuple().digits) > RATE_DIGITS_MAX:
        raise MoneyError(f"a rate has at most {RATE_DIGITS_MAX} digits")
    return _EXACT.multiply(Decimal(money.minor_units), rate).scaleb(shift, _EXACT)


def round_to_minor_units(unrounded: Decimal, currency_code: str) -> Money:
    """Rounds an exact count of minor units half to even, to money.

    Raises:
        UnknownCurrencyError: The currency is not in the table.
        AmountOutOfRangeError: The result is beyond `MINOR_UNITS_MAX`.
    """
    rounded = int(unrounded.to_integral_value(rounding=decimal.ROUND_HALF_EVEN))
    return Money(currency_code, rounded)


def convert(money: Money, rate: Decimal, to: str) -> Money:
    """Converts an amount at a rate, rounding half to even, once.

    The product is exact before it is rounded. Converting into the amount's own
    currency is a multiplication like any other; callers pass a rate of 1.

    Args:
        money: What to convert.
        rate: Price of one major unit of the amount's currency in major units of
            `to`; positive, finite, at most `RATE_DIGITS_MAX` digits.
        to: ISO 4217 code of the target.

    Raises:
        UnknownCurrencyError: The target is not in the table.
        AmountOutOfRangeError: The result is beyond `MINOR_UNITS_MAX`.
        MoneyError: The rate is not positive, not finite or has too many digits.
    """
    return round_to_minor_units(convert_unrounded(money, rate, to), to)
