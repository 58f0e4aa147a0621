"""`meshctl load`: orders at a steady rate, how long each took, and what became of them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

from meshctl.client import CallError, Edge, Json, Target
from meshctl.console import Console
from meshctl.grpc_edge import GrpcEdge, grpc_edge
from meshctl.resources import SETTLED

_SETTLE_SECONDS_MAX = 30.0
_IN_FLIGHT_MAX = 2_000


@dataclass(slots=True)
class Outcome:
    """What a load did."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from when each order was due to its answer; refused ones left out."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Refused orders by code and reason."""
    placed: set[str] = field(default_factory=set)
    """Names of the orders."""
    states: Counter[str] = field(default_factory=Counter)
    """What became of them, by state."""
    seconds: float = 0.0
    """How long the placing took."""

    def percentile(self, share: float) -> float:
        """Answers the latency that this share of the orders stayed below, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0

    def as_json(self) -> Json:
        """Answers the outcome for programs."""
        return {
            "orders": len(self.placed),
            "refused": dict(self.refusals),
            "seconds": round(self.seconds, 3),
            "orders_per_second": round(len(self.placed) / self.seconds, 1) if self.seconds else 0,
            "latency_ms": {
                name: round(self.percentile(share) * 1000, 1)
                for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
            },
            "states": dict(self.states),
        }


def run_load(
    called: Target,
    *,
    merchant: str,
    per_second: int,
    seconds: int,
    console: Console,
    as_json: bool,
) -> None:
    """Places `per_second` orders for `seconds`, and prints what became of them.

    Raises:
        MeshError: The mesh cannot be reached.
    """
    outcome = asyncio.run(_load(called, merchant, per_second, seconds, console))
    outcome.states = _await_states(Edge(called), merchant, outcome.placed)
    result = outcome.as_json()
    if as_json:
        console.json(result)
        return
    latency = result["latency_ms"]
    console.result(
        f"{result['orders']} orders in {result['seconds']} s, "
        f"{result['orders_per_second']} a second through the edge\n"
        f"answered within {latency['p50']} ms (median), {latency['p90']} ms (90 %), "
        f"{latency['p99']} ms (99 %), {latency['max']} ms (all)"
    )
    rows = [[state, str(count)] for state, count in outcome.states.most_common()]
    rows += [[f"refused: {why}", str(count)] for why, count in outcome.refusals.most_common()]
    console.table(["outcome", "orders"], rows)


async def _load(
    called: Target, merchant: str, per_second: int, seconds: int, console: Console
) -> Outcome:
    outcome = Outcome()
    loop = asyncio.get_running_loop()
    gate = asyncio.Semaphore(_IN_FLIGHT_MAX)
    async with grpc_edge(called) as edge:
        began = loop.time()
        next_report = began + 1.0
        async with asyncio.TaskGroup() as group:
            for number in range(per_second * seconds):
                due = began + number / per_second
                await asyncio.sleep(max(0.0, due - loop.time()))
                await gate.acquire()
                placing = group.create_task(_place(edge, merchant, number, due, outcome))
                placing.add_done_callback(lambda _: gate.release())
                if loop.time() >= next_report:
                    next_report += 1.0
                    console.say(
                        f"{number + 1} sent, {len(outcome.placed)} answered, "
                        f"{sum(outcome.refusals.values())} refused, "
                        f"median {outcome.percentile(0.5) * 1000:.0f} ms"
                    )
        outcome.seconds = loop.time() - began
    return outcome


async def _place(edge: GrpcEdge, merchant: str, number: int, due: float, outcome: Outcome) -> None:
    body: Json = {
        "order": {
            "customer": {"customerId": f"load-{number % 97}", "email": "load@example.com"},
            "currencyCode": "EUR",
            "lines": [
                {
                    "sku": f"LOAD-{number % 31}",
                    "title": "Load",
                    "quantity": 1 + number % 3,
                    "unitPrice": {"currencyCode": "EUR", "minorUnits": str(500 + number % 500)},
                }
            ],
        },
        # One card in fifty is declined, as in life.
        "paymentMethod": "pm_card_chargeDeclined" if number % 50 == 49 else "pm_card_visa",
    }
    try:
        order, _ = await edge.create_order(f"merchants/{merchant}", body)
    except CallError as error:
        outcome.refusals[f"{error.code} {error.reason}".strip()] += 1
    else:
        outcome.latencies.append(asyncio.get_running_loop().time() - due)
        outcome.placed.add(order["name"])


def _await_states(edge: Edge, merchant: str, placed: set[str]) -> Counter[str]:
    """Waits until the orders are settled, and counts them by state."""
    deadline = time.monotonic() + _SETTLE_SECONDS_MAX
    path = f"merchants/{merchant}/orders"
    while True:
        # Others may place orders meanwhile, so a few more than ours are looked through.
        recent = edge.pages(path, "orders", at_most=len(placed) + 1_000)
        states = Counter(order["state"] for order in recent if order["name"] in placed)
        settled = sum(count for state, count in states.items() if state in SETTLED)
        if settled >= len(placed) or time.monotonic() > deadline:
            return states
        time.sleep(0.5)
