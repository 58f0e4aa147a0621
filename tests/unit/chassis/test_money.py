"""Money is exact, keeps currencies apart and rounds once."""

from __future__ import annotations

import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.money import (
    CURRENCY_CODES,
    MINOR_UNITS_MAX,
    AmountOutOfRangeError,
    CurrencyMismatchError,
    Money,
    MoneyError,
    UnknownCurrencyError,
    convert,
    convert_unrounded,
    minor_unit_digits,
)

amounts = st.integers(-MINOR_UNITS_MAX, MINOR_UNITS_MAX)


@pytest.mark.parametrize(("code", "digits"), [("EUR", 2), ("JPY", 0), ("KWD", 3), ("UYW", 4)])
def test_a_currency_has_the_minor_digits_of_iso_4217(code: str, digits: int) -> None:
    """Euros have cents, yen have nothing smaller, dinars have mills."""
    assert minor_unit_digits(code) == digits


def test_the_table_holds_every_active_currency_once() -> None:
    """157 codes of list one are neither funds nor without a minor unit."""
    assert len(CURRENCY_CODES) == 157
    assert all(len(code) == 3 and code.isupper() for code in CURRENCY_CODES)


@pytest.mark.parametrize("code", ["XXX", "XAU", "USN", "HRK", "eur", "", "EURO"])
def test_a_code_that_is_no_active_currency_is_refused(code: str) -> None:
    """Gold, funds, withdrawn currencies and small letters are no money."""
    with pytest.raises(UnknownCurrencyError) as caught:
        Money(code, 1)
    assert caught.value.currency_code == code
    with pytest.raises(LookupError):
        minor_unit_digits(code)


@pytest.mark.parametrize("minor_units", [1.0, True, "1", Decimal(1), None])
def test_minor_units_are_an_int_and_nothing_else(minor_units: Any) -> None:
    """A float, a bool or a string never becomes an amount."""
    with pytest.raises(TypeError):
        Money("EUR", minor_units)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_amount_above_the_limit_is_refused(sign: int) -> None:
    """The limit itself is fine, one unit more is not."""
    assert Money("EUR", sign * MINOR_UNITS_MAX)
    with pytest.raises(AmountOutOfRangeError):
        Money("EUR", sign * (MINOR_UNITS_MAX + 1))


def test_arithmetic_that_leaves_the_range_is_refused() -> None:
    """A sum, a difference and a product are held to the same limit."""
    most, one = Money("EUR", MINOR_UNITS_MAX), Money("EUR", 1)
    with pytest.raises(AmountOutOfRangeError):
        most + one
    with pytest.raises(AmountOutOfRangeError):
        -most - one
    with pytest.raises(AmountOutOfRangeError):
        most * 2


def test_adding_subtracting_and_multiplying_are_exact() -> None:
    """Three times 12.50 less one cent is 37.49."""
    assert Money("EUR", 1250) * 3 - Money("EUR", 1) == Money("EUR", 3749)
    assert 2 * Money("JPY", 5) + Money("JPY", 1) == Money("JPY", 11)
    assert -Money("EUR", 5) == Money("EUR", -5)


@pytest.mark.parametrize("factor", [1.5, Decimal("1.5"), True, Money("EUR", 2)])
def test_money_is_multiplied_by_an_int_only(factor: Any) -> None:
    """A float factor would lose cents, a money factor has no meaning."""
    with pytest.raises(TypeError):
        Money("EUR", 100) * factor


@pytest.mark.parametrize(
    "operation",
    [operator.add, operator.sub, operator.lt, operator.le, operator.gt, operator.ge],
)
def test_two_currencies_never_meet_in_an_operation(
    operation: Callable[[Money, Money], object],
) -> None:
    """Neither arithmetic nor order exists between EUR and USD."""
    with pytest.raises(CurrencyMismatchError) as caught:
        operation(Money("EUR", 1), Money("USD", 1))
    assert (caught.value.left, caught.value.right) == ("EUR", "USD")


def test_amounts_of_one_currency_are_ordered() -> None:
    """Comparison follows the minor units."""
    small, large = Money("EUR", -1), Money("EUR", 1)
    assert small < large
    assert small <= large
    assert large > small
    assert large >= small
    assert max(small, large) is large


def test_nothing_in_one_currency_is_not_nothing_in_another() -> None:
    """Equality compares the currency too, and raises nothing."""
    assert Money.zero("EUR") != Money.zero("USD")
    assert not Money.zero("EUR")


def test_a_total_of_nothing_is_zero() -> None:
    """An empty order costs nothing, in its own currency."""
    assert Money.total([], "EUR") == Money("EUR", 0)


