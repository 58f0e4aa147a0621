"""What changes orders: the commands, their handlers, and what those need of storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from chassis.context import Cause
from chassis.errors import ConflictError
from chassis.ids import NewId, Now
from chassis.mediator import Command
from chassis.money import Money
from chassis.request_key import Replay, RequestKey
from chassis.settings import Merchant
from order_svc.domain.order import Basket, CaptureMethod, Order, Rate
from order_svc.domain.saga import CancellationRequested, PaymentFact, on


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command answers: the order's resource, serialized as it was committed.

    `replayed` says that the command had been done before and this is the answer it
    was given then.
    """

    resource: bytes
    replayed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateOrder(Command[Answer]):
    """Place an order."""

    request: RequestKey
    merchant: str
    basket: Basket
    payment_method: str
    expected_total: Money | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelOrder(Command[Answer]):
    """Undo an order."""

    request: RequestKey
    merchant: str
    order_id: UUID
    reason: str = ""
    etag: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PaymentReport:
    """A fact about an order's money, and the event that brought it."""

    merchant: str
    order_id: UUID
    fact: PaymentFact
    cause: Cause


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordPayments(Command[None]):
    """Let the saga act on what payment reported; the whole batch or nothing."""

    reports: Sequence[PaymentReport] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """An order about to be written, and the request that asked for it."""

    request: RequestKey
    order: Order


class OrderStore(Protocol):
    """Keeps orders; every method is one transaction."""

    async def place(self, placement: Placement) -> Answer:
        """Writes a new order, its event and its request's answer, or replays that answer.

        Raises:
            InvalidInputError: The request id was used for another request.
            AlreadyExistsError: The client_order_ref is another order's.
        """
        ...

    async def replay(self, request: RequestKey) -> Answer | None:
        """The answer that the request was given before, if any.

        Raises:
            InvalidInputError: The request id was used for another request.
        """
        ...

    async def change(
        self,
        request: RequestKey,
        merchant: str,
        order_id: UUID,
        decide: Callable[[Order], Order | None],
    ) -> Answer:
        """Locks an order, lets `decide` say what becomes of it, and writes that.

        A request that was done before is replayed without asking `decide`.

        Raises:
            NotFoundError: There is no such order.
            InvalidInputError: The request id was used for another request.
            ServiceError: What `decide` raises; nothing is written.
        """
        ...

    async def record(
        self,
        reports: Sequence[PaymentReport],
        decide: Callable[[PaymentFact, Order], Order | None],
    ) -> None:
        """Applies reports in their order, each once however often it is delivered.

        Raises:
            ConflictError: An order is not there (yet).
        """
        ...


class RateSource(Protocol):
    """Where exchange rates come from."""

    async def rate(self, base: str, quote: str) -> Rate:
        """How much of `quote` one unit of `base` is worth.

        Raises:
            InvalidInputError: Nobody publishes a rate of this pair.
            UnavailableError: No rate is known that is fresh enough.
        """
        ...


class CreateOrderHandler:
    """Places an order, exactly once per merchant and request id."""

    def __init__(
        self,
        *,
        store: OrderStore,
        rates: RateSource,
        merchants: Mapping[str, Merchant],
        new_id: NewId,
        now: Now,
    ) -> None:
        self._store = store
        self._rates = rates
        self._merchants = merchants
        self._new_id = new_id
        self._now = now

    async def __call__(self, command: CreateOrder) -> Answer:
        """Places the order, or answers as before."""
        settlement_currency = self._merchants[command.merchant].settlement_currency
        rate = None
        if settlement_currency != command.basket.currency_code:
            # A repeat must not depend on the exchange rates being there.
            if (answer := await self._store.replay(command.request)) is not None:
                return answer
            # Bad input is told before anyone is asked for a rate.
            command.basket.agreed_total(command.expected_total)
            rate = await self._rates.rate(command.basket.currency_code, settlement_currency)
        order = Order.place(
            merchant=command.merchant,
            order_id=self._new_id(),
            basket=command.basket,
            payment_method=command.payment_method,
            expected_total=command.expected_total,
            settlement_rate=rate,
            settlement_currency=settlement_currency,
            placed_at=self._now(),
        )
        return await self._store.place(Placement(request=command.request, order=order))


class CancelOrderHandler:
    """Asks for an order to be undone, exactly once per merchant and request id."""

    def __init__(self, *, store: OrderStore, now: Now) -> None:
        self._store = store
        self._now = now

    async def __call__(self, command: CancelOrder) -> Answer:
        """Moves the order to CANCELLING, or answers as before."""

        def decide(order: Order) -> Order | None:
            if command.etag and command.etag != order.etag:
                raise ConflictError(
                    "ETAG_MISMATCH",
                    f"the order is at {order.etag}, not at {command.etag}; read it again",
                    metadata={"name": order.name},
                )
            return on(CancellationRequested(reason=command.reason), order, at=self._now())

        return await self._store.change(command.request, command.merchant, command.order_id, decide)


class RecordPaymentsHandler:
    """Lets the saga act on what the payment service reports."""

    def __init__(self, *, store: OrderStore, now: Now) -> None:
        self._store = store
        self._now = now

    async def __call__(self, command: RecordPayments) -> None:
        """Applies every report of the batch, in one transaction."""
        await self._store.record(
            command.reports, lambda fact, order: on(fact, order, at=self._now())
        )


def capture_method_of(merchant: Merchant) -> CaptureMethod:
    """The merchant's own setting, for orders that do not say."""
    return CaptureMethod[merchant.capture_method.upper()]


def replayed(found: Replay) -> Answer:
    """The answer of a request that was done before."""
    return Answer(found.answer, replayed=True)
