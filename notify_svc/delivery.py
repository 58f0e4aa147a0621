"""How a queued mail comes to its end: claimed, rendered, handed over, settled.

A mail is claimed under a lease before it is sent, so that no two processes send it, and
its outcome is written under the same claim. Between the mail server's acceptance and
that write lies the one gap that SMTP leaves: a process that dies in it makes the next
one send the mail again, under the same Message-ID and byte for byte the same
(docs/adr/0040).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol, TypeAlias
from uuid import UUID

import structlog
from prometheus_client import Counter, Histogram

from chassis.context import CallContext, entered
from chassis.errors import ConflictError, OverloadedError, UnavailableError
from chassis.group_commit import GroupCommit
from chassis.money import Money
from chassis.periodic import pause
from chassis.worker import Worker
from notify_svc.commands import Audience, Recipient, State

BATCH_MAX: Final = 32
IN_HAND_PER_CONNECTION: Final = 16
"""Mails that a process takes into its hands for each connection that it may have. Each of
them is begun with at once, so their time limit allows a mail server more than a second
for each mail; more are left in the table, where another process may take them."""

SETTLE_SECONDS: Final = 15.0
"""What a lease allows beyond the time limit of sending, to write down the outcome."""

SETTLE_EVERY_SECONDS: Final = 0.01
"""The shortest time between two commits of outcomes. Nobody waits for them, so several share
one; it also bounds what a crash may send twice to the mails of so short a time."""

_ROOM_SECONDS = 0.05

_log = structlog.get_logger("delivery")
_OUTCOMES = Counter(
    "mesh_notifications_total", "Tries to send a notification, by outcome.", ["template", "outcome"]
)
_SECONDS = Histogram(
    "mesh_notification_send_seconds",
    "Time from a mail's turn to the mail server's answer.",
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """A notification that this process has claimed, and all that its mail says.

    Attributes:
        recipient: The order's customer; None when their row is gone.
        lease_end: Until when nobody else claims it, by the event loop's clock.
    """

    merchant: str
    notification_id: UUID
    order_id: UUID
    event_id: UUID
    audience: Audience
    template: str
    locale: str
    amount: Money
    payment_state: str
    detail: str
    occur_time: datetime
    create_time: datetime
    attempts: int
    context: CallContext
    recipient: Recipient | None
    claim: UUID
    lease_end: float


@dataclass(frozen=True, slots=True)
class Mail:
    """A mail as it goes over the wire, and to whom."""

    address: str
    content: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The mail server has taken it."""


@dataclass(frozen=True, slots=True)
class Deferred:
    """Not now; whether the mail server has it may be unknown. Names no address."""

    reason: str


@dataclass(frozen=True, slots=True)
class Refused:
    """Never. Names no address."""

    reason: str


SendOutcome: TypeAlias = Accepted | Deferred | Refused


class MailRenderer(Protocol):
    """Makes the mail of a notification."""

    def render(self, outgoing: Outgoing) -> Mail | None:
        """The mail; the same bytes every time. None when there is nobody to write to."""
        ...


class MailChannel(Protocol):
    """Hands mails to a mail server."""

    @property
    def send_seconds(self) -> float:
        """The longest that `send` takes."""
        ...

    async def send(self, mail: Mail) -> SendOutcome:
        """Hands over one mail. Never raises for the mail server's trouble."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What became of a try: SENT, RETRYING, DEAD or SUPPRESSED, under the try's claim.

    Attributes:
        jitter: In 0.1 to 1, the part of the full pause after which to try again.
    """

    merchant: str
    notification_id: UUID
    claim: UUID
    state: State
    failure_reason: str
    jitter: float


class DeliveryStore(Protocol):
    """Keeps what is to be sent."""

    async def claim(self, limit: int, *, lease_seconds: float) -> Sequence[Outgoing]:
        """Claims notifications that are due and that nobody holds."""
        ...

    async def settle(self, settlements: Sequence[Settlement]) -> Sequence[State | None]:
        """Writes down outcomes, in one transaction; answers the states that they led to.

        None means that the claim was not ours any more, and nothing was written. Tries
        that were put off for three days lead to DEAD.
        """
        ...


