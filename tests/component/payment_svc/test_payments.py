"""One payment per order, charged once and told once, whatever happens on the way."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from prometheus_client import REGISTRY

from chassis.broker import Message
from chassis.runtime import Role
from payment_svc.domain.attempt import CaptureMethod
from payment_svc.domain.outcomes import Outcome, RetrySameKey, Unknown
from tests.builders import eur
from tests.component.payment_svc.harness import ALL, PaymentService
from tests.eventually import eventually
from tests.payments import (
    a_payment_id,
    message_of,
    order_cancellation,
    order_created,
    order_id_of,
)


async def lost(method: str, outcome: Outcome) -> Outcome:
    """The provider did it, and its answer is lost on the way."""
    return Unknown("connection reset")


async def never_arrives(method: str) -> Outcome | None:
    """The request is lost on the way, and nobody can tell."""
    return Unknown("connection reset")


async def away(method: str) -> Outcome | None:
    """The provider cannot be reached."""
    return RetrySameKey(60.0)


async def unspoiled(method: str) -> Outcome | None:
    """The provider answers again."""
    return None


async def unspoiled_answer(method: str, outcome: Outcome) -> Outcome:
    """The provider is heard again."""
    return outcome


# --- charging -----------------------------------------------------------------------


async def test_an_order_placed_is_charged_and_told(service: PaymentService) -> None:
    """PaymentSucceeded, with all that ties it to the order's own event."""
    event = order_created()
    async with service.running():
        await service.hears(event)
        await service.tells(order_id_of(event), "PaymentSucceeded")

    (told,) = service.events
    payment = await service.payment_of(order_id_of(event))
    assert (told.aggregate, told.version) == (payment.name, 1)
    assert (told.correlation_id, told.causation_id) == ("corr-1", str(event.event_id))
    assert (payment.captured.minor_units, payment.captured.currency_code) == (2500, "EUR")
    assert service.charged(order_id_of(event)) == 1


async def test_a_redelivered_order_is_charged_once(service: PaymentService) -> None:
    """At least once is the broker's promise; once is ours."""
    event = order_created()
    async with service.running():
        await service.hears(event, event)
        await service.tells(order_id_of(event), "PaymentSucceeded")
        await service.hears(event)
        marker = order_created()
        await service.hears(marker)
        await service.tells(order_id_of(marker), "PaymentSucceeded")

    assert service.told_of(order_id_of(event)) == ["PaymentSucceeded"]
    assert service.gateway.asked("charge") == 2


async def test_an_order_told_under_two_events_is_charged_once(service: PaymentService) -> None:
    """One payment per order, whichever event asked for it."""
    order_id = a_payment_id()
    async with service.running():
        await service.hears(order_created(order_id), order_created(order_id))
        await service.hears(order_created(order_id))
        await service.tells(order_id, "PaymentSucceeded")
        await _settled(service)

    assert service.told_of(order_id) == ["PaymentSucceeded"]
    assert service.charged(order_id) == 1
    attempts = await service.rows("SELECT FROM payment_attempts WHERE order_id = $1", order_id)
    assert len(attempts) == 1
    assert len(await service.rows("SELECT FROM inbox")) == 4, "each was handled, in vain or not"


async def test_a_declined_card_is_told_with_its_reason(service: PaymentService) -> None:
    """Nothing is taken."""
    event = order_created(payment_method="pm_card_chargeDeclinedInsufficientFunds")
    async with service.running():
        await service.hears(event)
        await service.tells(order_id_of(event), "PaymentFailed")

    assert service.events[0].payload.failure_reason == "insufficient_funds"  # type: ignore[attr-defined]
    payment = await service.payment_of(order_id_of(event))
    assert payment.failure_reason == "insufficient_funds"
    assert service.charged(order_id_of(event)) == 0


async def test_a_payment_method_that_nobody_knows_fails(service: PaymentService) -> None:
    """The order ends, and says why."""
    event = order_created(payment_method="pm_nobody_knows")
    async with service.running():
        await service.hears(event)
        await service.tells(order_id_of(event), "PaymentFailed")

    assert service.events[0].payload.failure_reason == "payment_method_unknown"  # type: ignore[attr-defined]


