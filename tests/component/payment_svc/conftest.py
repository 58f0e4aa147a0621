"""A migrated database of the payment service for each test, and the service on it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

import payment_svc
from chassis.migrations import migrate
from tests.component.payment_svc.harness import PaymentService
from tests.databases import Databases

MIGRATIONS = Path(next(iter(payment_svc.__path__))) / "migrations"


@pytest_asyncio.fixture
async def payment_database(databases: Databases) -> AsyncIterator[str]:
    """The URL of an empty database with the payment service's tables."""

    async def prepare(url: str) -> None:
        await migrate(url, MIGRATIONS)

    template = await databases.template("payment_template", prepare)
    async with databases.cloned(template) as url:
        yield url


@pytest_asyncio.fixture
async def service(payment_database: str, tmp_path: Path) -> AsyncIterator[PaymentService]:
    """The payment service between a database and a broker; start what the test is about."""
    async with PaymentService.between(payment_database, tmp_path) as service:
        yield service