class Delivery:
    """Sends what is queued; `worker` does it in the background.

    Args:
        store: Where notifications are claimed and settled.
        renderer: Makes mails.
        channel: Takes them.
        in_hand_max: Mails that this process works on at once.
    """

    def __init__(
        self,
        *,
        store: DeliveryStore,
        renderer: MailRenderer,
        channel: MailChannel,
        in_hand_max: int,
    ) -> None:
        self._store = store
        self._renderer = renderer
        self._channel = channel
        self._settling: GroupCommit[Settlement, State | None] = GroupCommit(
            "settle-notifications", self._settle_together
        )
        self._in_hand_max = in_hand_max
        self._batch_max = min(BATCH_MAX, in_hand_max)
        self._in_hand = 0
        self._freed = asyncio.Event()
        self.worker: Worker[Outgoing] = Worker(
            "delivery",
            claim=self._claim,
            perform=self.perform,
            batch_max=self._batch_max,
            # What is in hand is begun with, in however many rounds it came.
            rounds_max=in_hand_max + 1,
            poll_seconds=0.2,
            backlog_max=in_hand_max,
        )

    @property
    def lease_seconds(self) -> float:
        """How long a claim must hold."""
        return self._channel.send_seconds + SETTLE_SECONDS

    @property
    def room(self) -> int:
        """How many notifications a transaction may claim for this process right now."""
        return max(self._in_hand_max - self._in_hand, 0) if self.worker.running else 0

    def offer(self, claimed: Sequence[Outgoing]) -> None:
        """Takes what a committed transaction has claimed for this process."""
        self._in_hand += len(claimed)
        self.worker.offer(claimed)

    async def perform(self, batch: Sequence[Outgoing]) -> None:
        """Sends a batch, each mail by itself, and settles each as soon as it is known."""
        # One that fails must not keep us from waiting for the others.
        results = await asyncio.gather(
            *(self._deliver(outgoing) for outgoing in batch), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _claim(self, limit: int) -> Sequence[Outgoing]:
        if self._in_hand_max - self._in_hand < limit:
            # Soon there is room for a whole batch, unless the mail server is slow.
            self._freed.clear()
            await pause(_ROOM_SECONDS, self._freed)
        limit = min(limit, self._in_hand_max - self._in_hand)
        if limit <= 0:
            return ()
        claimed = await self._store.claim(limit, lease_seconds=self.lease_seconds)
        self._in_hand += len(claimed)
        return claimed

    async def _deliver(self, outgoing: Outgoing) -> None:
        try:
            with entered(outgoing.context):
                await self._bring_to_its_end(outgoing)
        finally:
            self._in_hand -= 1
            if self._in_hand_max - self._in_hand >= self._batch_max:
                self._freed.set()

    async def _bring_to_its_end(self, outgoing: Outgoing) -> None:
        clock = asyncio.get_running_loop().time
        if clock() + self._channel.send_seconds > outgoing.lease_end:
            # We were held up; by the time the mail were sent, another process might
            # have claimed it too. It is claimed again when the lease has ended.
            _log.warning("notification.late", notification=str(outgoing.notification_id))
            return
        begun = time.perf_counter()
        outcome = await self._send(outgoing)
        seconds = time.perf_counter() - begun
        _SECONDS.observe(seconds)
        settlement = _settlement_of(outgoing, outcome)
        state = await self._settle(settlement, outgoing.lease_end)
        _OUTCOMES.labels(outgoing.template, state.name if state else "LOST").inc()
        level = _log.info if state in (State.SENT, State.SUPPRESSED) else _log.warning
        level(
            "notification",
            notification=str(outgoing.notification_id),
            order=str(outgoing.order_id),
            template=outgoing.template,
            state=state.name if state else "LOST",
            attempts=outgoing.attempts,
            seconds=round(seconds, 4),
            reason=settlement.failure_reason,
        )

    async def _send(self, outgoing: Outgoing) -> SendOutcome | None:
        """The outcome; None when there is nobody to write to."""
        try:
            mail = self._renderer.render(outgoing)
        except Exception as error:  # noqa: BLE001 - one that fails must not fail its neighbours
            # A fault of ours. Three days of trying leave time to put it right.
            _log.error(
                "rendering.failed", template=outgoing.template, locale=outgoing.locale,
                notification=str(outgoing.notification_id), error=type(error).__name__,
            )  # fmt: skip
            return Deferred(f"it could not be rendered: {type(error).__name__}")
        return None if mail is None else await self._channel.send(mail)

    async def _settle_together(self, settlements: Sequence[Settlement]) -> Sequence[State | None]:
        states = await self._store.settle(settlements)
        # What comes meanwhile is gathered behind this flush and goes with the next one.
        await asyncio.sleep(SETTLE_EVERY_SECONDS)
        return states

    async def _settle(self, settlement: Settlement, lease_end: float) -> State | None:
        """Writes down the outcome, as long as the claim may hold.

        Giving up any earlier would have the mail sent twice for a database that was away
        for a moment.
        """
        clock = asyncio.get_running_loop().time
        while True:
            try:
                return await self._settling.submit(settlement)
            except (ConflictError, OverloadedError, UnavailableError):
                pause_seconds = random.uniform(0.2, 1.0)
                if clock() + pause_seconds > lease_end:
                    raise
                await asyncio.sleep(pause_seconds)


def _settlement_of(outgoing: Outgoing, outcome: SendOutcome | None) -> Settlement:
    state, reason = State.SENT, ""
    if outcome is None:
        state, reason = State.SUPPRESSED, "the recipient's address was erased"
    elif isinstance(outcome, Deferred):
        state, reason = State.RETRYING, outcome.reason
    elif isinstance(outcome, Refused):
        state, reason = State.DEAD, outcome.reason
    return Settlement(
        merchant=outgoing.merchant,
        notification_id=outgoing.notification_id,
        claim=outgoing.claim,
        state=state,
        failure_reason=reason,
        jitter=random.uniform(0.1, 1.0),
    )
