"""One `consume` call over PostgreSQL: claims, leases and settlement, whatever connections break."""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Sequence
from typing import Any, Final

import structlog

from chassis.broker import Delivery, Handler, Limits, Subscription
from chassis.broker.handling import Bury, Forget, Handling, Recovery, SetAside, beside, forward
from chassis.broker.postgres.connection import (
    TROUBLE,
    Connection,
    Row,
    close_connection,
    declare,
    message_of,
    open_connection,
)
from chassis.broker.postgres.statements import (
    CHANNEL,
    DUE_ROWS_MAX,
    FAIL,
    RENEW,
    RETURN_DUE,
    SETTLE,
    SETTLE_AND_CLAIM,
)

_DUE_FALLBACK_SECONDS: Final = 5.0

_log = structlog.get_logger("broker")


class Consumer:
    """One `consume` call: its claims, over as many connections as it takes."""

    def __init__(
        self,
        url: str,
        name: str,
        subscription: Subscription,
        handle: Handler,
        limits: Limits,
        stopping: asyncio.Event,
    ) -> None:
        self._url = url
        self._name = name
        self._subscription = subscription
        self._handling = Handling(subscription.consumer, handle, limits)
        self._limits = limits
        self._stopping = stopping
        self._recovery = Recovery(subscription.consumer, limits.stuck_seconds_max)
        self._owner = secrets.randbits(62)
        self._queue_id = 0
        self._wake = asyncio.Event()
        # asyncpg runs one statement at a time; the renewal of leases is a second user.
        self._using = asyncio.Lock()
        self._leased: list[int] = []
        # Handled, and not yet deleted: kept over a lost connection, so that the next one can
        # still settle them in time.
        self._settled: list[int] = []
        self._next_full_look = 0.0
        self._next_due = 0.0

    async def run(self) -> None:
        """Consumes until told to stop; see `chassis.broker.Broker.consume`."""
        async with beside(forward(self._stopping, self._wake)):
            while True:
                connection: Connection | None = None
                try:
                    connection = await open_connection(
                        self._url, application_name=f"{self._name} consume", durable=False
                    )
                    await self._consume_over(connection)
                except TROUBLE as error:
                    trouble = error
                else:
                    return
                finally:
                    if connection is not None:
                        await close_connection(connection)
                if self._stopping.is_set():
                    return
                await self._recovery.pause(
                    reached=connection is not None, why=trouble, stopping=self._stopping
                )

    async def _consume_over(self, connection: Connection) -> None:
        await declare(connection, [self._subscription])
        self._queue_id = await connection.fetchval(
            "SELECT id FROM mesh_broker.queue WHERE consumer = $1", self._subscription.consumer
        )
        await connection.add_listener(CHANNEL, self._on_notification)
        self._next_due = 0.0
        first_id = 0
        async with beside(self._renew_leases(connection)):
            while True:
                self._wake.clear()
                if self._stopping.is_set():
                    if self._settled:
                        await self._settle(connection)
                    return
                if asyncio.get_running_loop().time() >= self._next_due:
                    await self._return_due(connection)
                rows = await self._claim(connection, first_id)
                self._recovery.consuming()
                if rows:
                    await self._handle(connection, rows)
                    first_id = self._first_id_after(rows)
                elif first_id:
                    first_id = 0
                else:
                    await self._rest()

    def _first_id_after(self, rows: Sequence[Row]) -> int:
        """Where the next look at the queue begins: 0, or the last batch while there is much.

        The entries of settled rows stay in the index until they are vacuumed, and a look steps
        over all of them. A consumer that is busy therefore begins where its last batch did, and
        looks from the start only now and then: for rows whose publisher was slow to commit, and
        for those that another consumer gave up.
        """
        now = asyncio.get_running_loop().time()
        if len(rows) < self._subscription.batch_size or now >= self._next_full_look:
            self._next_full_look = now + self._limits.poll_seconds
            return 0
        first: int = rows[0]["id"]
        return first

    def _on_notification(self, _connection: Any, _pid: int, _channel: str, payload: Any) -> None:
        if str(self._queue_id) in str(payload).split(","):
            self._wake.set()

    async def _rest(self) -> None:
        """Waits for a notification, the next poll, or what is due, whichever comes first."""
        poll = self._limits.poll_seconds * random.uniform(0.8, 1.2)
        until_due = self._next_due - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(max(0.0, min(poll, until_due))):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _claim(self, connection: Connection, first_id: int) -> list[Row]:
        async with self._using:
            rows = await connection.fetch(
                SETTLE_AND_CLAIM,
                self._queue_id,
                self._owner,
                self._subscription.batch_size,
                self._settled,
                first_id,
                self._limits.lease_seconds,
            )
        self._settled = []
        rows.sort(key=_id_of)
        return rows

    async def _handle(self, connection: Connection, rows: Sequence[Row]) -> None:
        deliveries = [Delivery(message_of(row), row["deliveries"] - 1) for row in rows]
        self._leased = [row["id"] for row in rows]
        try:
            disposals = await self._handling.dispose(deliveries)
        finally:
            self._leased = []
        failed: list[tuple[int, SetAside | Bury]] = []
        for row, disposal in zip(rows, disposals, strict=True):
            if isinstance(disposal, Forget):
                self._settled.append(row["id"])
            else:
                failed.append((row["id"], disposal))
        if failed:
            await self._fail(connection, failed)

    async def _fail(
        self, connection: Connection, failed: Sequence[tuple[int, SetAside | Bury]]
    ) -> None:
        tiers = self._limits.retry_tiers_seconds
        delays = [
            tiers[disposal.tier] if isinstance(disposal, SetAside) else None
            for _, disposal in failed
        ]
        buried = [disposal if isinstance(disposal, Bury) else None for _, disposal in failed]
        now = asyncio.get_running_loop().time()
        self._next_due = min([self._next_due, *(now + delay for delay in delays if delay)])
        async with self._using:
            await connection.execute(
                FAIL,
                self._queue_id,
                self._owner,
                [message_id for message_id, _ in failed],
                delays,
                [bury and bury.error_class for bury in buried],
                [bury and bury.error_detail for bury in buried],
            )

    async def _settle(self, connection: Connection) -> None:
        async with self._using:
            await connection.execute(SETTLE, self._queue_id, self._owner, self._settled)
        self._settled = []

    async def _return_due(self, connection: Connection) -> None:
        """Moves what is due back into the queue, and notes when to do so next.

        Other processes' rows are found by looking now and then; they look for them too.
        """
        async with self._using:
            row = await connection.fetchrow(RETURN_DUE, self._queue_id)
        wait = _DUE_FALLBACK_SECONDS
        if row is not None:
            if row["returned"] == DUE_ROWS_MAX:
                wait = 0.0
            elif row["next_seconds"] is not None:
                wait = min(wait, row["next_seconds"])
        self._next_due = asyncio.get_running_loop().time() + wait

    async def _renew_leases(self, connection: Connection) -> None:
        """Keeps the claim on what is being handled, should that take long."""
        while True:
            await asyncio.sleep(self._limits.lease_seconds / 3)
            if not self._leased:
                continue
            try:
                async with self._using:
                    await connection.execute(
                        RENEW,
                        self._queue_id,
                        self._owner,
                        self._leased,
                        self._limits.lease_seconds,
                    )
            except TROUBLE as error:
                # The statement may have failed alone, so the next one is tried. If it is the
                # connection, the consumer itself meets that as soon as it uses it.
                _log.warning("lease.not_renewed", reason=f"{type(error).__name__}: {error}")


def _id_of(row: Row) -> int:
    identity: int = row["id"]
    return identity