async def test_manual_capture_is_told_as_authorized(service: PaymentService) -> None:
    """Reserved; nothing is due until somebody asks."""
    event = order_created(capture_method=CaptureMethod.MANUAL)
    async with service.running():
        await service.hears(event)
        await service.tells(order_id_of(event), "PaymentAuthorized")

    assert await service.rows("SELECT due FROM payments") == [{"due": None}]
    assert service.charged(order_id_of(event)) == 0


async def test_many_orders_share_transactions(service: PaymentService) -> None:
    """A batch of 64 is begun in one transaction and settled in a few."""
    events = [order_created(amount=eur(100 + n)) for n in range(200)]
    await service.hears(*events)
    async with service.running():
        await eventually(lambda: len(service.events) == 200, 20)

    begun = await service.rows("SELECT DISTINCT xmin::text FROM payment_attempts")
    assert len(begun) <= 60
    amounts = sorted(event.payload.amount.minor_units for event in service.events)  # type: ignore[attr-defined]
    assert amounts == [100 + n for n in range(200)]
    assert len(service.gateway.provider.ledger) == 200


@pytest.mark.parametrize("position", [0, 3, 6])
async def test_one_bad_event_in_a_batch_fails_no_other(
    service: PaymentService, position: int
) -> None:
    """It becomes a dead letter, with its reason; its neighbours are charged."""
    good = [order_created() for _ in range(6)]
    bad = order_created(capture_method=CaptureMethod.AUTOMATIC)
    bad.payload.capture_method = 0  # type: ignore[attr-defined]
    unreadable = Message(event_id=a_payment_id(), type=bad.type, body=b"\xff\xff")
    messages = [message_of(event) for event in good]
    messages[position:position] = [message_of(bad), unreadable]
    await service.broker.publish(messages)

    async with service.running():
        await eventually(lambda: len(service.events) == 6)
        dead = await eventually(
            lambda: service.broker.dead_letters("payment"), until=lambda found: len(found) == 2
        )

    assert {letter.error_class for letter in dead} == {"INVALID_FIELD"}
    assert {letter.message.event_id for letter in dead} == {bad.event_id, unreadable.event_id}
    for event in good:
        assert service.told_of(order_id_of(event)) == ["PaymentSucceeded"]


async def test_merchants_never_share_a_payment(service: PaymentService) -> None:
    """The same order id under two merchants is two orders."""
    order_id = a_payment_id()
    async with service.running():
        await service.hears(order_created(order_id), order_created(order_id, merchant="acme"))
        await eventually(lambda: len(service.events) == 2)

    assert {event.merchant for event in service.events} == {"default", "acme"}
    assert service.charged(order_id) == 2


async def test_work_that_no_worker_of_the_process_takes_on_is_left_for_others(
    service: PaymentService,
) -> None:
    """It is committed as not sent by anybody, and due at once."""
    event = order_created()
    order_id = order_id_of(event)
    async with service.running(only={"consume"}):
        await service.hears(event)
        await eventually(
            lambda: service.rows("SELECT state, due, due_time <= now() AS now FROM payments"),
            until=lambda rows: rows == [{"state": "PENDING", "due": "CHARGE", "now": True}],
        )
    assert service.gateway.calls == []

    async with service.running():
        await service.tells(order_id, "PaymentSucceeded")


# --- cancelling ---------------------------------------------------------------------


async def test_a_cancelled_order_that_was_paid_is_given_back(service: PaymentService) -> None:
    """RefundSucceeded over the whole amount, as the payment's second event."""
    event = order_created()
    order_id = order_id_of(event)
    cancellation = order_cancellation(order_id)
    async with service.running():
        await service.hears(event)
        await service.tells(order_id, "PaymentSucceeded")
        await service.hears(cancellation)
        await service.tells(order_id, "PaymentSucceeded", "RefundSucceeded")

    told = service.events[-1]
    assert told.version == 2
    assert told.causation_id == str(cancellation.event_id)
    assert told.payload.refunded_total.minor_units == 2500  # type: ignore[attr-defined]
    payment = await service.payment_of(order_id)
    assert payment.refunded.minor_units == 2500
    assert [refund.reason for refund in payment.refunds] == ["changed my mind"]
    (entry,) = service.gateway.provider.ledger.values()
    assert entry.refunded == eur(2500)


