"""The server and its one interceptor, over real sockets, with and without mutual TLS."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from chassis.context import CallContext, Caller, current
from chassis.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    RuleViolationError,
    ServiceError,
    UnavailableError,
)
from chassis.grpc_server import GrpcServer, serving
from chassis.settings import ServiceSettings
from meshctl.credentials import Certificates, KeyPair
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.order.v1 import order_service_pb2_grpc as pb_grpc
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from tests.builders import a_create_order_request, a_line_message, merchants_file
from tests.eventually import eventually
from tests.refusals import refused

ORDERS = pb.DESCRIPTOR.services_by_name["OrderService"].full_name
RATES = rates_pb2.DESCRIPTOR.services_by_name["ExchangeRateService"].full_name
ORDER = f"merchants/default/orders/{uuid4()}"
DEFAULT = (("x-mesh-merchant", "default"),)
PERMISSION_DENIED = grpc.StatusCode.PERMISSION_DENIED
INVALID_ARGUMENT = grpc.StatusCode.INVALID_ARGUMENT

Answer = Callable[[Any, Any], Awaitable[Any]]


async def echo_name(request: Any, context: Any) -> pb.Order:
    """An order that says by whom it was asked for."""
    caller = current().caller or Caller()
    return pb.Order(
        name=getattr(request, "name", "") or request.parent,
        labels={
            "merchant": caller.merchant,
            "subject": caller.subject,
            "roles": ",".join(sorted(caller.roles)),
            "service": caller.service,
        },
    )


class Orders(pb_grpc.OrderServiceServicer):
    """Does what a test says, and remembers what it was asked and in which context."""

    def __init__(self) -> None:
        self.answer: Answer = echo_name
        self.requests: list[Any] = []
        self.contexts: list[CallContext] = []

    async def _answered(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        self.contexts.append(current())
        return await self.answer(request, context)

    async def CreateOrder(self, request: Any, context: Any) -> Any:
        """Requires an idempotency key."""
        return await self._answered(request, context)

    async def GetOrder(self, request: Any, context: Any) -> Any:
        """Requires none."""
        return await self._answered(request, context)


class Rates(rates_grpc.ExchangeRateServiceServicer):
    """A service whose resources belong to no merchant."""

    async def GetExchangeRate(self, request: Any, context: Any) -> Any:
        """Any pair is worth one."""
        return rates_pb2.ExchangeRate(name=request.name, rate="1")


class Running:
    """A server under test and a way to call it."""

    def __init__(self, server: GrpcServer, orders: Orders, channel: grpc.aio.Channel) -> None:
        self.server = server
        self.servicer = orders
        self.channel = channel
        self.orders: pb_grpc.OrderServiceAsyncStub = pb_grpc.OrderServiceStub(channel)
        self.rates: rates_grpc.ExchangeRateServiceAsyncStub = rates_grpc.ExchangeRateServiceStub(
            channel
        )
        self.health: Any = health_pb2_grpc.HealthStub(channel)

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"localhost:{self.server.port}"

    async def get(self, name: str = ORDER, metadata: Any = DEFAULT, **options: Any) -> pb.Order:
        """Reads an order."""
        return await self.orders.GetOrder(
            pb.GetOrderRequest(name=name), metadata=metadata, **options
        )

    async def create(
        self, request: pb.CreateOrderRequest | None = None, *headers: tuple[str, str]
    ) -> pb.Order:
        """Places an order, with these headers beside the identity."""
        return await self.orders.CreateOrder(
            request or a_create_order_request(), metadata=(*DEFAULT, *headers)
        )


@asynccontextmanager
async def serving_orders(folder: Path, **settings: Any) -> AsyncIterator[tuple[GrpcServer, Orders]]:
    """A server of orders and rates on a free port."""
    given = {
        "insecure": True,
        "grpc_address": "127.0.0.1:0",
        "page_token_key": "secret",
        **settings,
    }
    orders = Orders()  # type: ignore[abstract]  # the rest is UNIMPLEMENTED
    rates = Rates()  # type: ignore[abstract]  # as above
    registrations: list[tuple[str, Callable[[grpc.aio.Server], None]]] = [
        (ORDERS, lambda server: pb_grpc.add_OrderServiceServicer_to_server(orders, server)),
        (RATES, lambda server: rates_grpc.add_ExchangeRateServiceServicer_to_server(rates, server)),
    ]
    configured = ServiceSettings(merchants=merchants_file(folder), **given)
    async with serving(configured, registrations) as server:
        yield server, orders


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[Running]:
    """A server without TLS, and a caller."""
    async with (
        serving_orders(folder, **settings) as (server, orders),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
    ):
        yield Running(server, orders, channel)


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[Running]:
    """The usual server."""
    async with running(tmp_path) as server:
        yield server


# --- identity -------------------------------------------------------------------------


async def test_a_call_carries_who_makes_it(mesh: Running) -> None:
    """Merchant, subject and roles, as the edge has read them from the token."""
    order = await mesh.get(
        metadata=(
            *DEFAULT,
            ("x-mesh-subject", "ada"),
            ("x-mesh-roles", "merchant,operator"),
            ("x-forwarded-client-cert", 'Hash=ab;DNS=order.mesh;Subject="CN=x"'),
        )
    )
    assert dict(order.labels) == {
        "merchant": "default",
        "subject": "ada",
        "roles": "merchant,operator",
        "service": "order.mesh",
    }


async def test_a_call_without_an_identity_is_refused(mesh: Running) -> None:
    """Before anything of it is looked at."""
    refusal = await refused(mesh.get(metadata=()))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")
    assert mesh.servicer.requests == []


@pytest.mark.parametrize(
    ("name", "caller"),
    [
        ("merchants/acme/orders/{}", "default"),
        ("merchants/nobody/orders/{}", "default"),
        ("merchants/nobody/orders/{}", "nobody"),
    ],
    ids=["another's", "unknown", "unknown and claimed"],
)
async def test_a_foreign_and_an_unknown_merchant_are_denied_alike(
    mesh: Running, name: str, caller: str
) -> None:
    """Nobody finds out which merchants there are (AIP-211)."""
    refusal = await refused(mesh.get(name.format(uuid4()), metadata=(("x-mesh-merchant", caller),)))
    assert (refusal.code, refusal.reason) == (PERMISSION_DENIED, "MERCHANT_DENIED")
    assert refusal.metadata == {"merchant": name.split("/")[1]}
    assert mesh.servicer.requests == []


async def test_the_merchant_of_a_parent_is_checked_too(mesh: Running) -> None:
    """Creating for another is no better than reading."""
    refusal = await refused(mesh.create(a_create_order_request(merchant="acme")))
    assert refusal.reason == "MERCHANT_DENIED"


async def test_what_belongs_to_no_merchant_is_for_every_caller(mesh: Running) -> None:
    """Exchange rates have no owner."""
    rate = await mesh.rates.GetExchangeRate(
        rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR"), metadata=DEFAULT
    )
    assert rate.rate == "1"


# --- correlation ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "correlation_id"),
    [
        ((("x-correlation-id", "corr-1"), ("x-request-id", "req-1")), "corr-1"),
        ((("x-request-id", "req-1"),), "req-1"),
        ((("x-correlation-id", "x" * 129), ("x-request-id", "req-1")), "req-1"),
    ],
)
async def test_a_call_keeps_its_correlation_id(
    mesh: Running, headers: tuple[tuple[str, str], ...], correlation_id: str
) -> None:
    """The caller's own, or the edge's request id; never one that could do harm."""
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    await mesh.get(metadata=(*DEFAULT, *headers, ("traceparent", traceparent)))
    (context,) = mesh.servicer.contexts
    assert context.correlation_id == correlation_id
    assert context.causation_id == "req-1"
    assert context.traceparent == traceparent


async def test_a_call_without_a_correlation_id_gets_one(mesh: Running) -> None:
    """Each its own."""
    for _ in range(2):
        await mesh.get()
    one, other = (context.correlation_id for context in mesh.servicer.contexts)
    assert one
    assert one != other


# --- the idempotency key --------------------------------------------------------------


async def test_the_idempotency_key_header_becomes_the_request_id(mesh: Running) -> None:
    """REST callers have no other place for it."""
    key = str(uuid4())
    await mesh.create(a_create_order_request(request_id=""), ("idempotency-key", key))
    assert mesh.servicer.requests[0].request_id == key


async def test_a_key_given_twice_alike_is_one_key(mesh: Running) -> None:
    """A UUID has no case."""
    key = str(uuid4())
    await mesh.create(a_create_order_request(request_id=key), ("idempotency-key", key.upper()))
    assert len(mesh.servicer.requests) == 1


async def test_two_different_keys_are_a_conflict(mesh: Running) -> None:
    """Nobody can tell which one was meant."""
    refusal = await refused(
        mesh.create(a_create_order_request(), ("idempotency-key", str(uuid4())))
    )
    assert (refusal.code, refusal.reason) == (INVALID_ARGUMENT, "IDEMPOTENCY_KEY_CONFLICT")
    assert refusal.fields == ["request_id"]


async def test_where_money_moves_a_key_is_required(mesh: Running) -> None:
    """Neither in the message nor in the header: refused, with where to put it."""
    refusal = await refused(mesh.create(a_create_order_request(request_id="")))
    assert (refusal.code, refusal.reason) == (INVALID_ARGUMENT, "IDEMPOTENCY_KEY_MISSING")
    assert refusal.fields == ["request_id"]


@pytest.mark.parametrize("key", ["1234", "not-a-uuid", "0" * 36, "x" * 200])
async def test_a_key_that_is_no_uuid_is_refused(mesh: Running, key: str) -> None:
    """From either place."""
    for call in (
        mesh.create(a_create_order_request(request_id=key)),
        mesh.create(a_create_order_request(request_id=""), ("idempotency-key", key)),
    ):
        refusal = await refused(call)
        assert (refusal.code, refusal.reason) == (INVALID_ARGUMENT, "INVALID_FIELD")
        assert refusal.fields == ["request_id"]


async def test_a_call_that_changes_nothing_needs_no_key(mesh: Running) -> None:
    """And one that is sent along is ignored."""
    await mesh.get(metadata=(*DEFAULT, ("idempotency-key", "anything")))
    assert len(mesh.servicer.requests) == 1


# --- the rules on fields --------------------------------------------------------------

BROKEN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "customer": ({"customer": {}}, ["order.customer.customer_id", "order.customer.email"]),
    "quantity": ({"lines": [a_line_message(quantity=0)]}, ["order.lines[0].quantity"]),
    "second line": (
        {"lines": [a_line_message("A"), a_line_message("B", quantity=10_001)]},
        ["order.lines[1].quantity"],
    ),
    "deep": (
        {"lines": [a_line_message(currency_code="euro")]},
        ["order.lines[0].unit_price.currency_code"],
    ),
    "amount": (
        {"lines": [a_line_message(minor_units=10**15 + 1)]},
        ["order.lines[0].unit_price.minor_units"],
    ),
    "label": ({"labels": {"Bad Key": "x"}}, ['order.labels["Bad Key"]']),
    "lines": ({"lines": []}, ["order.lines"]),
    "101 lines": ({"lines": [a_line_message(f"S-{n}") for n in range(101)]}, ["order.lines"]),
    "NUL": ({"labels": {"note": "a\0b"}}, ['order.labels["note"]']),
    "enum": ({"capture_method": 99}, ["order.capture_method"]),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_field_that_breaks_its_rule_is_named(mesh: Running, case: str) -> None:
    """By its path as the caller wrote it, and all of them at once."""
    changes, fields = BROKEN[case]
    refusal = await refused(mesh.create(a_create_order_request(**changes)))
    assert (refusal.code, refusal.reason) == (INVALID_ARGUMENT, "INVALID_FIELD")
    assert list(dict.fromkeys(refusal.fields)) == fields
    assert refusal.metadata == {"field": fields[0]}
    assert mesh.servicer.requests == []


async def test_of_countless_faults_the_first_are_named(mesh: Running) -> None:
    """All of them would make trailers longer than clients take: they would see another error."""
    lines = [a_line_message(f"S-{n}", quantity=0, currency_code="euro") for n in range(100)]
    labels = {f"{n} {'NO LABEL ' * 400}": "x" for n in range(32)}
    for request in (
        a_create_order_request(lines=lines),
        a_create_order_request(labels=labels),
    ):
        refusal = await refused(mesh.create(request))
        assert (refusal.code, refusal.reason) == (INVALID_ARGUMENT, "INVALID_FIELD")
        assert len(refusal.fields) == 20


async def test_bytes_that_are_no_message_are_refused(mesh: Running) -> None:
    """The caller's mistake, told as one."""
    get: Any = mesh.channel.unary_unary(f"/{ORDERS}/GetOrder")
    refusal = await refused(get(b"\xff\xff\xff", metadata=DEFAULT))
    assert (refusal.code, refusal.reason) == (INVALID_ARGUMENT, "MALFORMED_REQUEST")
    assert mesh.servicer.requests == []


