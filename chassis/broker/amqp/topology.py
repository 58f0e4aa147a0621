"""The exchange and queues that the mesh has in RabbitMQ, and how they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from aio_pika import ExchangeType
from aio_pika.abc import AbstractChannel, AbstractConnection, AbstractExchange
from aio_pika.exceptions import ChannelPreconditionFailed

from chassis.broker import Limits, Subscription, TopologyError
from chassis.broker.amqp.connection import RPC_SECONDS, in_our_terms

EXCHANGE: Final = "ordermesh.events"

# Dead letters are looked at by taking and returning them, and every return counts; without a
# limit of its own RabbitMQ 4 would drop a dead letter at its 21st inspection.
_INSPECTIONS_MAX: Final = 1_000_000_000


def work_queue(consumer: str) -> str:
    """The queue that a consumer takes its messages from."""
    return f"ordermesh.{consumer}"


def dead_letter_queue(consumer: str) -> str:
    """The queue of what was given up."""
    return f"{work_queue(consumer)}.dlq"


def retry_queue(consumer: str, seconds: float) -> str:
    """The queue in which messages wait so long before they go back to the work queue."""
    return f"{work_queue(consumer)}.retry.{_delay_name(seconds)}"


def _delay_name(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    if milliseconds % 60_000 == 0:
        return f"{milliseconds // 60_000}m"
    if milliseconds % 1000 == 0:
        return f"{milliseconds // 1000}s"
    return f"{milliseconds}ms"


async def declare(
    connection: AbstractConnection, subscriptions: Sequence[Subscription], limits: Limits
) -> None:
    """Makes the topology of some subscriptions.

    Raises:
        BrokerUnavailableError: The broker did not answer.
        TopologyError: A queue exists with other properties.
    """
    async with in_our_terms(RPC_SECONDS * 2):
        try:
            channel = await connection.channel(publisher_confirms=False)
            exchange = await channel.declare_exchange(EXCHANGE, ExchangeType.TOPIC, durable=True)
            for subscription in subscriptions:
                await _declare_one(channel, exchange, subscription, limits)
            await channel.close()
        except ChannelPreconditionFailed as error:
            raise TopologyError(str(error)) from error


async def _declare_one(
    channel: AbstractChannel,
    exchange: AbstractExchange,
    subscription: Subscription,
    limits: Limits,
) -> None:
    consumer = subscription.consumer
    await channel.declare_queue(
        dead_letter_queue(consumer),
        durable=True,
        arguments={"x-queue-type": "quorum", "x-delivery-limit": _INSPECTIONS_MAX},
    )
    # At-least-once dead-lettering holds a message until the next queue has confirmed it, and
    # asks for the overflow behaviour that refuses instead of dropping.
    passing_on: dict[str, Any] = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        "x-max-length-bytes": limits.queue_bytes_max,
    }
    work = await channel.declare_queue(
        work_queue(consumer),
        durable=True,
        arguments={
            **passing_on,
            "x-delivery-limit": limits.delivery_limit,
            "x-dead-letter-routing-key": dead_letter_queue(consumer),
        },
    )
    for seconds in dict.fromkeys(limits.retry_tiers_seconds):
        await channel.declare_queue(
            retry_queue(consumer, seconds),
            durable=True,
            arguments={
                **passing_on,
                "x-message-ttl": round(seconds * 1000),
                "x-dead-letter-routing-key": work_queue(consumer),
            },
        )
    for name in subscription.types:
        await work.bind(exchange, routing_key=name)
