"""The worker: what it asks of a provider, when it asks again, and what it never does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime, timedelta
from time import monotonic

import pytest

from chassis.context import CallContext
from chassis.errors import UnavailableError
from payment_svc import worker as worker_module
from payment_svc.commands import Answer, Held, Leases, OrderNews, OrderPlaced, Work
from payment_svc.domain.outcomes import (
    Absent,
    Authorized,
    Captured,
    Declined,
    Invalid,
    Outcome,
    Refunded,
    RetrySameKey,
    Unknown,
    Voided,
)
from payment_svc.domain.payment import Payment, Task
from payment_svc.gateways import PaymentGateway
from payment_svc.worker import PaymentWorker
from tests.builders import NOON
from tests.eventually import eventually
from tests.payments import (
    FaultyGateway,
    a_captured_payment,
    a_payment,
    an_authorized_payment,
    an_unknown_payment,
    answered,
    cancelled,
    work_on,
)

TIMEOUT_SECONDS = 0.5
LEASE_SECONDS = 10.0


class DueForTests:
    """A store in which work waits to be taken; it does nothing else."""

    def __init__(self) -> None:
        self.due: list[Payment] = []

    async def take(
        self, tasks: Sequence[Task], limit: int, taken: Callable[[Payment], Payment]
    ) -> list[Held]:
        """Takes what waits, in order."""
        found = [payment for payment in self.due if payment.due in tasks][:limit]
        self.due = [payment for payment in self.due if payment not in found]
        return [Held(payment=taken(payment), context=CallContext()) for payment in found]

    async def follow(
        self,
        news: Sequence[OrderNews],
        begin: Callable[[OrderPlaced], Payment],
        cancel: object,
    ) -> list[Held]:
        """A worker begins no payments."""
        raise AssertionError("asked to begin payments")

    async def settle(self, answers: Sequence[Answer], settled: object) -> list[Held]:
        """A worker settles by command."""
        raise AssertionError("asked to settle directly")


class Bench:
    """A worker, and all that came out of it."""

    def __init__(self, gateway: PaymentGateway, *, now: datetime = NOON, **options: int) -> None:
        self.store = DueForTests()
        self.answers: list[Answer] = []
        self.batches: list[int] = []
        self.unavailable = 0
        self.worker = PaymentWorker(
            "payments",
            tuple(Task),
            gateway=gateway,
            store=self.store,
            settle=self._settle,
            leases=Leases(lease_seconds=LEASE_SECONDS, now=lambda: NOON, monotonic=monotonic),
            now=lambda: now,
            timeout_seconds=options.get("timeout_seconds", TIMEOUT_SECONDS),
            concurrency=options.get("concurrency", 32),
            poll_seconds=0.01,
        )

    async def _settle(self, answers: Sequence[Answer]) -> None:
        if self.unavailable > 0:
            self.unavailable -= 1
            raise UnavailableError("DEPENDENCY_UNAVAILABLE", "the database does not answer")
        self.batches.append(len(answers))
        self.answers += answers

    async def outcome_of(self, payment: Payment) -> Outcome:
        """What comes of the one thing that is due for a payment."""
        self.store.due = [payment]
        assert await self.worker.run_once() == 1
        (answer,) = self.answers
        return answer.outcome

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Event]:
        """Runs the worker; the event ends it early."""
        stopping = asyncio.Event()
        task = asyncio.create_task(self.worker.run(stopping))
        await eventually(lambda: self.worker.room)
        try:
            yield stopping
        finally:
            stopping.set()
            await asyncio.wait_for(task, 5)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses of milliseconds, so that tests need not wait."""
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(worker_module, "RETRY_SECONDS_MAX", 0.01)


@pytest.fixture
def gateway() -> FaultyGateway:
    """A provider whose line a test can spoil."""
    return FaultyGateway()


def spoiled(gateway: FaultyGateway, method: str, *outcomes: Outcome) -> None:
    """Answers these, before the provider hears of it, the next times it is asked this."""
    left = list(outcomes)

    async def before(asked: str) -> Outcome | None:
        return left.pop(0) if asked == method and left else None

    gateway.before = before


# --- asking -------------------------------------------------------------------------


