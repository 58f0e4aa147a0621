"""The commands about what a mesh holds: orders, payments, rates, dead letters."""

from __future__ import annotations

import asyncio
import time
from decimal import Decimal, InvalidOperation
from typing import Any

import click

from chassis.money import Money, MoneyError, minor_unit_digits
from meshctl.client import Edge, Json
from meshctl.session import (
    EXIT_CODES,
    Group,
    calls_the_mesh,
    examples,
    json_option,
    merchant_of,
    resource_name,
    session,
    state_option,
)

CONSUMERS = ("order", "payment", "notification")
"""The queues, each of which has its dead letters."""

SETTLED = {"CONFIRMED", "COMPLETED", "FAILED", "EXPIRED", "CANCELLED"}
"""Order states that nothing but a caller moves on."""


@click.group(cls=Group, epilog=EXIT_CODES)
def order() -> None:
    """Places, shows, lists and cancels orders."""


@click.group(cls=Group, epilog=EXIT_CODES)
def payment() -> None:
    """Shows and lists payments."""


@click.group(cls=Group, epilog=EXIT_CODES)
def rate() -> None:
    """Shows exchange rates."""


@click.group(cls=Group, epilog=EXIT_CODES)
def deadletter() -> None:
    """Shows the events that a consumer has given up."""


# ---------------------------------------------------------------------------- orders


@order.command(
    "create",
    epilog=examples(
        'meshctl order create --line TEA-001:2:12.50:"Darjeeling 100 g" --email ada@example.com',
        "meshctl order create --line POT-7:1:39.00 --payment-method pm_card_chargeDeclined --wait",
        "meshctl order create --merchant acme --currency GBP --line MUG-2:4:8.00 --shipping 4.90",
    ),
)
@click.option(
    "--line",
    "lines",
    multiple=True,
    required=True,
    metavar="SKU:QTY:PRICE[:TITLE]",
    help="What is ordered; may be given several times. The price is that of one, such as 12.50.",
)
@click.option("--currency", default="EUR", show_default=True, help="Of every price in the order.")
@click.option("--email", default="customer@example.com", show_default=True, help="The customer's.")
@click.option("--customer", default="cli-customer", show_default=True, help="The customer's id.")
@click.option("--locale", default="en", show_default=True, help="Language of the mails.")
@click.option(
    "--payment-method",
    default="pm_card_visa",
    show_default=True,
    help="pm_card_chargeDeclined is declined.",
)
@click.option("--discount", metavar="AMOUNT", help="Taken off the sum of the lines.")
@click.option("--shipping", metavar="AMOUNT", help="What delivery costs.")
@click.option("--tax", metavar="AMOUNT", help="What comes on top.")
@click.option("--expected-total", metavar="AMOUNT", help="Refuse an order that adds up otherwise.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Marks of your own.")
@click.option("--ref", metavar="REF", help="Your own number of the order, unique for ever.")
@click.option("--capture", type=click.Choice(["automatic", "manual"]), help="When money is taken.")
@click.option("--idempotency-key", metavar="UUID", default="", help="Repeat an earlier request.")
@click.option("--wait", is_flag=True, help="Wait until the order is confirmed or has failed.")
@calls_the_mesh
def order_create(
    merchant: str,
    lines: tuple[str, ...],
    currency: str,
    email: str,
    customer: str,
    locale: str,
    payment_method: str,
    discount: str | None,
    shipping: str | None,
    tax: str | None,
    expected_total: str | None,
    labels: tuple[str, ...],
    ref: str | None,
    capture: str | None,
    idempotency_key: str,
    wait: bool,
) -> None:
    """Places an order."""
    placed: Json = {
        "customer": {"customerId": customer, "email": email, "locale": locale},
        "currencyCode": currency,
        "lines": [_line(line, currency) for line in lines],
    }
    for field, amount in (("discount", discount), ("shipping", shipping), ("tax", tax)):
        if amount is not None:
            placed[field] = money(amount, currency)
    if labels:
        placed["labels"] = dict(_label(label) for label in labels)
    if ref:
        placed["clientOrderRef"] = ref
    if capture:
        placed["captureMethod"] = capture.upper()
    body: Json = {"order": placed, "paymentMethod": payment_method}
    if expected_total is not None:
        body["expectedTotal"] = money(expected_total, currency)
    shared = session()
    edge = shared.edge(merchant)
    created, replayed = edge.post(f"merchants/{merchant}/orders", body, key=idempotency_key)
    if replayed:
        shared.console.note("this request was made before; the order is the one it made then")
    if wait:
        created = wait_until_settled(edge, created["name"])
    _show_order(created)


