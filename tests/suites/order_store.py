"""What every `OrderStore` must do, asked of PostgreSQL and of the fake in the same words.

A test module subclasses `OrderStoreSuite` and gives it a `kept` fixture: an empty store,
and a look at what it has written.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol
from uuid import uuid4

import pytest

from chassis.errors import (
    AlreadyExistsError,
    ConflictError,
    InvalidInputError,
    NotFoundError,
    RuleViolationError,
    ServiceError,
)
from chassis.request_key import RequestKey
from order_svc.commands import Answer, OrderStore
from order_svc.domain.order import Announcement, Order, OrderState, PaymentState
from order_svc.domain.saga import (
    CancellationRequested,
    PaymentAuthorized,
    PaymentCaptured,
    PaymentFact,
    PaymentFailed,
    on,
)
from order_svc.messages import order_resource
from tests.builders import (
    NOON,
    PAYMENT,
    a_basket,
    a_line,
    a_placement,
    a_rate,
    a_report,
    a_request_key,
    an_address,
    an_order,
    an_order_id,
    eur,
)

Version = tuple[str, int, Announcement]


class Kept(Protocol):
    """A store and a look at what it has written."""

    @property
    def store(self) -> OrderStore:
        """The store under test."""

    async def order(self, order: Order) -> Order | None:
        """The order of this name as it is kept now."""

    async def versions(self) -> Sequence[Version]:
        """The history of all orders: name, version and announcement, in order."""

    async def published(self) -> Sequence[Version]:
        """Those of them for which an event was staged."""


def decide(fact: PaymentFact, order: Order) -> Order | None:
    """What the saga says."""
    return on(fact, order, at=NOON)


def cancel(order: Order) -> Order | None:
    """What the saga says of a cancellation."""
    return on(CancellationRequested(reason="changed my mind"), order, at=NOON)


def never(order: Order) -> Order | None:
    """A decision that must not be asked for."""
    raise AssertionError(f"asked about {order.name}")


def with_ref(ref: str, merchant: str = "default") -> Order:
    """A new order under the caller's own number."""
    return an_order(merchant=merchant, basket=a_basket(client_order_ref=ref))