async def test_a_charge_that_is_due_is_sent_and_its_answer_settled(
    gateway: FaultyGateway,
) -> None:
    """Under the attempt's own key."""
    payment = a_payment()

    outcome = await Bench(gateway).outcome_of(payment)

    assert isinstance(outcome, Captured)
    assert gateway.calls == [("charge", payment.attempt.provider_key)]


async def test_a_void_that_is_due_is_sent_under_its_own_key(gateway: FaultyGateway) -> None:
    """Never under the charge's."""
    payment = await _authorized(gateway)

    outcome = await Bench(gateway).outcome_of(cancelled(payment))

    assert outcome == Voided()
    assert gateway.calls[-1] == ("void", payment.attempt.void_key)


async def test_a_refund_that_is_due_is_sent_under_its_own_key(gateway: FaultyGateway) -> None:
    """Never under the charge's."""
    payment = cancelled(await _captured(gateway))

    outcome = await Bench(gateway).outcome_of(payment)

    assert isinstance(outcome, Refunded)
    assert gateway.calls[-1] == ("refund", payment.refunds[0].provider_key)


async def test_many_answers_share_a_transaction(gateway: FaultyGateway) -> None:
    """Whatever is answered while one batch is being settled is the next."""
    bench = Bench(gateway)
    bench.store.due = [a_payment() for _ in range(64)]

    assert await bench.worker.run_once() == 64

    assert sum(bench.batches) == 64
    assert len(bench.batches) <= 3


async def test_no_more_is_asked_at_once_than_allowed(gateway: FaultyGateway) -> None:
    """The provider's limits are not ours to test."""
    at_once: list[int] = [0, 0]

    async def slowly(method: str) -> Outcome | None:
        at_once[0] += 1
        at_once[1] = max(at_once)
        await asyncio.sleep(0.001)
        at_once[0] -= 1
        return None

    gateway.before = slowly
    bench = Bench(gateway, concurrency=4)
    bench.store.due = [a_payment() for _ in range(30)]

    await bench.worker.run_once()

    assert at_once[1] == 4


async def test_a_provider_that_does_not_answer_in_time_leaves_the_outcome_unknown(
    gateway: FaultyGateway,
) -> None:
    """It may have charged; nobody says that it has not."""

    async def charged_and_silent(method: str, outcome: Outcome) -> Outcome:
        await asyncio.sleep(60)
        return outcome

    gateway.after = charged_and_silent

    outcome = await Bench(gateway).outcome_of(a_payment())

    assert isinstance(outcome, Unknown)
    assert gateway.asked("charge") == 1


async def test_a_fault_with_one_payment_spoils_no_other(gateway: FaultyGateway) -> None:
    """It is raised for the log; its own payment is resolved when its lease ends."""
    calls = 0

    async def second_raises(method: str) -> Outcome | None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise LookupError("a fault in an adapter")
        return None

    gateway.before = second_raises
    bench = Bench(gateway)
    bench.store.due = [a_payment() for _ in range(5)]

    with pytest.raises(ExceptionGroup, match="not settled"):
        await bench.worker.run_once()

    assert len(bench.answers) == 4


# --- asking again -------------------------------------------------------------------


async def test_a_call_that_did_nothing_is_made_again_under_the_same_key(
    gateway: FaultyGateway,
) -> None:
    """Within the lease, with pauses, until there is an answer."""
    payment = a_payment()
    spoiled(gateway, "charge", *[RetrySameKey()] * 4)

    outcome = await Bench(gateway).outcome_of(payment)

    assert isinstance(outcome, Captured)
    assert gateway.calls == [("charge", payment.attempt.provider_key)] * 5
    assert len(gateway.provider.ledger) == 1


async def test_the_provider_says_how_long_to_wait_at_least(gateway: FaultyGateway) -> None:
    """429 with Retry-After, say."""
    spoiled(gateway, "charge", RetrySameKey(0.15))
    begun = monotonic()

    await Bench(gateway).outcome_of(a_payment())

    assert monotonic() - begun >= 0.15


