"""What every `PaymentGateway` must do, asked of each provider in the same words.

A test module subclasses `PaymentGatewaySuite` and gives it a `gateway` fixture. Payment
methods are Stripe's test cards, which every provider that we can test with knows.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import timedelta

import pytest

from chassis.money import Money
from payment_svc.domain.attempt import CaptureMethod
from payment_svc.domain.outcomes import (
    Absent,
    Authorized,
    Captured,
    Declined,
    Invalid,
    Refunded,
    Submitted,
    Unknown,
    Voided,
)
from payment_svc.gateways import (
    CaptureRequest,
    Charge,
    PaymentGateway,
    RefundRequest,
    VoidRequest,
)
from tests.builders import eur
from tests.payments import a_payment, charge_for

DECLINES = [
    ("pm_card_chargeDeclined", "card_declined"),
    ("pm_card_visa_chargeDeclined", "card_declined"),
    ("pm_card_chargeDeclinedInsufficientFunds", "insufficient_funds"),
    ("pm_card_visa_chargeDeclinedInsufficientFunds", "insufficient_funds"),
    ("pm_card_chargeDeclinedExpiredCard", "expired_card"),
    ("pm_card_chargeDeclinedIncorrectCvc", "incorrect_cvc"),
    ("pm_card_chargeDeclinedProcessingError", "processing_error"),
    ("pm_card_visa_chargeDeclinedLostCard", "lost_card"),
    ("pm_card_visa_chargeDeclinedStolenCard", "stolen_card"),
]


def a_charge(
    *,
    payment_method: str = "pm_card_visa",
    capture_method: CaptureMethod = CaptureMethod.AUTOMATIC,
    amount: Money | None = None,
) -> Charge:
    """A charge that nobody has asked for yet."""
    return charge_for(
        a_payment(
            amount=amount or eur(2500),
            payment_method=payment_method,
            capture_method=capture_method,
        )
    )


def refund_of(charge: Charge, amount: Money | None = None) -> RefundRequest:
    """A refund under a key of its own: of all of it, unless an amount is given."""
    key = a_charge().key.replace("pa_", "pr_")
    return RefundRequest(key=key, charge=charge, amount=amount or charge.terms.amount)


def void_of(charge: Charge) -> VoidRequest:
    """The request to let a charge go."""
    return VoidRequest(key=charge.key.replace("pa_", "pv_"), charge=charge)


def capture_of(charge: Charge) -> CaptureRequest:
    """The request to take what a charge reserved."""
    return CaptureRequest(key=charge.key.replace("pa_", "pc_"), charge=charge)


async def captured(gateway: PaymentGateway, **terms: str) -> Charge:
    """A charge that was taken, as its provider refers to it."""
    charge = a_charge(**terms)  # type: ignore[arg-type]
    outcome = await gateway.charge(charge)
    assert isinstance(outcome, Captured)
    return replace(charge, reference=outcome.reference)


async def authorized(gateway: PaymentGateway) -> Charge:
    """A charge that is reserved, as its provider refers to it."""
    charge = a_charge(capture_method=CaptureMethod.MANUAL)
    outcome = await gateway.charge(charge)
    assert isinstance(outcome, Authorized)
    return replace(charge, reference=outcome.reference)


class PaymentGatewaySuite:
    """The behaviour of a payment provider behind the port."""

    @pytest.mark.parametrize(
        "payment_method", ["pm_card_visa", "pm_card_mastercard", "pm_card_amex"]
    )
    async def test_a_card_that_works_is_charged(
        self, gateway: PaymentGateway, payment_method: str
    ) -> None:
        """Automatic capture takes the money at once, under the provider's own reference."""
        outcome = await gateway.charge(a_charge(payment_method=payment_method))

        assert isinstance(outcome, Captured)
        assert outcome.reference

    async def test_manual_capture_only_reserves_the_amount(self, gateway: PaymentGateway) -> None:
        """It is taken, or let go, by a call of its own."""
        outcome = await gateway.charge(a_charge(capture_method=CaptureMethod.MANUAL))

        assert isinstance(outcome, Authorized)
        assert outcome.reference

    @pytest.mark.parametrize(("payment_method", "code"), DECLINES)
    async def test_a_card_that_is_declined_says_why(
        self, gateway: PaymentGateway, payment_method: str, code: str
    ) -> None:
        """The code is the one that the order and its customer are told."""
        outcome = await gateway.charge(a_charge(payment_method=payment_method))

        assert outcome == Declined(code)

    async def test_an_unknown_payment_method_is_our_own_fault(
        self, gateway: PaymentGateway
    ) -> None:
        """Invalid, not declined: no customer can help it."""
        outcome = await gateway.charge(a_charge(payment_method="pm_nobody_knows"))

        assert outcome == Invalid("payment_method_unknown")

    @pytest.mark.parametrize("payment_method", ["pm_card_visa", "pm_card_chargeDeclined"])
    async def test_the_same_key_charges_once_and_answers_the_same(
        self, gateway: PaymentGateway, payment_method: str
    ) -> None:
        """However often it is sent: this is what every retry of ours relies on."""
        charge = a_charge(payment_method=payment_method)

        first = await gateway.charge(charge)

        assert [await gateway.charge(charge) for _ in range(3)] == [first] * 3

    async def test_the_same_key_in_flight_twice_charges_once(self, gateway: PaymentGateway) -> None:
        """Twins may be told to come again, but never answer with two charges."""
        charge = a_charge()

        outcomes = await asyncio.gather(*(gateway.charge(charge) for _ in range(5)))

        references = {o.reference for o in outcomes if isinstance(o, Captured)}
        assert len(references) == 1
        assert await gateway.charge(charge) == Captured(*references)

    async def test_the_same_key_with_other_terms_charges_nothing_and_denies_nothing(
        self, gateway: PaymentGateway
    ) -> None:
        """Something was taken under the key, so that the answer must not read as a refusal."""
        charge = a_charge()
        await gateway.charge(charge)

        other = replace(charge, terms=replace(charge.terms, amount=eur(2600)))

        assert isinstance(await gateway.charge(other), Unknown)
        assert isinstance(await gateway.find(other), Captured)

    async def test_two_keys_are_two_charges(self, gateway: PaymentGateway) -> None:
        """Nothing but the key makes charges the same."""
        first, second = await captured(gateway), await captured(gateway)

        assert first.reference != second.reference

    async def test_an_authorized_amount_can_be_taken(self, gateway: PaymentGateway) -> None:
        """And taking it again is no fault."""
        charge = await authorized(gateway)

        assert await gateway.capture(capture_of(charge)) == Captured(charge.reference)
        assert await gateway.capture(capture_of(charge)) == Captured(charge.reference)
        assert await gateway.find(charge) == Captured(charge.reference)

    async def test_an_authorized_amount_can_be_let_go(self, gateway: PaymentGateway) -> None:
        """And letting it go again is no fault."""
        charge = await authorized(gateway)

        assert await gateway.void(void_of(charge)) == Voided()
        assert await gateway.void(void_of(charge)) == Voided()
        assert await gateway.find(charge) == Voided()

    async def test_what_was_let_go_cannot_be_taken(self, gateway: PaymentGateway) -> None:
        """A void is final."""
        charge = await authorized(gateway)
        await gateway.void(void_of(charge))

        assert isinstance(await gateway.capture(capture_of(charge)), Invalid)

    async def test_what_was_taken_cannot_be_let_go(self, gateway: PaymentGateway) -> None:
        """It says that it was taken, so that it is given back instead."""
        charge = await captured(gateway)

        assert await gateway.void(void_of(charge)) == Captured(charge.reference)

    async def test_captured_money_can_be_given_back(self, gateway: PaymentGateway) -> None:
        """Under a key of its own, with a reference of its own."""
        charge = await captured(gateway)
        request = refund_of(charge)

        outcome = await gateway.refund(request)

        assert isinstance(outcome, Refunded)
        assert outcome.reference not in {"", charge.reference}
        assert await gateway.find_refund(request) == outcome

    async def test_the_same_refund_key_gives_back_once(self, gateway: PaymentGateway) -> None:
        """However often it is sent."""
        charge = await captured(gateway)
        request = refund_of(charge, eur(2000))

        first = await gateway.refund(request)

        assert await gateway.refund(request) == first
        assert isinstance(await gateway.refund(refund_of(charge, eur(500))), Refunded)

    async def test_a_refund_key_with_another_amount_gives_nothing_and_denies_nothing(
        self, gateway: PaymentGateway
    ) -> None:
        """Something was given back under the key."""
        request = refund_of(await captured(gateway), eur(1000))
        await gateway.refund(request)

        assert isinstance(await gateway.refund(replace(request, amount=eur(500))), Unknown)
        assert isinstance(await gateway.refund(refund_of(request.charge, eur(1500))), Refunded)

    async def test_no_more_is_given_back_than_was_taken(self, gateway: PaymentGateway) -> None:
        """Over all refunds of a charge."""
        charge = await captured(gateway)
        await gateway.refund(refund_of(charge, eur(2000)))

        assert isinstance(await gateway.refund(refund_of(charge, eur(501))), Invalid)
        assert isinstance(await gateway.refund(refund_of(charge, eur(500))), Refunded)

    async def test_what_was_only_reserved_cannot_be_given_back(
        self, gateway: PaymentGateway
    ) -> None:
        """It is let go instead."""
        assert isinstance(await gateway.refund(refund_of(await authorized(gateway))), Invalid)

    async def test_a_refund_to_a_dead_card_fails(self, gateway: PaymentGateway) -> None:
        """At once, or when it is asked about."""
        request = refund_of(await captured(gateway, payment_method="pm_card_refundFail"))

        outcome = await gateway.refund(request)

        if isinstance(outcome, Submitted):
            outcome = await gateway.find_refund(request)  # type: ignore[assignment]
        assert outcome == Declined("expired_or_canceled_card")

    async def test_a_pending_refund_is_submitted_and_goes_through_later(
        self, gateway: PaymentGateway
    ) -> None:
        """Asking about it is how we hear."""
        request = refund_of(await captured(gateway, payment_method="pm_card_pendingRefund"))

        outcome = await gateway.refund(request)

        assert isinstance(outcome, Submitted)
        assert await gateway.find_refund(request) == Refunded(outcome.reference)

    @pytest.mark.parametrize(
        ("payment_method", "capture_method"),
        [
            ("pm_card_visa", CaptureMethod.AUTOMATIC),
            ("pm_card_visa", CaptureMethod.MANUAL),
            ("pm_card_chargeDeclined", CaptureMethod.AUTOMATIC),
        ],
    )
    async def test_a_charge_is_found_by_its_key(
        self, gateway: PaymentGateway, payment_method: str, capture_method: CaptureMethod
    ) -> None:
        """By whoever lost the answer, and so knows no reference."""
        charge = a_charge(payment_method=payment_method, capture_method=capture_method)
        outcome = await gateway.charge(charge)

        assert await gateway.find(charge) == outcome

    async def test_what_was_never_asked_for_is_absent(self, gateway: PaymentGateway) -> None:
        """Charges and refunds alike."""
        charge = await captured(gateway)

        assert await gateway.find(a_charge()) == Absent()
        assert await gateway.find_refund(refund_of(charge)) == Absent()

    async def test_a_charge_that_never_was_cannot_be_acted_on(
        self, gateway: PaymentGateway
    ) -> None:
        """A made-up reference is refused, not believed."""
        charge = replace(a_charge(), reference="ch_made_up")

        assert isinstance(await gateway.refund(refund_of(charge)), Invalid)
        assert isinstance(await gateway.void(void_of(charge)), Invalid)
        assert isinstance(await gateway.capture(capture_of(charge)), Invalid)

    async def test_amounts_are_minor_units_of_any_currency(self, gateway: PaymentGateway) -> None:
        """A yen has none, a dinar a thousand; none of it is divided or rounded."""
        for amount in (Money("JPY", 1250), Money("KWD", 1250), Money("EUR", 999_999_99)):
            charge = a_charge(amount=amount)
            outcome = await gateway.charge(charge)
            assert isinstance(outcome, Captured)
            refunded = await gateway.refund(refund_of(replace(charge, reference=outcome.reference)))
            assert isinstance(refunded, Refunded)

    async def test_it_says_how_long_it_remembers_a_key(self, gateway: PaymentGateway) -> None:
        """Long enough that the resolver may send one again."""
        assert gateway.key_ttl > timedelta(hours=1)
        assert isinstance(gateway.stores_errors, bool)
        assert gateway.name
