"""What a basket adds up to, and which baskets are none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import InvalidInputError
from chassis.money import MINOR_UNITS_MAX, Money
from order_svc.domain.order import Basket
from tests.builders import a_basket, a_line, eur

USD = Money("USD", 100)


def refusal(basket: Basket) -> InvalidInputError:
    """The error with which a basket is refused."""
    with pytest.raises(InvalidInputError) as caught:
        basket.total()
    return caught.value


def test_a_basket_adds_up_its_lines() -> None:
    """The subtotal is quantity times price, over all lines."""
    basket = a_basket(a_line("TEA", quantity=2), a_line("CUP", quantity=3, unit_price=eur(999)))
    assert basket.subtotal() == eur(5497)
    assert basket.total() == eur(5497)


def test_the_total_takes_off_the_discount_and_adds_shipping_and_tax() -> None:
    """The order of the contract: subtotal - discount + shipping + tax."""
    basket = a_basket(discount=eur(500), shipping=eur(490), tax=eur(399))
    assert basket.subtotal() == eur(2500)
    assert basket.total() == eur(2889)


def test_a_line_may_be_free_as_long_as_something_is_to_be_paid() -> None:
    """A price of zero is a price."""
    assert a_basket(a_line("TEA"), a_line("GIFT", unit_price=eur(0))).total() == eur(2500)


def test_a_discount_may_exceed_the_lines_when_shipping_is_paid() -> None:
    """Only the total has to be positive, not what it passes through."""
    assert a_basket(discount=eur(2600), shipping=eur(200)).total() == eur(100)


def test_currencies_without_minor_units_add_up_too() -> None:
    """1250 yen are 1250 minor units."""
    line = a_line(unit_price=Money("JPY", 1250))
    assert a_basket(line, currency_code="JPY").total() == Money("JPY", 2500)


@given(
    prices=st.lists(
        st.tuples(st.integers(1, 10_000), st.integers(0, 10**8)), min_size=1, max_size=100
    ),
    discount=st.integers(0, 10**6),
    shipping=st.integers(0, 10**6),
    tax=st.integers(0, 10**6),
)
def test_the_total_is_the_sum_that_a_child_would_make(
    prices: list[tuple[int, int]], discount: int, shipping: int, tax: int
) -> None:
    """Whatever is ordered, the total is the plain sum, or the basket is refused for lack of one."""
    basket = a_basket(
        *(
            a_line(f"SKU-{position}", quantity=quantity, unit_price=eur(price))
            for position, (quantity, price) in enumerate(prices)
        ),
        discount=eur(discount),
        shipping=eur(shipping),
        tax=eur(tax),
    )
    expected = sum(quantity * price for quantity, price in prices) - discount + shipping + tax
    if expected > 0:
        assert basket.total() == eur(expected)
    else:
        assert refusal(basket).reason == "AMOUNT_OUT_OF_RANGE"


def test_two_lines_of_one_sku_are_refused() -> None:
    """The later line is at fault, and the sku is told."""
    error = refusal(a_basket(a_line("TEA"), a_line("CUP"), a_line("TEA")))
    assert error.reason == "DUPLICATE_SKU"
    assert error.metadata == {"field": "order.lines[2].sku", "sku": "TEA"}


def test_a_price_in_another_currency_is_refused() -> None:
    """Amounts of two currencies are never added."""
    error = refusal(a_basket(a_line("TEA"), a_line("CUP", unit_price=USD)))
    assert error.reason == "CURRENCY_MISMATCH"
    assert error.metadata == {
        "field": "order.lines[1].unit_price.currency_code",
        "expected": "EUR",
        "given": "USD",
    }


@pytest.mark.parametrize("field", ["discount", "shipping", "tax"])
def test_an_amount_in_another_currency_is_refused(field: str) -> None:
    """The same holds for what is not a line."""
    error = refusal(a_basket(**{field: USD}))
    assert error.reason == "CURRENCY_MISMATCH"
    assert error.metadata["field"] == f"order.{field}.currency_code"


def test_an_unknown_currency_is_refused() -> None:
    """XXX is no currency that anybody pays in."""
    error = refusal(a_basket(currency_code="XXX"))
    assert error.reason == "CURRENCY_UNKNOWN"
    assert error.metadata == {"field": "order.currency_code", "given": "XXX"}


def test_a_negative_price_is_refused() -> None:
    """Nobody is paid for buying."""
    error = refusal(a_basket(a_line(unit_price=eur(-1))))
    assert error.reason == "AMOUNT_OUT_OF_RANGE"
    assert error.metadata == {"field": "order.lines[0].unit_price.minor_units"}


@pytest.mark.parametrize("field", ["discount", "shipping", "tax"])
def test_a_negative_amount_is_refused(field: str) -> None:
    """A discount is given as a positive amount, so a negative one is a surcharge in disguise."""
    error = refusal(a_basket(**{field: eur(-1)}))
    assert error.reason == "AMOUNT_OUT_OF_RANGE"
    assert error.metadata == {"field": f"order.{field}.minor_units"}


NOTHING_TO_PAY: dict[str, tuple[Basket, str]] = {
    "free lines": (a_basket(a_line(unit_price=eur(0))), "order.lines"),
    "discounted to zero": (a_basket(discount=eur(2500)), "order.discount"),
    "discounted below zero": (a_basket(discount=eur(2501)), "order.discount"),
}


@pytest.mark.parametrize("case", NOTHING_TO_PAY)
def test_a_total_that_is_not_positive_is_refused(case: str) -> None:
    """There must be something to charge."""
    basket, field = NOTHING_TO_PAY[case]
    error = refusal(basket)
    assert error.reason == "AMOUNT_OUT_OF_RANGE"
    assert error.metadata == {"field": field}


MOST = eur(MINOR_UNITS_MAX)

TOO_MUCH: dict[str, tuple[Callable[[], Basket], str]] = {
    "one line": (lambda: a_basket(a_line(quantity=2, unit_price=MOST)), "order.lines"),
    "the sum of lines": (
        lambda: a_basket(
            a_line("A", quantity=1, unit_price=MOST),
            a_line("B", quantity=1, unit_price=eur(1)),
        ),
        "order.lines",
    ),
    "shipping": (
        lambda: a_basket(a_line(quantity=1, unit_price=MOST), shipping=eur(1)),
        "order.shipping",
    ),
    "tax": (lambda: a_basket(a_line(quantity=1, unit_price=MOST), tax=eur(1)), "order.tax"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_a_sum_that_does_not_fit_is_refused(case: str) -> None:
    """An overflow is an answer with a field, not an accident."""
    make, field = TOO_MUCH[case]
    error = refusal(make())
    assert error.reason == "AMOUNT_OUT_OF_RANGE"
    assert error.metadata == {"field": field}


def test_the_largest_total_fits() -> None:
    """The limit itself is allowed."""
    assert a_basket(a_line(quantity=1, unit_price=MOST)).total() == MOST


def test_every_refusal_names_its_field_twice() -> None:
    """Once in the metadata for programs, once as a violation for the BadRequest detail."""
    error = refusal(a_basket(discount=eur(-1)))
    (violation,) = error.violations
    assert violation.field == error.metadata["field"]
    assert violation.reason == error.reason