@order.command(
    "get",
    epilog=examples(
        "meshctl order get 0199f3d2-8c1e-7c3a-9b51-1f0f6c3e2a77",
    ),
)
@click.argument("name")
@calls_the_mesh
def order_get(merchant: str, name: str) -> None:
    """Shows an order; NAME is its resource name or its id."""
    full = resource_name("orders", merchant, name)
    _show_order(session().edge(merchant_of(full, merchant)).get(full))


@order.command(
    "list",
    epilog=examples(
        "meshctl order list --page-size 5",
        "meshctl order list --all --json | jq -r '.[] | .name + \" \" + .state'",
    ),
)
@click.option("--page-size", type=click.IntRange(1, 1000), default=20, show_default=True)
@click.option("--all", "everything", is_flag=True, help="Every page, not the first alone.")
@calls_the_mesh
def order_list(merchant: str, page_size: int, everything: bool) -> None:
    """Lists orders, the newest first."""
    shared = session()
    limit = 10**9 if everything else page_size
    path = f"merchants/{merchant}/orders"
    found = list(shared.edge(merchant).pages(path, "orders", at_most=limit))
    if shared.json:
        shared.console.json(found)
        return
    rows = [
        [
            _id_of(item["name"]),
            _time(item, "createTime"),
            item.get("state", ""),
            item.get("paymentState", ""),
            amount_words(item.get("total")),
            item.get("customer", {}).get("customerId", ""),
        ]
        for item in found
    ]
    shared.console.table(["order", "placed", "state", "payment", "total", "customer"], rows)


@order.command(
    "cancel",
    epilog=examples(
        'meshctl order cancel 0199f3d2-8c1e-7c3a-9b51-1f0f6c3e2a77 --reason "ordered twice"',
    ),
)
@click.argument("name")
@click.option("--reason", default="", help="Kept with the order and told to the customer.")
@click.option("--idempotency-key", metavar="UUID", default="", help="Repeat an earlier request.")
@click.option("--wait", is_flag=True, help="Wait until the money is back and the order cancelled.")
@calls_the_mesh
def order_cancel(merchant: str, name: str, reason: str, idempotency_key: str, wait: bool) -> None:
    """Cancels an order; what was charged is given back first."""
    full = resource_name("orders", merchant, name)
    edge = session().edge(merchant_of(full, merchant))
    body = {"reason": reason} if reason else {}
    cancelled, _ = edge.post(f"{full}:cancel", body, key=idempotency_key)
    if wait:
        cancelled = wait_until_settled(edge, full, until={"CANCELLED"})
    _show_order(cancelled)


@order.command(
    "events",
    epilog=examples(
        "meshctl order events 0199f3d2-8c1e-7c3a-9b51-1f0f6c3e2a77",
    ),
)
@click.argument("name")
@calls_the_mesh
def order_events(merchant: str, name: str) -> None:
    """Shows an order's timeline, the oldest event first."""
    full = resource_name("orders", merchant, name)
    shared = session()
    edge = shared.edge(merchant_of(full, merchant))
    found = list(edge.pages(f"{full}/events", "events", at_most=10**6))
    if shared.json:
        shared.console.json(found)
        return
    rows = [
        [
            _time(event, "occurTime"),
            event.get("type", "").rpartition(".")[2],
            event.get("state", ""),
            event.get("paymentState", ""),
            str(event.get("orderVersion", "")),
            event.get("correlationId", ""),
        ]
        for event in found
    ]
    headings = ["time", "event", "state", "payment", "version", "correlation"]
    shared.console.table(headings, rows)


