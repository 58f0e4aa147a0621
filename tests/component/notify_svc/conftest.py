"""Migrated databases and mail servers of the notification service's tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio

import notify_svc
from chassis.database import Database
from chassis.migrations import migrate
from tests.component.notify_svc.mail_server import MailServer
from tests.databases import Databases

MIGRATIONS = Path(next(iter(notify_svc.__path__))) / "migrations"


async def prepare(url: str) -> None:
    """Makes the notification service's tables."""
    await migrate(url, MIGRATIONS)


@pytest_asyncio.fixture
async def own_database_url(databases: Databases) -> AsyncIterator[str]:
    """The URL of a database with the service's tables, shared with no other test."""
    async with databases.cloned(await databases.template("notification_service", prepare)) as url:
        yield url


@pytest_asyncio.fixture
async def database(databases: Databases) -> AsyncIterator[Database]:
    """A database with the service's tables and nothing in them."""
    url = await databases.emptied("notification_service", prepare)
    async with Database.opened(url, application_name="test") as opened:
        yield opened


@pytest_asyncio.fixture
async def mail_server(tmp_path: Path) -> AsyncIterator[MailServer]:
    """A running mail server that keeps what it gets."""
    async with MailServer.running(tmp_path / "mail") as server:
        yield server
