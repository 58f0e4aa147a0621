"""The port to a payment provider, typed by outcome, and the provider in this process.

An adapter's whole duty is to say truthfully which kind of answer it got
(`domain/outcomes.py`); what follows from it is decided in the domain. All adapters pass
`tests/suites/payment_gateway.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Final, Protocol

from chassis.money import Money
from payment_svc.domain.attempt import CaptureMethod, ChargeTerms
from payment_svc.domain.outcomes import (
    Absent,
    Authorized,
    Captured,
    ChargeOutcome,
    Declined,
    FoundCharge,
    FoundRefund,
    Invalid,
    Refunded,
    RefundOutcome,
    Submitted,
    Unknown,
    Voided,
    VoidOutcome,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """A charge as it was asked for: to send it, to send it again, or to refer to it.

    Attributes:
        key: The provider key. Whatever is sent under it is done once.
        terms: What to charge; never anything else under the same key.
        order: The order's resource name, for the provider's records.
        reference: The provider's own id, once it has named one.
    """

    key: str
    terms: ChargeTerms
    order: str
    reference: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureRequest:
    """Take an authorized amount, under a key of its own."""

    key: str
    charge: Charge


@dataclass(frozen=True, slots=True, kw_only=True)
class VoidRequest:
    """Let an authorized amount go, under a key of its own."""

    key: str
    charge: Charge


@dataclass(frozen=True, slots=True, kw_only=True)
class RefundRequest:
    """Give captured money back, under a key of its own."""

    key: str
    charge: Charge
    amount: Money


class PaymentGateway(Protocol):
    """A payment provider. Safe for concurrent use in one event loop.

    Nothing raises for what the provider answers or fails to answer: that is an outcome.
    A caller may cancel a call at any moment, after which its outcome is unknown.
    """

    @property
    def name(self) -> str:
        """Stands in `Payment.provider`."""
        ...

    @property
    def key_ttl(self) -> timedelta:
        """How long the provider surely remembers a key after its first use."""
        ...

    @property
    def stores_errors(self) -> bool:
        """Whether a failed request, sent again under its key, fails the same way.

        Otherwise a refusal is final only for the one request that was refused: another
        under the same key, still on its way, may go through.
        """
        ...

    async def charge(self, charge: Charge) -> ChargeOutcome:
        """Reserves the amount, and takes it where capture is automatic.

        The same key with the same terms answers the same. With other terms, Unknown:
        something stands under the key, so nobody may say that nothing was taken.
        """
        ...

    async def capture(self, request: CaptureRequest) -> ChargeOutcome:
        """Takes the whole authorized amount. Captured already is Captured."""
        ...

    async def void(self, request: VoidRequest) -> VoidOutcome:
        """Lets the authorized amount go. Voided already is Voided."""
        ...

    async def refund(self, request: RefundRequest) -> RefundOutcome:
        """Gives captured money back, never more in all than was captured.

        The same key with the same amount answers the same; with another, Unknown.
        """
        ...

    async def find(self, charge: Charge) -> FoundCharge:
        """What the provider knows of a charge now, by its reference or else its key."""
        ...

    async def find_refund(self, request: RefundRequest) -> FoundRefund:
        """What the provider knows of a refund now, by its key."""
        ...


DECLINES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "chargeDeclined": "card_declined",
        "chargeDeclinedInsufficientFunds": "insufficient_funds",
        "chargeDeclinedLostCard": "lost_card",
        "chargeDeclinedStolenCard": "stolen_card",
        "chargeDeclinedExpiredCard": "expired_card",
        "chargeDeclinedIncorrectCvc": "incorrect_cvc",
        "chargeDeclinedProcessingError": "processing_error",
        "chargeDeclinedVelocityLimitExceeded": "card_velocity_exceeded",
        "chargeDeclinedFraudulent": "fraudulent",
        "chargeCustomerFail": "card_declined",
    }
)
"""Stripe's test cards that are declined, and why: `pm_card_` or `pm_card_visa_` goes in
front of the name (docs.stripe.com/testing)."""

REFUND_FAIL: Final = "pm_card_refundFail"
REFUND_PENDING: Final = "pm_card_pendingRefund"

APPROVED: Final = frozenset(
    {
        "pm_card_visa",
        "pm_card_visa_debit",
        "pm_card_mastercard",
        "pm_card_mastercard_debit",
        "pm_card_mastercard_prepaid",
        "pm_card_amex",
        "pm_card_discover",
        "pm_card_diners",
        "pm_card_jcb",
        "pm_card_unionpay",
        REFUND_FAIL,
        REFUND_PENDING,
    }
)
"""Stripe's test cards that are approved. The last two misbehave when money goes back."""

LEDGER_MAX: Final = 20_000
"""Charges that the in-process gateway keeps in its books; the oldest leave first."""

UNKNOWN_METHOD: Final = "payment_method_unknown"
KEY_REUSED: Final = "idempotency_key_in_use"


@dataclass(slots=True)
class LedgerRefund:
    """A refund in the in-process gateway's books."""

    reference: str
    amount: Money
    outcome: RefundOutcome


@dataclass(slots=True)
class LedgerCharge:
    """A charge in the in-process gateway's books, a declined one included."""

    charge: Charge
    reference: str
    outcome: ChargeOutcome
    captured: Money
    voided: bool = False
    refunds: dict[str, LedgerRefund] = field(default_factory=dict)

    @property
    def refunded(self) -> Money:
        """What was given back, or is about to be."""
        return Money.total(
            (
                refund.amount
                for refund in self.refunds.values()
                if isinstance(refund.outcome, Refunded | Submitted)
            ),
            self.captured.currency_code,
        )

    @property
    def stands(self) -> FoundCharge:
        """What is to be answered to whoever asks for it now."""
        if self.voided:
            return Voided()
        if self.captured:
            return Captured(self.reference)
        if isinstance(self.outcome, Authorized):
            return Authorized(self.reference)
        return self.outcome if isinstance(self.outcome, Declined) else Absent()