async def test_a_message_that_is_too_large_is_refused(mesh: Running) -> None:
    """A mebibyte is more than a hundred lines need."""
    huge = a_create_order_request(labels={"note": "x" * 1024 * 1024})
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await mesh.create(huge)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert mesh.servicer.requests == []


# --- time -----------------------------------------------------------------------------


async def forever(request: Any, context: Any) -> Any:
    """An answer that does not come."""
    await asyncio.Event().wait()


async def test_a_call_ends_before_its_callers_time_is_over(
    mesh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The servicer is cancelled, and what it was is told by us, not by the caller's clock."""
    monkeypatch.setattr("chassis.grpc_server.HOP_SECONDS", 0.6)
    cancelled = asyncio.Event()

    async def waiting(request: Any, context: Any) -> Any:
        try:
            await forever(request, context)
        finally:
            cancelled.set()

    mesh.servicer.answer = waiting
    refusal = await refused(mesh.get(timeout=1.2))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert refusal.reason == "DEADLINE_EXCEEDED"
    assert cancelled.is_set()


async def test_a_call_knows_how_long_its_caller_waits(mesh: Running) -> None:
    """So that the calls that it leads to wait no longer."""
    now = asyncio.get_running_loop().time()
    await mesh.get(timeout=20)
    await mesh.get()
    limited, unlimited = (context.deadline for context in mesh.servicer.contexts)
    assert limited is not None
    assert now < limited < now + 30
    assert unlimited is None


async def test_a_call_that_comes_too_late_is_not_begun(
    mesh: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No effect begins that nobody could hear of in time."""
    monkeypatch.setattr("chassis.grpc_server.HOP_SECONDS", 30.0)
    refusal = await refused(mesh.get(timeout=20))
    assert refusal.code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert mesh.servicer.requests == []


async def test_a_time_out_of_ours_is_not_taken_for_the_callers(mesh: Running) -> None:
    """Something that we wait for was too slow: a fault of ours while the caller has time."""

    async def impatient(request: Any, context: Any) -> Any:
        async with asyncio.timeout(0.01):
            await forever(request, context)

    mesh.servicer.answer = impatient
    refusal = await refused(mesh.get(timeout=20))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")


async def test_a_caller_who_gives_up_stops_the_work(mesh: Running) -> None:
    """What nobody waits for is not gone on with."""
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def waiting(request: Any, context: Any) -> Any:
        began.set()
        try:
            await forever(request, context)
        finally:
            cancelled.set()

    mesh.servicer.answer = waiting
    call = mesh.orders.GetOrder(pb.GetOrderRequest(name=ORDER), metadata=DEFAULT)
    task = asyncio.ensure_future(call)
    await asyncio.wait_for(began.wait(), 5)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(cancelled.wait(), 5)


# --- overload -------------------------------------------------------------------------


async def test_one_call_too_many_is_shed_at_once(tmp_path: Path) -> None:
    """With a wait to keep; probes are answered, and later calls too."""
    async with running(tmp_path, concurrency_max=1) as mesh:
        gate = asyncio.Event()

        async def gated(request: Any, context: Any) -> Any:
            await gate.wait()
            return pb.Order(name=request.name)

        mesh.servicer.answer = gated
        first = asyncio.ensure_future(mesh.get())
        await eventually(lambda: mesh.servicer.requests)
        refusal = await refused(mesh.get())
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "OVERLOADED",
        )
        assert refusal.retry_after_seconds == 0.5
        assert refusal.trailing["grpc-retry-pushback-ms"] == "500"
        assert refusal.trailing["retry-after"] == "1"
        await mesh.health.Check(health_pb2.HealthCheckRequest())
        gate.set()
        assert (await first).name == ORDER
        assert (await mesh.get()).name == ORDER


# --- errors ---------------------------------------------------------------------------

ERRORS: list[tuple[ServiceError, grpc.StatusCode]] = [
    (InvalidInputError.of_field("A", "order.lines", "too many"), INVALID_ARGUMENT),
    (NotFoundError("B", "not here", metadata={"name": "x"}), grpc.StatusCode.NOT_FOUND),
    (AlreadyExistsError("C", "is here"), grpc.StatusCode.ALREADY_EXISTS),
    (RuleViolationError("D", "not now"), grpc.StatusCode.FAILED_PRECONDITION),
    (ConflictError("E", "again"), grpc.StatusCode.ABORTED),
    (OverloadedError("F", "too much"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (UnavailableError("G", "away", retry_after_seconds=1.5), grpc.StatusCode.UNAVAILABLE),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=lambda one: type(one).__name__)
async def test_an_error_reaches_the_caller_as_the_tree_says(
    mesh: Running, error: ServiceError, code: grpc.StatusCode
) -> None:
    """Status, sentence, reason, metadata, fields and wait."""

    async def failing(request: Any, context: Any) -> Any:
        raise error

    mesh.servicer.answer = failing
    refusal = await refused(mesh.get())
    assert (refusal.code, refusal.reason, refusal.message) == (code, error.reason, error.message)
    assert refusal.metadata == error.metadata
    assert refusal.fields == [violation.field for violation in error.violations]
    assert refusal.retry_after_seconds == error.retry_after_seconds


async def test_a_state_that_forbids_a_call_is_told_as_a_precondition(mesh: Running) -> None:
    """So that a program can read which resource was in the way."""

    async def failing(request: Any, context: Any) -> Any:
        raise RuleViolationError("D", "not now", metadata={"name": ORDER, "state": "FAILED"})

    mesh.servicer.answer = failing
    assert (await refused(mesh.get())).states == [ORDER]


async def test_a_fault_of_ours_shows_nothing_of_itself(
    mesh: Running, capsys: pytest.CaptureFixture[str]
) -> None:
    """The caller gets a correlation id; whoever has the log finds the rest under it."""

    async def stumble(request: Any, context: Any) -> Any:
        raise ZeroDivisionError("secret of the house")

    mesh.servicer.answer = stumble
    refusal = await refused(mesh.get(metadata=(*DEFAULT, ("x-correlation-id", "corr-7"))))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
    assert refusal.metadata == {"correlation_id": "corr-7"}
    assert "secret" not in refusal.message
    assert not any(b"secret" in bytes(str(value), "utf-8") for value in refusal.trailing.values())
    assert "secret of the house" in capsys.readouterr().out


async def test_a_servicer_may_answer_what_is_serialized_already(mesh: Running) -> None:
    """Read rows go out as they are."""

    async def raw(request: Any, context: Any) -> Any:
        return pb.Order(name="as it was").SerializeToString()

    mesh.servicer.answer = raw
    assert (await mesh.get()).name == "as it was"


async def test_a_method_that_is_not_there_is_unimplemented(mesh: Running) -> None:
    """Whether the service has it no more or never had."""
    for method in (f"/{ORDERS}/Nothing", "/ordermesh.nothing.v1.Nothing/Do", "/x.Y/Z"):
        nothing: Any = mesh.channel.unary_unary(method)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await nothing(b"", metadata=DEFAULT)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- health and reflection ------------------------------------------------------------


async def test_health_says_not_serving_until_it_is_told_otherwise(mesh: Running) -> None:
    """For the whole process and for each service of it; nobody else's is known."""

    async def said(service: str) -> int:
        answer = await mesh.health.Check(health_pb2.HealthCheckRequest(service=service))
        return int(answer.status)

    for serving_now in (False, True, False):
        if serving_now != (await said("") == health_pb2.HealthCheckResponse.SERVING):
            await mesh.server.report(serving=serving_now)
        expected = (
            health_pb2.HealthCheckResponse.SERVING
            if serving_now
            else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        assert [await said(name) for name in ("", ORDERS, RATES)] == [expected] * 3
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await said("ordermesh.payment.v1.PaymentService")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def listed(mesh: Running) -> set[str]:
    """The services that reflection lists."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(mesh.channel)  # type: ignore[arg-type]
    messages: Any = reflection_pb2  # its stubs know no constructors
    question = messages.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([question])):
        return {service.name for service in answer.list_services_response.service}
    raise AssertionError("no answer")


async def test_reflection_lists_every_public_service(mesh: Running) -> None:
    """Whichever service is asked: the edge sends the question to any one of them."""
    assert await listed(mesh) == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "ordermesh.notification.v1.NotificationService",
        "ordermesh.order.v1.OrderService",
        "ordermesh.payment.v1.PaymentService",
        "ordermesh.rates.v1.ExchangeRateService",
    }


async def test_reflection_is_off_where_it_is_switched_off(tmp_path: Path) -> None:
    """In production the protos are published instead."""
    async with running(tmp_path, reflection=False) as mesh:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await listed(mesh)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


# --- starting and stopping ------------------------------------------------------------


async def test_an_address_that_is_taken_is_said_so(mesh: Running, tmp_path: Path) -> None:
    """Two processes on one port would share calls by chance."""
    with pytest.raises(UnavailableError, match=f"cannot listen on 127.0.0.1:{mesh.server.port}"):
        async with running(tmp_path, grpc_address=f"127.0.0.1:{mesh.server.port}"):
            raise AssertionError("served")


async def test_a_server_that_stops_finishes_what_is_in_flight(mesh: Running) -> None:
    """And takes nothing new."""
    gate = asyncio.Event()

    async def gated(request: Any, context: Any) -> Any:
        await gate.wait()
        return pb.Order(name=request.name)

    mesh.servicer.answer = gated
    in_flight = asyncio.ensure_future(mesh.get())
    await eventually(lambda: mesh.servicer.requests)
    stopping = asyncio.create_task(mesh.server.stop(5))

    async def is_refused() -> bool:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{mesh.server.port}") as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            try:
                await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.aio.AioRpcError as error:
                return error.code() is grpc.StatusCode.UNAVAILABLE
        return False

    await eventually(is_refused)
    assert not stopping.done()
    gate.set()
    assert (await in_flight).name == ORDER
    await asyncio.wait_for(stopping, 5)


async def test_a_server_that_stops_cancels_what_takes_too_long(mesh: Running) -> None:
    """After its grace."""
    mesh.servicer.answer = forever
    in_flight = asyncio.ensure_future(mesh.get())
    await eventually(lambda: mesh.servicer.requests)
    await asyncio.wait_for(mesh.server.stop(0.05), 5)
    with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
        await in_flight


# --- mutual TLS -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Those of a mesh."""
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    made.ensure()
    return made


@asynccontextmanager
async def secured(folder: Path, certificates: Certificates) -> AsyncIterator[tuple[int, Orders]]:
    """The order service's server as it is in a mesh: its port, and what answers."""
    pair = certificates.of("order")
    async with serving_orders(
        folder,
        insecure=False,
        tls_cert=pair.certificate,
        tls_key=pair.key,
        tls_ca=certificates.ca,
    ) as (server, orders):
        yield server.port, orders


def channel_as(port: int, certificates: Certificates, who: KeyPair | None) -> grpc.aio.Channel:
    """A channel of someone with this certificate, or with none."""
    credentials = grpc.ssl_channel_credentials(
        certificates.ca.read_bytes(),
        who.key.read_bytes() if who else None,
        who.certificate.read_bytes() if who else None,
    )
    options = [("grpc.ssl_target_name_override", "order.mesh")]
    return grpc.aio.secure_channel(f"127.0.0.1:{port}", credentials, options=options)


async def get_as(port: int, certificates: Certificates, who: KeyPair | None) -> pb.Order:
    """Reads an order under this certificate, claiming to call for `default`."""
    async with channel_as(port, certificates, who) as channel:
        stub: pb_grpc.OrderServiceAsyncStub = pb_grpc.OrderServiceStub(channel)
        return await stub.GetOrder(pb.GetOrderRequest(name=ORDER), metadata=DEFAULT, timeout=10)


async def test_the_edge_is_believed_about_who_calls(
    tmp_path: Path, certificates: Certificates
) -> None:
    """Its certificate says that it is the edge."""
    async with secured(tmp_path, certificates) as (port, _):
        order = await get_as(port, certificates, certificates.of("edge"))
    assert order.labels["merchant"] == "default"


@pytest.mark.parametrize("who", ["payment", "order", "envoy", "edge-server"])
async def test_nobody_else_is_believed_about_who_calls(
    tmp_path: Path, certificates: Certificates, who: str
) -> None:
    """A service speaks for itself alone, whatever headers it sends."""
    async with secured(tmp_path, certificates) as (port, orders):
        refusal = await refused(get_as(port, certificates, certificates.of(who)))
        assert (refusal.code, refusal.reason) == (PERMISSION_DENIED, "MERCHANT_DENIED")
        assert orders.requests == []


async def test_a_service_is_known_by_its_certificate(
    tmp_path: Path, certificates: Certificates
) -> None:
    """Where no merchant is needed it may call, under its own name."""
    seen: list[Caller | None] = []

    class Noting(Rates):
        async def GetExchangeRate(self, request: Any, context: Any) -> Any:
            seen.append(current().caller)
            return await super().GetExchangeRate(request, context)

    pair = certificates.of("rates")
    settings = ServiceSettings(
        merchants=merchants_file(tmp_path),
        page_token_key="secret",
        grpc_address="127.0.0.1:0",
        tls_cert=pair.certificate,
        tls_key=pair.key,
        tls_ca=certificates.ca,
    )
    noting = Noting()  # type: ignore[abstract]  # as above
    add = rates_grpc.add_ExchangeRateServiceServicer_to_server
    async with serving(settings, [(RATES, lambda server: add(noting, server))]) as server:
        credentials = grpc.ssl_channel_credentials(
            certificates.ca.read_bytes(),
            certificates.of("order").key.read_bytes(),
            certificates.of("order").certificate.read_bytes(),
        )
        options = [("grpc.ssl_target_name_override", "rates.mesh")]
        address = f"127.0.0.1:{server.port}"
        async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
            await rates_grpc.ExchangeRateServiceStub(channel).GetExchangeRate(
                rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR"),
                metadata=(*DEFAULT, ("x-forwarded-client-cert", "DNS=edge.mesh")),
            )
    assert seen == [Caller(service="order.mesh")]


async def unreachable(call: Awaitable[object]) -> None:
    """The call does not get as far as a servicer."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_without_a_certificate_nobody_gets_in(
    tmp_path: Path, certificates: Certificates
) -> None:
    """The handshake ends it."""
    async with secured(tmp_path, certificates) as (port, orders):
        await unreachable(get_as(port, certificates, None))
        assert orders.requests == []


async def test_a_certificate_of_another_authority_is_none(
    tmp_path: Path, certificates: Certificates
) -> None:
    """Also one that says that it is the edge's."""
    issued = trustme.CA().issue_cert("edge.mesh")
    forged = KeyPair(tmp_path / "edge.pem", tmp_path / "edge.key")
    issued.private_key_pem.write_to_path(forged.key)
    issued.cert_chain_pems[0].write_to_path(forged.certificate)
    async with secured(tmp_path, certificates) as (port, orders):
        await unreachable(get_as(port, certificates, forged))
        assert orders.requests == []


async def test_nobody_gets_in_without_tls(tmp_path: Path, certificates: Certificates) -> None:
    """The port speaks nothing else."""
    async with secured(tmp_path, certificates) as (port, orders):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: pb_grpc.OrderServiceAsyncStub = pb_grpc.OrderServiceStub(channel)
            await unreachable(
                stub.GetOrder(pb.GetOrderRequest(name=ORDER), metadata=DEFAULT, timeout=10)
            )
        assert orders.requests == []


async def test_a_certificate_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Never a server without TLS by accident."""
    missing = tmp_path / "nothing.pem"
    with pytest.raises(OSError, match=r"nothing\.pem"):
        async with serving_orders(
            tmp_path, insecure=False, tls_cert=missing, tls_key=missing, tls_ca=missing
        ):
            raise AssertionError("served")
