"""The store on a real PostgreSQL: locks, leases, fences, and what the tables forbid."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import asyncpg
import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from chassis.broker import connect
from chassis.database import Database
from chassis.ids import new_id
from chassis.outbox import Outbox
from payment_svc import storage
from payment_svc.commands import Answer, CancellationAsked, Held, OrderPlaced, Work, work_of
from payment_svc.domain.outcomes import Captured, Declined, Outcome, Refunded, Unknown
from payment_svc.domain.payment import Payment, PaymentState, Task
from payment_svc.storage import PostgresPayments
from tests.builders import NOON, ACause, eur
from tests.payments import a_payment_id, some_terms, taken

PAYING = (Task.CHARGE, Task.VOID, Task.REFUND)


class Kept:
    """A store, and short ways to what tests do with it."""

    def __init__(self, store: PostgresPayments, url: str) -> None:
        self.store = store
        self.url = url

    async def begun(self, count: int = 1, *, taken_at_once: bool = False) -> list[Held]:
        """Begins payments of new orders."""
        news = [
            OrderPlaced(
                merchant="default",
                order_id=a_payment_id(),
                terms=some_terms(),
                cause=ACause(),
            )
            for _ in range(count)
        ]

        def begin(one: OrderPlaced) -> Payment:
            payment = Payment.begin(
                merchant=one.merchant,
                payment_id=a_payment_id(),
                order_id=one.order_id,
                attempt_id=a_payment_id(),
                provider="in_process",
                terms=one.terms,
                at=NOON,
            )
            return taken(payment) if taken_at_once else payment

        return await self.store.follow(news, begin, _nothing_to_cancel)

    async def takes(self, tasks: Sequence[Task] = PAYING, limit: int = 10) -> list[Work]:
        """Takes what is due."""
        return work_of(await self.store.take(tasks, limit, taken), lease_ends=0.0)

    async def settles(self, *answers: tuple[Work, Outcome]) -> list[Held]:
        """Records answers."""
        return await self.store.settle(
            [Answer(work=work, outcome=outcome) for work, outcome in answers], _settled
        )

    async def cancels(self, *payments: Held) -> list[Held]:
        """Cancels the orders of payments, in one batch."""
        asked = [
            CancellationAsked(
                merchant="default", order_id=held.payment.order_id, reason="x", cause=ACause()
            )
            for held in payments
        ]
        return await self.store.follow(asked, _nothing_to_begin, _cancelled)

    async def execute(self, statement: str) -> list[asyncpg.Record]:
        """Asks the database directly."""
        connection = await asyncpg.connect(self.url)
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    async def leases_end(self) -> None:
        """Lets the time of every lease pass."""
        await self.execute(
            "UPDATE payments SET due_time = now() - interval '1 s' WHERE due IS NOT NULL"
        )


def _settled(answer: Answer, payment: Payment) -> Payment:
    return payment.settled(answer.work.task, answer.outcome, new_id=a_payment_id, at=NOON)


def _cancelled(asked: CancellationAsked, payment: Payment) -> Payment | None:
    return payment.cancelled(reason=asked.reason, new_id=a_payment_id, at=NOON)


def _nothing_to_cancel(asked: CancellationAsked, payment: Payment) -> Payment | None:
    raise AssertionError("asked to cancel")


def _nothing_to_begin(news: OrderPlaced) -> Payment:
    raise AssertionError("asked to begin")


@pytest_asyncio.fixture
async def kept(payment_database: str) -> AsyncIterator[Kept]:
    """An empty store."""
    async with (
        Database.opened(payment_database, application_name="test") as database,
        connect("memory://kept", name="test") as broker,
    ):
        outbox = Outbox(database, broker, new_id=new_id)
        yield Kept(PostgresPayments(database, outbox, new_id=new_id), payment_database)


async def test_what_is_read_back_is_what_was_written(kept: Kept) -> None:
    """Every field of a payment, its attempt and its refunds survives the database."""
    (work,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    (paid,) = await kept.settles((work, Captured("ch_1")))
    (cancelled,) = await kept.cancels(paid)
    expected = taken(replace(cancelled.payment, announcements=()))

    (again,) = await kept.takes()

    assert replace(again.payment, due_in_seconds=expected.due_in_seconds) == expected
    assert again.context.correlation_id == "corr-1"


async def test_what_is_due_is_taken_by_one_alone(kept: Kept) -> None:
    """However many look at the same moment; nobody waits for anybody's lock."""
    begun = await kept.begun(40)

    taken_by = await asyncio.gather(*(kept.takes(limit=15) for _ in range(6)))

    ids = [work.payment.payment_id for found in taken_by for work in found]
    assert len(ids) == len(set(ids)) <= len(begun)
    rest = [work.payment.payment_id for work in await kept.takes(limit=100)]
    assert {*ids, *rest} == {held.payment.payment_id for held in begun}


