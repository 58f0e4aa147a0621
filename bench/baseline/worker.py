"""The other side of the hand-written pipeline: relay, payment consumer, order consumer."""

from __future__ import annotations

import asyncio
import os
import uuid
from typing import Any

import aio_pika
import orjson
import uvloop
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage
from sqlalchemy import func, select, update
from sqlalchemy.dialects.postgresql import insert

from bench.baseline.models import Base, Order, Outbox, Payment, Session, engine


def message(payload: dict[str, Any]) -> aio_pika.Message:
    """A persistent JSON message."""
    return aio_pika.Message(
        orjson.dumps(payload),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        content_type="application/json",
    )


async def relay(exchange: AbstractExchange) -> None:
    """Publishes the outbox, a hundred at a time, for ever."""
    while True:
        async with Session() as session, session.begin():
            rows = (
                await session.scalars(
                    select(Outbox)
                    .where(Outbox.sent_at.is_(None))
                    .order_by(Outbox.id)
                    .limit(100)
                    .with_for_update(skip_locked=True)
                )
            ).all()
            if rows:
                await asyncio.gather(
                    *(exchange.publish(message(row.payload), routing_key=row.topic) for row in rows)
                )
                await session.execute(
                    update(Outbox)
                    .where(Outbox.id.in_([row.id for row in rows]))
                    .values(sent_at=func.now())
                )
        if len(rows) < 100:
            await asyncio.sleep(0.1)


async def main() -> None:
    """Consumes and relays until it is killed."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    broker = await aio_pika.connect_robust(os.environ["BASELINE_AMQP"])
    channel = await broker.channel(publisher_confirms=True)
    exchange = await channel.declare_exchange("baseline", aio_pika.ExchangeType.TOPIC, durable=True)

    async def charge(incoming: AbstractIncomingMessage) -> None:
        async with incoming.process(requeue=True):
            created = orjson.loads(incoming.body)
            async with Session() as session, session.begin():
                await session.execute(
                    insert(Payment)
                    .values(
                        id=uuid.uuid4(),
                        order_id=uuid.UUID(created["order_id"]),
                        amount_minor=created["amount_minor"],
                        state="SUCCEEDED",
                    )
                    .on_conflict_do_nothing(index_elements=["order_id"])
                )
            await exchange.publish(
                message({"order_id": created["order_id"]}), routing_key="payment.succeeded"
            )

    async def mark_paid(incoming: AbstractIncomingMessage) -> None:
        async with incoming.process(requeue=True):
            order_id = uuid.UUID(orjson.loads(incoming.body)["order_id"])
            async with Session() as session, session.begin():
                await session.execute(
                    update(Order)
                    .where(Order.id == order_id, Order.state == "PENDING")
                    .values(state="PAID")
                )

    for name, key, handle in (
        ("baseline.payments", "order.created", charge),
        ("baseline.orders", "payment.succeeded", mark_paid),
    ):
        consuming = await broker.channel()
        await consuming.set_qos(prefetch_count=20)
        queue = await consuming.declare_queue(name, durable=True)
        await queue.bind("baseline", key)
        await queue.consume(handle)
    await relay(exchange)


if __name__ == "__main__":
    uvloop.run(main())