@order.command(
    "watch",
    epilog=examples(
        "meshctl order watch 0199f3d2-8c1e-7c3a-9b51-1f0f6c3e2a77",
    ),
)
@click.argument("name")
@click.option("--seconds", type=click.IntRange(1), default=60, show_default=True, help="Patience.")
@calls_the_mesh
def order_watch(merchant: str, name: str, seconds: int) -> None:
    """Shows an order each time that it changes, until it is settled."""
    full = resource_name("orders", merchant, name)
    shared = session()
    edge = shared.edge(merchant_of(full, merchant))
    deadline = time.monotonic() + seconds
    seen = ""
    while True:
        found = edge.get(full)
        if found.get("etag") != seen:
            seen = found.get("etag", "")
            if shared.json:
                shared.console.json(found)
            else:
                shared.console.result(
                    f"{_time(found, 'updateTime')}  {found['state']}  {found['paymentState']}"
                )
        if found["state"] in SETTLED:
            return
        if time.monotonic() > deadline:
            shared.console.note(f"still {found['state']} after {seconds} s")
            raise click.exceptions.Exit(1)
        time.sleep(0.2)


def wait_until_settled(
    edge: Edge, name: str, *, until: set[str] | None = None, within_seconds: float = 30.0
) -> Json:
    """Asks for an order until it is in a settled state, and answers it as it is then.

    Args:
        edge: The connection.
        name: The order's resource name.
        until: Other states to wait for.
        within_seconds: Patience; afterwards the order is answered as it is.
    """
    deadline = time.monotonic() + within_seconds
    pause = 0.05
    while True:
        found = edge.get(name)
        if found["state"] in (until or SETTLED) or time.monotonic() > deadline:
            return found
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)


def _show_order(shown: Json) -> None:
    shared = session()
    if shared.json:
        shared.console.json(shown)
        return
    customer = shown.get("customer", {})
    lines = [
        f"{line['quantity']} x {line['sku']}  {line.get('title', '')}".rstrip()
        + f"  at {amount_words(line.get('unitPrice'))}"
        for line in shown.get("lines", [])
    ]
    settlement = shown.get("settlement")
    settled = (
        f"{amount_words(settlement.get('amount'))}"
        f" (rate {settlement.get('exchangeRate')} of {settlement.get('provider')})"
        if settlement
        else ""
    )
    _show_fields(
        {
            "order": shown["name"],
            "state": shown.get("state", ""),
            "payment": " ".join([shown.get("paymentState", ""), shown.get("payment", "")]).strip(),
            "failed because": shown.get("failureReason", ""),
            "cancelled because": shown.get("cancelReason", ""),
            "needs attention": shown.get("attentionReason", ""),
            "customer": f"{customer.get('customerId', '')} <{customer.get('email', '')}>",
            "lines": "\n".join(lines),
            "discount": amount_words(shown.get("discount")),
            "shipping": amount_words(shown.get("shipping")),
            "tax": amount_words(shown.get("tax")),
            "total": amount_words(shown.get("total")),
            "settled as": settled,
            "your number": shown.get("clientOrderRef", ""),
            "labels": ", ".join(f"{k}={v}" for k, v in shown.get("labels", {}).items()),
            "placed": shown.get("createTime", ""),
            "changed": shown.get("updateTime", ""),
            "etag": shown.get("etag", ""),
        }
    )


# ---------------------------------------------------------------------------- payments, rates


