"""What the payment service reads from its environment, beside what all services share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chassis.settings import DatabaseSettings


class PaymentSettings(DatabaseSettings):
    """Settings of the payment service."""

    payment_provider: Literal["in_process"] = "in_process"
    """Who moves the money. `in_process` moves none: it is decided by the payment
    method's name, as Stripe's test cards are."""

    provider_timeout_seconds: float = Field(default=10.0, gt=0, le=60)
    """How long to wait for the provider's answer; after that the outcome is unknown. The
    payments of a process that dies wait for twice as long and five seconds."""

    provider_concurrency: int = Field(default=32, ge=1, le=1000)
    """Calls to the provider in flight at once, per process: as many that move money, and
    as many that ask about lost answers."""
