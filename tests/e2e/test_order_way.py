"""The way of an order: placed at the edge, charged, confirmed, told of, and undone."""

from __future__ import annotations

import asyncio
import json
import ssl
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_EVEN, Decimal

import asyncpg
import httpx
import psutil
import pytest

from tests.e2e.callers import (
    ACME,
    DEFAULT,
    REFUNDED,
    Caller,
    Ends,
    GrpcCaller,
    RestCaller,
    a_line,
    a_request,
    an_order,
    ended,
    insisted,
    listed,
    money,
    new_key,
    notifications_of,
    over_rest_and_grpc,
    payments_of,
)
from tests.e2e.meshes import Json, Mesh, on_both_brokers
from tests.eventually import eventually

CUSTOMER, MERCHANT = "ada@example.com", "merchant@default.example"

PAID_MAILS = {
    ("payment_receipt", "CUSTOMER"): CUSTOMER,
    ("order_confirmed", "CUSTOMER"): CUSTOMER,
    ("merchant_order_confirmed", "MERCHANT"): MERCHANT,
}
CANCELLED_MAILS = {
    ("refund_issued", "CUSTOMER"): CUSTOMER,
    ("order_cancelled", "CUSTOMER"): CUSTOMER,
    ("merchant_order_cancelled", "MERCHANT"): MERCHANT,
}

CONSUMERS = {
    "ordermesh.order.v1.OrderCreated": {"payment", "notification"},
    "ordermesh.order.v1.OrderConfirmed": {"notification"},
    "ordermesh.order.v1.OrderFailed": {"notification"},
    "ordermesh.order.v1.OrderCancellationRequested": {"payment"},
    "ordermesh.order.v1.OrderCancelled": {"notification"},
    "ordermesh.payment.v1.PaymentSucceeded": {"order", "notification"},
    "ordermesh.payment.v1.PaymentFailed": {"order"},
    "ordermesh.payment.v1.RefundSucceeded": {"order", "notification"},
}
"""Who has to have an event in the inbox."""

EXAMPLE = (
    b'{"order": {"customer": {"customerId": "cust-42", "email": "ada@example.com", "locale": "en"},'
    b' "currencyCode": "EUR", "lines": [{"sku": "TEA-001", "title": "Darjeeling 100 g",'
    b' "quantity": 2, "unitPrice": {"currencyCode": "EUR", "minorUnits": "1250"}}]},'
    b' "paymentMethod": "pm_card_visa"}'
)
"""The order of the documentation, to the letter."""


async def test_the_documented_example_is_answered_as_a_resource_and_soon_paid(
    mesh: Mesh, rest: RestCaller
) -> None:
    """The very bytes that the documentation shows, with no more headers than it shows."""
    access = mesh.access()
    before = datetime.now(UTC)
    response = await rest.client.post(
        f"{access.url}/v1/merchants/default/orders",
        content=EXAMPLE,
        headers={"Authorization": f"Bearer {access.token}", "Idempotency-Key": new_key()},
    )
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    order = response.json()
    create_time = datetime.fromisoformat(order["createTime"])
    assert before - timedelta(seconds=1) < create_time < datetime.now(UTC) + timedelta(seconds=1)
    given = json.loads(EXAMPLE)["order"]
    line = {**given["lines"][0], "amount": money(2500)}
    assert order == {
        **given,
        "name": order["name"],
        "clientOrderRef": "",
        "lines": [line],
        "labels": {},
        "captureMethod": "AUTOMATIC",
        "subtotal": money(2500),
        "total": money(2500),
        "state": "AWAITING_PAYMENT",
        "paymentState": "NONE",
        "fulfillmentState": "UNFULFILLED",
        "payment": "",
        "failureReason": "",
        "cancelReason": "",
        "attentionReason": "",
        "createTime": order["createTime"],
        "updateTime": order["createTime"],
        "etag": '"1"',
    }
    assert order["name"].startswith("merchants/default/orders/")
    paid = await ended(rest, order["name"])
    assert paid["etag"] != order["etag"]
    assert paid["updateTime"] > paid["createTime"] == order["createTime"]
    assert paid["payment"].startswith("merchants/default/payments/")


