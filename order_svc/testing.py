"""Orders in memory, for tests of handlers; passes `tests/suites/order_store.py`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from uuid import UUID

from chassis.errors import AlreadyExistsError, ConflictError, InvalidInputError, NotFoundError
from chassis.request_key import RequestKey
from order_svc.commands import Answer, PaymentReport, Placement
from order_svc.domain.order import Announcement, Order
from order_svc.domain.saga import PaymentFact
from order_svc.messages import UNANNOUNCED, order_resource


class InMemoryOrders:
    """An `OrderStore` that forgets everything with its process.

    Attributes:
        orders: Every order as it is now, by resource name.
        history: Every version of every order, in the order in which they were written.
    """

    def __init__(self) -> None:
        self.orders: dict[str, Order] = {}
        self.history: list[Order] = []
        self._answers: dict[tuple[str, str, UUID], tuple[bytes, bytes]] = {}
        self._seen: set[UUID] = set()

    @property
    def announced(self) -> list[tuple[str, int, Announcement]]:
        """What was published: the order's name, its version, and what that is told as."""
        return [
            (order.name, order.version, order.announcement)
            for order in self.history
            if order.announcement not in UNANNOUNCED
        ]

    async def place(self, placement: Placement) -> Answer:
        """See `OrderStore.place`."""
        # As with a database, others get to run in between.
        await asyncio.sleep(0)
        if (answer := self._replayed(placement.request)) is not None:
            return answer
        order = placement.order
        if (holder := self._holder_of(order)) is not None:
            raise AlreadyExistsError(
                "CLIENT_ORDER_REF_TAKEN",
                "the merchant has an order with this client_order_ref already",
                metadata={
                    "client_order_ref": order.basket.client_order_ref,
                    "name": holder.name,
                },
            )
        self._write(order)
        return self._answered(placement.request, order)

    async def replay(self, request: RequestKey) -> Answer | None:
        """See `OrderStore.replay`."""
        await asyncio.sleep(0)
        return self._replayed(request)

    async def change(
        self,
        request: RequestKey,
        merchant: str,
        order_id: UUID,
        decide: Callable[[Order], Order | None],
    ) -> Answer:
        """See `OrderStore.change`."""
        await asyncio.sleep(0)
        name = f"merchants/{merchant}/orders/{order_id}"
        if name not in self.orders:
            raise NotFoundError("ORDER_NOT_FOUND", f"there is no {name}", metadata={"name": name})
        if (answer := self._replayed(request)) is not None:
            return answer
        decided = decide(self.orders[name])
        if decided is not None:
            self._write(decided)
        return self._answered(request, self.orders[name])

    async def record(
        self,
        reports: Sequence[PaymentReport],
        decide: Callable[[PaymentFact, Order], Order | None],
    ) -> None:
        """See `OrderStore.record`."""
        await asyncio.sleep(0)
        todo = {
            report.cause.event_id: report
            for report in reports
            if report.cause.event_id not in self._seen
        }
        decided: list[Order] = []
        current = dict(self.orders)
        for report in todo.values():
            name = f"merchants/{report.merchant}/orders/{report.order_id}"
            if name not in current:
                raise ConflictError("CONCURRENT_CHANGE", f"{name} is not here")
            version = decide(report.fact, current[name])
            if version is not None:
                current[name] = version
                decided.append(version)
        self._seen.update(todo)
        for order in decided:
            self._write(order)

    def _holder_of(self, order: Order) -> Order | None:
        ref = order.basket.client_order_ref
        for other in self.orders.values():
            if ref and (other.merchant, other.basket.client_order_ref) == (order.merchant, ref):
                return other
        return None

    def _write(self, order: Order) -> None:
        self.orders[order.name] = order
        self.history.append(order)

    def _answered(self, request: RequestKey, order: Order) -> Answer:
        resource = order_resource(order)
        self._answers[request.identity] = (request.fingerprint, resource)
        return Answer(resource)

    def _replayed(self, request: RequestKey) -> Answer | None:
        known = self._answers.get(request.identity)
        if known is None:
            return None
        fingerprint, answer = known
        if fingerprint != request.fingerprint:
            raise InvalidInputError.of_field(
                "IDEMPOTENCY_KEY_REUSED",
                "request_id",
                "was used before with another request",
                request_id=str(request.request_id),
            )
        return Answer(answer, replayed=True)
