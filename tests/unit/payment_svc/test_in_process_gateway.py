"""The in-process provider: the port's behaviour, and what is its own."""

from __future__ import annotations

import pytest

from payment_svc import gateways
from payment_svc.domain.attempt import CaptureMethod
from payment_svc.domain.outcomes import Authorized, Captured, Refunded, Voided
from payment_svc.gateways import APPROVED, DECLINES, InProcessGateway, PaymentGateway
from tests.builders import eur
from tests.suites.payment_gateway import (
    PaymentGatewaySuite,
    a_charge,
    authorized,
    captured,
    refund_of,
    void_of,
)


class TestInProcessGateway(PaymentGatewaySuite):
    """It does what every provider does."""

    @pytest.fixture
    def gateway(self) -> PaymentGateway:
        """A provider with empty books."""
        return InProcessGateway()


@pytest.mark.parametrize("payment_method", sorted(APPROVED))
async def test_every_card_that_works_is_charged(payment_method: str) -> None:
    """With Stripe's names."""
    outcome = await InProcessGateway().charge(a_charge(payment_method=payment_method))

    assert isinstance(outcome, Captured)


async def test_no_card_both_works_and_is_declined() -> None:
    """A name decides for itself."""
    declined = {f"pm_card_{name}" for name in DECLINES} | {f"pm_card_visa_{n}" for n in DECLINES}

    assert not declined & APPROVED


async def test_the_books_show_what_was_taken_and_given_back() -> None:
    """For tests to look at."""
    gateway = InProcessGateway()
    charge = await captured(gateway)
    await gateway.refund(refund_of(charge, eur(1000)))

    entry = gateway.ledger[charge.key]

    assert (entry.captured, entry.refunded) == (eur(2500), eur(1000))


async def test_what_was_charged_before_a_restart_can_be_given_back_after_it() -> None:
    """The books are gone; the reference proves that it was approved with these terms."""
    charge = await captured(InProcessGateway())

    restarted = InProcessGateway()

    assert await restarted.find(charge) == Captured(charge.reference)
    assert isinstance(await restarted.refund(refund_of(charge)), Refunded)


async def test_what_was_reserved_before_a_restart_can_be_let_go_after_it() -> None:
    """The same for an amount that was not taken yet."""
    charge = await authorized(InProcessGateway())

    restarted = InProcessGateway()

    assert await restarted.find(charge) == Authorized(charge.reference)
    assert await restarted.void(void_of(charge)) == Voided()


async def test_the_books_do_not_grow_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mesh that runs for weeks keeps its memory; what left the books is still refunded."""
    monkeypatch.setattr(gateways, "LEDGER_MAX", 3)
    gateway = InProcessGateway()
    charges = [await captured(gateway) for _ in range(5)]

    assert list(gateway.ledger) == [charge.key for charge in charges[2:]]
    assert isinstance(await gateway.refund(refund_of(charges[0])), Refunded)
    assert len(gateway.ledger) == 3


async def test_a_reference_proves_nothing_about_other_terms() -> None:
    """Nobody turns an approval of one amount into one of another."""
    small = a_charge(amount=eur(100), capture_method=CaptureMethod.AUTOMATIC)
    outcome = await InProcessGateway().charge(small)
    assert isinstance(outcome, Captured)
    large = a_charge(amount=eur(100_000))

    restarted = InProcessGateway()
    forged = type(large)(
        key=small.key, terms=large.terms, order=large.order, reference=outcome.reference
    )

    assert not isinstance(await restarted.refund(refund_of(forged)), Refunded)
