"""An order: how it is placed, settled and versioned, and where it may go from where it stands."""

from __future__ import annotations

from datetime import timedelta
from itertools import product

import pytest

from chassis.errors import InvalidInputError, RuleViolationError
from chassis.money import MINOR_UNITS_MAX, Money
from order_svc.domain.order import (
    TRANSITIONS,
    Announcement,
    FulfillmentState,
    OrderState,
    PaymentState,
)
from tests.builders import NOON, a_basket, a_line, a_rate, an_order, an_order_in, eur


def test_a_placed_order_awaits_its_payment() -> None:
    """Version 1, nothing paid, nothing sent, told as OrderCreated."""
    order = an_order()
    assert order.state is OrderState.AWAITING_PAYMENT
    assert order.payment_state is PaymentState.NONE
    assert order.fulfillment_state is FulfillmentState.UNFULFILLED
    assert (order.version, order.etag) == (1, '"1"')
    assert order.announcement is Announcement.CREATED
    assert (order.subtotal, order.total) == (eur(2500), eur(2500))
    assert order.create_time == order.update_time == NOON
    assert order.settlement is None


def test_an_order_is_named_after_its_merchant_and_id() -> None:
    """The resource name of the contract."""
    order = an_order(merchant="acme")
    assert order.name == f"merchants/acme/orders/{order.order_id}"


def test_a_basket_that_does_not_add_up_is_not_placed() -> None:
    """The basket's refusal is the order's."""
    with pytest.raises(InvalidInputError) as caught:
        an_order(basket=a_basket(a_line("TEA"), a_line("TEA")))
    assert caught.value.reason == "DUPLICATE_SKU"


def test_an_order_is_placed_at_the_expected_total() -> None:
    """What the customer saw is what is charged."""
    assert an_order(expected_total=eur(2500)).total == eur(2500)


@pytest.mark.parametrize("expected", [eur(2499), eur(2501), eur(-2500)])
def test_another_total_than_expected_is_refused(expected: Money) -> None:
    """The customer is never charged another amount than the one shown."""
    with pytest.raises(RuleViolationError) as caught:
        an_order(expected_total=expected)
    assert caught.value.reason == "TOTAL_MISMATCH"
    assert caught.value.metadata == {
        "field": "expected_total",
        "expected": str(expected.minor_units),
        "computed": "2500",
        "currency_code": "EUR",
    }


def test_a_total_expected_in_another_currency_is_refused_for_the_currency() -> None:
    """There is no amount that would be right in it."""
    with pytest.raises(InvalidInputError) as caught:
        an_order(expected_total=Money("USD", 2500))
    assert caught.value.reason == "CURRENCY_MISMATCH"
    assert caught.value.metadata == {
        "field": "expected_total.currency_code",
        "expected": "EUR",
        "given": "USD",
    }


@pytest.mark.parametrize(
    ("minor_units", "rate", "settled"),
    [
        (1000, "1.1", 1100),
        (5, "1.1", 6),  # 5.5, and 6 is even
        (15, "1.1", 16),  # 16.5, and 16 is even
        (25, "1.1", 28),  # 27.5
        (1, "1.49", 1),
        (1, "1.51", 2),
        (333, "0.999", 333),  # 332.667
    ],
)
def test_a_settlement_is_rounded_half_to_even_once(
    minor_units: int, rate: str, settled: int
) -> None:
    """The rule that the contract names, and no other."""
    order = an_order(
        basket=a_basket(a_line(quantity=1, unit_price=eur(minor_units))),
        settlement_rate=a_rate(rate),
        settlement_currency="USD",
    )
    assert order.settlement is not None
    assert order.settlement.amount == Money("USD", settled)
    assert order.settlement.rate == a_rate(rate)


def test_a_settlement_counts_the_minor_units_of_its_currency() -> None:
    """25.00 EUR at 160.125 are 4003 yen, which have no cents: 4003.125 rounded."""
    order = an_order(settlement_rate=a_rate("160.125"), settlement_currency="JPY")
    assert order.settlement is not None
    assert order.settlement.amount == Money("JPY", 4003)


def test_a_total_too_large_to_settle_is_refused() -> None:
    """What does not fit in the merchant's currency is the caller's input at fault, not ours."""
    basket = a_basket(a_line(quantity=1, unit_price=eur(MINOR_UNITS_MAX)))
    with pytest.raises(InvalidInputError) as caught:
        an_order(basket=basket, settlement_rate=a_rate("1.2"), settlement_currency="USD")
    assert caught.value.reason == "AMOUNT_OUT_OF_RANGE"
    assert caught.value.metadata["field"] == "order.lines"