async def test_what_is_due_longest_is_taken_first(kept: Kept) -> None:
    """Whichever of the worker's tasks it is."""
    first, second, third = await kept.begun(3)
    for held, age, task in ((first, 1, "CHARGE"), (second, 3, "VOID"), (third, 2, "REFUND")):
        await kept.execute(
            f"UPDATE payments SET due = '{task}', due_time = now() - interval '{age} min'"
            f" WHERE payment_id = '{held.payment.payment_id}'"
        )

    found = await kept.execute(
        storage._TAKE.replace("$1", "ARRAY['CHARGE', 'VOID', 'REFUND']").replace("$2", "2")
    )

    ids = [row["payment_id"] for row in found]
    assert ids == [second.payment.payment_id, third.payment.payment_id]


async def test_a_backlog_of_charges_is_not_read_through_for_what_is_to_be_resolved(
    kept: Kept,
) -> None:
    """An outage leaves many of them, and the resolver looks twice a second."""
    await kept.begun(300)
    await kept.begun(taken_at_once=True)
    await kept.leases_end()
    take = storage._TAKE.replace("$1", "ARRAY['RESOLVE']").replace("$2", "10")
    connection = await asyncpg.connect(kept.url, server_settings={"enable_seqscan": "off"})
    try:
        lines = [row[0] for row in await connection.fetch(f"EXPLAIN (ANALYZE) {take}")]
    finally:
        await connection.close()

    assert any("payments_due_time" in line for line in lines), lines
    assert not any("Removed by Filter" in line for line in lines), lines
    assert len(await kept.takes((Task.RESOLVE,))) == 1


async def test_what_is_in_hand_is_nobody_elses_until_its_lease_ends(kept: Kept) -> None:
    """And then it is to be resolved, not charged."""
    await kept.begun(taken_at_once=True)
    assert await kept.takes((*PAYING, Task.RESOLVE)) == []

    await kept.leases_end()

    assert await kept.takes() == []
    (work,) = await kept.takes((Task.RESOLVE,))
    assert (work.task, work.payment.state) == (Task.RESOLVE, PaymentState.OUTCOME_UNKNOWN)


