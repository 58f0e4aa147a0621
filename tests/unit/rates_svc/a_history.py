"""A small history whose every rate fits on a line, for the tests of rates."""

from __future__ import annotations

from datetime import UTC, datetime

from rates_svc.providers import EcbHistory

A_HISTORY = """\
Date,USD,JPY,GBP,RUB,HRK,KWD,
2026-10-30,1.25,160,0.8,N/A,N/A,0.3333,
2026-10-29,1.2345,159.5,0.81,N/A,N/A,0.3332,
2026-10-28,1.2,150.25,0.82,99.5,N/A,0.3331,
2026-10-16,1.1,140,0.83,98,N/A,0.333,
2022-12-30,1.0666,140.66,0.88693,N/A,7.5365,N/A,
2022-12-29,1.0649,142.24,0.88549,N/A,7.5365,N/A,
"""
"""The newest days are a Friday, the Thursday and the Wednesday before it."""

FRIDAY_EVENING = datetime(2026, 10, 30, 18, tzinfo=UTC)
"""Three hours after the newest publication: 16:00 in Frankfurt is 15:00 UTC by then."""


def a_history(text: str = A_HISTORY) -> EcbHistory:
    """The history above, or another text."""
    return EcbHistory(text)