async def test_every_field_of_an_order_comes_back_as_it_was_given(rest: RestCaller) -> None:
    """What the caller says stands in the resource, and totals are the server's."""
    address = {
        "recipient": "Konrad Zuse",
        "addressLines": ["Invalidenstraße 116", "Hinterhaus"],
        "locality": "Berlin",
        "administrativeArea": "BE",
        "postalCode": "10115",
        "regionCode": "DE",
    }
    given = an_order(
        clientOrderRef=f"WEB-{new_key()}",
        customer={"customerId": "cust/7:a@b", "email": CUSTOMER, "locale": "de-AT"},
        lines=[a_line(), a_line(sku="POT-7", title="Kännchen „Rund“ 🫖", quantity=1)],
        shippingAddress=address,
        billingAddress={**address, "recipient": "Buchhaltung"},
        labels={"channel": "web", "campaign": "autumn"},
        discount=money(250),
        shipping=money(490),
        tax=money(713),
        captureMethod="MANUAL",
    )
    answer = await rest.call("CreateOrder", a_request(order=given, expectedTotal=money(4703)))
    order = answer.resource
    for field in set(given) - {"lines"}:
        assert order[field] == given[field], field
    assert [line["title"] for line in order["lines"]] == ["Darjeeling 100 g", "Kännchen „Rund“ 🫖"]
    assert (order["subtotal"], order["total"]) == (money(3750), money(4703))
    authorized = await ended(rest, order["name"], Ends("CONFIRMED", "AUTHORIZED"))
    assert authorized["lines"] == order["lines"]
    (payment,) = await payments_of(rest, order["name"])
    assert (payment["state"], payment["captured"]) == ("AUTHORIZED", money(0))


@on_both_brokers
@over_rest_and_grpc
async def test_an_order_is_charged_once_confirmed_and_told_of(mesh: Mesh, caller: Caller) -> None:
    """From the request to the mails: states, timeline, payment, each hop's rows."""
    correlation_id = f"way-{new_key()}"
    placed = (
        await caller.call("CreateOrder", a_request(), headers={"x-correlation-id": correlation_id})
    ).resource
    name = placed["name"]
    order = await ended(caller, name)

    created, confirmed = await listed(caller, "ListOrderEvents", "events", parent=name)
    assert created["type"] == "ordermesh.order.v1.OrderCreated"
    assert (created["state"], created["paymentState"]) == ("AWAITING_PAYMENT", "NONE")
    assert confirmed["type"] == "ordermesh.order.v1.OrderConfirmed"
    assert (confirmed["state"], confirmed["paymentState"]) == ("CONFIRMED", "PAID")
    assert [created["orderVersion"], confirmed["orderVersion"]] == ["1", "2"]
    assert [created["occurTime"], confirmed["occurTime"]] == [
        order["createTime"],
        order["updateTime"],
    ]
    assert {created["correlationId"], confirmed["correlationId"]} == {correlation_id}

    (payment,) = await payments_of(caller, name)
    assert payment["name"] == order["payment"]
    assert (await caller.call("GetPayment", {"name": order["payment"]})).resource == payment
    assert payment["order"] == name
    assert payment["state"] == "CAPTURED"
    assert (payment["amount"], payment["captured"]) == (money(2500), money(2500))
    assert (payment["refunded"], payment["refunds"]) == (money(0), [])
    assert payment["paymentMethod"] == "pm_card_visa"
    assert payment["provider"] == "in_process"
    assert payment["providerReference"]

    await _are_sent(mesh, caller, name, PAID_MAILS)
    hops = await _hops(mesh, order)
    assert [event["type"].rpartition(".")[2] for event in hops] == [
        "OrderCreated",
        "OrderConfirmed",
        "PaymentSucceeded",
    ]
    assert {event["correlation_id"] for event in hops} == {correlation_id}
    # What made the order confirmed is the payment's event, and nothing else.
    assert confirmed["causationId"] == str(hops[2]["event_id"])
    assert [str(event["event_id"]) for event in hops[:2]] == [
        created["eventId"],
        confirmed["eventId"],
    ]


@on_both_brokers
@over_rest_and_grpc
async def test_a_declined_card_ends_the_order_with_the_reason(mesh: Mesh, caller: Caller) -> None:
    """Nothing is taken, the customer is told, and order and payment say why."""
    for method, reason in (
        ("pm_card_chargeDeclined", "card_declined"),
        ("pm_card_chargeDeclinedInsufficientFunds", "insufficient_funds"),
    ):
        placed = await caller.call("CreateOrder", a_request(paymentMethod=method))
        name = placed.resource["name"]
        order = await ended(caller, name, Ends("FAILED", "NONE", reason))
        (payment,) = await payments_of(caller, name)
        assert (payment["state"], payment["failureReason"]) == ("FAILED", reason)
        assert payment["captured"] == money(0)
        await _are_sent(mesh, caller, name, {("order_failed", "CUSTOMER"): CUSTOMER})
        types = [event["type"].rpartition(".")[2] for event in await _hops(mesh, order)]
        assert types == ["OrderCreated", "OrderFailed", "PaymentFailed"]


