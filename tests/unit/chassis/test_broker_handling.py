"""What every consumer does with a batch, whichever broker it came from."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from uuid import UUID

import pytest
import structlog.testing

from chassis.broker import (
    DELIVERY_LIMIT_EXCEEDED,
    ConsumerStuckError,
    Delivery,
    Limits,
    Message,
    Subscription,
    Verdict,
)
from chassis.broker.handling import (
    Bury,
    Handling,
    Recovery,
    SetAside,
    beside,
    bury,
    handed_over_together,
)
from tests.eventually import eventually
from tests.suites.broker import Recorder


def a_delivery(delivery_count: int = 0) -> Delivery:
    """A delivery that was taken so often before."""
    message = Message(event_id=UUID(int=1), type="ordermesh.test.v1.Happened", body=b"1")
    return Delivery(message, delivery_count)


@pytest.mark.parametrize(
    ("counts", "together"),
    [((0, 0, 0), 3), ((0, 0, 1, 0), 2), ((1, 0, 0), 1), ((0,), 1), ((2, 2), 1)],
)
def test_only_first_deliveries_go_to_the_handler_together(
    counts: tuple[int, ...], together: int
) -> None:
    """A redelivered one ends the batch before it, and is a batch by itself."""
    assert handed_over_together([a_delivery(count) for count in counts]) == together


async def test_a_message_that_was_taken_too_often_is_buried_without_being_handled() -> None:
    """The one delivery more that the limit allows is the last that a handler sees."""
    recorder = Recorder()
    handling = Handling("consumer", recorder, Limits(delivery_limit=3))
    await handling.dispose([a_delivery(delivery_count=3)])
    assert len(recorder.calls) == 1
    [disposal] = await handling.dispose([a_delivery(delivery_count=4)])
    assert isinstance(disposal, Bury)
    assert disposal.error_class == DELIVERY_LIMIT_EXCEEDED
    assert len(recorder.calls) == 1


async def test_three_failures_in_a_row_end_the_replay_of_a_failed_batch() -> None:
    """By then it is not the messages that are bad: the rest is retried without being tried."""
    sizes: list[int] = []

    async def fails(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
        sizes.append(len(deliveries))
        raise ConnectionError("the database is away")

    handling = Handling("consumer", fails, Limits())
    disposals = await handling.dispose([a_delivery() for _ in range(10)])
    assert sizes == [10, 1, 1, 1]
    assert disposals == [SetAside(0)] * 10


async def test_what_runs_beside_a_block_does_not_fail_without_a_word() -> None:
    """A watchdog that broke would otherwise be missed only when it is needed."""

    async def fails() -> None:
        raise LookupError("a mistake of ours")

    with structlog.testing.capture_logs() as logs:
        async with beside(fails()):
            await eventually(lambda: logs)
    [line] = logs
    assert line["event"] == "beside.failed"
    assert isinstance(line["exc_info"], LookupError)


def test_the_texts_of_a_dead_letter_fit_into_every_broker() -> None:
    """They are cut to whole characters, have no NUL, and a class is never empty."""
    cut = bury("", "é" * 1000)
    assert cut.error_class == "Unknown"
    assert cut.error_detail == "é" * 512
    assert "\0" not in bury("a\0b", "c\0d").error_detail


async def test_an_absent_broker_is_waited_for_and_an_unwilling_one_is_not() -> None:
    """Only failures to consume from a broker that answers add up to being stuck."""
    recovery = Recovery("consumer", stuck_seconds_max=0.0)
    trouble = OSError("no")
    stopping = asyncio.Event()
    stopping.set()  # ends each pause at once
    for _ in range(3):
        await recovery.pause(reached=False, why=trouble, stopping=stopping)
        await recovery.pause(reached=True, why=trouble, stopping=stopping)
    with pytest.raises(ConsumerStuckError):
        await recovery.pause(reached=True, why=trouble, stopping=stopping)
    recovery.consuming()
    await recovery.pause(reached=True, why=trouble, stopping=stopping)


@pytest.mark.parametrize("name", ["", "ordermesh.*", "ordermesh.#", "x" * 256])
def test_a_subscription_names_events_in_full(name: str) -> None:
    """Patterns mean something to one broker only, so there are none."""
    with pytest.raises(ValueError, match="full name"):
        Subscription(consumer="consumer", types=(name,))


def test_a_subscription_names_its_consumer() -> None:
    """A queue without a name would be anybody's."""
    with pytest.raises(ValueError, match="1 to 100"):
        Subscription(consumer="", types=("a.B",))
    with pytest.raises(ValueError, match="at least one"):
        Subscription(consumer="c", types=("a.B",), batch_size=0)