@payment.command("get", epilog=EXIT_CODES)
@click.argument("name")
@calls_the_mesh
def payment_get(merchant: str, name: str) -> None:
    """Shows a payment; NAME is its resource name or its id."""
    full = resource_name("payments", merchant, name)
    shared = session()
    shown = shared.edge(merchant_of(full, merchant)).get(full)
    if shared.json:
        shared.console.json(shown)
        return
    refunds = [
        f"{_id_of(refund['name'])}  {refund.get('state', '')}  {amount_words(refund.get('amount'))}"
        for refund in shown.get("refunds", [])
    ]
    _show_fields(
        {
            "payment": shown["name"],
            "order": shown.get("order", ""),
            "state": shown.get("state", ""),
            "failed because": shown.get("failureReason", ""),
            "amount": amount_words(shown.get("amount")),
            "captured": amount_words(shown.get("captured")),
            "refunded": amount_words(shown.get("refunded")),
            "refunds": "\n".join(refunds),
            "method": shown.get("paymentMethod", ""),
            "provider": f"{shown.get('provider', '')} {shown.get('providerReference', '')}".strip(),
            "made": shown.get("createTime", ""),
            "changed": shown.get("updateTime", ""),
        }
    )


@payment.command("list", epilog=EXIT_CODES)
@click.option("--order", "of_order", metavar="NAME", help="Only those of this order.")
@click.option("--page-size", type=click.IntRange(1, 1000), default=20, show_default=True)
@calls_the_mesh
def payment_list(merchant: str, of_order: str | None, page_size: int) -> None:
    """Lists payments, the newest first."""
    shared = session()
    chosen = None
    if of_order is not None:
        full = resource_name("orders", merchant, of_order)
        merchant = merchant_of(full, merchant)
        chosen = f'order = "{full}"'
    found = list(
        shared.edge(merchant).pages(
            f"merchants/{merchant}/payments", "payments", at_most=page_size, filter=chosen
        )
    )
    if shared.json:
        shared.console.json(found)
        return
    rows = [
        [
            _id_of(item["name"]),
            _time(item, "createTime"),
            item.get("state", ""),
            amount_words(item.get("amount")),
            amount_words(item.get("refunded")),
            _id_of(item.get("order", "")),
            item.get("failureReason", ""),
        ]
        for item in found
    ]
    headings = ["payment", "made", "state", "amount", "refunded", "order", "failed because"]
    shared.console.table(headings, rows)


@rate.command(
    "get",
    epilog=examples(
        "meshctl rate get USD-EUR",
    ),
)
@click.argument("pair")
@calls_the_mesh
def rate_get(merchant: str, pair: str) -> None:
    """Shows an exchange rate; PAIR is such as USD-EUR."""
    shared = session()
    shown = shared.edge(merchant).get(f"exchangeRates/{pair.removeprefix('exchangeRates/')}")
    if shared.json:
        shared.console.json(shown)
        return
    _show_fields(
        {
            "rate": f"1 {shown.get('baseCurrencyCode')} = {shown.get('rate')} "
            f"{shown.get('quoteCurrencyCode')}",
            "provider": shown.get("provider", ""),
            "as of": shown.get("asOfTime", ""),
            "stale": "yes" if shown.get("stale") else "no",
        }
    )


# ---------------------------------------------------------------------------- dead letters


@deadletter.command(
    "list",
    epilog=examples(
        "meshctl deadletter list",
        "meshctl deadletter list --consumer payment --json",
    ),
)
@state_option
@json_option
@click.option(
    "--consumer", "consumers", type=click.Choice(CONSUMERS), multiple=True, help="Only this one's."
)
@click.option("--limit", type=click.IntRange(1, 10_000), default=100, show_default=True)
def deadletter_list(consumers: tuple[str, ...], limit: int) -> None:
    """Lists the events that a consumer has given up, the newest last; removes none."""
    shared = session()
    run = shared.state.running()
    found = asyncio.run(_dead_letters(run.broker_url, consumers or CONSUMERS, limit))
    if shared.json:
        shared.console.json(found)
        return
    rows = [
        [
            letter["consumer"],
            letter["death_time"],
            letter["type"].rpartition(".")[2],
            letter["error_class"],
            letter["error_detail"][:80],
            letter["event_id"],
        ]
        for letter in found
    ]
    shared.console.table(["consumer", "given up", "event", "error", "detail", "event id"], rows)
    shared.console.note(f"{len(found)} dead letters")


