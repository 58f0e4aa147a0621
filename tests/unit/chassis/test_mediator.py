"""The mediator: who answers what, inside which behaviours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client import REGISTRY

from chassis.errors import NotFoundError
from chassis.mediator import Command, Mediator, Next, Query, Registration, Request, measured, traced


@dataclass(frozen=True, slots=True)
class Double(Query[int]):
    """Twice a number."""

    number: int


@dataclass(frozen=True, slots=True)
class Shout(Command[str]):
    """A text in capitals."""

    text: str


async def double(request: Double) -> int:
    """Doubles."""
    return request.number * 2


async def shout(request: Shout) -> str:
    """Shouts, unless there is nothing to shout."""
    if not request.text:
        raise NotFoundError("NO_TEXT", "there is nothing to shout")
    return request.text.upper()


def count_of(request: str, outcome: str) -> float:
    """How often the metric saw a request with this outcome."""
    labels = {"request": request, "outcome": outcome}
    return REGISTRY.get_sample_value("mesh_request_seconds_count", labels) or 0.0


async def test_a_request_is_answered_by_its_own_handler() -> None:
    """The type of the request decides, and the type of the answer follows."""
    mediator = Mediator([Registration(Double, double), Registration(Shout, shout)])
    number: int = await mediator.send(Double(21))
    text: str = await mediator.send(Shout("tea"))
    assert (number, text) == (42, "TEA")


async def test_a_request_that_nobody_answers_is_a_mistake_of_ours() -> None:
    """And says which."""
    with pytest.raises(LookupError, match="Double"):
        await Mediator([]).send(Double(1))


def test_two_handlers_for_one_request_are_refused() -> None:
    """When wiring, not when it is called."""
    with pytest.raises(ValueError, match="Double has two handlers"):
        Mediator([Registration(Double, double), Registration(Double, double)])


async def test_behaviours_wrap_every_request_the_first_outermost() -> None:
    """Each is made once for each type and runs for each request."""
    made: list[str] = []
    ran: list[str] = []

    def behaviour(name: str) -> Any:
        def make(request_type: type[Request[Any]], proceed: Next) -> Next:
            made.append(f"{name} {request_type.__name__}")

            async def handle(request: Any) -> Any:
                ran.append(f"{name} in")
                answer = await proceed(request)
                ran.append(f"{name} out")
                return answer

            return handle

        return make

    mediator = Mediator([Registration(Double, double)], [behaviour("outer"), behaviour("inner")])
    await mediator.send(Double(1))
    await mediator.send(Double(2))
    assert sorted(made) == ["inner Double", "outer Double"]
    assert ran == ["outer in", "inner in", "inner out", "outer out"] * 2


async def test_a_measured_request_counts_by_its_outcome() -> None:
    """Success, a refusal by its reason, and an accident by its type."""

    async def stumble(request: Shout) -> str:
        raise ZeroDivisionError

    before = {name: count_of("Shout", name) for name in ("OK", "NO_TEXT", "ZeroDivisionError")}
    mediator = Mediator([Registration(Shout, shout)], [measured])
    assert await mediator.send(Shout("tea")) == "TEA"
    with pytest.raises(NotFoundError):
        await mediator.send(Shout(""))
    with pytest.raises(ZeroDivisionError):
        await Mediator([Registration(Shout, stumble)], [measured]).send(Shout("tea"))
    for name, count in before.items():
        assert count_of("Shout", name) == count + 1


async def test_a_traced_request_answers_as_before() -> None:
    """A span changes nothing."""
    assert await Mediator([Registration(Double, double)], [traced]).send(Double(4)) == 8
