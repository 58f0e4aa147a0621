"""Payments that tests talk about, made in one line; see `tests/builders.py`.

Also the events by which the payment service hears of orders, as they come off the wire.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar, cast
from uuid import UUID, uuid4

from google.protobuf.message import Message as ProtoMessage

from chassis.broker import Message
from chassis.context import CallContext
from chassis.events import Event
from chassis.ids import uuid7
from chassis.money import Money
from ordermesh.common.v1 import money_pb2
from ordermesh.order.v1 import order_events_pb2
from payment_svc.commands import Work
from payment_svc.domain.attempt import CaptureMethod, ChargeTerms
from payment_svc.domain.outcomes import (
    Authorized,
    Captured,
    ChargeOutcome,
    Declined,
    FoundCharge,
    FoundRefund,
    Outcome,
    Refunded,
    RefundOutcome,
    Unknown,
    VoidOutcome,
)
from payment_svc.domain.payment import Payment
from payment_svc.gateways import (
    CaptureRequest,
    Charge,
    InProcessGateway,
    RefundRequest,
    VoidRequest,
)
from tests.builders import NOON, eur

T = TypeVar("T", bound=Outcome)

REFERENCE = "ch_1"
LEASE_SECONDS = 60.0


def a_payment_id() -> UUID:
    """An id that no other payment, attempt or refund has."""
    return uuid7(int(NOON.timestamp() * 1000), uuid4().bytes[:10])


def some_terms(**changes: Any) -> ChargeTerms:
    """25.00 EUR with a card that works, taken at once."""
    return replace(
        ChargeTerms(
            amount=eur(2500),
            payment_method="pm_card_visa",
            capture_method=CaptureMethod.AUTOMATIC,
        ),
        **changes,
    )


def a_payment(**terms: Any) -> Payment:
    """A payment just begun: PENDING, a charge due."""
    return Payment.begin(
        merchant="default",
        payment_id=a_payment_id(),
        order_id=a_payment_id(),
        attempt_id=a_payment_id(),
        provider="in_process",
        terms=some_terms(**terms),
        at=NOON,
    )


def taken(payment: Payment) -> Payment:
    """The payment, with what is due for it taken by somebody."""
    return payment.taken(at=NOON, lease_seconds=LEASE_SECONDS)


def answered(payment: Payment, outcome: Outcome) -> Payment:
    """Takes what is due for a payment, and settles it with this outcome."""
    held = taken(payment)
    assert held.in_hand is not None
    return held.announced().settled(
        held.in_hand, outcome, new_id=a_payment_id, at=NOON + timedelta(seconds=1)
    )


def cancelled(payment: Payment) -> Payment:
    """The payment after its order was cancelled for the first time."""
    changed = payment.cancelled(reason="changed my mind", new_id=a_payment_id, at=NOON)
    assert changed is not None
    return changed


def a_captured_payment() -> Payment:
    """Paid."""
    return answered(a_payment(), Captured(REFERENCE)).announced()


def an_authorized_payment() -> Payment:
    """Reserved, to be taken later."""
    payment = a_payment(capture_method=CaptureMethod.MANUAL)
    return answered(payment, Authorized(REFERENCE)).announced()


def a_failed_payment() -> Payment:
    """Declined."""
    return answered(a_payment(), Declined("card_declined")).announced()


def an_unknown_payment() -> Payment:
    """Sent, and the answer is lost."""
    return answered(a_payment(), Unknown("timeout")).announced()


def a_refunded_payment() -> Payment:
    """Paid, cancelled, and given back."""
    return answered(cancelled(a_captured_payment()), Refunded("re_1")).announced()


def work_on(payment: Payment, *, lease_ends: float) -> Work:
    """What is due for a payment, as a worker is handed it."""
    held = taken(payment)
    assert held.in_hand is not None
    return Work(
        task=held.in_hand,
        payment=held.announced(),
        context=CallContext(correlation_id="corr-1"),
        lease_ends=lease_ends,
    )


def charge_for(payment: Payment, *, reference: str = "") -> Charge:
    """A payment's latest attempt, as its provider knows it."""
    attempt = payment.attempt
    return Charge(
        key=attempt.provider_key, terms=attempt.terms, order=payment.order, reference=reference
    )


# --- events -----------------------------------------------------------------------


