"""What every implementation of the broker port counts, under one set of names."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Sequence

from prometheus_client import Counter, Histogram

from chassis.broker import PublishOutcome

PUBLISHED = Counter(
    "mesh_broker_published_total", "Messages given to the broker, by outcome.", ["outcome"]
)
CONSUMED = Counter(
    "mesh_broker_consumed_total",
    "Deliveries settled: ack, retry or dead_letter.",
    ["consumer", "verdict"],
)
HANDLER_SECONDS = Histogram(
    "mesh_broker_handler_seconds",
    "Time a handler took for one batch.",
    ["consumer"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
BATCH_SIZE = Histogram(
    "mesh_broker_batch_size",
    "Deliveries handed to a handler at once.",
    ["consumer"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128),
)
REDELIVERED = Counter(
    "mesh_broker_redelivered_total",
    "Deliveries that somebody had taken before and not settled.",
    ["consumer"],
)
HANDLER_FAILED = Counter(
    "mesh_broker_handler_failed_total",
    "Calls of a handler that raised or ran out of time.",
    ["consumer"],
)
RECONNECTED = Counter(
    "mesh_broker_reconnects_total",
    "Connections to the broker that were lost or could not be made.",
    ["role"],
)

_PUBLISHED_BY_OUTCOME = {outcome: PUBLISHED.labels(outcome.value) for outcome in PublishOutcome}


def count_published(outcomes: Sequence[PublishOutcome]) -> None:
    """Counts the outcomes of one publish call."""
    for outcome, number in Tally(outcomes).items():
        _PUBLISHED_BY_OUTCOME[outcome].inc(number)