async def _dead_letters(url: str, consumers: tuple[str, ...], limit: int) -> list[dict[str, Any]]:
    # Late: the brokers' clients are of no use to the other commands.
    from chassis.broker import BrokerUnavailableError, connect
    from meshctl.processes import MeshError

    found: list[dict[str, Any]] = []
    try:
        async with connect(url, name="meshctl") as broker:
            for consumer in consumers:
                found += [
                    {
                        "consumer": letter.consumer,
                        "event_id": str(letter.message.event_id),
                        "type": letter.message.type,
                        "attempts": letter.message.attempt,
                        "error_class": letter.error_class,
                        "error_detail": letter.error_detail,
                        "first_death_time": letter.first_death_time.isoformat(),
                        "death_time": letter.death_time.isoformat(),
                    }
                    for letter in await broker.dead_letters(consumer, limit=limit)
                ]
    except BrokerUnavailableError as error:
        raise MeshError(
            f"the broker does not answer: {error}", hint="meshctl status shows what runs"
        ) from error
    return found


# ---------------------------------------------------------------------------- words


def money(amount: str, currency: str) -> Json:
    """Reads an amount such as ``12.50`` exactly, as the API's Money.

    Raises:
        click.BadParameter: It is no amount of this currency.
    """
    try:
        scaled = Decimal(amount).scaleb(minor_unit_digits(currency))
        if scaled != scaled.to_integral_value():
            raise click.BadParameter(
                f"{amount} has more decimals than {currency}, which has "
                f"{minor_unit_digits(currency)}"
            )
        return {
            "currencyCode": currency,
            "minorUnits": str(Money(currency, int(scaled)).minor_units),
        }
    except (InvalidOperation, OverflowError, MoneyError) as error:
        raise click.BadParameter(f"{amount!r} is no amount in {currency}: {error}") from error


def amount_words(value: Json | None) -> str:
    """Says a Money of the API as ``12.50 EUR``; nothing for none."""
    if not value:
        return ""
    try:
        return str(Money(value["currencyCode"], int(value.get("minorUnits", 0))))
    except MoneyError:
        return f"{value.get('minorUnits', 0)} minor units of {value['currencyCode']}"


def _line(given: str, currency: str) -> Json:
    parts = given.split(":", 3)
    if len(parts) < 3 or not parts[1].isdecimal():
        raise click.BadParameter(f"{given!r} is not SKU:QTY:PRICE[:TITLE]", param_hint="--line")
    line: Json = {
        "sku": parts[0],
        "quantity": int(parts[1]),
        "unitPrice": money(parts[2], currency),
    }
    if len(parts) == 4:
        line["title"] = parts[3]
    return line


def _label(given: str) -> tuple[str, str]:
    key, sign, value = given.partition("=")
    if not sign:
        raise click.BadParameter(f"{given!r} is not KEY=VALUE", param_hint="--label")
    return key, value


def _show_fields(fields: dict[str, str]) -> None:
    console = session().console
    for name, value in fields.items():
        for number, line in enumerate(value.splitlines()):
            console.result(f"{name if number == 0 else '':<18}{line}")


def _id_of(name: str) -> str:
    return name.rpartition("/")[2]


def _time(item: Json, field: str) -> str:
    # 2026-11-22T16:11:27.123456Z; to the millisecond is enough to read.
    value = str(item.get(field, ""))
    head, dot, fraction = value.rstrip("Z").partition(".")
    return f"{head}.{fraction[:3]:0<3}" if dot else head
