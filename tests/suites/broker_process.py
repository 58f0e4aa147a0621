"""A consumer in a process of its own, which one message kills: see `tests.suites.broker`.

Prints the number of each message that it handled, as soon as it has, and ends when the
queue has brought nothing for a while.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence

from chassis.broker import Ack, Delivery, Subscription, Verdict, connect
from tests.suites.broker import LIMITS, number_of

IDLE_SECONDS = 3.0
"""Longer than it takes until what a dead process held is delivered again."""


async def main(url: str, consumer: str, name: str, deadly: int) -> None:
    """Consumes until nothing has come for a while."""
    stopping = asyncio.Event()
    busy = asyncio.Event()

    async def handle(deliveries: Sequence[Delivery]) -> Sequence[Verdict]:
        busy.set()
        if any(number_of(delivery) == deadly for delivery in deliveries):
            os._exit(9)
        for delivery in deliveries:
            sys.stdout.write(f"{number_of(delivery)}\n")
        sys.stdout.flush()
        return [Ack() for _ in deliveries]

    async def stop_when_idle() -> None:
        while not stopping.is_set():
            busy.clear()
            try:
                async with asyncio.timeout(IDLE_SECONDS):
                    await busy.wait()
            except TimeoutError:
                stopping.set()

    subscription = Subscription(consumer=consumer, types=(name,))
    async with connect(url, name="process", limits=LIMITS) as broker, asyncio.TaskGroup() as tasks:
        tasks.create_task(stop_when_idle())
        tasks.create_task(broker.consume(subscription, handle, stopping=stopping))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
