"""Callers from outside, over REST and over gRPC, with the same words.

A request is the JSON value of the proto's request message and an answer that of its
response, so that a test says once what has to hold for both. Refusals come as `Refused`,
read from the `google.rpc.Status` that each protocol carries in its own way.
"""

from __future__ import annotations

import asyncio
import copy
import json
import ssl
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit

import grpc
import grpc.aio
import httpx
import pytest
from google.protobuf.json_format import MessageToDict, MessageToJson, ParseDict
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from ordermesh.notification.v1 import notification_service_pb2 as notification_pb2
from ordermesh.order.v1 import order_service_pb2 as order_pb2
from ordermesh.payment.v1 import payment_service_pb2 as payment_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from tests.e2e.meshes import Access, Json
from tests.eventually import eventually

DEFAULT = "merchants/default"
ACME = "merchants/acme"
CALL_SECONDS_MAX = 15.0

over_rest_and_grpc = pytest.mark.parametrize("caller", ["rest", "grpc"], indirect=True)
"""Runs a test over each protocol."""

HTTP_STATUS = {
    "OK": 200,
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "ALREADY_EXISTS": 409,
    "ABORTED": 409,
    "RESOURCE_EXHAUSTED": 429,
    "UNIMPLEMENTED": 501,
    "INTERNAL": 500,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
"""google.rpc.Code to HTTP status, as google/rpc/code.proto gives it."""

# Details are packed; naming their types here makes them known to protobuf.
_DETAILS = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest)


@dataclass(frozen=True, slots=True)
class _Method:
    service: str
    request: type[Message]
    response: type[Message]
    verb: str
    path: str
    """What follows /v1/; the fields in braces are taken from the request."""
    has_key: bool = False


METHODS = {
    "CreateOrder": _Method(
        "ordermesh.order.v1.OrderService",
        order_pb2.CreateOrderRequest,
        order_pb2.Order,
        "POST",
        "{parent}/orders",
        has_key=True,
    ),
    "GetOrder": _Method(
        "ordermesh.order.v1.OrderService",
        order_pb2.GetOrderRequest,
        order_pb2.Order,
        "GET",
        "{name}",
    ),
    "ListOrders": _Method(
        "ordermesh.order.v1.OrderService",
        order_pb2.ListOrdersRequest,
        order_pb2.ListOrdersResponse,
        "GET",
        "{parent}/orders",
    ),
    "CancelOrder": _Method(
        "ordermesh.order.v1.OrderService",
        order_pb2.CancelOrderRequest,
        order_pb2.Order,
        "POST",
        "{name}:cancel",
        has_key=True,
    ),
    "ListOrderEvents": _Method(
        "ordermesh.order.v1.OrderService",
        order_pb2.ListOrderEventsRequest,
        order_pb2.ListOrderEventsResponse,
        "GET",
        "{parent}/events",
    ),
    "GetPayment": _Method(
        "ordermesh.payment.v1.PaymentService",
        payment_pb2.GetPaymentRequest,
        payment_pb2.Payment,
        "GET",
        "{name}",
    ),
    "ListPayments": _Method(
        "ordermesh.payment.v1.PaymentService",
        payment_pb2.ListPaymentsRequest,
        payment_pb2.ListPaymentsResponse,
        "GET",
        "{parent}/payments",
    ),
    "GetNotification": _Method(
        "ordermesh.notification.v1.NotificationService",
        notification_pb2.GetNotificationRequest,
        notification_pb2.Notification,
        "GET",
        "{name}",
    ),
    "ListNotifications": _Method(
        "ordermesh.notification.v1.NotificationService",
        notification_pb2.ListNotificationsRequest,
        notification_pb2.ListNotificationsResponse,
        "GET",
        "{parent}/notifications",
    ),
    "GetExchangeRate": _Method(
        "ordermesh.rates.v1.ExchangeRateService",
        rates_pb2.GetExchangeRateRequest,
        rates_pb2.ExchangeRate,
        "GET",
        "{name}",
    ),
}
"""The methods that tests call, and where REST has them."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call was answered."""

    resource: Json
    raw: bytes
    """The very bytes: JSON over REST, a serialized message over gRPC."""
    replayed: bool
    """Whether the answer says that it is an earlier one."""
    headers: Mapping[str, str]