async def test_a_cancelled_order_that_was_authorized_is_let_go(service: PaymentService) -> None:
    """PaymentVoided."""
    event = order_created(capture_method=CaptureMethod.MANUAL)
    order_id = order_id_of(event)
    async with service.running():
        await service.hears(event)
        await service.tells(order_id, "PaymentAuthorized")
        await service.hears(order_cancellation(order_id))
        await service.tells(order_id, "PaymentAuthorized", "PaymentVoided")

    (entry,) = service.gateway.provider.ledger.values()
    assert entry.voided


async def test_an_order_cancelled_before_it_was_charged_is_called_off(
    service: PaymentService,
) -> None:
    """Placed and cancelled before anybody looked: the provider never hears of it."""
    event = order_created()
    order_id = order_id_of(event)
    async with service.running():
        await service.hears(event, order_cancellation(order_id))
        await service.tells(order_id, "PaymentVoided")
        await _settled(service)

    assert service.charged(order_id) == 0
    assert service.gateway.asked("charge") == 1, "only the order behind it"
    assert await service.rows("SELECT state, due FROM payments WHERE order_id = $1", order_id) == [
        {"state": "VOIDED", "due": None}
    ]


@pytest.mark.parametrize(
    ("payment_method", "capture_method", "told"),
    [
        ("pm_card_visa", CaptureMethod.AUTOMATIC, ["PaymentSucceeded", "RefundSucceeded"]),
        ("pm_card_visa", CaptureMethod.MANUAL, ["PaymentAuthorized", "PaymentVoided"]),
        ("pm_card_chargeDeclined", CaptureMethod.AUTOMATIC, ["PaymentFailed"]),
        ("pm_card_refundFail", CaptureMethod.AUTOMATIC, ["PaymentSucceeded", "RefundFailed"]),
    ],
)
async def test_an_order_cancelled_while_it_is_charged_ends_by_what_came_of_it(
    service: PaymentService, payment_method: str, capture_method: CaptureMethod, told: list[str]
) -> None:
    """The cancellation arrives while the provider is being asked."""
    event = order_created(payment_method=payment_method, capture_method=capture_method)
    order_id = order_id_of(event)
    asked, goes_on = asyncio.Event(), asyncio.Event()

    async def waits(method: str) -> Outcome | None:
        if method == "charge":
            asked.set()
            await goes_on.wait()
        return None

    service.gateway.before = waits
    async with service.running():
        await service.hears(event)
        await asyncio.wait_for(asked.wait(), 5)
        await service.hears(order_cancellation(order_id))
        await eventually(lambda: _marked(service))
        goes_on.set()
        await service.tells(order_id, *told)


async def test_an_order_cancelled_while_the_outcome_is_unknown_is_undone_later(
    service: PaymentService,
) -> None:
    """Nothing is said of the money before it is known; then it is given back, once."""
    event = order_created()
    order_id = order_id_of(event)
    service.gateway.after = lost
    async with service.running(ALL):
        await service.hears(event)
        await service.stands(order_id, "OUTCOME_UNKNOWN")
        await service.hears(order_cancellation(order_id))
        await eventually(lambda: _marked(service))
        assert service.told_of(order_id) == []
        service.gateway.after = unspoiled_answer
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentSucceeded", "RefundSucceeded")

    assert service.gateway.asked("charge") == 1
    assert service.gateway.asked("refund") == 1