async def test_an_unknown_outcome_is_not_made_again(gateway: FaultyGateway) -> None:
    """Only the resolver goes on from there, and it asks first."""
    spoiled(gateway, "charge", Unknown("reset after write"))

    assert isinstance(await Bench(gateway).outcome_of(a_payment()), Unknown)
    assert gateway.asked("charge") == 1


async def test_a_call_that_never_gets_through_is_put_off_before_the_lease_ends(
    gateway: FaultyGateway,
) -> None:
    """So that its lease never runs out over it."""

    async def away(method: str) -> Outcome | None:
        return RetrySameKey()

    gateway.before = away
    bench = Bench(gateway)
    begun = monotonic()
    seconds = TIMEOUT_SECONDS + worker_module.SETTLE_SECONDS + 0.2
    await _offered(bench, [work_on(a_payment(), lease_ends=begun + seconds)])

    (answer,) = bench.answers
    assert answer.outcome == RetrySameKey(worker_module.RETRY_SECONDS_MAX)
    assert gateway.asked("charge") > 1
    assert monotonic() < begun + seconds


async def test_work_whose_lease_is_nearly_over_is_given_back_unasked(
    gateway: FaultyGateway,
) -> None:
    """A call that could not be settled in time is not begun."""
    bench = Bench(gateway)

    await _offered(bench, [work_on(a_payment(), lease_ends=monotonic() + TIMEOUT_SECONDS)])

    assert [answer.outcome for answer in bench.answers] == [RetrySameKey()]
    assert gateway.calls == []


async def test_a_process_that_stops_gives_back_what_it_has_not_begun(
    gateway: FaultyGateway,
) -> None:
    """Another one takes it on at once, instead of waiting for the lease to end."""
    reached = asyncio.Event()
    goes_on = asyncio.Event()

    async def waits(method: str) -> Outcome | None:
        reached.set()
        await goes_on.wait()
        return None

    gateway.before = waits
    bench = Bench(gateway, concurrency=1)
    async with bench.running() as stopping:
        bench.worker.offer(
            [work_on(a_payment(), lease_ends=monotonic() + LEASE_SECONDS) for _ in range(3)]
        )
        await asyncio.wait_for(reached.wait(), 5)
        stopping.set()
        goes_on.set()

    kinds = sorted(type(answer.outcome).__name__ for answer in bench.answers)
    assert kinds == ["Captured", "RetrySameKey", "RetrySameKey"]
    assert gateway.asked("charge") == 1


async def test_a_process_that_stops_does_not_wait_out_its_retries(
    gateway: FaultyGateway,
) -> None:
    """It puts them off, and ends."""
    spoiled(gateway, "charge", *[RetrySameKey(30.0)] * 10)
    bench = Bench(gateway)
    async with bench.running() as stopping:
        bench.worker.offer([work_on(a_payment(), lease_ends=monotonic() + 10 * LEASE_SECONDS)])
        await eventually(lambda: gateway.asked("charge"))
        stopping.set()
        await eventually(lambda: bench.answers, within_seconds=5)

    assert [answer.outcome for answer in bench.answers] == [RetrySameKey(30.0)]
    assert gateway.asked("charge") == 1, "asked again before the provider's time"


