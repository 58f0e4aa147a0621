"""One key, one order: through the edge, over REST and gRPC, one after another and at once."""

from __future__ import annotations

import asyncio
import json

from tests.e2e.callers import (
    ACME,
    DEFAULT,
    Answer,
    Caller,
    GrpcCaller,
    RestCaller,
    a_line,
    a_request,
    an_order,
    ended,
    money,
    new_key,
    over_rest_and_grpc,
    payments_of,
    refused,
)
from tests.e2e.meshes import Mesh, on_both_brokers

ORDERS_OF_KEY = "SELECT count(*) FROM requests WHERE request_id = $1::text::uuid"


@over_rest_and_grpc
async def test_a_repeat_is_answered_with_the_very_bytes_of_the_first_answer(
    mesh: Mesh, caller: Caller
) -> None:
    """And says that it is one; also when the order has moved on meanwhile."""
    key = new_key()
    first = await caller.call("CreateOrder", a_request(), key=key)
    at_once = await caller.call("CreateOrder", a_request(), key=key)
    await ended(caller, first.resource["name"])
    later = await caller.call("CreateOrder", a_request(), key=key)
    assert not first.replayed
    assert "idempotency-replayed" not in first.headers
    for repeat in (at_once, later):
        assert repeat.raw == first.raw
        assert repeat.headers["idempotency-replayed"] == "true"
    assert later.resource["state"] == "AWAITING_PAYMENT"
    assert await mesh.count("order", ORDERS_OF_KEY, key) == 1
    assert len(await payments_of(caller, first.resource["name"])) == 1


async def test_rest_and_grpc_forms_of_one_request_are_one_request(
    mesh: Mesh, rest: RestCaller, grpc: GrpcCaller
) -> None:
    """What is compared is what is asked for, not how it is written."""
    for first_by, then_by in ((rest, grpc), (grpc, rest)):
        key = new_key()
        order = an_order(labels={"a": "1", "b": "2"}, lines=[a_line(), a_line(sku="B")])
        first = await first_by.call("CreateOrder", a_request(order=order), key=key)
        then = await then_by.call("CreateOrder", a_request(order=order), key=key)
        assert then.replayed
        assert then.resource == first.resource
        # Members in another order, one of them twice, numbers for text, an unknown field.
        line = {"quantity": 2, "unitPrice": money(1250), "title": "Darjeeling 100 g"}
        twisted = {
            "paymentMethod": "pm_card_visa",
            "frob": 1,
            "order": {
                "lines": [{"sku": "X", **line}, {"sku": "B", **line}],
                "labels": {"b": "2", "a": "1"},
                "currencyCode": "EUR",
                "customer": order["customer"],
            },
        }
        content = json.dumps(twisted).replace('"sku": "X"', '"sku": "X", "sku": "TEA-001"', 1)
        again = await rest.send(
            "POST",
            f"/v1/{DEFAULT}/orders",
            content=content.replace('"1250"', "1250").encode(),
            headers={"idempotency-key": key.upper()},
        )
        assert again.replayed
        assert again.resource == first.resource
        assert await mesh.count("order", ORDERS_OF_KEY, key) == 1


@over_rest_and_grpc
async def test_a_key_in_the_field_is_the_key_in_the_header(caller: Caller) -> None:
    """Either place will do, and both are the same key."""
    key = new_key()
    in_header = await caller.call("CreateOrder", a_request(), key=key)
    in_field = await caller.call("CreateOrder", a_request(requestId=key), key=None)
    in_both = await caller.call("CreateOrder", a_request(requestId=key.upper()), key=key)
    assert [in_header.replayed, in_field.replayed, in_both.replayed] == [False, True, True]
    assert in_header.resource == in_field.resource == in_both.resource


@over_rest_and_grpc
async def test_a_key_in_the_field_that_differs_from_the_header_is_refused(
    mesh: Mesh, caller: Caller
) -> None:
    """Nobody guesses which one was meant."""
    header, field = new_key(), new_key()
    refusal = await refused(caller.call("CreateOrder", a_request(requestId=field), key=header))
    assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_CONFLICT")
    assert refusal.http_status in (400, None)
    assert (refusal.domain, refusal.fields) == ("ordermesh", ["request_id"])
    for key in (header, field):
        assert await mesh.count("order", ORDERS_OF_KEY, key) == 0