def order_name(order_id: UUID, merchant: str = "default") -> str:
    """The resource name of an order."""
    return f"merchants/{merchant}/orders/{order_id}"


def order_created(
    order_id: UUID | None = None,
    *,
    merchant: str = "default",
    amount: Money | None = None,
    payment_method: str = "pm_card_visa",
    capture_method: CaptureMethod = CaptureMethod.AUTOMATIC,
) -> Event:
    """The event of an order placed: 25.00 EUR, unless another amount is given."""
    amount = amount or eur(2500)
    name = order_name(order_id or a_payment_id(), merchant)
    payload = order_events_pb2.OrderCreated(
        order=name,
        amount=money_pb2.Money(currency_code=amount.currency_code, minor_units=amount.minor_units),
        payment_method=payment_method,
        capture_method=capture_method.value,  # type: ignore[arg-type]
    )
    payload.customer.customer_id = "cust-42"
    payload.customer.email = "ada@example.com"
    return an_order_event(payload, name, merchant=merchant)


def order_cancellation(order_id: UUID, *, merchant: str = "default") -> Event:
    """The event of an order that is to be undone."""
    name = order_name(order_id, merchant)
    payload = order_events_pb2.OrderCancellationRequested(order=name, reason="changed my mind")
    return an_order_event(payload, name, merchant=merchant, version=2)


def an_order_event(
    payload: ProtoMessage, aggregate: str, *, merchant: str = "default", version: int = 1
) -> Event:
    """An event of the order service."""
    return Event(
        event_id=uuid4(),
        merchant=merchant,
        aggregate=aggregate,
        version=version,
        occur_time=NOON,
        payload=payload,
        correlation_id="corr-1",
        causation_id="request-1",
    )


def order_id_of(event: Event) -> UUID:
    """The order that an event is about."""
    return UUID(event.aggregate.rpartition("/")[2])


def message_of(event: Event) -> Message:
    """An event as a broker carries it."""
    return Message(event_id=event.event_id, type=event.type, body=event.encoded())


# --- providers that misbehave -----------------------------------------------------


class FaultyGateway:
    """The in-process provider behind a line that a test can spoil.

    Attributes:
        provider: The provider itself; its ledger says what truly happened.
        before: Awaited before each call reaches the provider; may raise or answer.
        after: Awaited with each answer on its way back; may raise or answer another.
        calls: What was asked, in order: the method's name and the provider key.
    """

    name = "in_process"
    key_ttl = InProcessGateway.key_ttl
    stores_errors = True

    def __init__(self, provider: InProcessGateway | None = None) -> None:
        self.provider = provider or InProcessGateway()
        self.before: Callable[[str], Awaitable[Outcome | None]] = _nothing
        self.after: Callable[[str, Outcome], Awaitable[Outcome]] = _the_same
        self.calls: list[tuple[str, str]] = []

    def asked(self, method: str) -> int:
        """How often this was asked."""
        return sum(1 for name, _ in self.calls if name == method)

    async def charge(self, charge: Charge) -> ChargeOutcome:
        """As the provider does."""
        return await self._through("charge", charge.key, lambda: self.provider.charge(charge))

    async def capture(self, request: CaptureRequest) -> ChargeOutcome:
        """As the provider does."""
        return await self._through("capture", request.key, lambda: self.provider.capture(request))

    async def void(self, request: VoidRequest) -> VoidOutcome:
        """As the provider does."""
        return await self._through("void", request.key, lambda: self.provider.void(request))

    async def refund(self, request: RefundRequest) -> RefundOutcome:
        """As the provider does."""
        return await self._through("refund", request.key, lambda: self.provider.refund(request))

    async def find(self, charge: Charge) -> FoundCharge:
        """As the provider does."""
        return await self._through("find", charge.key, lambda: self.provider.find(charge))

    async def find_refund(self, request: RefundRequest) -> FoundRefund:
        """As the provider does."""
        return await self._through(
            "find_refund", request.key, lambda: self.provider.find_refund(request)
        )

    async def _through(self, method: str, key: str, ask: Callable[[], Awaitable[T]]) -> T:
        self.calls.append((method, key))
        early = await self.before(method)
        if early is not None:
            return cast(T, early)
        return cast(T, await self.after(method, await ask()))


async def _nothing(method: str) -> Outcome | None:
    return None


async def _the_same(method: str, outcome: Outcome) -> Outcome:
    return outcome
