"""The order: what it holds, what it adds up to, and how it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from decimal import Decimal
from enum import Enum
from uuid import UUID

from chassis.errors import InvalidInputError, RuleViolationError
from chassis.money import (
    AmountOutOfRangeError,
    Money,
    UnknownCurrencyError,
    convert,
    minor_unit_digits,
)


class OrderState(Enum):
    """Where an order stands; the values are the proto's `Order.State`."""

    AWAITING_PAYMENT = 1
    CONFIRMED = 2
    COMPLETED = 3
    FAILED = 4
    EXPIRING = 5
    EXPIRED = 6
    CANCELLING = 7
    CANCELLED = 8


class PaymentState(Enum):
    """What is known of its money; the values are the proto's `Order.PaymentState`."""

    NONE = 1
    AUTHORIZED = 2
    PAID = 3
    PARTIALLY_REFUNDED = 4
    REFUNDED = 5
    UNKNOWN = 6


class FulfillmentState(Enum):
    """How much of it has left; the values are the proto's `Order.FulfillmentState`."""

    UNFULFILLED = 1
    PARTIALLY_FULFILLED = 2
    FULFILLED = 3


class CaptureMethod(Enum):
    """When the money is taken; the values are the proto's `CaptureMethod`."""

    AUTOMATIC = 1
    MANUAL = 2


class Announcement(Enum):
    """What a change is told as: the order service's events."""

    CREATED = "OrderCreated"
    CONFIRMED = "OrderConfirmed"
    FAILED = "OrderFailed"
    CANCELLATION_REQUESTED = "OrderCancellationRequested"
    CANCELLED = "OrderCancelled"
    PAYMENT_RECORDED = "OrderPaymentRecorded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Customer:
    """Who ordered. Personal data, kept apart from the order's history."""

    customer_id: str
    email: str
    locale: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where goods or invoices go. Personal data, kept apart from the order's history."""

    recipient: str
    address_lines: tuple[str, ...]
    locality: str
    administrative_area: str
    postal_code: str
    region_code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderLine:
    """A quantity of one article at one price."""

    sku: str
    title: str
    quantity: int
    unit_price: Money

    @property
    def amount(self) -> Money:
        """Quantity times unit price."""
        return self.unit_price * self.quantity


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """An exchange rate as it was published, and by whom."""

    value: Decimal
    provider: str
    as_of_time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """The total in the merchant's own currency, at the rate pinned when the order was placed."""

    amount: Money
    rate: Rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Basket:
    """What a caller wants to order, before anything of it has been checked together."""

    currency_code: str
    lines: tuple[OrderLine, ...]
    customer: Customer
    capture_method: CaptureMethod
    client_order_ref: str = ""
    shipping_address: Address | None = None
    billing_address: Address | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    discount: Money | None = None
    shipping: Money | None = None
    tax: Money | None = None

    def subtotal(self) -> Money:
        """The sum of the lines.

        Raises:
            InvalidInputError: The currency is unknown, a price is in another one or
                negative, two lines share a sku, or the sum is too large.
        """
        try:
            minor_unit_digits(self.currency_code)
        except UnknownCurrencyError:
            raise InvalidInputError.of_field(
                "CURRENCY_UNKNOWN",
                "order.currency_code",
                f"{self.currency_code} is not a currency that orders can be placed in",
                given=self.currency_code,
            ) from None
        seen: set[str] = set()
        for position, line in enumerate(self.lines):
            path = f"order.lines[{position}]"
            if line.sku in seen:
                raise InvalidInputError.of_field(
                    "DUPLICATE_SKU", f"{path}.sku", "stands in an earlier line too", sku=line.sku
                )
            seen.add(line.sku)
            self._check_amount(line.unit_price, f"{path}.unit_price")
        try:
            return Money.total((line.amount for line in self.lines), self.currency_code)
        except AmountOutOfRangeError:
            raise _out_of_range("order.lines", "the lines add up to too much") from None

    def total(self) -> Money:
        """What the customer pays: subtotal - discount + shipping + tax.

        Raises:
            InvalidInputError: As `subtotal`; or one of the other amounts is in another
                currency or negative, or the total is not positive, or too large.
        """
        total = self.subtotal()
        for name, amount, sign in (
            ("discount", self.discount, -1),
            ("shipping", self.shipping, 1),
            ("tax", self.tax, 1),
        ):
            if amount is not None:
                self._check_amount(amount, f"order.{name}")
                try:
                    total = total + amount * sign
                except AmountOutOfRangeError:
                    raise _out_of_range(f"order.{name}", "makes the total too large") from None
        if total.minor_units <= 0:
            at_fault = "order.discount" if self.discount else "order.lines"
            raise _out_of_range(at_fault, "leaves nothing to pay; the total must be positive")
        return total

    def agreed_total(self, expected: Money | None) -> Money:
        """The total, which must be the expected one where the caller expects one.

        Raises:
            InvalidInputError: As `total`; or another currency is expected.
            RuleViolationError: The basket adds up to something else.
        """
        total = self.total()
        if expected is None or expected == total:
            return total
        self._check_currency(expected, "expected_total")
        raise RuleViolationError(
            "TOTAL_MISMATCH",
            f"the order adds up to {total}, not to {expected}",
            metadata={
                "field": "expected_total",
                "expected": str(expected.minor_units),
                "computed": str(total.minor_units),
                "currency_code": total.currency_code,
            },
        )

    def _check_amount(self, amount: Money, path: str) -> None:
        self._check_currency(amount, path)
        if amount.minor_units < 0:
            raise _out_of_range(f"{path}.minor_units", "is negative")

    def _check_currency(self, amount: Money, path: str) -> None:
        if amount.currency_code != self.currency_code:
            raise InvalidInputError.of_field(
                "CURRENCY_MISMATCH",
                f"{path}.currency_code",
                f"is {amount.currency_code} in an order in {self.currency_code}",
                expected=self.currency_code,
                given=amount.currency_code,
            )