@over_rest_and_grpc
async def test_a_key_of_another_request_is_refused_and_the_first_order_stands(
    caller: Caller,
) -> None:
    """IDEMPOTENCY_KEY_REUSED, whatever differs; the first one can still be repeated."""
    key = new_key()
    first = await caller.call("CreateOrder", a_request(), key=key)
    for other in (
        a_request(order=an_order(lines=[a_line(quantity=3)])),
        a_request(order=an_order(lines=[a_line(unitPrice=money(1251))])),
        a_request(order=an_order(labels={"a": "b"})),
        a_request(paymentMethod="pm_card_mastercard"),
        a_request(expectedTotal=money(2500)),
    ):
        refusal = await refused(caller.call("CreateOrder", other, key=key))
        assert (refusal.code, refusal.reason) == ("INVALID_ARGUMENT", "IDEMPOTENCY_KEY_REUSED")
        assert refusal.http_status in (400, None)
        assert refusal.metadata["request_id"] == key
        assert refusal.fields == ["request_id"]
    again = await caller.call("CreateOrder", a_request(), key=key)
    assert (again.replayed, again.raw) == (True, first.raw)


async def test_a_key_belongs_to_one_merchant_and_one_method(rest: RestCaller, acme: Caller) -> None:
    """The same key of two merchants is two orders, and a cancellation may carry it too."""
    key = new_key()
    ours = await rest.call("CreateOrder", a_request(), key=key)
    theirs = await acme.call("CreateOrder", a_request(ACME), key=key)
    assert not theirs.replayed
    assert ours.resource["name"] != theirs.resource["name"]
    await ended(rest, ours.resource["name"])
    cancelled = await rest.call("CancelOrder", {"name": ours.resource["name"]}, key=key)
    assert not cancelled.replayed
    assert cancelled.resource["state"] == "CANCELLING"


@over_rest_and_grpc
async def test_a_repeated_cancellation_is_answered_as_the_first(caller: Caller) -> None:
    """To the byte, also when the order is cancelled by then; another reason is refused."""
    key = new_key()
    name = (await caller.call("CreateOrder", a_request())).resource["name"]
    await ended(caller, name)
    request = {"name": name, "reason": "ordered twice"}
    first = await caller.call("CancelOrder", request, key=key)
    again = await caller.call("CancelOrder", request, key=key)
    assert (first.replayed, again.replayed) == (False, True)
    assert again.raw == first.raw
    refusal = await refused(caller.call("CancelOrder", {**request, "reason": "x"}, key=key))
    assert refusal.reason == "IDEMPOTENCY_KEY_REUSED"


@on_both_brokers
async def test_fifty_identical_requests_at_once_are_one_order(
    mesh: Mesh, rest: RestCaller, grpc: GrpcCaller
) -> None:
    """One is done, the others are answered with it; one order, one payment, one set of mails."""
    key = new_key()
    callers: list[Caller] = [rest, grpc] * 25
    answers: list[Answer] = await asyncio.gather(
        *(caller.call("CreateOrder", a_request(), key=key) for caller in callers)
    )
    assert sorted(answer.replayed for answer in answers) == [False] + [True] * 49
    for caller in (rest, grpc):
        assert len({a.raw for a, by in zip(answers, callers, strict=True) if by is caller}) == 1
    (name,) = {answer.resource["name"] for answer in answers}
    assert await mesh.count("order", ORDERS_OF_KEY, key) == 1
    await ended(rest, name)
    assert len(await payments_of(rest, name)) == 1


async def test_fifty_orders_at_once_under_their_own_keys_are_fifty_orders(
    rest: RestCaller, grpc: GrpcCaller
) -> None:
    """Written together, each has its own answer; the bad ones among them harm nobody."""
    keys = [new_key() for _ in range(50)]

    async def place(number: int) -> str:
        caller: Caller = (rest, grpc)[number % 2]
        lines = [a_line(quantity=1 + number)]
        request = a_request(order=an_order(lines=lines, clientOrderRef=f"n{number}-{keys[0]}"))
        answer = await caller.call("CreateOrder", request, key=keys[number])
        assert answer.resource["total"] == money(1250 * (1 + number))
        assert not answer.replayed
        return str(answer.resource["name"])

    async def misplace(number: int) -> None:
        taken = a_request(order=an_order(labels={"another": "body"}))
        await refused(rest.call("CreateOrder", taken, key=keys[number]))

    names = await asyncio.gather(*(place(number) for number in range(50)))
    assert len(set(names)) == 50
    await asyncio.gather(*(misplace(number) for number in range(10)))
    for name in names:
        await ended(rest, name)