class Refused(Exception):  # noqa: N818 - it is an answer, and a test asks for it
    """A call was refused."""

    def __init__(self, http_status: int | None, status: Json, headers: Mapping[str, str]) -> None:
        """Reads a `google.rpc.Status` in its JSON form."""
        self.http_status = http_status
        """None over gRPC."""
        self.status = status
        self.headers = headers
        self.code = _code_name(int(status.get("code", 2)))
        self.message = str(status.get("message", ""))
        details: list[Json] = status.get("details", [])
        info = next((d for d in details if d["@type"].endswith("ErrorInfo")), {})
        self.reason = str(info.get("reason", ""))
        self.domain = str(info.get("domain", ""))
        self.metadata: dict[str, str] = info.get("metadata", {})
        self.fields = [
            str(violation["field"])
            for detail in details
            for violation in detail.get("fieldViolations", [])
        ]
        super().__init__(f"{http_status} {self.code} {self.reason} {self.fields}: {self.message}")


class Caller(Protocol):
    """Somebody who calls the mesh, one way or the other."""

    via: str
    """`rest` or `grpc`."""

    async def call(
        self,
        method: str,
        request: Json,
        *,
        key: str | None = "",
        token: str | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Calls a method of `METHODS`.

        Args:
            method: Its name.
            request: The request, as proto3 JSON.
            key: The idempotency key, sent as a header; empty for a new one where the
                method takes one, None for no header.
            token: Another token than the caller's own; None for none.
            headers: Further headers.

        Raises:
            Refused: The mesh said no.
        """
        ...


@dataclass
class RestCaller:
    """Calls over REST."""

    client: httpx.AsyncClient
    token: str
    via: str = "rest"

    async def call(
        self,
        method: str,
        request: Json,
        *,
        key: str | None = "",
        token: str | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Calls a method by its REST line."""
        called = METHODS[method]
        rest = copy.copy(request)
        places = {
            name: rest.pop(name) for name in ("parent", "name") if f"{{{name}}}" in called.path
        }
        path = f"/v1/{called.path.format(**places)}"
        sent = {**_headers(called, key, self.token if token == "" else token), **(headers or {})}
        if called.verb == "GET":
            response = await self.client.get(path, params=rest, headers=sent)
        else:
            response = await self.client.post(path, json=rest, headers=sent)
        return answered(response)

    async def send(
        self,
        verb: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = "application/json",
    ) -> Answer:
        """Sends any request at all, with the caller's token and a new idempotency key."""
        sent = {"authorization": f"Bearer {self.token}", "idempotency-key": new_key()}
        if content is not None and content_type is not None:
            sent["content-type"] = content_type
        sent |= headers or {}
        return answered(await self.client.request(verb, path, content=content, headers=sent))


@dataclass
class GrpcCaller:
    """Calls over gRPC, with the generated messages."""

    channel: grpc.aio.Channel
    token: str
    via: str = "grpc"

    async def call(
        self,
        method: str,
        request: Json,
        *,
        key: str | None = "",
        token: str | None = "",
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Calls a method by its gRPC path."""
        called = METHODS[method]
        message = ParseDict(request, called.request())
        sent = {**_headers(called, key, self.token if token == "" else token), **(headers or {})}
        return await self.send(
            f"/{called.service}/{method}", message.SerializeToString(), sent, called.response
        )

    async def send(
        self, path: str, content: bytes, headers: Mapping[str, str], response: type[Message]
    ) -> Answer:
        """Sends any bytes to any path."""
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self.channel.unary_unary(path)
        call = method(
            content,
            metadata=grpc.aio.Metadata(*headers.items()),
            timeout=CALL_SECONDS_MAX,
        )
        try:
            raw = await call
        except grpc.aio.AioRpcError as error:
            trailing = dict(error.trailing_metadata() or ())
            raise Refused(None, _status_of(error, trailing), _texts(trailing)) from error
        initial = _texts(dict(await call.initial_metadata()))
        resource = MessageToDict(
            response.FromString(raw), always_print_fields_with_no_presence=True
        )
        return Answer(resource, raw, initial.get("idempotency-replayed") == "true", initial)


@asynccontextmanager
async def rest_caller(access: Access, *, http2: bool = True) -> AsyncIterator[RestCaller]:
    """A caller over REST who trusts the mesh's own CA alone."""
    tls = ssl.create_default_context(cafile=str(access.ca))
    async with httpx.AsyncClient(
        base_url=access.url, verify=tls, http2=http2, timeout=CALL_SECONDS_MAX, trust_env=False
    ) as client:
        yield RestCaller(client, access.token)


@asynccontextmanager
async def grpc_caller(access: Access) -> AsyncIterator[GrpcCaller]:
    """A caller over gRPC, who trusts the mesh's own CA alone."""
    roots = await asyncio.to_thread(access.ca.read_bytes)
    address = urlsplit(access.url).netloc
    # Channels to the same address share their connection unless told otherwise.
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(
        address, grpc.ssl_channel_credentials(roots), options=options
    ) as channel:
        yield GrpcCaller(channel, access.token)


def answered(response: httpx.Response) -> Answer:
    """The answer of a REST call.

    Raises:
        Refused: It is a refusal.
    """
    headers = dict(response.headers)
    if response.status_code != 200:
        try:
            status: Json = response.json()
        except ValueError:
            status = {"message": response.text}
        raise Refused(response.status_code, status, headers)
    replayed = headers.get("idempotency-replayed") == "true"
    return Answer(response.json(), response.content, replayed, headers)


async def refused(calling: Any) -> Refused:
    """The refusal that an awaitable call has to end in."""
    try:
        answer = await calling
    except Refused as refusal:
        return refusal
    raise AssertionError(f"it was not refused, but answered {answer}")


# ---------------------------------------------------------------------------- requests


def an_order(**changes: Any) -> Json:
    """A valid order over 25.00 EUR; keyword arguments change its fields, None drops one."""
    order: Json = {
        "customer": {"customerId": "cust-42", "email": "ada@example.com", "locale": "en"},
        "currencyCode": "EUR",
        "lines": [a_line()],
    }
    return _changed(order, changes)


def a_line(**changes: Any) -> Json:
    """A valid line over twice 12.50 EUR."""
    line: Json = {
        "sku": "TEA-001",
        "title": "Darjeeling 100 g",
        "quantity": 2,
        "unitPrice": money(1250),
    }
    return _changed(line, changes)


def a_request(parent: str = DEFAULT, **changes: Any) -> Json:
    """A valid CreateOrderRequest; keyword arguments change its fields, None drops one."""
    request: Json = {"parent": parent, "order": an_order(), "paymentMethod": "pm_card_visa"}
    return _changed(request, changes)


def money(minor_units: str | float, currency: str = "EUR") -> Json:
    """An amount; what is given as minor units goes out as it is, but an integer as text."""
    shown = str(minor_units) if isinstance(minor_units, int) else minor_units
    return {"currencyCode": currency, "minorUnits": shown}


def new_key() -> str:
    """An idempotency key that nobody has used."""
    return str(uuid.uuid4())


def _changed(value: Json, changes: Mapping[str, Any]) -> Json:
    return {name: item for name, item in {**value, **changes}.items() if item is not None}


# ---------------------------------------------------------------------------- waiting


@dataclass(frozen=True, slots=True)
class Ends:
    """How an order ends: its state and what is known of its money."""

    state: str
    payment_state: str
    failure_reason: str = ""

    @classmethod
    def of(cls, order: Json) -> Ends:
        """How an order stands now."""
        return cls(order["state"], order["paymentState"], order["failureReason"])


PAID = Ends("CONFIRMED", "PAID")
REFUNDED = Ends("CANCELLED", "REFUNDED")


async def ended(
    caller: Caller, order: str, as_: Ends = PAID, *, within_seconds: float = 15.0
) -> Json:
    """Asks for an order until it stands as it has to, and answers it."""

    async def asked() -> Json:
        return (await caller.call("GetOrder", {"name": order})).resource

    return await eventually(
        asked,
        within_seconds,
        until=lambda found: Ends.of(found) == as_,
        describe=f"{order} as {as_}",
    )


async def listed(caller: Caller, method: str, key: str, **request: Any) -> list[Json]:
    """The items of the first page of a list."""
    found: list[Json] = (await caller.call(method, request)).resource[key]
    return found


async def payments_of(caller: Caller, order: str) -> list[Json]:
    """The payments of an order."""
    parent = order.partition("/orders/")[0]
    return await listed(
        caller, "ListPayments", "payments", parent=parent, filter=f'order = "{order}"'
    )


async def notifications_of(caller: Caller, order: str) -> list[Json]:
    """The notifications about an order."""
    parent = order.partition("/orders/")[0]
    return await listed(
        caller, "ListNotifications", "notifications", parent=parent, filter=f'order = "{order}"'
    )


# ---------------------------------------------------------------------------- placing many


async def insisted(caller: Caller, method: str, request: Json) -> Json:
    """Calls as a patient caller does: the same request again, under its key, until it is taken.

    Only what may be repeated is: a refusal for a reason of the caller's own is raised.
    """
    key = new_key()

    async def call() -> Json | Refused:
        try:
            return (await caller.call(method, request, key=key)).resource
        except Refused as refusal:
            if refusal.code in {"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"}:
                raise
            return refusal

    answer: Json | Refused = await eventually(
        call, 30, until=lambda _: True, describe=f"{method} is taken"
    )
    if isinstance(answer, Refused):
        raise answer
    return answer


@dataclass
class Placing:
    """Orders placed at a steady rate, whatever happens meanwhile."""

    placed: list[str] = field(default_factory=list)
    refusals: list[BaseException] = field(default_factory=list)

    async def place(
        self, caller: Caller, *, per_second: float, times: int, request: Callable[[int], Json]
    ) -> None:
        """Places orders on time, earlier ones answered or not, and waits for all answers."""
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def one(number: int) -> None:
            try:
                answer = await caller.call("CreateOrder", request(number))
            except (Refused, httpx.HTTPError, grpc.aio.AioRpcError) as error:
                self.refusals.append(error)
            else:
                self.placed.append(answer.resource["name"])

        async with asyncio.TaskGroup() as group:
            for number in range(times):
                await asyncio.sleep(max(0.0, began + number / per_second - loop.time()))
                group.create_task(one(number))


# ---------------------------------------------------------------------------- inside


def _headers(method: _Method, key: str | None, token: str | None) -> dict[str, str]:
    sent = {}
    if token is not None:
        sent["authorization"] = f"Bearer {token}"
    if key is not None and (key or method.has_key):
        sent["idempotency-key"] = key or new_key()
    return sent


def _code_name(number: int) -> str:
    return next((code.name for code in grpc.StatusCode if code.value[0] == number), str(number))


def _status_of(error: grpc.aio.AioRpcError, trailing: Mapping[Any, Any]) -> Json:
    packed = trailing.get("grpc-status-details-bin")
    if not isinstance(packed, bytes):
        return {"code": error.code().value[0], "message": error.details() or ""}
    status: Json = json.loads(MessageToJson(status_pb2.Status.FromString(packed)))
    assert status["code"] == error.code().value[0], "the details tell another status"
    return status


def _texts(metadata: Mapping[Any, Any]) -> dict[str, str]:
    return {name: value for name, value in metadata.items() if isinstance(value, str)}