def test_a_total_too_small_to_settle_is_refused() -> None:
    """No merchant gets nothing for something."""
    basket = a_basket(a_line(quantity=1, unit_price=eur(1)))
    with pytest.raises(InvalidInputError) as caught:
        an_order(basket=basket, settlement_rate=a_rate("0.5"), settlement_currency="USD")
    assert caught.value.reason == "AMOUNT_OUT_OF_RANGE"
    assert caught.value.metadata["field"] == "order.lines"


LEGAL = {
    (OrderState.AWAITING_PAYMENT, OrderState.CONFIRMED),
    (OrderState.AWAITING_PAYMENT, OrderState.FAILED),
    (OrderState.AWAITING_PAYMENT, OrderState.EXPIRING),
    (OrderState.AWAITING_PAYMENT, OrderState.CANCELLING),
    (OrderState.CONFIRMED, OrderState.COMPLETED),
    (OrderState.CONFIRMED, OrderState.CANCELLING),
    (OrderState.EXPIRING, OrderState.EXPIRED),
    (OrderState.CANCELLING, OrderState.CANCELLED),
}
"""The contract's states, written down a second time."""


def test_every_state_stands_in_the_table() -> None:
    """A new state cannot be forgotten."""
    assert set(TRANSITIONS) == set(OrderState)


@pytest.mark.parametrize(
    ("state", "target"),
    [pair for pair in product(OrderState, repeat=2) if pair[0] is not pair[1]],
    ids=lambda state: state.name,
)
def test_an_order_moves_only_where_the_contract_allows(
    state: OrderState, target: OrderState
) -> None:
    """Every pair of states, legal and not; a refusal names both."""
    order = an_order_in(state)
    if (state, target) in LEGAL:
        moved = order.changed(Announcement.CONFIRMED, at=NOON, state=target)
        assert (moved.state, moved.version) == (target, 2)
        return
    with pytest.raises(RuleViolationError) as caught:
        order.changed(Announcement.CONFIRMED, at=NOON, state=target)
    assert caught.value.reason == "ILLEGAL_TRANSITION"
    assert caught.value.metadata == {
        "name": order.name,
        "state": state.name,
        "requested": target.name,
    }


@pytest.mark.parametrize("state", OrderState, ids=lambda state: state.name)
def test_a_change_that_keeps_the_state_is_always_allowed(state: OrderState) -> None:
    """Money may move while the order stands, also after its end."""
    moved = an_order_in(state).changed(
        Announcement.PAYMENT_RECORDED, at=NOON, payment_state=PaymentState.REFUNDED
    )
    assert (moved.state, moved.payment_state) == (state, PaymentState.REFUNDED)


def test_a_change_makes_a_new_order_and_leaves_the_old_one() -> None:
    """Orders are values: what was read stays what it was."""
    order = an_order()
    moved = order.changed(Announcement.CONFIRMED, at=NOON, state=OrderState.CONFIRMED)
    assert order.version == 1
    assert order.state is OrderState.AWAITING_PAYMENT
    assert moved.etag != order.etag


def test_what_a_change_does_not_name_stays() -> None:
    """Reasons and the payment outlive later changes."""
    order = an_order_in(
        OrderState.CANCELLING,
        payment="merchants/default/payments/1",
        cancel_reason="too late",
        attention_reason="look",
        failure_reason="declined",
    )
    moved = order.changed(Announcement.CANCELLED, at=NOON, state=OrderState.CANCELLED)
    assert moved.payment == "merchants/default/payments/1"
    assert moved.cancel_reason == "too late"
    assert moved.attention_reason == "look"
    assert moved.failure_reason == "declined"


def test_a_clock_that_went_back_does_not_turn_back_an_order() -> None:
    """Times of one order never fall, whichever replica's clock they come from."""
    order = an_order()
    later = order.changed(
        Announcement.CONFIRMED, at=NOON + timedelta(seconds=5), state=OrderState.CONFIRMED
    )
    again = later.changed(Announcement.PAYMENT_RECORDED, at=NOON)
    assert later.update_time == NOON + timedelta(seconds=5)
    assert again.update_time == later.update_time
