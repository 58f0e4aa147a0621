"""The order service's migrations make the tables that its code believes in."""

from __future__ import annotations

import asyncio
from typing import Any

import asyncpg
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.ext.asyncio import create_async_engine

from chassis.migrations import migrate
from order_svc.tables import metadata
from tests.component.order_svc.conftest import MIGRATIONS
from tests.databases import Databases

CATALOGUE = {
    "columns": """
        SELECT table_name, column_name, data_type, is_nullable, column_default
        FROM information_schema.columns WHERE table_schema = 'public'
    """,
    "constraints": """
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid)
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    """,
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "storage": """
        SELECT relname, relkind::text, array_to_string(reloptions, ',') FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'i')
    """,
}


async def catalogue(url: str) -> dict[str, set[Any]]:
    """What the server says that a database holds, but for Alembic's own table."""
    connection = await asyncpg.connect(url)
    try:
        return {
            name: {
                tuple(row)
                for row in await connection.fetch(query)
                if not str(row[0]).startswith("alembic_version")
            }
            for name, query in CATALOGUE.items()
        }
    finally:
        await connection.close()


def engine_of(url: str) -> Any:
    """SQLAlchemy's way to a database."""
    return create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))


async def test_a_migrated_database_is_what_the_tables_module_says(
    databases: Databases, order_database: str
) -> None:
    """Columns, defaults, keys, indexes and storage parameters, one by one."""
    async with databases.cloned() as url:
        engine = engine_of(url)
        async with engine.begin() as connection:
            await connection.run_sync(metadata.create_all)
        await engine.dispose()
        described = await catalogue(url)
    migrated = await catalogue(order_database)
    for name in CATALOGUE:
        assert migrated[name] == described[name], name


async def test_alembic_finds_no_difference_either(order_database: str) -> None:
    """So that a new revision begins from nothing."""

    def differences(connection: sa.Connection) -> list[Any]:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, metadata))

    engine = engine_of(order_database)
    async with engine.connect() as connection:
        assert await connection.run_sync(differences) == []
    await engine.dispose()


async def test_two_replicas_may_migrate_at_once_and_again(empty_database: str) -> None:
    """Every process of `all` does so when it starts."""
    await asyncio.gather(*(migrate(empty_database, MIGRATIONS) for _ in range(2)))
    before = await catalogue(empty_database)
    await migrate(empty_database, MIGRATIONS)
    assert await catalogue(empty_database) == before
    assert ("orders",) in {row[:1] for row in before["columns"]}