async def test_a_process_that_was_stopped_past_its_lease_asks_nothing_more(
    gateway: FaultyGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP while it pauses before a retry; by SIGCONT somebody else may have resolved it."""

    async def stopped(seconds: float, unless: asyncio.Event) -> None:
        time.sleep(0.2)  # noqa: ASYNC251 - nothing runs in a process that is stopped

    monkeypatch.setattr(worker_module, "pause", stopped)
    spoiled(gateway, "charge", RetrySameKey())
    lease = TIMEOUT_SECONDS + worker_module.SETTLE_SECONDS + 0.15
    bench = Bench(gateway)

    await _offered(bench, [work_on(a_payment(), lease_ends=monotonic() + lease)])

    assert isinstance(bench.answers[0].outcome, RetrySameKey)
    assert gateway.asked("charge") == 1


async def test_a_charge_put_off_until_its_key_may_be_forgotten_is_not_sent(
    gateway: FaultyGateway,
) -> None:
    """An outage of a day: one that was thought never to have arrived may have met its twin."""
    payment = answered(a_payment(), RetrySameKey())

    outcome = await Bench(gateway, now=NOON + timedelta(hours=23)).outcome_of(payment)

    assert outcome == Absent()
    assert gateway.calls == [("find", payment.attempt.provider_key)]


async def test_calls_that_take_long_hold_up_no_others(gateway: FaultyGateway) -> None:
    """As long as the provider may be asked more at once, what comes next is asked."""
    slow = [a_payment() for _ in range(12)]
    goes_on = asyncio.Event()

    async def waits(method: str) -> Outcome | None:
        if len(gateway.calls) <= len(slow):
            await goes_on.wait()
        return None

    gateway.before = waits
    bench = Bench(gateway, timeout_seconds=10)
    async with bench.running():
        for payment in [*slow, a_payment()]:
            bench.worker.offer([work_on(payment, lease_ends=monotonic() + 60)])
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await eventually(lambda: bench.answers, within_seconds=2)
        goes_on.set()

    assert len(bench.answers) == len(slow) + 1


# --- resolving ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "found", [Captured("ch_1"), Authorized("ch_1"), Declined("expired_card"), Voided()]
)
async def test_resolving_asks_before_anything_else(gateway: FaultyGateway, found: Outcome) -> None:
    """What the provider knows is the answer; nothing is sent."""
    payment = an_unknown_payment()
    spoiled(gateway, "find", found)

    assert await Bench(gateway).outcome_of(payment) == found
    assert gateway.calls == [("find", payment.attempt.provider_key)]


async def test_what_the_provider_does_not_know_is_sent_again_under_the_same_key(
    gateway: FaultyGateway,
) -> None:
    """Should the first request arrive after all, the two are one."""
    payment = an_unknown_payment()

    outcome = await Bench(gateway).outcome_of(payment)

    key = payment.attempt.provider_key
    assert isinstance(outcome, Captured)
    assert gateway.calls == [("find", key), ("charge", key)]


async def test_a_lease_is_long_enough_to_ask_and_to_send_again(gateway: FaultyGateway) -> None:
    """Though it began late, and the provider takes its time for both."""

    async def slowly(method: str) -> Outcome | None:
        await asyncio.sleep(0.9 * TIMEOUT_SECONDS)
        return None

    gateway.before = slowly
    lease = worker_module.lease_seconds_for(TIMEOUT_SECONDS) - worker_module.BEGIN_SECONDS
    bench = Bench(gateway)

    await _offered(bench, [work_on(an_unknown_payment(), lease_ends=monotonic() + lease)])

    assert isinstance(bench.answers[0].outcome, Captured)


@pytest.mark.parametrize("outcome", [Declined("insufficient_funds"), Invalid("token_expired")])
async def test_a_refusal_when_sent_again_is_final_only_if_the_provider_keeps_it(
    gateway: FaultyGateway, outcome: Outcome
) -> None:
    """Else the first request, on its way still, may go through after all."""
    for keeps in (True, False):
        gateway.stores_errors = keeps
        spoiled(gateway, "charge", outcome)

        found = await Bench(gateway).outcome_of(an_unknown_payment())

        assert (found == outcome) is keeps
        assert isinstance(found, Unknown) is not keeps


async def test_a_key_that_the_provider_may_have_forgotten_is_never_sent_again(
    gateway: FaultyGateway,
) -> None:
    """It would be a second charge."""
    bench = Bench(gateway, now=NOON + timedelta(hours=23))

    assert await bench.outcome_of(an_unknown_payment()) == Absent()
    assert gateway.asked("charge") == 0


async def test_a_charge_that_the_provider_had_named_is_never_sent_again(
    gateway: FaultyGateway,
) -> None:
    """That it is absent now is the provider's riddle, not our leave to charge."""
    payment = answered(cancelled(await _authorized(gateway)), Unknown("timeout")).announced()
    gateway.calls.clear()
    spoiled(gateway, "find", Absent())

    assert await Bench(gateway).outcome_of(payment) == Absent()
    assert gateway.asked("charge") == 0


async def test_not_hearing_of_it_leaves_it_unknown(gateway: FaultyGateway) -> None:
    """The provider is away when it is asked."""
    spoiled(gateway, "find", Unknown("503"))

    assert await Bench(gateway).outcome_of(an_unknown_payment()) == Unknown("503")
    assert gateway.asked("charge") == 0


async def test_an_unknown_refund_is_looked_up_and_sent_again_under_the_same_key(
    gateway: FaultyGateway,
) -> None:
    """As a charge is."""
    payment = cancelled(await _captured(gateway))
    payment = answered(payment, Unknown("timeout")).announced()
    gateway.calls.clear()

    outcome = await Bench(gateway).outcome_of(payment)

    key = payment.refunds[0].provider_key
    assert isinstance(outcome, Refunded)
    assert gateway.calls == [("find_refund", key), ("refund", key)]


async def test_a_refund_that_went_through_unheard_is_found(gateway: FaultyGateway) -> None:
    """It is not sent again."""
    payment = cancelled(await _captured(gateway))
    bench = Bench(gateway)
    refunded = await bench.outcome_of(payment)
    bench.answers.clear()
    gateway.calls.clear()

    outcome = await bench.outcome_of(answered(payment, Unknown("timeout")).announced())

    assert outcome == refunded
    assert gateway.asked("refund") == 0


# --- settling and taking on ---------------------------------------------------------


async def test_an_answer_is_kept_until_the_database_is_back(gateway: FaultyGateway) -> None:
    """Asking again would be slower, and is not needed while the lease lasts."""
    bench = Bench(gateway)
    bench.unavailable = 3

    assert isinstance(await bench.outcome_of(a_payment()), Captured)
    assert gateway.asked("charge") == 1


async def test_an_answer_is_kept_without_haste_while_the_process_ends(
    gateway: FaultyGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is away and the process is told to stop: it pauses between its tries."""
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.2)
    monkeypatch.setattr(worker_module, "RETRY_SECONDS_MAX", 0.4)
    bench = Bench(gateway)
    bench.unavailable = many = 10**9
    async with bench.running() as stopping:
        bench.worker.offer([work_on(a_payment(), lease_ends=monotonic() + LEASE_SECONDS)])
        await eventually(lambda: bench.unavailable < many)
        stopping.set()
        await asyncio.sleep(0.5)
        tries = many - bench.unavailable
        bench.unavailable = 0

    assert tries < 50
    assert isinstance(bench.answers[0].outcome, Captured)


async def test_a_worker_that_does_not_run_takes_nothing_on(gateway: FaultyGateway) -> None:
    """So that no transaction takes work for nobody."""
    bench = Bench(gateway)
    assert bench.worker.room == 0

    async with bench.running() as stopping:
        assert bench.worker.room > 0
        stopping.set()
        assert bench.worker.room == 0, "what it gives back would be its own again"


async def test_what_is_in_hand_takes_room(gateway: FaultyGateway) -> None:
    """More than can be done within a lease is left for others."""
    goes_on = asyncio.Event()

    async def waits(method: str) -> Outcome | None:
        await goes_on.wait()
        return None

    gateway.before = waits
    bench = Bench(gateway)
    async with bench.running():
        room = bench.worker.room
        bench.worker.offer([work_on(a_payment(), lease_ends=monotonic() + LEASE_SECONDS)])
        await eventually(lambda: gateway.calls)
        assert bench.worker.room == room - 1
        goes_on.set()
        await eventually(lambda: bench.worker.room == room)


async def _captured(gateway: FaultyGateway) -> Payment:
    """A payment that this provider has captured."""
    return await _paid(gateway, a_captured_payment())


async def _authorized(gateway: FaultyGateway) -> Payment:
    """A payment that this provider has authorized."""
    return await _paid(gateway, an_authorized_payment())


async def _paid(gateway: FaultyGateway, payment: Payment) -> Payment:
    charge = worker_module.charge_of(payment)
    outcome = await gateway.provider.charge(replace(charge, reference=""))
    assert isinstance(outcome, Captured | Authorized)
    attempt = replace(payment.attempt, provider_reference=outcome.reference)
    return replace(payment, attempt=attempt)


async def _offered(bench: Bench, work: Sequence[Work]) -> None:
    """Lets the worker do what it is offered."""
    async with bench.running():
        bench.worker.offer(work)
        await eventually(lambda: len(bench.answers) == len(work))
