"""The context: who calls, and what ties together all that follows."""

from __future__ import annotations

import asyncio

import pytest

from chassis.context import CallContext, Caller, caller, current, entered
from chassis.errors import UnauthenticatedError

CALL = CallContext(correlation_id="corr-1", caller=Caller(merchant="default"))


def test_outside_of_calls_there_is_an_empty_context() -> None:
    """Nothing has to ask whether there is one."""
    assert current() == CallContext()


def test_a_context_holds_inside_its_block_and_not_after() -> None:
    """Also when the block raises, and when blocks are nested."""

    def failing() -> None:
        with entered(CALL):
            assert current() is CALL
            with entered(CallContext(correlation_id="inner")):
                assert current().correlation_id == "inner"
            assert current() is CALL
            raise RuntimeError("something went wrong")

    with pytest.raises(RuntimeError):
        failing()
    assert current() == CallContext()


async def test_concurrent_calls_do_not_see_each_others_context() -> None:
    """Each task keeps its own, whoever runs in between."""

    async def seen(name: str) -> str:
        with entered(CallContext(correlation_id=name)):
            await asyncio.sleep(0)
            return current().correlation_id

    names = [f"corr-{number}" for number in range(10)]
    assert await asyncio.gather(*(seen(name) for name in names)) == names


def test_the_caller_is_who_the_context_says() -> None:
    """Whoever needs one asks for it."""
    with entered(CALL):
        assert caller() == Caller(merchant="default")


def test_without_a_caller_nobody_calls() -> None:
    """An event has none, so what needs a caller refuses."""
    with entered(CallContext(correlation_id="corr-1")), pytest.raises(UnauthenticatedError):
        caller()


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        ("", ""),
        ("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
         "0af7651916cd43dd8448eb211c80319c"),
        ("nonsense", ""),
    ],
)  # fmt: skip
def test_the_trace_id_stands_in_the_traceparent(traceparent: str, trace_id: str) -> None:
    """W3C trace context: version, trace, span, flags."""
    assert CallContext(traceparent=traceparent).trace_id == trace_id