async def test_a_cancellation_that_overtakes_its_order_waits_for_it(
    service: PaymentService,
) -> None:
    """It goes to a retry queue, and comes again."""
    order_id = a_payment_id()
    retried = _retried()
    async with service.running():
        await service.hears(order_cancellation(order_id))
        await eventually(lambda: _retried() > retried)
        await service.hears(order_created(order_id))
        await eventually(
            lambda: service.told_of(order_id),
            until=lambda told: told in (["PaymentSucceeded", "RefundSucceeded"], ["PaymentVoided"]),
        )


async def test_a_cancellation_of_nothing_becomes_a_dead_letter(service: PaymentService) -> None:
    """The order's own event is lost for good, so a person must look."""
    async with service.running():
        await service.hears(order_cancellation(a_payment_id()))
        (letter,) = await eventually(lambda: service.broker.dead_letters("payment"))

    assert "is to be cancelled and its payment is not here" in letter.error_detail


async def test_a_cancellation_told_twice_gives_back_once(service: PaymentService) -> None:
    """Under the same event, and under another one."""
    event = order_created()
    order_id = order_id_of(event)
    cancellation = order_cancellation(order_id)
    async with service.running():
        await service.hears(event)
        await service.tells(order_id, "PaymentSucceeded")
        await service.hears(cancellation, cancellation, order_cancellation(order_id))
        await service.tells(order_id, "PaymentSucceeded", "RefundSucceeded")
        await service.hears(order_cancellation(order_id))
        await _settled(service)

    assert service.told_of(order_id) == ["PaymentSucceeded", "RefundSucceeded"]
    assert service.gateway.asked("refund") == 1


async def test_a_cancellation_after_a_decline_is_recorded_and_says_nothing(
    service: PaymentService,
) -> None:
    """The order knows already that nothing was taken."""
    event = order_created(payment_method="pm_card_chargeDeclined")
    order_id = order_id_of(event)
    async with service.running():
        await service.hears(event)
        await service.tells(order_id, "PaymentFailed")
        await service.hears(order_cancellation(order_id))
        await eventually(lambda: _marked(service))
        await _settled(service)

    assert service.told_of(order_id) == ["PaymentFailed"]


async def test_a_refund_that_is_pending_is_asked_about_until_it_is_through(
    service: PaymentService,
) -> None:
    """The order waits for RefundSucceeded meanwhile."""
    event = order_created(payment_method="pm_card_pendingRefund")
    order_id = order_id_of(event)
    async with service.running(ALL):
        await service.hears(event)
        await service.tells(order_id, "PaymentSucceeded")
        await service.hears(order_cancellation(order_id))
        await eventually(
            lambda: service.rows("SELECT state, provider_reference FROM refunds"),
            until=lambda rows: (
                rows and rows[0]["state"] == "SUBMITTED" and rows[0]["provider_reference"]
            ),
        )
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentSucceeded", "RefundSucceeded")

    assert service.gateway.asked("refund") == 1


# --- lost answers and crashes -------------------------------------------------------


async def test_a_charge_whose_answer_is_lost_is_found_and_told_once(
    service: PaymentService,
) -> None:
    """The provider charged and we did not hear: asking tells."""
    event = order_created()
    order_id = order_id_of(event)
    service.gateway.after = lost
    async with service.running(ALL):
        await service.hears(event)
        payment = await service.stands(order_id, "OUTCOME_UNKNOWN")
        assert payment.captured.minor_units == 0
        service.gateway.after = unspoiled_answer
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentSucceeded")

    assert service.gateway.asked("charge") == 1
    assert service.charged(order_id) == 1


async def test_a_charge_that_never_arrived_is_sent_again_under_its_key(
    service: PaymentService,
) -> None:
    """The provider does not know it, so the same request is made once more."""
    event = order_created()
    order_id = order_id_of(event)
    service.gateway.before = never_arrives
    async with service.running(ALL):
        await service.hears(event)
        await service.stands(order_id, "OUTCOME_UNKNOWN")
        service.gateway.before = unspoiled
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentSucceeded")

    keys = {key for method, key in service.gateway.calls if method == "charge"}
    assert len(keys) == 1
    assert service.charged(order_id) == 1