def test_a_total_of_another_currency_is_refused() -> None:
    """One stray line of another currency spoils the sum."""
    with pytest.raises(CurrencyMismatchError):
        Money.total([Money("EUR", 1), Money("USD", 1)], "EUR")


def test_only_the_total_has_to_be_in_range() -> None:
    """Adding in another order must not decide whether a sum is accepted."""
    most = Money("EUR", MINOR_UNITS_MAX)
    assert Money.total([most, most, -most], "EUR") == most


@pytest.mark.parametrize(
    ("money", "text"),
    [
        (Money("EUR", 1250), "12.50 EUR"),
        (Money("EUR", -5), "-0.05 EUR"),
        (Money("JPY", 1250), "1250 JPY"),
        (Money("KWD", 1), "0.001 KWD"),
        (Money("EUR", MINOR_UNITS_MAX), "10000000000000.00 EUR"),
    ],
)
def test_money_prints_as_people_write_it(money: Money, text: str) -> None:
    """Every digit of the minor unit is shown, never an exponent."""
    assert str(money) == text


@pytest.mark.parametrize(
    ("minor_units", "rate", "expected"),
    [(1, "0.5", 0), (3, "0.5", 2), (5, "0.5", 2), (-1, "0.5", 0), (-3, "0.5", -2), (7, "0.5", 4)],
)
def test_a_half_is_rounded_to_even(minor_units: int, rate: str, expected: int) -> None:
    """Halves go up as often as down, so sums of many do not drift."""
    assert convert(Money("EUR", minor_units), Decimal(rate), "USD") == Money("USD", expected)


def test_a_conversion_is_rounded_once() -> None:
    """Rounding first to cents and then to yen would make 1 of 0.4949..."""
    just_below_half = Decimal("0.49" + "9" * 40)
    assert convert(Money("JPY", 1), just_below_half, "JPY") == Money("JPY", 0)


@pytest.mark.parametrize(
    ("source", "rate", "target"),
    [
        (Money("EUR", 1250), "175.68", Money("JPY", 2196)),
        (Money("JPY", 2196), "0.0057", Money("EUR", 1252)),
        (Money("KWD", 1), "3.25", Money("USD", 0)),
        (Money("USD", 100), "0.305", Money("KWD", 305)),
    ],
)
def test_a_conversion_counts_in_the_targets_minor_units(
    source: Money, rate: str, target: Money
) -> None:
    """Currencies with another number of digits are shifted, not misread by a hundred."""
    assert convert(source, Decimal(rate), target.currency_code) == target


@pytest.mark.parametrize("rate", ["0", "-1", "NaN", "sNaN", "Infinity", "1." + "1" * 60])
def test_what_is_no_price_is_refused(rate: str) -> None:
    """Zero, negative, not a number, endless and over-long rates convert nothing."""
    with pytest.raises(MoneyError):
        convert(Money("EUR", 1), Decimal(rate), "USD")


def test_a_conversion_into_an_unknown_currency_is_refused() -> None:
    """The target is held to the same table."""
    with pytest.raises(UnknownCurrencyError):
        convert(Money("EUR", 1), Decimal(1), "XXX")


def test_a_conversion_that_leaves_the_range_is_refused() -> None:
    """A large amount times a large rate does not fit and is not cut."""
    with pytest.raises(AmountOutOfRangeError):
        convert(Money("EUR", MINOR_UNITS_MAX), Decimal("20275.17"), "IDR")


def test_a_surrounding_decimal_context_has_no_say() -> None:
    """Two digits of precision set elsewhere in the process change no cent."""
    with localcontext(prec=2):
        assert convert(Money("EUR", 123456), Decimal("1.17345"), "USD") == Money("USD", 144869)
        assert str(Money("EUR", 123456)) == "1234.56 EUR"


@given(
    minor_units=st.integers(-(10**9), 10**9),
    rate=st.decimals("0.000001", "1000", allow_nan=False, allow_infinity=False),
)
def test_a_conversion_agrees_with_fractions(minor_units: int, rate: Decimal) -> None:
    """The product is exact and its rounding is Python's own half-even of a fraction."""
    money = Money("EUR", minor_units)
    exact = Fraction(minor_units) * Fraction(rate)
    assert Fraction(convert_unrounded(money, rate, "USD")) == exact
    assert convert(money, rate, "USD").minor_units == round(exact)


@given(left=amounts, right=amounts)
def test_adding_and_taking_away_again_changes_nothing(left: int, right: int) -> None:
    """Whatever fits can be undone to the unit."""
    a, b = Money("EUR", left // 2), Money("EUR", right // 2)
    assert a + b - b == a
    assert (a < b) == (left // 2 < right // 2)
