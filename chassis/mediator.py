"""Commands and queries go through here: `await mediator.send(CreateOrder(...))`.

A request knows its answer's type (`Request[Order]` is answered by an `Order`), and
its handler is registered in the service's `wiring`, in a plain list. Behaviours wrap
every request in one place; the chain of each request type is built once.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import structlog
from opentelemetry import trace
from prometheus_client import Histogram

from chassis.errors import ServiceError

R = TypeVar("R")
Answer_co = TypeVar("Answer_co", covariant=True)
Asked_contra = TypeVar("Asked_contra", bound="Request[Any]", contravariant=True)


class Request(Generic[R]):
    """Something asked of the service, answered by an `R`."""

    __slots__ = ()


class Command(Request[R]):
    """A request that changes something."""

    __slots__ = ()


class Query(Request[R]):
    """A request that only reads; it never opens a write transaction."""

    __slots__ = ()


class Handler(Protocol[Asked_contra, Answer_co]):
    """Answers one type of request."""

    async def __call__(self, request: Asked_contra, /) -> Answer_co:
        """Answers the request or raises a `ServiceError`."""
        ...


Next = Callable[[Any], Awaitable[Any]]
Behaviour = Callable[[type[Request[Any]], Next], Next]
"""Wraps the handling of one request type; called once per type, when wiring."""


class Registration:
    """A request type and its handler, typed to fit each other."""

    __slots__ = ("handler", "request_type")

    def __init__(
        self, request_type: type[Request[R]], handler: Callable[[Any], Awaitable[R]]
    ) -> None:
        self.request_type: type[Request[Any]] = request_type
        self.handler: Next = handler


class Mediator:
    """Finds the handler of a request and runs it inside the behaviours.

    Args:
        registrations: One per request type.
        behaviours: The outermost first.

    Raises:
        ValueError: Two handlers are registered for one request type.
    """

    def __init__(
        self, registrations: Iterable[Registration], behaviours: Sequence[Behaviour] = ()
    ) -> None:
        self._chains: dict[type[Request[Any]], Next] = {}
        for registration in registrations:
            if registration.request_type in self._chains:
                raise ValueError(f"{registration.request_type.__name__} has two handlers")
            chain = registration.handler
            for behaviour in reversed(behaviours):
                chain = behaviour(registration.request_type, chain)
            self._chains[registration.request_type] = chain

    async def send(self, request: Request[R]) -> R:
        """Answers the request.

        Raises:
            ServiceError: As the handler does.
            LookupError: No handler is registered for the request's type.
        """
        chain = self._chains.get(type(request))
        if chain is None:
            raise LookupError(f"no handler is registered for {type(request).__name__}")
        answer: R = await chain(request)
        return answer


_SECONDS = Histogram(
    "mesh_request_seconds",
    "Time from a command's or query's start to its answer.",
    ["request", "outcome"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
_log = structlog.get_logger("mediator")
_tracer = trace.get_tracer("chassis.mediator")


def usual_behaviours(*, tracing: bool) -> list[Behaviour]:
    """A metric and a command's log line around every request, in a span where spans are made."""
    return [traced, measured] if tracing else [measured]


def measured(request_type: type[Request[Any]], proceed: Next) -> Next:
    """Behaviour: a duration metric by outcome, and one log line per command."""
    name = request_type.__name__
    succeeded = _SECONDS.labels(name, "OK")
    logged = issubclass(request_type, Command)

    async def handle(request: Any) -> Any:
        begun = time.perf_counter()
        try:
            answer = await proceed(request)
        except ServiceError as error:
            seconds = time.perf_counter() - begun
            _SECONDS.labels(name, error.reason).observe(seconds)
            _log.info(name, outcome=error.reason, seconds=round(seconds, 4))
            raise
        except BaseException as error:
            _SECONDS.labels(name, type(error).__name__).observe(time.perf_counter() - begun)
            raise
        seconds = time.perf_counter() - begun
        succeeded.observe(seconds)
        if logged:
            _log.info(name, outcome="OK", seconds=round(seconds, 4))
        return answer

    return handle


def traced(request_type: type[Request[Any]], proceed: Next) -> Next:
    """Behaviour: one span per request."""
    name = request_type.__name__

    async def handle(request: Any) -> Any:
        with _tracer.start_as_current_span(name):
            return await proceed(request)

    return handle