@on_both_brokers
@over_rest_and_grpc
async def test_a_paid_order_that_is_cancelled_is_refunded(mesh: Mesh, caller: Caller) -> None:
    """CANCELLING at once, CANCELLED when the money is back, and everybody is told."""
    name = (await caller.call("CreateOrder", a_request())).resource["name"]
    paid = await ended(caller, name)
    cancelling = await caller.call(
        "CancelOrder", {"name": name, "reason": "ordered by mistake", "etag": paid["etag"]}
    )
    assert cancelling.resource["state"] == "CANCELLING"
    assert cancelling.resource["cancelReason"] == "ordered by mistake"
    order = await ended(caller, name, REFUNDED)
    (payment,) = await payments_of(caller, name)
    assert payment["state"] == "CAPTURED"
    assert (payment["captured"], payment["refunded"]) == (money(2500), money(2500))
    (refund,) = payment["refunds"]
    assert (refund["state"], refund["amount"]) == ("SUCCEEDED", money(2500))
    await _are_sent(mesh, caller, name, {**PAID_MAILS, **CANCELLED_MAILS})
    types = [event["type"].rpartition(".")[2] for event in await _hops(mesh, order)]
    assert types == [
        "OrderCreated",
        "OrderConfirmed",
        "OrderCancellationRequested",
        "OrderCancelled",
        "PaymentSucceeded",
        "RefundSucceeded",
    ]
    # Cancelling what is cancelled already is no error and changes nothing.
    again = await caller.call("CancelOrder", {"name": name})
    assert again.resource == order


@on_both_brokers
async def test_orders_that_are_cancelled_at_once_keep_no_money(
    mesh: Mesh, rest: RestCaller, grpc: GrpcCaller
) -> None:
    """Whichever comes first, charge or cancellation: nothing stays captured, all is told."""

    async def placed_and_cancelled(caller: Caller, wait_seconds: float) -> Json:
        name = (await caller.call("CreateOrder", a_request())).resource["name"]
        await asyncio.sleep(wait_seconds)  # not to wait for something: to meet the race
        # So many at once may be too many for a busy machine, which then says so.
        await insisted(caller, "CancelOrder", {"name": name, "reason": "at once"})

        async def asked() -> Json:
            return (await caller.call("GetOrder", {"name": name})).resource

        return await eventually(asked, 15, until=lambda found: found["state"] == "CANCELLED")

    orders = await asyncio.gather(
        *(placed_and_cancelled(rest, n * 0.004) for n in range(8)),
        *(placed_and_cancelled(grpc, n * 0.004) for n in range(8)),
    )
    for order in orders:
        (payment,) = await payments_of(rest, order["name"])
        assert payment["captured"] == payment["refunded"]
        assert order["paymentState"] == ("NONE" if payment["captured"] == money(0) else "REFUNDED")
        assert order["attentionReason"] == ""
        told = {("order_cancelled", "CUSTOMER"), ("merchant_order_cancelled", "MERCHANT")}
        await _are_told(rest, order["name"], told)
    await eventually(lambda: _unsent(mesh), 10, until=lambda unsent: unsent == 0)


async def test_a_total_in_another_currency_is_settled_at_the_rate_of_its_moment(
    acme: Caller,
) -> None:
    """Converted once, rounded half to even, and pinned: later answers repeat it."""
    rate = (await acme.call("GetExchangeRate", {"name": "exchangeRates/EUR-USD"})).resource
    order = an_order(lines=[a_line(quantity=3, unitPrice=money(4999))])
    placed = (await acme.call("CreateOrder", a_request(ACME, order=order))).resource
    exact = Decimal(3 * 4999) * Decimal(rate["rate"])
    rounded = int(exact.quantize(Decimal(1), rounding=ROUND_HALF_EVEN))
    assert placed["total"] == money(14997)
    assert placed["settlement"] == {
        "amount": money(rounded, "USD"),
        "exchangeRate": rate["rate"],
        "provider": rate["provider"],
        "asOfTime": rate["asOfTime"],
    }
    paid = await ended(acme, placed["name"])
    assert paid["settlement"] == placed["settlement"]
    (payment,) = await payments_of(acme, placed["name"])
    assert payment["captured"] == money(14997), "the customer pays in the order's currency"
    in_its_own = an_order(currencyCode="USD", lines=[a_line(unitPrice=money(1250, "USD"))])
    answer = await acme.call("CreateOrder", a_request(ACME, order=in_its_own))
    assert "settlement" not in answer.resource


