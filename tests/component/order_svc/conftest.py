"""Migrated databases of the order service, and the service on one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

import order_svc
from chassis.migrations import migrate
from tests.component.order_svc.app import OrderApp, running
from tests.databases import Databases

MIGRATIONS = Path(next(iter(order_svc.__path__))) / "migrations"


async def prepare(url: str) -> None:
    """Makes the order service's tables."""
    await migrate(url, MIGRATIONS)


@pytest_asyncio.fixture
async def order_database(databases: Databases) -> str:
    """The URL of a database with the order service's tables and nothing in them."""
    return await databases.emptied("order_service", prepare)


@pytest_asyncio.fixture
async def own_order_database(databases: Databases) -> AsyncIterator[str]:
    """The same, shared with no other test: for those that kill what works on it."""
    async with databases.cloned(await databases.template("order_service", prepare)) as url:
        yield url


@pytest_asyncio.fixture
async def app(order_database: str, tmp_path: Path) -> AsyncIterator[OrderApp]:
    """The order service, with nothing in it yet."""
    async with running(order_database, tmp_path) as started:
        yield started
