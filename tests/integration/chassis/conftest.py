"""A database that holds the chassis's own tables and no service's."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA
from sqlalchemy.dialects.postgresql import UUID as PgUuid
from sqlalchemy.ext.asyncio import create_async_engine

from chassis.database import Database
from chassis.idempotency import request_table
from chassis.inbox import inbox_table
from chassis.outbox import outbox_table
from tests.databases import Databases

metadata = sa.MetaData()
outbox_table(metadata)
inbox_table(metadata)
request_table(metadata)
sa.Table(
    "notes",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("text", sa.Text, nullable=False),
)
documents = sa.Table(
    "documents",
    metadata,
    sa.Column("owner", sa.Text, primary_key=True),
    sa.Column("id", PgUuid(as_uuid=True), primary_key=True),
    sa.Column("version", sa.BigInteger, sa.Identity(), nullable=False, unique=True),
    sa.Column("body", BYTEA, nullable=False),
)


async def prepare(url: str) -> None:
    """Makes outbox, inbox and ledger, and tables of notes and documents beside them."""
    engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
    async with engine.begin() as connection:
        await connection.run_sync(metadata.create_all)
    await engine.dispose()


@pytest_asyncio.fixture
async def database_url(databases: Databases) -> str:
    """The URL of a database with the chassis's tables, all of them empty."""
    return await databases.emptied("chassis", prepare)


@pytest_asyncio.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """The same, opened as a service opens its own."""
    async with Database.opened(database_url, application_name="test") as opened:
        yield opened