async def test_rest_and_grpc_answer_the_same_order_in_the_same_words(
    rest: RestCaller, grpc: GrpcCaller
) -> None:
    """One resource: what was placed one way reads the same the other way."""
    for one, other in ((rest, grpc), (grpc, rest)):
        placed = (await one.call("CreateOrder", a_request())).resource
        paid = await ended(one, placed["name"])
        assert (await other.call("GetOrder", {"name": placed["name"]})).resource == paid
        for method, request in (
            ("ListOrders", {"parent": DEFAULT, "pageSize": 3}),
            ("ListOrderEvents", {"parent": placed["name"]}),
            ("GetPayment", {"name": paid["payment"]}),
        ):
            answers = [(await caller.call(method, request)).resource for caller in (one, other)]
            assert answers[0] == answers[1], method


@pytest.mark.parametrize("acme", ["rest", "grpc"], indirect=True)
async def test_pages_of_a_list_hold_each_order_once_while_others_arrive(acme: Caller) -> None:
    """The newest first; what is placed meanwhile neither shifts a page nor appears in one."""

    async def place() -> str:
        return str((await acme.call("CreateOrder", a_request(ACME))).resource["name"])

    names = [await place() for _ in range(8)]
    seen: list[str] = []
    token = ""
    late: list[str] = []
    while set(names) - set(seen):
        page = (
            await acme.call("ListOrders", {"parent": ACME, "pageSize": 3, "pageToken": token})
        ).resource
        assert len(page["orders"]) == 3
        seen += [order["name"] for order in page["orders"]]
        token = page["nextPageToken"]
        late += [await place(), await place()]
    assert seen[: len(names)] == names[::-1]
    assert len(set(seen)) == len(seen)
    assert not set(late) & set(seen)
    newest = await listed(acme, "ListOrders", "orders", parent=ACME, pageSize=2)
    assert [order["name"] for order in newest] == late[:-3:-1]


@pytest.mark.parametrize("space", ["%20", "+"])
async def test_a_filter_reads_the_same_however_its_spaces_are_written(
    rest: RestCaller, space: str
) -> None:
    """Browsers and most clients write `+` for a space in a query."""
    name = (await rest.call("CreateOrder", a_request())).resource["name"]
    await ended(rest, name)
    query = f"filter=order{space}={space}%22{name}%22"
    found = (await rest.send("GET", f"/v1/{DEFAULT}/payments?{query}")).resource["payments"]
    assert [payment["order"] for payment in found] == [name]


async def test_a_list_ends_with_an_empty_token_and_takes_a_large_page_size(
    acme: Caller,
) -> None:
    """50 where no size is named, 1000 at the most; the last page leads nowhere."""
    await acme.call("CreateOrder", a_request(ACME))
    everything = (await acme.call("ListOrders", {"parent": ACME, "pageSize": 100_000})).resource
    assert everything["nextPageToken"] == ""
    assert len(everything["orders"]) <= 1000
    usual = await listed(acme, "ListOrders", "orders", parent=ACME)
    # By name: the order that was just placed may have come further in between.
    names = [order["name"] for order in everything["orders"]]
    assert [order["name"] for order in usual] == names[:50]
    times = [order["createTime"] for order in everything["orders"]]
    assert times == sorted(times, reverse=True)


async def test_a_timeline_is_paged_too(rest: RestCaller) -> None:
    """The oldest first, one event a page."""
    name = (await rest.call("CreateOrder", a_request())).resource["name"]
    await ended(rest, name)
    versions, token = [], ""
    while True:
        request = {"parent": name, "pageSize": 1, "pageToken": token}
        page = (await rest.call("ListOrderEvents", request)).resource
        versions += [event["orderVersion"] for event in page["events"]]
        token = page["nextPageToken"]
        if not token:
            break
    assert versions == ["1", "2"]


async def test_mails_are_written_in_the_customers_language(mesh: Mesh, rest: RestCaller) -> None:
    """The customer of `de-AT` reads German, the merchant English as the file says."""
    email = f"konrad+{new_key()[:8]}@example.com"
    order = an_order(customer={"customerId": "c-1", "email": email, "locale": "de-AT"})
    name = (await rest.call("CreateOrder", a_request(order=order))).resource["name"]
    mails = await eventually(
        lambda: mesh.mails(name), 15, until=lambda found: len(found) == len(PAID_MAILS)
    )
    texts = {mail.to: mail.text for mail in mails}
    assert set(texts) == {email, MERCHANT}
    assert "Bestellung" in texts[email]
    assert "€\u00a025,00" in texts[email]
    assert "€25.00" in texts[MERCHANT]


