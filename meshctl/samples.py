"""The twenty sample orders of `meshctl demo`, and how each has to end."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Literal

from meshctl.client import Json

Via = Literal["REST", "gRPC"]

_PAID_MAILS = frozenset({"payment_receipt", "order_confirmed", "merchant_order_confirmed"})
_AUTHORIZED_MAILS = frozenset({"order_confirmed", "merchant_order_confirmed"})
_FAILED_MAILS = frozenset({"order_failed"})
_CANCELLED_MAILS = _PAID_MAILS | {"order_cancelled", "merchant_order_cancelled", "refund_issued"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of the orders, and how it has to end."""

    title: str
    via: Via
    order: Json
    merchant: str = "default"
    payment_method: str = "pm_card_visa"
    expected_total: Json | None = None
    key: str = field(default_factory=lambda: str(uuid.uuid4()))

    state: str = "CONFIRMED"
    payment_state: str = "PAID"
    failure: str = ""
    """The reason that the order and its payment have to give."""
    settled_in: str = ""
    """Currency of the settlement, where it is not the order's."""
    mails: frozenset[str] = _PAID_MAILS
    """Templates of the mails about it."""
    refused: str = ""
    """Field that the request has to be refused for; no order comes of it."""
    repeats: int | None = None
    """Number of the sample that this one is a repeat of, from 1."""
    cancel: str = ""
    """Reason for which the order is cancelled once it is confirmed."""