def _out_of_range(path: str, description: str) -> InvalidInputError:
    return InvalidInputError.of_field("AMOUNT_OUT_OF_RANGE", path, description)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """An order at one version. Changes make a new one (`domain/saga.py`).

    Attributes:
        version: Counts the order's changes from 1; each has one entry in its history.
        announcement: What this version is told as.
        payment: Resource name of the latest payment, empty before there is one.
    """

    merchant: str
    order_id: UUID
    version: int
    announcement: Announcement
    basket: Basket
    subtotal: Money
    total: Money
    settlement: Settlement | None
    payment_method: str
    state: OrderState
    payment_state: PaymentState
    fulfillment_state: FulfillmentState
    create_time: datetime
    update_time: datetime
    payment: str = ""
    failure_reason: str = ""
    cancel_reason: str = ""
    attention_reason: str = ""

    @classmethod
    def place(
        cls,
        *,
        merchant: str,
        order_id: UUID,
        basket: Basket,
        payment_method: str,
        expected_total: Money | None,
        settlement_rate: Rate | None,
        settlement_currency: str,
        placed_at: datetime,
    ) -> Order:
        """Places an order: AWAITING_PAYMENT, version 1.

        Raises:
            InvalidInputError: The basket does not add up (see `Basket.agreed_total`), or to
                more than the settlement currency can hold, or to less than it can count.
            RuleViolationError: It adds up to something else than was expected.
        """
        total = basket.agreed_total(expected_total)
        settlement = None
        if settlement_rate is not None:
            try:
                amount = convert(total, settlement_rate.value, settlement_currency)
            except AmountOutOfRangeError:
                raise _out_of_range(
                    "order.lines", f"the total is too large to settle in {settlement_currency}"
                ) from None
            if not amount:
                raise _out_of_range(
                    "order.lines", f"the total is too small to settle in {settlement_currency}"
                )
            settlement = Settlement(amount=amount, rate=settlement_rate)
        return cls(
            merchant=merchant,
            order_id=order_id,
            version=1,
            announcement=Announcement.CREATED,
            basket=basket,
            subtotal=basket.subtotal(),
            total=total,
            settlement=settlement,
            payment_method=payment_method,
            state=OrderState.AWAITING_PAYMENT,
            payment_state=PaymentState.NONE,
            fulfillment_state=FulfillmentState.UNFULFILLED,
            create_time=placed_at,
            update_time=placed_at,
        )

    @property
    def name(self) -> str:
        """The resource name, `merchants/{merchant}/orders/{order}`."""
        return f"merchants/{self.merchant}/orders/{self.order_id}"

    @property
    def etag(self) -> str:
        """Names this very version (AIP-154)."""
        return f'"{self.version}"'

    def changed(
        self,
        announcement: Announcement,
        *,
        at: datetime,
        state: OrderState | None = None,
        payment_state: PaymentState | None = None,
        payment: str = "",
        failure_reason: str = "",
        cancel_reason: str = "",
        attention_reason: str = "",
    ) -> Order:
        """The next version; what is not given stays as it is.

        Raises:
            RuleViolationError: The state cannot be left for the new one.
        """
        target = state or self.state
        if target is not self.state and target not in TRANSITIONS[self.state]:
            raise illegal_transition(self, target)
        return replace(
            self,
            version=self.version + 1,
            announcement=announcement,
            state=target,
            payment_state=payment_state or self.payment_state,
            payment=payment or self.payment,
            failure_reason=failure_reason or self.failure_reason,
            cancel_reason=cancel_reason or self.cancel_reason,
            attention_reason=attention_reason or self.attention_reason,
            update_time=max(at, self.update_time),
        )


TRANSITIONS: Mapping[OrderState, frozenset[OrderState]] = {
    OrderState.AWAITING_PAYMENT: frozenset(
        {
            OrderState.CONFIRMED,
            OrderState.FAILED,
            OrderState.EXPIRING,
            OrderState.CANCELLING,
        }
    ),
    OrderState.CONFIRMED: frozenset({OrderState.COMPLETED, OrderState.CANCELLING}),
    OrderState.EXPIRING: frozenset({OrderState.EXPIRED}),
    OrderState.CANCELLING: frozenset({OrderState.CANCELLED}),
    OrderState.COMPLETED: frozenset(),
    OrderState.FAILED: frozenset(),
    OrderState.EXPIRED: frozenset(),
    OrderState.CANCELLED: frozenset(),
}
"""Where an order may go from where it stands. A state with nowhere to go is final."""


def illegal_transition(order: Order, target: OrderState) -> RuleViolationError:
    """The error of a change that the order's state does not allow."""
    return RuleViolationError(
        "ILLEGAL_TRANSITION",
        f"the order is {order.state.name} and cannot become {target.name}",
        metadata={
            "name": order.name,
            "state": order.state.name,
            "requested": target.name,
        },
    )
