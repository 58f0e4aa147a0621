"""What the payment service reads from its environment, beside what all services share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from chassis.settings import DatabaseSettings

LEASE_MARGIN_SECONDS = 3.0
"""What a lease must leave for settling, after the provider's time is up."""


class PaymentSettings(DatabaseSettings):
    """Settings of the payment service."""

    payment_provider: Literal["in_process"] = "in_process"
    """Who moves the money. `in_process` moves none: it is decided by the payment
    method's name, as Stripe's test cards are."""

    provider_timeout_seconds: float = Field(default=10.0, gt=0, le=60)
    """How long to wait for the provider's answer; after that the outcome is unknown."""

    provider_concurrency: int = Field(default=32, ge=1, le=1000)
    """Calls to the provider in flight at once, per process."""

    payment_lease_seconds: float = Field(default=60.0, gt=0, le=3600)
    """How long a process may take over a payment before another one asks the provider
    what became of it. At least the provider's time and three seconds."""

    @model_validator(mode="after")
    def _lease_covers_the_provider(self) -> PaymentSettings:
        if self.payment_lease_seconds < self.provider_timeout_seconds + LEASE_MARGIN_SECONDS:
            raise ValueError(
                "MESH_PAYMENT_LEASE_SECONDS must be at least MESH_PROVIDER_TIMEOUT_SECONDS + 3"
            )
        return self