class InProcessGateway:
    """A provider in this process: decided by the payment method, booked in memory.

    The books end with the process, and hold no more than `LEDGER_MAX` charges. What left
    them carries its own proof: a reference is made from key and terms, so a charge that
    comes back with the right reference is entered again as it was approved, and can be
    refunded after a restart.

    Attributes:
        ledger: Every charge by its key, for tests to look at.
    """

    name = "in_process"
    key_ttl = timedelta(hours=24)
    stores_errors = True

    def __init__(self) -> None:
        self.ledger: dict[str, LedgerCharge] = {}

    async def charge(self, charge: Charge) -> ChargeOutcome:
        """Charges, once for a key."""
        known = self.ledger.get(charge.key)
        if known is not None:
            return known.outcome if known.charge.terms == charge.terms else Unknown(KEY_REUSED)
        method = charge.terms.payment_method
        reference = reference_of(charge)
        nothing = Money.zero(charge.terms.amount.currency_code)
        captured = nothing
        outcome: ChargeOutcome
        if (code := _decline_of(method)) is not None:
            outcome = Declined(code)
        elif method not in APPROVED:
            return Invalid(UNKNOWN_METHOD)
        elif charge.terms.capture_method is CaptureMethod.MANUAL:
            outcome = Authorized(reference)
        else:
            outcome = Captured(reference)
            captured = charge.terms.amount
        return self._entered(
            LedgerCharge(charge=charge, reference=reference, outcome=outcome, captured=captured)
        ).outcome

    async def capture(self, request: CaptureRequest) -> ChargeOutcome:
        """Takes what is authorized."""
        entry = self._entry(request.charge)
        if entry is None:
            return Invalid("charge_unknown")
        if entry.voided or not isinstance(entry.outcome, Authorized | Captured):
            return Invalid("charge_not_capturable")
        entry.captured = entry.charge.terms.amount
        return Captured(entry.reference)

    async def void(self, request: VoidRequest) -> VoidOutcome:
        """Lets go what is authorized."""
        entry = self._entry(request.charge)
        if entry is None:
            return Invalid("charge_unknown")
        if entry.captured:
            return Captured(entry.reference)
        if not isinstance(entry.outcome, Authorized):
            return Invalid("charge_not_voidable")
        entry.voided = True
        return Voided()

    async def refund(self, request: RefundRequest) -> RefundOutcome:
        """Gives money back, once for a key."""
        entry = self._entry(request.charge)
        if entry is None:
            return Invalid("charge_unknown")
        known = entry.refunds.get(request.key)
        if known is not None:
            return known.outcome if known.amount == request.amount else Unknown(KEY_REUSED)
        if request.amount.minor_units <= 0 or request.amount > entry.captured - entry.refunded:
            return Invalid("amount_too_large")
        reference = f"ipr_{_digest(request.key)}"
        outcome: RefundOutcome = Refunded(reference)
        if entry.charge.terms.payment_method == REFUND_FAIL:
            outcome = Declined("expired_or_canceled_card")
        elif entry.charge.terms.payment_method == REFUND_PENDING:
            outcome = Submitted(reference)
        entry.refunds[request.key] = LedgerRefund(
            reference=reference, amount=request.amount, outcome=outcome
        )
        return outcome

    async def find(self, charge: Charge) -> FoundCharge:
        """Looks a charge up."""
        entry = self._entry(charge)
        return entry.stands if entry is not None else Absent()

    async def find_refund(self, request: RefundRequest) -> FoundRefund:
        """Looks a refund up. One that was pending has gone through by the time of asking."""
        entry = self._entry(request.charge)
        known = entry.refunds.get(request.key) if entry is not None else None
        if known is None:
            return Absent()
        if isinstance(known.outcome, Submitted):
            known.outcome = Refunded(known.reference)
        return known.outcome if isinstance(known.outcome, Refunded | Declined) else Absent()

    def _entry(self, charge: Charge) -> LedgerCharge | None:
        known = self.ledger.get(charge.key)
        if known is not None or charge.reference != reference_of(charge):
            return known
        automatic = charge.terms.capture_method is CaptureMethod.AUTOMATIC
        amount = charge.terms.amount
        return self._entered(
            LedgerCharge(
                charge=charge,
                reference=charge.reference,
                outcome=Captured(charge.reference) if automatic else Authorized(charge.reference),
                captured=amount if automatic else Money.zero(amount.currency_code),
            )
        )

    def _entered(self, entry: LedgerCharge) -> LedgerCharge:
        if len(self.ledger) >= LEDGER_MAX:
            del self.ledger[next(iter(self.ledger))]
        self.ledger[entry.charge.key] = entry
        return entry


def reference_of(charge: Charge) -> str:
    """The in-process gateway's id of a charge that it approves."""
    terms = charge.terms
    return "ipc_" + _digest(
        f"{charge.key}|{terms.amount.minor_units}|{terms.amount.currency_code}"
        f"|{terms.payment_method}|{terms.capture_method.name}"
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _decline_of(payment_method: str) -> str | None:
    for prefix in ("pm_card_visa_", "pm_card_"):
        if payment_method.startswith(prefix):
            code = DECLINES.get(payment_method.removeprefix(prefix))
            if code is not None:
                return code
    return None
