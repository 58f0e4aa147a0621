"""What the order service reads from its environment, beside what all services share."""

from __future__ import annotations

from pydantic import Field

from chassis.settings import DatabaseSettings


class OrderSettings(DatabaseSettings):
    """Settings of the order service."""

    rate_max_age_seconds: int = Field(default=4 * 86_400, ge=0)
    """How old an exchange rate may be to be pinned to an order; 0 takes any age, as
    the embedded mesh does, which works offline from shipped history. The default
    covers a long weekend without publications."""

    rate_timeout_seconds: float = Field(default=1.0, gt=0, le=10)
    """How long placing an order waits for an exchange rate."""

    cache_ttl_seconds: int = Field(default=60, ge=1, le=3600)
    """How long a cached order that missed an update may be served."""