async def test_a_charge_is_not_sent_again_once_its_key_is_old(service: PaymentService) -> None:
    """After a day the provider may have forgotten the key: only asking is left."""
    event = order_created()
    service.gateway.before = never_arrives
    async with service.running(ALL):
        await service.hears(event)
        await service.stands(order_id_of(event), "OUTCOME_UNKNOWN")
        service.gateway.before = unspoiled
        await service.lets_time_pass(minutes=60 * 24)
        await eventually(lambda: service.gateway.asked("find"))
        await eventually(
            lambda: service.rows("SELECT asked FROM payment_attempts"),
            until=lambda rows: rows == [{"asked": 2}],
        )

    assert service.gateway.provider.ledger == {}
    assert service.told_of(order_id_of(event)) == []


@pytest.mark.parametrize("charged", [False, True])
async def test_a_process_that_dies_while_charging_leaves_one_charge(
    service: PaymentService, charged: bool
) -> None:
    """Before the provider heard of it, or after: the next process asks first."""
    event = order_created()
    order_id = order_id_of(event)
    reached = asyncio.Event()

    async def hangs_before(method: str) -> Outcome | None:
        if not charged:
            reached.set()
            await asyncio.Event().wait()
        return None

    async def hangs_after(method: str, outcome: Outcome) -> Outcome:
        reached.set()
        await asyncio.Event().wait()
        return outcome

    service.gateway.before, service.gateway.after = hangs_before, hangs_after
    async with service.running() as crash:
        await service.hears(event)
        await asyncio.wait_for(reached.wait(), 5)
        await crash.now()
    assert await service.rows("SELECT state FROM payment_attempts") == [{"state": "SENT"}]
    assert service.charged(order_id) == int(charged)

    service.gateway.before, service.gateway.after = unspoiled, unspoiled_answer
    async with service.running(ALL):
        assert await service.rows(
            "SELECT due, due_time > now() + interval '20 s' AS later FROM payments"
        ) == [{"due": "RESOLVE", "later": True}], "the dead process's lease must run out first"
        await service.lets_time_pass(minutes=1)
        await service.tells(order_id, "PaymentSucceeded")

    assert service.charged(order_id) == 1
    keys = {key for method, key in service.gateway.calls if method in ("charge", "find")}
    assert len(keys) == 1


async def test_an_answer_that_comes_after_its_lease_counts_for_nothing(
    service: PaymentService,
) -> None:
    """A process wakes from a long pause with a decline in hand; another has charged since."""
    event = order_created()
    order_id = order_id_of(event)
    reached, goes_on = asyncio.Event(), asyncio.Event()

    async def pauses(method: str, outcome: Outcome) -> Outcome:
        if method == "charge" and not reached.is_set():
            reached.set()
            await goes_on.wait()
            return Unknown("woken late")
        return outcome

    service.gateway.after = pauses
    async with service.running(), service.running(frozenset({Role.SWEEP})):
        await service.hears(event)
        await asyncio.wait_for(reached.wait(), 5)
        await service.lets_time_pass(minutes=1)
        await service.tells(order_id, "PaymentSucceeded")
        goes_on.set()
        await _settled(service)

    assert service.told_of(order_id) == ["PaymentSucceeded"]
    assert (await service.payment_of(order_id)).captured.minor_units == 2500
    assert service.charged(order_id) == 1


async def test_a_refund_whose_answer_is_lost_is_found_and_told_once(
    service: PaymentService,
) -> None:
    """Money is given back once, however often we must ask."""
    event = order_created()
    order_id = order_id_of(event)
    async with service.running(ALL):
        await service.hears(event)
        await service.tells(order_id, "PaymentSucceeded")
        service.gateway.after = lost
        await service.hears(order_cancellation(order_id))
        await eventually(
            lambda: service.rows("SELECT state FROM refunds"),
            until=lambda rows: rows == [{"state": "OUTCOME_UNKNOWN"}],
        )
        service.gateway.after = unspoiled_answer
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentSucceeded", "RefundSucceeded")

    (entry,) = service.gateway.provider.ledger.values()
    assert entry.refunded == eur(2500)
    assert service.gateway.asked("refund") == 1