@pytest.mark.rabbitmq
async def test_only_one_mesh_knows_an_order(
    postgres_mesh: Mesh, rest: RestCaller, rabbitmq_mesh: Mesh
) -> None:
    """Two meshes side by side: other orders, other CA, other tokens."""
    name = (await rest.call("CreateOrder", a_request())).resource["name"]
    one, other = postgres_mesh.access(), rabbitmq_mesh.access()
    assert one.url != other.url
    trust = ssl.create_default_context(cafile=str(other.ca))
    async with httpx.AsyncClient(verify=trust, trust_env=False) as client:
        answers = [
            await client.get(f"{other.url}/v1/{name}", headers={"authorization": f"Bearer {token}"})
            for token in (other.token, one.token)
        ]
        assert [answer.status_code for answer in answers] == [404, 401]
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            await client.get(f"{one.url}/healthz")


@pytest.mark.rabbitmq
async def test_the_services_of_the_rabbitmq_mesh_use_rabbitmq_and_no_other_queue(
    rabbitmq_mesh: Mesh,
) -> None:
    """Each of them that has events holds connections to it, and the other queue is not there."""
    status = rabbitmq_mesh.status()
    assert status["broker"] == "amqp"
    port = rabbitmq_mesh.port("rabbitmq")
    pids = {process["name"]: process["pid"] for process in status["processes"]}
    for name in ("order", "payment", "notification"):
        connections = psutil.Process(pids[name]).net_connections("inet")
        ports = {getattr(connection.raddr, "port", 0) for connection in connections}
        assert port in ports, name
    tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'mesh_broker'"
    assert await rabbitmq_mesh.count("broker", tables) == 0


async def test_no_event_was_given_up(postgres_mesh: Mesh) -> None:
    """After everything above: no dead letters, nothing parked, nothing unsent."""
    assert json.loads(postgres_mesh.run("deadletter", "list", "--json").stdout) == []
    await eventually(lambda: _unsent(postgres_mesh), 10, until=lambda unsent: unsent == 0)


# ---------------------------------------------------------------------------- looking


async def _are_told(caller: Caller, order: str, told: set[tuple[str, str]]) -> list[Json]:
    async def asked() -> list[Json]:
        return await notifications_of(caller, order)

    def enough(found: list[Json]) -> bool:
        sent = {(n["template"], n["audience"]) for n in found if n["state"] == "SENT"}
        return told <= sent

    return await eventually(asked, 15, until=enough, describe=f"{told} of {order}")


async def _are_sent(
    mesh: Mesh, caller: Caller, order: str, mails: dict[tuple[str, str], str]
) -> None:
    """Waits until these mails, one for each and no others, have reached the sink."""
    found = await _are_told(caller, order, set(mails))
    assert sorted((n["template"], n["audience"]) for n in found) == sorted(mails)
    assert all(n["channel"] == "EMAIL" and n["attempts"] == 1 for n in found)
    assert all(mails[n["template"], n["audience"]] != n["recipient"] for n in found), "in the clear"
    kept = mesh.mails(order)
    assert sorted((mail.event, mail.to) for mail in kept) == sorted(
        (n["eventId"], mails[n["template"], n["audience"]]) for n in found
    )


async def _hops(mesh: Mesh, order: Json) -> list[asyncpg.Record]:
    """The events of an order and of its payment, once each is sent and has been received."""

    async def hops() -> list[asyncpg.Record]:
        query = "SELECT * FROM outbox WHERE aggregate = $1 ORDER BY aggregate_version"
        events = await mesh.rows("order", query, order["name"])
        events += await mesh.rows("payment", query, order["payment"])
        for event in events:
            assert event["sent_time"] is not None, event["type"]
            assert (event["attempts"], event["park_time"]) == (1, None)
            for consumer in CONSUMERS[event["type"]]:
                received = await mesh.rows(
                    consumer,
                    "SELECT consumer, aggregate, aggregate_version FROM inbox WHERE event_id = $1",
                    event["event_id"],
                )
                assert [tuple(row) for row in received] == [
                    (consumer, event["aggregate"], event["aggregate_version"])
                ], f"{event['type']} at {consumer}"
        return events

    return await eventually(hops, 10, describe=f"the hops of {order['name']}")


async def _unsent(mesh: Mesh) -> int:
    query = "SELECT count(*) FROM outbox WHERE sent_time IS NULL"
    return await mesh.count("order", query) + await mesh.count("payment", query)