def samples() -> list[Sample]:
    """Answers the samples, with keys of their own at every call; half REST, half gRPC."""
    tea = _order("ada@example.com", "EUR", ("TEA-001", "Darjeeling 100 g", 2, 1250))
    tea_key = str(uuid.uuid4())
    return [
        Sample(title="two packets of tea", via="REST", order=tea, key=tea_key),
        Sample(
            title="three lines",
            via="gRPC",
            order=_order(
                "grace@example.com",
                "EUR",
                ("POT-7", "Tea pot", 1, 3900),
                ("MUG-2", "Mug", 4, 850),
                ("TEA-014", "Assam 250 g", 1, 1490),
            ),
        ),
        Sample(title="the first one, repeated", via="REST", order=tea, key=tea_key, repeats=1),
        Sample(
            title="a declined card",
            via="gRPC",
            order=_order("bob@example.com", "EUR", ("POT-7", "Tea pot", 1, 3900)),
            payment_method="pm_card_chargeDeclined",
            state="FAILED",
            payment_state="NONE",
            failure="card_declined",
            mails=_FAILED_MAILS,
        ),
        Sample(
            title="discount, shipping and tax",
            via="REST",
            order=_order(
                "linus@example.com",
                "EUR",
                ("TEA-001", "Darjeeling 100 g", 10, 1250),
                discount=_money(1250, "EUR"),
                shipping=_money(490, "EUR"),
                tax=_money(2138, "EUR"),
            ),
            expected_total=_money(13878, "EUR"),
        ),
        Sample(
            title="in German, with addresses",
            via="gRPC",
            order=_order(
                "konrad@example.com",
                "EUR",
                ("SCHALE-3", "Teeschale", 2, 2200),
                locale="de",
                shippingAddress={
                    "regionCode": "DE",
                    "postalCode": "10115",
                    "locality": "Berlin",
                    "addressLines": ["Invalidenstraße 116"],
                    "recipient": "Konrad Zuse",
                },
            ),
        ),
        Sample(
            title="a bad request: quantity 0",
            via="REST",
            order=_order("eve@example.com", "EUR", ("TEA-001", "Darjeeling 100 g", 0, 1250)),
            refused="order.lines[0].quantity",
        ),
        Sample(
            title="in dollars, for merchant acme",
            via="gRPC",
            merchant="acme",
            order=_order("wile@example.com", "USD", ("ANVIL-1", "Anvil, small", 1, 9900)),
        ),
        Sample(
            title="in euros, settled in dollars",
            via="REST",
            merchant="acme",
            order=_order("road@example.com", "EUR", ("ROCKET-2", "Rocket", 3, 4999)),
            settled_in="USD",
        ),
        Sample(
            title="cancelled after it was paid",
            via="gRPC",
            order=_order("mary@example.com", "EUR", ("POT-9", "Cast iron pot", 1, 8900)),
            cancel="ordered by mistake",
            state="CANCELLED",
            payment_state="REFUNDED",
            mails=_CANCELLED_MAILS,
        ),
        Sample(
            title="in yen, which have no cents",
            via="REST",
            order=_order("hideo@example.com", "JPY", ("MATCHA-1", "Matcha 30 g", 2, 2160)),
            settled_in="EUR",
        ),
        Sample(
            title="with a number and labels",
            via="gRPC",
            order=_order(
                "alan@example.com",
                "EUR",
                ("TEA-020", "Lapsang 100 g", 1, 1190),
                clientOrderRef="WEB-2026-000042",
                labels={"channel": "web", "campaign": "autumn"},
            ),
        ),
        Sample(
            title="not enough money",
            via="REST",
            order=_order("otto@example.com", "EUR", ("POT-9", "Cast iron pot", 2, 8900)),
            payment_method="pm_card_chargeDeclinedInsufficientFunds",
            state="FAILED",
            payment_state="NONE",
            failure="insufficient_funds",
            mails=_FAILED_MAILS,
        ),
        Sample(
            title="forty lines",
            via="gRPC",
            order=_order(
                "barbara@example.com",
                "EUR",
                *((f"TEA-{n:03}", f"Sampler {n}", 1 + n % 3, 300 + 10 * n) for n in range(1, 41)),
            ),
        ),
        Sample(
            title="with a free gift",
            via="REST",
            order=_order(
                "donald@example.com",
                "EUR",
                ("TEA-001", "Darjeeling 100 g", 1, 1250),
                ("GIFT-1", "Sample sachet", 1, 0),
            ),
        ),
        Sample(
            title="authorized now, captured later",
            via="gRPC",
            order=_order(
                "edsger@example.com",
                "EUR",
                ("TABLE-1", "Tea table, made to order", 1, 42000),
                captureMethod="MANUAL",
            ),
            payment_state="AUTHORIZED",
            mails=_AUTHORIZED_MAILS,
        ),
        Sample(
            title="in French",
            via="REST",
            order=_order(
                "sophie@example.com", "EUR", ("THE-8", "Thé à la menthe", 3, 720), locale="fr"
            ),
        ),
        Sample(
            title="in pounds, settled in euros",
            via="gRPC",
            order=_order("charles@example.com", "GBP", ("TEA-031", "Earl Grey 125 g", 5, 610)),
            settled_in="EUR",
        ),
        Sample(
            title="wholesale, ten thousand pieces",
            via="REST",
            order=_order("john@example.com", "EUR", ("BAG-1", "Tea bag", 10_000, 4)),
        ),
        Sample(
            title="cancelled, for merchant acme",
            via="gRPC",
            merchant="acme",
            order=_order("coyote@example.com", "USD", ("GLUE-4", "Glue", 2, 1299)),
            cancel="does not stick",
            state="CANCELLED",
            payment_state="REFUNDED",
            mails=_CANCELLED_MAILS,
        ),
    ]


def _order(
    email: str,
    currency: str,
    *lines: tuple[str, str, int, int],
    locale: str = "en",
    **more: object,
) -> Json:
    customer = email.partition("@")[0]
    return {
        "customer": {"customerId": f"cust-{customer}", "email": email, "locale": locale},
        "currencyCode": currency,
        "lines": [
            {"sku": sku, "title": title, "quantity": count, "unitPrice": _money(price, currency)}
            for sku, title, count, price in lines
        ],
        **more,
    }


def _money(minor_units: int, currency: str) -> Json:
    return {"currencyCode": currency, "minorUnits": str(minor_units)}