async def test_a_void_whose_answer_is_lost_is_found(service: PaymentService) -> None:
    """And PaymentVoided is told once."""
    event = order_created(capture_method=CaptureMethod.MANUAL)
    order_id = order_id_of(event)
    async with service.running(ALL):
        await service.hears(event)
        await service.tells(order_id, "PaymentAuthorized")
        service.gateway.after = lost
        await service.hears(order_cancellation(order_id))
        await service.stands(order_id, "OUTCOME_UNKNOWN")
        service.gateway.after = unspoiled_answer
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentAuthorized", "PaymentVoided")


async def test_a_process_that_ends_leaves_its_work_to_the_next(service: PaymentService) -> None:
    """What it could not do is due at once, without waiting for any lease."""
    event = order_created()
    service.gateway.before = away
    async with service.running():
        await service.hears(event)
        await eventually(lambda: service.gateway.calls)

    service.gateway.before = unspoiled
    (row,) = await service.rows("SELECT state, due FROM payments")
    assert row == {"state": "PROCESSING", "due": "CHARGE"}
    await service.lets_time_pass(minutes=1)
    async with service.running():
        await service.tells(order_id_of(event), "PaymentSucceeded")

    assert service.charged(order_id_of(event)) == 1


async def test_two_processes_share_the_work_and_charge_once(service: PaymentService) -> None:
    """Each order is somebody's, and nobody else's."""
    events = [order_created() for _ in range(100)]
    async with service.running(ALL), service.running(ALL):
        await service.hears(*events[:50])
        await service.hears(*events[50:])
        await eventually(lambda: len(service.events) >= 100, 20)
        await _settled(service)

    for event in events:
        assert service.told_of(order_id_of(event)) == ["PaymentSucceeded"]
    assert service.gateway.asked("charge") == 101, "one of them is the order behind all"


async def test_versions_of_a_payments_events_have_no_gaps(service: PaymentService) -> None:
    """Changes that are told to nobody do not count."""
    event = order_created(capture_method=CaptureMethod.MANUAL)
    order_id = order_id_of(event)
    async with service.running(ALL):
        service.gateway.after = lost
        await service.hears(event)
        await service.stands(order_id, "OUTCOME_UNKNOWN")
        service.gateway.after = unspoiled_answer
        await service.lets_time_pass(minutes=5)
        await service.tells(order_id, "PaymentAuthorized")
        await service.hears(order_cancellation(order_id))
        await service.tells(order_id, "PaymentAuthorized", "PaymentVoided")

    assert [event.version for event in service.events] == [1, 2]
    payment = await service.payment_of(order_id)
    assert int(payment.etag.strip('"')) > 2


async def test_connections_that_are_cut_cost_no_order_its_charge(
    service: PaymentService,
) -> None:
    """In the middle of it all; nobody restarts anything."""
    events = [order_created() for _ in range(40)]
    async with service.running():
        for position, event in enumerate(events):
            await service.hears(event)
            if position == 20:
                await service.rows(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                    " WHERE application_name = 'payment' AND datname = current_database()"
                )
        await eventually(lambda: len(service.events) >= 40, 20)

    for event in events:
        assert service.told_of(order_id_of(event)) == ["PaymentSucceeded"]
        assert service.charged(order_id_of(event)) == 1


async def _marked(service: PaymentService) -> bool:
    (row,) = await service.rows("SELECT cancel_requested FROM payments")
    return bool(row["cancel_requested"])


def _retried() -> float:
    """How many events have been put aside for a later attempt, in this run of the tests."""
    labels = {"consumer": "payment", "outcome": "retried"}
    return REGISTRY.get_sample_value("mesh_inbox_events_total", labels) or 0.0


async def _settled(service: PaymentService) -> None:
    """Waits until nothing is on its way: a last order goes through behind everything."""
    last: UUID = order_id_of(marker := order_created())
    await service.hears(marker)
    await eventually(lambda: service.told_of(last) == ["PaymentSucceeded"])