class OrderStoreSuite:
    """The behaviour of an `OrderStore`."""

    # --- place ------------------------------------------------------------------------

    async def test_an_order_is_kept_as_it_was_placed(self, kept: Kept) -> None:
        """Every field comes back: addresses, labels, amounts, settlement, times."""
        order = an_order(
            basket=a_basket(
                a_line("TEA"),
                a_line("CUP", quantity=1, unit_price=eur(999)),
                client_order_ref="web-1001",
                shipping_address=an_address(),
                billing_address=an_address(locality="Graz"),
                labels={"campaign": "spring", "note": 'größer, 日本 "quoted"'},
                discount=eur(100),
                shipping=eur(490),
                tax=eur(250),
            ),
            settlement_rate=a_rate("1.0837"),
            settlement_currency="USD",
        )
        await kept.store.place(a_placement(order))
        assert await kept.order(order) == order

    async def test_a_placement_answers_the_resource(self, kept: Kept) -> None:
        """The bytes that the caller gets are those of the order as committed."""
        order = an_order()
        answer = await kept.store.place(a_placement(order))
        assert answer == Answer(order_resource(order))

    async def test_a_placed_order_is_published(self, kept: Kept) -> None:
        """One order, one version, one event."""
        order = an_order()
        await kept.store.place(a_placement(order))
        created = [(order.name, 1, Announcement.CREATED)]
        assert list(await kept.versions()) == created
        assert list(await kept.published()) == created

    async def test_many_orders_placed_at_once_are_all_kept(self, kept: Kept) -> None:
        """Placements that share a transaction do not lose one another."""
        orders = [an_order() for _ in range(40)]
        answers = await asyncio.gather(*(kept.store.place(a_placement(order)) for order in orders))
        assert [answer.resource for answer in answers] == [order_resource(o) for o in orders]
        assert {name for name, _, _ in await kept.published()} == {o.name for o in orders}

    async def test_a_repeated_placement_answers_as_before(self, kept: Kept) -> None:
        """To the byte, marked as a replay, and nothing is written."""
        first = a_placement()
        again = replace(first, order=an_order(basket=a_basket(a_line("CUP"))))
        answer = await kept.store.place(first)
        replayed = await kept.store.place(again)
        assert replayed == Answer(answer.resource, replayed=True)
        assert len(await kept.versions()) == 1
        assert await kept.order(again.order) is None

    async def test_concurrent_twins_place_one_order(self, kept: Kept) -> None:
        """However many send the same request at once, one is done and all hear the same."""
        request = a_request_key()
        answers = await asyncio.gather(
            *(kept.store.place(a_placement(an_order(), request)) for _ in range(20))
        )
        assert len({answer.resource for answer in answers}) == 1
        assert [answer.replayed for answer in answers].count(False) == 1
        assert len(await kept.versions()) == 1

    async def test_a_request_id_used_for_something_else_is_refused(self, kept: Kept) -> None:
        """The same id with another content is a mistake, and nothing is done."""
        request = a_request_key()
        await kept.store.place(a_placement(request=request))
        other = a_placement(request=replace(request, fingerprint=b"else".ljust(32)))
        with pytest.raises(InvalidInputError) as caught:
            await kept.store.place(other)
        assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
        assert caught.value.metadata["request_id"] == str(request.request_id)
        assert await kept.order(other.order) is None

    async def test_concurrent_requests_of_one_id_and_two_contents_are_told_apart(
        self, kept: Kept
    ) -> None:
        """One is done and the other refused, never both and never mixed up."""
        request = a_request_key()
        one = a_placement(request=request)
        two = a_placement(request=replace(request, fingerprint=b"else".ljust(32)))
        done = await asyncio.gather(
            kept.store.place(one), kept.store.place(two), return_exceptions=True
        )
        refused = [o for o in done if isinstance(o, InvalidInputError)]
        assert [error.reason for error in refused] == ["IDEMPOTENCY_KEY_REUSED"]
        assert len(await kept.versions()) == 1

    async def test_one_request_id_of_two_merchants_is_two_requests(self, kept: Kept) -> None:
        """A key belongs to its merchant, so nobody reads another's answer."""
        request = a_request_key()
        ours = a_placement(request=request)
        theirs = a_placement(an_order(merchant="acme"), replace(request, merchant="acme"))
        assert not (await kept.store.place(ours)).replayed
        assert not (await kept.store.place(theirs)).replayed
        assert len(await kept.versions()) == 2

    # --- client_order_ref -------------------------------------------------------------

    async def test_a_client_order_ref_is_used_once(self, kept: Kept) -> None:
        """The second order is refused and told which one holds the number."""
        holder, other = with_ref("web-1"), with_ref("web-1")
        await kept.store.place(a_placement(holder))
        with pytest.raises(AlreadyExistsError) as caught:
            await kept.store.place(a_placement(other))
        assert caught.value.reason == "CLIENT_ORDER_REF_TAKEN"
        assert caught.value.metadata == {"client_order_ref": "web-1", "name": holder.name}
        assert await kept.order(other) is None
        assert len(await kept.published()) == 1

    async def test_a_refused_placement_is_not_remembered(self, kept: Kept) -> None:
        """Nothing was done under the request id, so it may be used for a better request."""
        await kept.store.place(a_placement(with_ref("web-1")))
        request = a_request_key()
        with pytest.raises(AlreadyExistsError):
            await kept.store.place(a_placement(with_ref("web-1"), request))
        better = a_placement(with_ref("web-2"), replace(request, fingerprint=b"b".ljust(32)))
        assert not (await kept.store.place(better)).replayed
        assert await kept.order(better.order) == better.order

    async def test_concurrent_orders_of_one_ref_make_one(self, kept: Kept) -> None:
        """One wins; every other is refused and told the winner's name."""
        orders = [with_ref("web-1") for _ in range(8)]
        done = await asyncio.gather(
            *(kept.store.place(a_placement(order)) for order in orders), return_exceptions=True
        )
        refused = [o for o in done if isinstance(o, AlreadyExistsError)]
        ((winner, _, _),) = await kept.versions()
        assert len(refused) == len(orders) - 1
        assert {error.metadata["name"] for error in refused} == {winner}

    async def test_concurrent_twins_of_a_taken_ref_are_all_refused(self, kept: Kept) -> None:
        """No twin is told of an order that was never written."""
        await kept.store.place(a_placement(with_ref("web-1")))
        request = a_request_key()
        done = await asyncio.gather(
            *(kept.store.place(a_placement(with_ref("web-1"), request)) for _ in range(5)),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in done] == [AlreadyExistsError] * 5

    async def test_one_bad_placement_does_not_fail_its_neighbours(self, kept: Kept) -> None:
        """Refused beside placed, in the same moment."""
        await kept.store.place(a_placement(with_ref("web-1")))
        good = [an_order() for _ in range(5)]
        bad = with_ref("web-1")
        done = await asyncio.gather(
            *(kept.store.place(a_placement(order)) for order in [*good[:2], bad, *good[2:]]),
            return_exceptions=True,
        )
        assert [isinstance(outcome, ServiceError) for outcome in done] == [
            False, False, True, False, False, False,
        ]  # fmt: skip
        for order in good:
            assert await kept.order(order) == order

    async def test_two_merchants_may_use_the_same_ref(self, kept: Kept) -> None:
        """The caller's number is unique per merchant."""
        await kept.store.place(a_placement(with_ref("web-1")))
        theirs = with_ref("web-1", merchant="acme")
        await kept.store.place(a_placement(theirs))
        assert await kept.order(theirs) == theirs

    async def test_orders_without_a_ref_do_not_clash(self, kept: Kept) -> None:
        """No number is no number, not the same one."""
        await kept.store.place(a_placement())
        await kept.store.place(a_placement())
        assert len(await kept.versions()) == 2

    # --- replay -----------------------------------------------------------------------

    async def test_a_request_has_no_answer_before_it_is_done(self, kept: Kept) -> None:
        """Asking is no doing."""
        assert await kept.store.replay(a_request_key()) is None
        assert list(await kept.versions()) == []

    async def test_a_request_that_was_done_has_its_answer(self, kept: Kept) -> None:
        """Without writing anything."""
        placement = a_placement()
        answer = await kept.store.place(placement)
        replayed = await kept.store.replay(placement.request)
        assert replayed == Answer(answer.resource, replayed=True)

    async def test_asking_for_the_answer_of_something_else_is_refused(self, kept: Kept) -> None:
        """A reused id is found out before anything else is done for it."""
        placement = a_placement()
        await kept.store.place(placement)
        with pytest.raises(InvalidInputError) as caught:
            await kept.store.replay(replace(placement.request, fingerprint=b"else".ljust(32)))
        assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"

    # --- change -----------------------------------------------------------------------

    async def test_a_change_is_kept_answered_and_published(self, kept: Kept) -> None:
        """The next version, whole."""
        order = await self._placed(kept)
        answer = await kept.store.change(_cancelling(), order.merchant, order.order_id, cancel)
        changed = await kept.order(order)
        assert changed == cancel(order)
        assert changed is not None
        assert answer == Answer(order_resource(changed))
        assert list(await kept.published())[1:] == [
            (order.name, 2, Announcement.CANCELLATION_REQUESTED)
        ]

    async def test_a_decision_to_change_nothing_answers_the_order_as_it_is(
        self, kept: Kept
    ) -> None:
        """And the request is remembered as done."""
        order = await self._placed(kept)
        request = _cancelling()
        answer = await kept.store.change(request, order.merchant, order.order_id, lambda _: None)
        again = await kept.store.change(request, order.merchant, order.order_id, never)
        assert answer == Answer(order_resource(order))
        assert again == Answer(answer.resource, replayed=True)
        assert len(await kept.versions()) == 1

    async def test_a_repeated_change_answers_as_before(self, kept: Kept) -> None:
        """Also when the order has moved on since, and without deciding again."""
        order = await self._placed(kept)
        request = _cancelling()
        first = await kept.store.change(request, order.merchant, order.order_id, cancel)
        failed = PaymentFailed(payment=PAYMENT, reason="card_declined")
        await kept.store.record([a_report(order, failed)], decide)
        again = await kept.store.change(request, order.merchant, order.order_id, never)
        assert again == Answer(first.resource, replayed=True)

    async def test_concurrent_twins_change_an_order_once(self, kept: Kept) -> None:
        """One version, and the same answer for all."""
        order = await self._placed(kept)
        request = _cancelling()
        answers = await asyncio.gather(
            *(kept.store.change(request, order.merchant, order.order_id, cancel) for _ in range(5))
        )
        assert len({answer.resource for answer in answers}) == 1
        assert [answer.replayed for answer in answers].count(False) == 1
        assert len(await kept.versions()) == 2

    async def test_a_change_under_another_requests_id_is_refused(self, kept: Kept) -> None:
        """The id of one cancellation cannot be used for another order's."""
        one, two = await self._placed(kept), await self._placed(kept)
        request = _cancelling()
        await kept.store.change(request, one.merchant, one.order_id, cancel)
        other = replace(request, fingerprint=b"another order".ljust(32))
        with pytest.raises(InvalidInputError) as caught:
            await kept.store.change(other, two.merchant, two.order_id, cancel)
        assert caught.value.reason == "IDEMPOTENCY_KEY_REUSED"
        assert await kept.order(two) == two

    async def test_an_id_is_shared_by_no_two_methods(self, kept: Kept) -> None:
        """Placing and cancelling under one id are two requests."""
        request = a_request_key()
        order = an_order()
        await kept.store.place(a_placement(order, request))
        answer = await kept.store.change(
            replace(request, method="CancelOrder"), order.merchant, order.order_id, cancel
        )
        assert not answer.replayed

    async def test_an_order_that_is_not_there_cannot_change(self, kept: Kept) -> None:
        """The error names it."""
        missing = an_order_id()
        with pytest.raises(NotFoundError) as caught:
            await kept.store.change(_cancelling(), "default", missing, never)
        assert caught.value.reason == "ORDER_NOT_FOUND"
        assert caught.value.metadata == {"name": f"merchants/default/orders/{missing}"}

    async def test_another_merchants_order_is_not_there(self, kept: Kept) -> None:
        """The id alone finds nothing."""
        order = await self._placed(kept)
        with pytest.raises(NotFoundError):
            await kept.store.change(_cancelling(merchant="acme"), "acme", order.order_id, never)

    async def test_a_refused_change_leaves_no_trace(self, kept: Kept) -> None:
        """Nothing is written, and the request may be made again."""
        order = await self._placed(kept)
        request = _cancelling()

        def refuse(order: Order) -> Order | None:
            raise RuleViolationError("ILLEGAL_TRANSITION", "not now")

        with pytest.raises(RuleViolationError):
            await kept.store.change(request, order.merchant, order.order_id, refuse)
        assert await kept.order(order) == order
        answer = await kept.store.change(request, order.merchant, order.order_id, cancel)
        assert not answer.replayed

    async def test_changes_of_one_order_at_once_are_decided_one_after_the_other(
        self, kept: Kept
    ) -> None:
        """Each sees what the one before it made; none is lost."""
        order = await self._placed(kept)
        seen: list[int] = []

        def note(order: Order) -> Order | None:
            seen.append(order.version)
            return order.changed(Announcement.CONFIRMED, at=NOON)

        await asyncio.gather(
            *(
                kept.store.change(_cancelling(), order.merchant, order.order_id, note)
                for _ in range(5)
            )
        )
        assert seen == [1, 2, 3, 4, 5]
        assert [version for _, version, _ in await kept.published()] == [1, 2, 3, 4, 5, 6]

    async def test_one_refused_change_does_not_fail_its_neighbours(self, kept: Kept) -> None:
        """Cancelled beside refused and not there, in the same moment."""
        orders = [await self._placed(kept) for _ in range(4)]

        def refuse(order: Order) -> Order | None:
            raise RuleViolationError("ILLEGAL_TRANSITION", "not now")

        targets = [
            (orders[0], cancel), (an_order(), never), (orders[1], refuse),
            (orders[2], cancel), (orders[3], cancel),
        ]  # fmt: skip
        done = await asyncio.gather(
            *(
                kept.store.change(_cancelling(), order.merchant, order.order_id, decide)
                for order, decide in targets
            ),
            return_exceptions=True,
        )
        assert [type(outcome) for outcome in done] == [
            Answer, NotFoundError, RuleViolationError, Answer, Answer,
        ]  # fmt: skip
        assert await kept.order(orders[1]) == orders[1]
        for order in (orders[0], orders[2], orders[3]):
            assert await kept.order(order) == cancel(order)

    # --- record -----------------------------------------------------------------------

    async def test_a_payment_moves_its_order(self, kept: Kept) -> None:
        """The saga's next version is kept and published."""
        order = await self._placed(kept)
        await kept.store.record([a_report(order)], decide)
        changed = await kept.order(order)
        assert changed is not None
        assert changed.state is OrderState.CONFIRMED
        assert changed.payment_state is PaymentState.PAID
        assert changed.payment == PAYMENT
        assert list(await kept.published())[1:] == [(order.name, 2, Announcement.CONFIRMED)]

    async def test_an_event_delivered_twice_counts_once(self, kept: Kept) -> None:
        """In two batches, and twice in one batch."""
        order = await self._placed(kept)
        authorized = a_report(order, PaymentAuthorized(payment=PAYMENT))
        await kept.store.record([authorized, authorized], decide)
        await kept.store.record([authorized], lambda *_: never(order))
        assert len(await kept.versions()) == 2

    async def test_concurrent_deliveries_of_one_event_count_once(self, kept: Kept) -> None:
        """Two consumers that hold the same event have one effect."""
        order = await self._placed(kept)
        event_id = uuid4()
        asked: list[Order] = []

        def counted(fact: PaymentFact, order: Order) -> Order | None:
            asked.append(order)
            return decide(fact, order)

        await asyncio.gather(
            *(kept.store.record([a_report(order, event_id=event_id)], counted) for _ in range(4))
        )
        assert len(asked) == 1
        assert len(await kept.versions()) == 2

    async def test_reports_of_one_order_in_one_batch_are_applied_in_order(self, kept: Kept) -> None:
        """Each makes a version; the last is how the order stands."""
        order = await self._placed(kept)
        reports = [
            a_report(order, PaymentAuthorized(payment=PAYMENT)),
            a_report(order, PaymentCaptured(payment=PAYMENT)),
        ]
        await kept.store.record(reports, decide)
        changed = await kept.order(order)
        assert changed is not None
        assert (changed.version, changed.payment_state) == (3, PaymentState.PAID)
        assert [version for _, version, _ in await kept.versions()] == [1, 2, 3]

    async def test_reports_of_many_orders_share_a_batch(self, kept: Kept) -> None:
        """Every order of the batch moves."""
        orders = [await self._placed(kept) for _ in range(5)]
        await kept.store.record([a_report(order) for order in orders], decide)
        for order in orders:
            changed = await kept.order(order)
            assert changed is not None
            assert changed.state is OrderState.CONFIRMED

    async def test_what_only_the_timeline_tells_is_not_published(self, kept: Kept) -> None:
        """A capture after an authorization is in the history and wakes nobody."""
        order = await self._placed(kept)
        await kept.store.record([a_report(order, PaymentAuthorized(payment=PAYMENT))], decide)
        await kept.store.record([a_report(order)], decide)
        assert [told for _, _, told in await kept.versions()][2:] == [Announcement.PAYMENT_RECORDED]
        assert len(await kept.published()) == 2

    async def test_a_report_that_changes_nothing_is_seen_all_the_same(self, kept: Kept) -> None:
        """Asked once, never again."""
        order = await self._placed(kept)
        report = a_report(order)
        await kept.store.record([report], lambda *_: None)
        await kept.store.record([report], lambda *_: never(order))
        assert await kept.order(order) == order

    async def test_a_report_of_an_unknown_order_fails_its_whole_batch(self, kept: Kept) -> None:
        """It may come later; until then nothing of the batch is applied or remembered."""
        order = await self._placed(kept)
        known, unknown = a_report(order), a_report(an_order())
        with pytest.raises(ConflictError):
            await kept.store.record([known, unknown], decide)
        assert await kept.order(order) == order
        await kept.store.record([known], decide)
        assert len(await kept.versions()) == 2

    @staticmethod
    async def _placed(kept: Kept) -> Order:
        order = an_order()
        await kept.store.place(a_placement(order))
        return order


def _cancelling(merchant: str = "default") -> RequestKey:
    return a_request_key(method="CancelOrder", merchant=merchant)
