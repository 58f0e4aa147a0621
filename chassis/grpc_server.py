"""The gRPC server of a service: mutual TLS, health, reflection, and one interceptor.

The interceptor does for every call of ours, in this order: identity, correlation,
shedding, deadline, the idempotency key, the rules on fields, the merchant in the
resource name, then the servicer, then the error tree. A servicer only translates.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
import protovalidate
import structlog
from google.api import field_behavior_pb2
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage
from google.protobuf.message_factory import GetMessageClass
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection
from prometheus_client import Counter, Gauge, Histogram
from protovalidate import Violation

import ordermesh
from chassis.context import HOP_SECONDS, CallContext, Caller, entered
from chassis.errors import (
    DeadlineError,
    FieldViolation,
    InvalidInputError,
    OverloadedError,
    PermissionDeniedError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)
from chassis.ids import new_id
from chassis.settings import ServiceSettings

DOMAIN = "ordermesh"
RECEIVE_BYTES_MAX = 1024 * 1024
METADATA_BYTES_MAX = 8 * 1024
# Violations travel in the trailers; gRPC's clients refuse trailers over 8 to 16 KiB.
VIOLATIONS_MAX = 20
_SUBSCRIPT_CHARACTERS_MAX = 64
_log = structlog.get_logger("grpc")
_SECONDS = Histogram(
    "mesh_grpc_server_seconds",
    "Time from a call's arrival to its answer, by status.",
    ["method", "status"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
_IN_FLIGHT = Gauge("mesh_grpc_server_in_flight", "Calls being handled.")
_SHED = Counter("mesh_grpc_server_shed_total", "Calls refused because too many were in flight.")

_validator = protovalidate.Validator()

Servicer = Callable[[Any, Any], Awaitable[Any]]

if TYPE_CHECKING:
    _MethodHandler = grpc.RpcMethodHandler[Any, Any]


@dataclass(frozen=True, slots=True)
class _RequestShape:
    """What the interceptor must know of a request's type; found out once per type."""

    has_request_id: bool
    request_id_required: bool
    resource_field: str

    @classmethod
    def of(cls, descriptor: Any) -> _RequestShape:
        field = descriptor.fields_by_name.get("request_id")
        behaviors = (
            field.GetOptions().Extensions[field_behavior_pb2.field_behavior] if field else ()
        )
        named = [name for name in ("parent", "name") if name in descriptor.fields_by_name]
        return cls(
            has_request_id=field is not None,
            request_id_required=field_behavior_pb2.REQUIRED in behaviors,
            resource_field=named[0] if named else "",
        )


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary call of the ordermesh services; leaves others as they are.

    Args:
        merchants: The merchants that exist.
        trusted_proxy: Certificate name of Envoy, whose identity headers are believed.
        insecure: Believe those headers from anyone.
        concurrency_max: Calls at once; more are shed.
    """

    def __init__(
        self,
        *,
        merchants: Collection[str],
        trusted_proxy: str,
        insecure: bool,
        concurrency_max: int,
    ) -> None:
        self._merchants = frozenset(merchants)
        self._trusted_proxy = trusted_proxy
        self._insecure = insecure
        self._concurrency_max = concurrency_max
        self._in_flight = 0
        self._wrapped: dict[str, _MethodHandler] = {}
        self._shapes: dict[Any, _RequestShape] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_MethodHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _MethodHandler | None:
        """Answers the wrapped handler of the called method."""
        method: str = handler_call_details.method
        if (known := self._wrapped.get(method)) is not None:
            return known
        handler = await continuation(handler_call_details)
        if handler is None or not method.startswith(f"/{DOMAIN}.") or handler.unary_unary is None:
            return handler
        self._wrapped[method] = grpc.unary_unary_rpc_method_handler(
            self._around(method.rpartition("/")[2], handler.unary_unary),
            request_deserializer=_decoding(handler.request_deserializer),
            response_serializer=_serialized,
        )
        return self._wrapped[method]

    def _around(self, method: str, servicer: Servicer) -> Servicer:
        observe_ok = _SECONDS.labels(method, "OK").observe

        async def handle(request: ProtoMessage | _Undecodable, context: Any) -> Any:
            begun = time.perf_counter()
            call = CallContext()
            try:
                call = self._context_of(context)
                if self._in_flight >= self._concurrency_max:
                    _SHED.inc()
                    raise OverloadedError(
                        "OVERLOADED", "too many calls are in flight", retry_after_seconds=0.5
                    )
                self._in_flight += 1
                _IN_FLIGHT.inc()
                try:
                    with entered(call):
                        answer = await self._handled(request, context, call, servicer)
                finally:
                    self._in_flight -= 1
                    _IN_FLIGHT.dec()
            except ServiceError as error:
                _SECONDS.labels(method, error.status).observe(time.perf_counter() - begun)
                with entered(call):
                    if isinstance(error, UnavailableError | OverloadedError):
                        _log.warning(method, status=error.status, reason=error.reason)
                await _abort(context, error)
            except (grpc.aio.AbortError, asyncio.CancelledError):
                _SECONDS.labels(method, "CANCELLED").observe(time.perf_counter() - begun)
                raise
            except Exception as error:  # noqa: BLE001 - hidden from the caller, kept in the log
                _SECONDS.labels(method, "INTERNAL").observe(time.perf_counter() - begun)
                with entered(call):
                    _log.error(method, status="INTERNAL", exc_info=error)
                await _abort(
                    context,
                    ServiceError(
                        "INTERNAL",
                        "something went wrong on our side; quote the correlation id",
                        metadata={"correlation_id": call.correlation_id},
                    ),
                )
            observe_ok(time.perf_counter() - begun)
            return answer

        return handle

    async def _handled(
        self,
        request: ProtoMessage | _Undecodable,
        context: Any,
        call: CallContext,
        servicer: Servicer,
    ) -> Any:
        if isinstance(request, _Undecodable):
            raise InvalidInputError(
                "MALFORMED_REQUEST", f"the request cannot be decoded: {request.why}"
            )
        shape = self._shape_of(request)
        if shape.has_request_id:
            _take_idempotency_key(request, context, required=shape.request_id_required)
        _check_fields(request)
        if shape.resource_field:
            self._check_merchant(getattr(request, shape.resource_field), call)
        if call.deadline is None:
            return await servicer(request, context)
        if call.deadline - asyncio.get_running_loop().time() < HOP_SECONDS:
            raise _too_late()
        clock = asyncio.timeout_at(call.deadline - HOP_SECONDS / 2)
        try:
            async with clock:
                return await servicer(request, context)
        except TimeoutError:
            if clock.expired():
                raise _too_late() from None
            raise  # something that we waited for, while the caller still has time

    def _shape_of(self, request: ProtoMessage) -> _RequestShape:
        shape = self._shapes.get(request.DESCRIPTOR)
        if shape is None:
            shape = self._shapes[request.DESCRIPTOR] = _RequestShape.of(request.DESCRIPTOR)
        return shape

    def _context_of(self, context: Any) -> CallContext:
        headers = dict(context.invocation_metadata())
        names = () if self._insecure else _certificate_names(context)
        if self._insecure or self._trusted_proxy in names:
            caller = _caller_from(headers)
        elif names:
            # A service that calls without Envoy in between speaks for itself alone.
            caller = Caller(service=names[0])
        else:
            raise UnauthenticatedError("UNAUTHENTICATED", "the call carries no identity")
        correlation_id = _plain(headers.get("x-correlation-id")) or _plain(
            headers.get("x-request-id")
        )
        remaining = context.time_remaining()
        return CallContext(
            correlation_id=correlation_id or str(new_id()),
            causation_id=_plain(headers.get("x-request-id")),
            traceparent=_plain(headers.get("traceparent")),
            caller=caller,
            deadline=(None if remaining is None else asyncio.get_running_loop().time() + remaining),
        )

    def _check_merchant(self, name: str, call: CallContext) -> None:
        collection, _, rest = name.partition("/")
        if collection != "merchants":
            return
        merchant = rest.partition("/")[0]
        asked_by = call.caller.merchant if call.caller else ""
        if merchant != asked_by or merchant not in self._merchants:
            raise PermissionDeniedError(
                "MERCHANT_DENIED",
                f"this caller may not act for merchant {merchant!r}",
                metadata={"merchant": merchant},
            )


@dataclass(frozen=True, slots=True)
class _Undecodable:
    """In the place of a request whose bytes are no message of its type."""

    why: str


def _decoding(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    """Lets bytes that cannot be decoded reach the handler, which refuses them.

    gRPC itself would answer UNKNOWN, and the edge would count that as a failure of ours.
    """

    def decoded(raw: bytes) -> Any:
        try:
            return decode(raw) if decode is not None else raw
        except DecodeError as error:
            return _Undecodable(str(error))

    return decoded


def _serialized(answer: Any) -> bytes:
    """Read rows and replays are serialized already; they go out as they are."""
    if isinstance(answer, bytes):
        return answer
    raw: bytes = answer.SerializeToString()
    return raw


def _plain(value: Any) -> str:
    """A header as text, or nothing when it is long or unprintable enough to do harm."""
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else (value or "")
    return text if len(text) <= 128 and text.isprintable() else ""


def _certificate_names(context: Any) -> tuple[str, ...]:
    found = context.auth_context().get("x509_subject_alternative_name", ())
    return tuple(name.decode() for name in found)


def _caller_from(headers: dict[str, Any]) -> Caller:
    merchant = _plain(headers.get("x-mesh-merchant"))
    service = ""
    for part in str(headers.get("x-forwarded-client-cert", "")).split(";"):
        key, _, value = part.partition("=")
        if key.upper() == "DNS":
            service = value
            break
    if not merchant and not service:
        raise UnauthenticatedError("UNAUTHENTICATED", "the call carries no identity")
    return Caller(
        merchant=merchant,
        subject=_plain(headers.get("x-mesh-subject")),
        roles=frozenset(_plain(headers.get("x-mesh-roles")).replace(",", " ").split()),
        service=service,
    )


def _take_idempotency_key(request: Any, context: Any, *, required: bool) -> None:
    header = ""
    for key, value in context.invocation_metadata():
        if key == "idempotency-key":
            # As it is: one that is too long for us is malformed, not missing.
            header = value
            break
    if header and request.request_id and header.lower() != request.request_id.lower():
        raise InvalidInputError.of_field(
            "IDEMPOTENCY_KEY_CONFLICT",
            "request_id",
            "differs from the idempotency-key header; give one of them",
        )
    if header:
        request.request_id = header
    if not request.request_id and required:
        raise InvalidInputError.of_field(
            "IDEMPOTENCY_KEY_MISSING",
            "request_id",
            "is required: a UUID, here or in the idempotency-key header",
        )


def _check_fields(request: ProtoMessage) -> None:
    violations = _validator.collect_violations(request)
    if not violations:
        return
    found = [
        FieldViolation(_path_of(violation), violation.proto.message or "is not valid")
        for violation in violations[:VIOLATIONS_MAX]
    ]
    raise InvalidInputError(
        "INVALID_FIELD",
        "; ".join(f"{violation.field}: {violation.description}" for violation in found[:5]),
        metadata={"field": found[0].field},
        violations=found,
    )


def _path_of(violation: Violation) -> str:
    path = ""
    field = violation.proto.field
    for element in field.elements if field is not None else ():
        path += f".{element.field_name}" if path else element.field_name
        subscript = element.subscript
        if subscript is not None:
            value = getattr(subscript, "value", subscript)
            if isinstance(value, str):
                path += f'["{value[:_SUBSCRIPT_CHARACTERS_MAX]}"]'
            else:
                path += f"[{value}]"
    return path


def _too_late() -> DeadlineError:
    return DeadlineError(
        "DEADLINE_EXCEEDED",
        "the caller's time has run out; whether this had an effect is told by repeating it "
        "with the same request_id",
    )


async def _abort(context: Any, error: ServiceError) -> NoReturn:
    details: list[ProtoMessage] = [
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)
    ]
    if error.violations:
        details.append(
            error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(
                        field=violation.field,
                        description=violation.description,
                        reason=violation.reason,
                    )
                    for violation in error.violations
                ]
            )
        )
    if error.status == "FAILED_PRECONDITION" and "state" in error.metadata:
        details.append(
            error_details_pb2.PreconditionFailure(
                violations=[
                    error_details_pb2.PreconditionFailure.Violation(
                        type="STATE",
                        subject=error.metadata.get("name", ""),
                        description=error.message,
                    )
                ]
            )
        )
    trailing: list[tuple[str, str | bytes]] = []
    if error.retry_after_seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromMicroseconds(int(error.retry_after_seconds * 1_000_000))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        trailing.append(("grpc-retry-pushback-ms", str(int(error.retry_after_seconds * 1000))))
        # Becomes an HTTP header on REST, which counts in whole seconds (RFC 9110, 10.2.3).
        trailing.append(("retry-after", str(math.ceil(error.retry_after_seconds))))
    code = grpc.StatusCode[error.status]
    packed = []
    for detail in details:
        holder = any_pb2.Any()
        holder.Pack(detail)
        packed.append(holder)
    status = status_pb2.Status(code=code.value[0], message=error.message, details=packed)
    trailing.append(("grpc-status-details-bin", status.SerializeToString()))
    await context.abort(code, error.message, trailing_metadata=tuple(trailing))
    raise AssertionError("abort always raises")


Registrations = Sequence[tuple[str, Callable[[grpc.aio.Server], None]]]
"""The full name of each service that is served, and what adds it to a server."""


class GrpcServer:
    """A running server: its port, its health, and the way to drain it."""

    def __init__(
        self, server: grpc.aio.Server, health: HealthServicer, names: Sequence[str], port: int
    ) -> None:
        self._server = server
        self._health = health
        self._names = names
        self.port = port

    async def report(self, *, serving: bool) -> None:
        """Tells health checks whether to send calls here."""
        answer = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            await self._health.set(name, answer.SERVING if serving else answer.NOT_SERVING)

    async def stop(self, grace_seconds: float) -> None:
        """Takes no more calls and waits for those in flight; then cancels what is left."""
        await self._server.stop(grace_seconds)


@contextlib.asynccontextmanager
async def serving(
    settings: ServiceSettings, registrations: Registrations
) -> AsyncIterator[GrpcServer]:
    """Serves until the block ends. Health says NOT_SERVING until `report` is called.

    Raises:
        UnavailableError: The address is taken, or not ours.
        OSError: A certificate cannot be read.
    """
    interceptors: list[Any] = []
    if settings.otlp_endpoint:
        from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters

        interceptors.append(aio_server_interceptor(filter_=filters.negate(filters.health_check())))
    interceptors.append(
        CallInterceptor(
            merchants=settings.merchants_by_id.keys(),
            trusted_proxy=settings.trusted_proxy,
            insecure=settings.insecure,
            concurrency_max=settings.concurrency_max,
        )
    )
    server = grpc.aio.server(
        interceptors=interceptors,
        options=[
            ("grpc.max_receive_message_length", RECEIVE_BYTES_MAX),
            ("grpc.max_metadata_size", METADATA_BYTES_MAX),
            # Two processes on one port would share calls by chance.
            ("grpc.so_reuseport", 0),
        ],
    )
    names = [name for name, _ in registrations]
    for _, add in registrations:
        add(server)
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    public = _public_services()
    if settings.reflection:
        reflection.enable_server_reflection(
            [*public, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
             reflection.SERVICE_NAME],
            server,
        )  # fmt: skip
    for name in names:
        _warm_up(public[name])
    try:
        port = _listen(server, settings)
    except RuntimeError as error:
        raise UnavailableError(
            "DEPENDENCY_UNAVAILABLE",
            f"cannot listen on {settings.grpc_address}: {error}",
            metadata={"dependency": "network"},
        ) from error
    running = GrpcServer(server, health, names, port)
    await running.report(serving=False)
    await server.start()
    try:
        yield running
    finally:
        await server.stop(None)


def _listen(server: grpc.aio.Server, settings: ServiceSettings) -> int:
    if settings.tls_cert is None or settings.tls_key is None or settings.tls_ca is None:
        port: int = server.add_insecure_port(settings.grpc_address)
        return port
    credentials = grpc.ssl_server_credentials(
        [(settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())],
        root_certificates=settings.tls_ca.read_bytes(),
        require_client_auth=True,
    )
    secured: int = server.add_secure_port(settings.grpc_address, credentials)
    return secured


def _public_services() -> dict[str, Any]:
    """Every public service, whoever serves it: reflection asks any one of them for all."""
    found: dict[str, Any] = {}
    for root in map(Path, ordermesh.__path__):
        for file in sorted(root.rglob("*_service_pb2.py")):
            module = ".".join(file.relative_to(root.parent).with_suffix("").parts)
            for service in importlib.import_module(module).DESCRIPTOR.services_by_name.values():
                found[service.full_name] = service
    return found


def _warm_up(service: Any) -> None:
    """Compiles the rules of each request now, not while the first caller waits."""
    for method in service.methods:
        _validator.collect_violations(GetMessageClass(method.input_type)())
