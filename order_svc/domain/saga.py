"""The saga: what a fact means for an order, and nothing else decides it.

`on(fact, order)` is the whole of it. It answers the order's next version, or None
when the fact changes nothing: a repeat, or something that came too late to matter.
Commands to the payment service travel as the announcements of a version
(OrderCreated: charge; OrderCancellationRequested: void or refund, and charge no more),
so committing the version is sending the command.

| state            | fact                  | next             | money              |
|------------------|-----------------------|------------------|--------------------|
| AWAITING_PAYMENT | payment authorized    | CONFIRMED        | AUTHORIZED         |
| AWAITING_PAYMENT | payment captured      | CONFIRMED        | PAID               |
| AWAITING_PAYMENT | payment failed, voided| FAILED           | NONE               |
| AWAITING_PAYMENT | cancellation asked    | CANCELLING       | as it is           |
| AWAITING_PAYMENT | refund succeeded      | as it is, needs attention | (PARTIALLY_)REFUNDED |
| CONFIRMED        | payment captured      | CONFIRMED        | PAID               |
| CONFIRMED, authorized | failed, voided   | CONFIRMED, needs attention | NONE      |
| CONFIRMED        | cancellation asked    | CANCELLING       | as it is           |
| CONFIRMED, COMPLETED | refund succeeded  | as it is         | (PARTIALLY_)REFUNDED |
| CANCELLING       | authorized, captured  | CANCELLING       | AUTHORIZED, PAID   |
| CANCELLING, nothing captured | failed, voided | CANCELLED   | NONE               |
| CANCELLING       | refunded in full      | CANCELLED        | REFUNDED           |
| CANCELLING       | refund failed         | CANCELLING, needs attention | as it is |
| final            | money moved           | as it is, needs attention | what is true |

Facts may be repeated and may overtake each other on their way. A fact that contradicts
money known to have moved is a straggler and changes nothing: a failure or a void after
a capture, a part of a refund after the whole, an authorization after the same payment's
failure or void. One that is no news of the money may still move the order: a capture that
its refund has overtaken confirms an order whose money stays REFUNDED. The last row needs
no attention where the money is back with the customer, or where the order is COMPLETED
and a refund is normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from chassis.money import Money
from order_svc.domain.order import (
    TRANSITIONS,
    Announcement,
    Order,
    OrderState,
    PaymentState,
    illegal_transition,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentAuthorized:
    """The order's amount is reserved."""

    payment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentCaptured:
    """The order's amount is taken."""

    payment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentFailed:
    """Nothing was taken and nothing will be."""

    payment: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentVoided:
    """The reservation was let go, or the charge called off before it was made."""

    payment: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundSucceeded:
    """Captured money is on its way back."""

    payment: str
    refunded_total: Money
    captured_total: Money

    @property
    def payment_state(self) -> PaymentState:
        """REFUNDED once everything is given back."""
        return (
            PaymentState.REFUNDED
            if self.refunded_total >= self.captured_total
            else PaymentState.PARTIALLY_REFUNDED
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundFailed:
    """The provider refused to give captured money back."""

    payment: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CancellationRequested:
    """The caller wants the order undone."""

    reason: str


PaymentFact = (
    PaymentAuthorized
    | PaymentCaptured
    | PaymentFailed
    | PaymentVoided
    | RefundSucceeded
    | RefundFailed
)
Fact = PaymentFact | CancellationRequested


def on(fact: Fact, order: Order, *, at: datetime) -> Order | None:
    """The order's next version, or None when the fact changes nothing.

    Raises:
        RuleViolationError: A cancellation is asked for that the state does not allow.
            Facts about money never raise: they have happened.
    """
    if isinstance(fact, CancellationRequested):
        return _on_cancellation(fact, order, at)
    if not TRANSITIONS[order.state]:
        return _on_money_after_the_end(fact, order, at)
    if order.state is OrderState.CANCELLING:
        return _on_money_while_cancelling(fact, order, at)
    return _on_money(fact, order, at)


def _on_cancellation(fact: CancellationRequested, order: Order, at: datetime) -> Order | None:
    if order.state in (OrderState.CANCELLING, OrderState.CANCELLED):
        return None
    if OrderState.CANCELLING not in TRANSITIONS[order.state]:
        raise illegal_transition(order, OrderState.CANCELLING)
    return order.changed(
        Announcement.CANCELLATION_REQUESTED,
        at=at,
        state=OrderState.CANCELLING,
        cancel_reason=fact.reason,
    )


def _on_money(fact: PaymentFact, order: Order, at: datetime) -> Order | None:
    """AWAITING_PAYMENT and CONFIRMED."""
    waiting = order.state is OrderState.AWAITING_PAYMENT
    match fact:
        case PaymentAuthorized() | PaymentCaptured() if waiting:
            authorized = isinstance(fact, PaymentAuthorized)
            money = PaymentState.AUTHORIZED if authorized else PaymentState.PAID
            return order.changed(
                Announcement.CONFIRMED,
                at=at,
                state=OrderState.CONFIRMED,
                payment_state=order.payment_state if _was_captured(order) else money,
                payment=fact.payment,
            )
        case PaymentFailed() | PaymentVoided() if waiting and not _was_captured(order):
            return order.changed(
                Announcement.FAILED,
                at=at,
                state=OrderState.FAILED,
                payment_state=PaymentState.NONE,
                payment=fact.payment,
                failure_reason=fact.reason if isinstance(fact, PaymentFailed) else "voided",
            )
        case PaymentCaptured() if order.payment_state is PaymentState.AUTHORIZED:
            return _recorded(order, fact, PaymentState.PAID, at)
        case PaymentVoided() if order.payment_state is PaymentState.AUTHORIZED:
            return _recorded(order, fact, PaymentState.NONE, at, attention="authorization voided")
        case PaymentFailed() if order.payment_state is PaymentState.AUTHORIZED:
            return _recorded(
                order, fact, PaymentState.NONE, at, attention=f"payment failed: {fact.reason}"
            )
        case RefundSucceeded() if _is_news(fact, order):
            return _recorded(
                order,
                fact,
                fact.payment_state,
                at,
                attention="money refunded before it was known to be taken" if waiting else "",
            )
        case RefundFailed():
            return _recorded(
                order, fact, order.payment_state, at, attention=f"refund failed: {fact.reason}"
            )
        case _:
            return None


def _on_money_while_cancelling(fact: PaymentFact, order: Order, at: datetime) -> Order | None:
    match fact:
        case PaymentFailed() | PaymentVoided() if not _was_captured(order):
            return _cancelled(order, fact, PaymentState.NONE, at)
        case RefundSucceeded() if fact.payment_state is PaymentState.REFUNDED:
            return _cancelled(order, fact, PaymentState.REFUNDED, at)
        case RefundSucceeded() if _is_news(fact, order):
            return _recorded(order, fact, fact.payment_state, at)
        case RefundFailed():
            return _recorded(
                order, fact, order.payment_state, at, attention=f"refund failed: {fact.reason}"
            )
        case PaymentCaptured() if order.payment_state in (
            PaymentState.NONE,
            PaymentState.AUTHORIZED,
        ):
            return _recorded(order, fact, PaymentState.PAID, at)
        case PaymentAuthorized() if order.payment_state is PaymentState.NONE:
            return _recorded(order, fact, PaymentState.AUTHORIZED, at)
        case _:
            return None


def _on_money_after_the_end(fact: PaymentFact, order: Order, at: datetime) -> Order | None:
    """The state stays and the money is recorded; what nobody waits for needs attention."""
    completed = order.state is OrderState.COMPLETED
    money = order.payment_state
    match fact:
        case PaymentCaptured() if not completed and money in (
            PaymentState.NONE,
            PaymentState.AUTHORIZED,
        ):
            return _recorded(
                order,
                fact,
                PaymentState.PAID,
                at,
                attention=f"money taken after {order.state.name}",
            )
        # Of the payment that the order ended with, nothing is reserved any more.
        case PaymentAuthorized() if (
            not completed and money is PaymentState.NONE and fact.payment != order.payment
        ):
            return _recorded(
                order,
                fact,
                PaymentState.AUTHORIZED,
                at,
                attention=f"money reserved after {order.state.name}",
            )
        case PaymentFailed() | PaymentVoided() if money is PaymentState.AUTHORIZED:
            return _recorded(
                order,
                fact,
                PaymentState.NONE,
                at,
                attention=f"reservation let go after {order.state.name}",
            )
        case RefundSucceeded() if _is_news(fact, order):
            in_part = fact.payment_state is PaymentState.PARTIALLY_REFUNDED
            return _recorded(
                order,
                fact,
                fact.payment_state,
                at,
                attention=(
                    f"refunded in part after {order.state.name}"
                    if in_part and not completed
                    else ""
                ),
            )
        case RefundFailed():
            return _recorded(
                order, fact, order.payment_state, at, attention=f"refund failed: {fact.reason}"
            )
        case _:
            return None


def _was_captured(order: Order) -> bool:
    """Whether money is known to have been taken, also where it is back by now."""
    return order.payment_state in (
        PaymentState.PAID,
        PaymentState.PARTIALLY_REFUNDED,
        PaymentState.REFUNDED,
    )


def _is_news(fact: RefundSucceeded, order: Order) -> bool:
    """Whether a refund says more than is known; what is refunded stays refunded."""
    return order.payment_state not in (fact.payment_state, PaymentState.REFUNDED)


def _cancelled(order: Order, fact: PaymentFact, money: PaymentState, at: datetime) -> Order:
    return order.changed(
        Announcement.CANCELLED,
        at=at,
        state=OrderState.CANCELLED,
        payment_state=money,
        payment=fact.payment,
    )


def _recorded(
    order: Order, fact: PaymentFact, money: PaymentState, at: datetime, attention: str = ""
) -> Order:
    return order.changed(
        Announcement.PAYMENT_RECORDED,
        at=at,
        payment_state=money,
        payment=fact.payment,
        attention_reason=attention,
    )