@pytest.mark.parametrize("outcome", [Captured("ch_late"), Declined("late"), Unknown("late")])
async def test_an_answer_under_an_old_fence_counts_for_nothing(
    kept: Kept, outcome: Outcome
) -> None:
    """Its work is in somebody else's hand, who will say what is true."""
    (late,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    await kept.leases_end()
    (current,) = await kept.takes((Task.RESOLVE,))

    assert await kept.settles((late, outcome)) == []

    (settled,) = await kept.settles((current, Captured("ch_1")))
    assert settled.payment.attempt.provider_reference == "ch_1"
    assert settled.payment.captured == eur(2500)


async def test_a_late_answer_and_a_current_one_may_share_a_batch(kept: Kept) -> None:
    """The current one counts, in whatever order they stand."""
    for late_first in (True, False):
        (late,) = work_of(await kept.begun(taken_at_once=True), 0.0)
        await kept.leases_end()
        (current,) = await kept.takes((Task.RESOLVE,))
        answers = [(late, Declined("late")), (current, Captured("ch_1"))]

        (settled,) = await kept.settles(*(answers if late_first else reversed(answers)))

        assert settled.payment.state is PaymentState.CAPTURED


@pytest.mark.parametrize("outcome", [Captured("ch_1"), Declined("no"), Unknown("timeout")])
async def test_an_answer_that_is_told_twice_counts_once(kept: Kept, outcome: Outcome) -> None:
    """Its commit went through while the connection was lost, so it is settled again."""
    (work,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    (other,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    (settled,) = await kept.settles((work, outcome))

    (neighbour,) = await kept.settles((work, outcome), (other, Captured("ch_2")))

    assert neighbour.payment.payment_id == other.payment.payment_id
    rows = await kept.execute(
        f"SELECT revision FROM payments WHERE payment_id = '{work.payment.payment_id}'"
    )
    assert [row["revision"] for row in rows] == [settled.payment.revision]


async def test_an_answer_is_decided_on_the_payment_as_it_is_by_now(kept: Kept) -> None:
    """It was cancelled while the provider was being asked."""
    (held,) = await kept.begun(taken_at_once=True)
    (work,) = work_of([held], 0.0)
    await kept.cancels(held)

    (settled,) = await kept.settles((work, Captured("ch_1")))

    assert settled.payment.cancel_requested
    assert settled.payment.due is Task.REFUND


async def test_a_cancellation_and_an_answer_at_the_same_moment_both_count(kept: Kept) -> None:
    """Whichever comes first, a refund is due in the end; never two."""
    for _ in range(10):
        (held,) = await kept.begun(taken_at_once=True)
        (work,) = work_of([held], 0.0)

        await asyncio.gather(kept.cancels(held), kept.settles((work, Captured("ch_1"))))

        (due,) = await kept.takes()
        assert (due.task, len(due.payment.refunds)) == (Task.REFUND, 1)
        await kept.settles((due, Refunded("re_1")))


async def test_answers_in_any_order_never_deadlock(kept: Kept) -> None:
    """Rows are locked in the order of their keys, whatever order they were given in."""
    for _ in range(5):
        begun = await kept.begun(30, taken_at_once=True)
        work = work_of(begun, 0.0)

        await asyncio.gather(
            kept.settles(*((one, Captured("ch")) for one in reversed(work))),
            kept.cancels(*begun[10:20]),
            kept.cancels(*reversed(begun[15:])),
        )

    states = {row["state"] for row in await kept.execute("SELECT state FROM payments")}
    assert states == {"CAPTURED"}


async def test_events_are_staged_with_the_change_they_tell_of(kept: Kept) -> None:
    """And with nothing that is told to nobody."""
    (work,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    assert await kept.execute("SELECT FROM outbox") == []

    await kept.settles((work, Captured("ch_1")))

    (row,) = await kept.execute("SELECT type, aggregate, aggregate_version FROM outbox")
    assert tuple(row) == ("ordermesh.payment.v1.PaymentSucceeded", work.payment.name, 1)


async def test_the_tables_forbid_a_second_live_charge_of_an_order(kept: Kept) -> None:
    """Whatever goes wrong above them."""
    await kept.begun()
    copy = """
        INSERT INTO payment_attempts
        SELECT merchant, payment_id, seq + 1, gen_random_uuid(), order_id, 'pa_other', amount,
               currency, payment_method, capture_method, 'NEW', '', '', 0, NULL
        FROM payment_attempts
    """

    with pytest.raises(asyncpg.UniqueViolationError, match="payment_attempts_live"):
        await kept.execute(copy)

    await kept.execute("UPDATE payment_attempts SET state = 'DECLINED'")
    await kept.execute(copy)


async def test_the_tables_forbid_giving_back_more_than_was_taken(kept: Kept) -> None:
    """Money is conserved at every commit."""
    await kept.begun()

    with pytest.raises(asyncpg.CheckViolationError, match="payments_conserved"):
        await kept.execute("UPDATE payments SET refunded = 1")


async def test_the_age_of_what_is_unknown_is_measured(kept: Kept) -> None:
    """So that somebody is called before a day is over."""
    (work,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    await kept.settles((work, Unknown("timeout")))
    await kept.execute("UPDATE payment_attempts SET sent_time = now() - interval '2 hours'")

    await kept.store.measure()

    assert _gauge("mesh_payment_unknown") == 1
    assert 7200 <= _gauge("mesh_payment_oldest_unknown_seconds") < 7300


async def test_a_refund_whose_outcome_is_unknown_is_measured_too(kept: Kept) -> None:
    """Its payment is captured, and money is on its way all the same."""
    (work,) = work_of(await kept.begun(taken_at_once=True), 0.0)
    (paid,) = await kept.settles((work, Captured("ch_1")))
    await kept.cancels(paid)
    (refund,) = await kept.takes()
    await kept.settles((refund, Unknown("timeout")))
    await kept.execute("UPDATE refunds SET sent_time = now() - interval '3 hours'")

    await kept.store.measure()

    assert _gauge("mesh_payment_unknown") == 1
    assert 10800 <= _gauge("mesh_payment_oldest_unknown_seconds") < 10900


def _gauge(name: str) -> float:
    value = REGISTRY.get_sample_value(name)
    assert value is not None
    return value
