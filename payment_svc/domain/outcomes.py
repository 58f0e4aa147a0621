"""What may come of asking a payment provider: one type per kind of answer.

What matters of each is what is known of the money, not which status code an adapter met:

| kind           | what is known                                  | what follows                |
|----------------|------------------------------------------------|-----------------------------|
| Authorized     | the amount is reserved                         | captured, or let go         |
| Captured       | the amount is taken                            | final, unless given back    |
| Voided         | nothing is reserved or taken any more          | final                       |
| Declined       | nothing was taken, the provider says why       | final; a person may retry   |
| Invalid        | nothing was taken, our request was refused     | final; a fault of ours      |
| Submitted      | a refund was accepted and is not yet through   | ask later                   |
| Refunded       | the amount is on its way back                  | final                       |
| RetrySameKey   | this call had no effect of its own             | the same call again         |
| Unknown        | nothing                                        | ask, before anything else   |
| Absent         | the provider has never seen the key            | the same call again, while  |
|                |                                                | its key is young enough     |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Authorized:
    """The amount is reserved; `reference` is the provider's id of the charge."""

    reference: str


@dataclass(frozen=True, slots=True)
class Captured:
    """The amount is taken; `reference` is the provider's id of the charge."""

    reference: str


@dataclass(frozen=True, slots=True)
class Voided:
    """The reservation was let go; nothing was taken and nothing will be."""


@dataclass(frozen=True, slots=True)
class Declined:
    """The provider said no for good; `code` is its reason, for example `card_declined`."""

    code: str


@dataclass(frozen=True, slots=True)
class Invalid:
    """The provider refused the request as malformed; nothing was done under its key."""

    code: str


@dataclass(frozen=True, slots=True)
class Submitted:
    """The provider took a refund on and will say later whether it went through."""

    reference: str


@dataclass(frozen=True, slots=True)
class Refunded:
    """The money is on its way back; `reference` is the provider's id of the refund."""

    reference: str


@dataclass(frozen=True, slots=True)
class RetrySameKey:
    """This call did nothing; make it again after `delay_seconds` at the earliest.

    It was never sent, was turned away at the door, or met its own twin in flight.
    """

    delay_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Unknown:
    """The call may have had its effect or not; `detail` is for the log."""

    detail: str


@dataclass(frozen=True, slots=True)
class Absent:
    """The provider knows nothing under the key, now. A request may still be in flight."""


ChargeOutcome: TypeAlias = Authorized | Captured | Declined | Invalid | RetrySameKey | Unknown
"""What may come of a charge; a capture answers the same kinds."""

VoidOutcome: TypeAlias = Voided | Captured | Invalid | RetrySameKey | Unknown
"""What may come of letting a reservation go. Captured: it was too late for that."""

RefundOutcome: TypeAlias = Refunded | Submitted | Declined | Invalid | RetrySameKey | Unknown
"""What may come of giving money back."""

FoundCharge: TypeAlias = Authorized | Captured | Voided | Declined | Absent | RetrySameKey | Unknown
"""What a provider may know of a charge. Unknown: it is not final there either."""

FoundRefund: TypeAlias = Refunded | Submitted | Declined | Absent | RetrySameKey | Unknown
"""What a provider may know of a refund."""

Outcome: TypeAlias = ChargeOutcome | VoidOutcome | RefundOutcome | FoundCharge | FoundRefund
"""Anything that may come of asking a provider."""
