"""Who calls, on whose behalf, and what ties everything that follows together.

The server interceptor and the consumer loop enter a context; everything below them
reads it. Nothing else passes identity or correlation along by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from chassis.errors import UnauthenticatedError

HOP_SECONDS = 0.05
"""What one hop keeps of the caller's time, to get its answer back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who makes a call.

    A person or program calls for one merchant, with a subject and roles from their
    token. A service calls under the name in its certificate, and may name the
    merchant for whom it does so.
    """

    merchant: str = ""
    subject: str = ""
    roles: frozenset[str] = field(default_factory=frozenset)
    service: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallContext:
    """What is known of the call or event being handled.

    Attributes:
        correlation_id: Ties together everything that one outside call set off.
        causation_id: The request or event that directly led here.
        traceparent: The W3C trace context, empty where nothing is traced.
        caller: Who calls; absent while an event is handled.
        deadline: When the caller's time is over, by the event loop's clock; None where
            nobody waits.
    """

    correlation_id: str = ""
    causation_id: str = ""
    traceparent: str = ""
    caller: Caller | None = None
    deadline: float | None = None

    @property
    def trace_id(self) -> str:
        """The trace id within `traceparent`, empty where nothing is traced."""
        parts = self.traceparent.split("-")
        return parts[1] if len(parts) == 4 else ""


class Cause(Protocol):
    """The event that led to something, as far as its records need to know it."""

    @property
    def event_id(self) -> UUID:
        """Unique for ever."""
        ...

    @property
    def aggregate(self) -> str:
        """Resource name of what changed."""
        ...

    @property
    def version(self) -> int:
        """Rises with the aggregate's events; may skip numbers."""
        ...

    @property
    def context(self) -> CallContext:
        """The context in which what the event sets off is handled."""
        ...


_NOBODY = CallContext()
_current: ContextVar[CallContext] = ContextVar("call_context", default=_NOBODY)


def current() -> CallContext:
    """The context of what is being handled; an empty one outside of calls and events."""
    return _current.get()


def caller() -> Caller:
    """The caller of the call being handled.

    Raises:
        UnauthenticatedError: There is none.
    """
    found = _current.get().caller
    if found is None:
        raise UnauthenticatedError("UNAUTHENTICATED", "the call carries no identity")
    return found


@contextmanager
def entered(context: CallContext) -> Iterator[CallContext]:
    """Handles what stands inside the block under this context."""
    token = _current.set(context)
    try:
        yield context
    finally:
        _current.reset(token)
