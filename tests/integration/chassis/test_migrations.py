"""Migrations: from nothing to the newest revision, once, however many try."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from chassis.migrations import migrate

ENVIRONMENT = """
from chassis.migrations import run_environment
run_environment()
"""

REVISION = """
from alembic import op
revision = "{number}"
down_revision = {before}

def upgrade():
    {upgrade}
"""


def revisions(folder: Path, *upgrades: str) -> Path:
    """A service's migrations, each of them one statement of Python."""
    versions = folder / "migrations" / "versions"
    versions.mkdir(parents=True, exist_ok=True)
    (folder / "migrations" / "env.py").write_text(ENVIRONMENT)
    for number, upgrade in enumerate(upgrades, 1):
        (versions / f"{number:04}_pre_test.py").write_text(
            REVISION.format(
                number=f"{number:04}",
                before=f'"{number - 1:04}"' if number > 1 else None,
                upgrade=upgrade,
            )
        )
    return folder / "migrations"


A = 'op.execute("CREATE TABLE a (id int)")'
B = 'op.execute("ALTER TABLE a ADD COLUMN b int")'
FAILING = 'op.execute("CREATE TABLE c (id int)"); op.execute("CREATE TABLE a (id int)")'


async def state(url: str) -> tuple[str | None, list[str]]:
    """The revision of a database, and its tables' columns."""
    connection = await asyncpg.connect(url)
    try:
        columns = await connection.fetch(
            "SELECT table_name || '.' || column_name AS name FROM information_schema.columns"
            " WHERE table_schema = 'public' AND table_name <> 'alembic_version' ORDER BY 1"
        )
        known = await connection.fetchval("SELECT to_regclass('alembic_version')")
        number = known and await connection.fetchval("SELECT version_num FROM alembic_version")
    finally:
        await connection.close()
    return number, [row["name"] for row in columns]


async def test_an_empty_database_is_brought_to_the_newest_revision(
    empty_database: str, tmp_path: Path
) -> None:
    """One after the other."""
    await migrate(empty_database, revisions(tmp_path, A, B))
    assert await state(empty_database) == ("0002", ["a.b", "a.id"])


async def test_a_url_says_the_same_to_migrations_as_to_the_pool(
    empty_database: str, tmp_path: Path
) -> None:
    """How a database is to be reached over TLS, for one, stands in its URL."""
    url = f"{empty_database.replace('postgresql://', 'postgres://')}?sslmode=prefer"
    await migrate(url, revisions(tmp_path, A))
    assert await state(url) == ("0001", ["a.id"])


async def test_a_second_run_finds_nothing_to_do(empty_database: str, tmp_path: Path) -> None:
    """So that every replica may try."""
    for _ in range(2):
        await migrate(empty_database, revisions(tmp_path, A))
    assert await state(empty_database) == ("0001", ["a.id"])


async def test_a_newer_release_goes_on_where_the_last_one_ended(
    empty_database: str, tmp_path: Path
) -> None:
    """Only what is new is run."""
    await migrate(empty_database, revisions(tmp_path, A))
    await migrate(empty_database, revisions(tmp_path, A, B))
    assert await state(empty_database) == ("0002", ["a.b", "a.id"])


async def test_replicas_that_migrate_at_once_do_it_once(
    empty_database: str, tmp_path: Path
) -> None:
    """The others wait, and find it done."""
    folder = revisions(tmp_path, A, B)
    await asyncio.gather(*(migrate(empty_database, folder) for _ in range(3)))
    assert await state(empty_database) == ("0002", ["a.b", "a.id"])


async def test_a_revision_that_fails_leaves_the_database_as_it_was(
    empty_database: str, tmp_path: Path
) -> None:
    """Nothing of it is kept, nor of those before it in the same run."""
    await migrate(empty_database, revisions(tmp_path, A))
    folder = revisions(tmp_path, A, B, FAILING)
    with pytest.raises(Exception, match='relation "a" already exists'):
        await migrate(empty_database, folder)
    assert await state(empty_database) == ("0001", ["a.id"])


async def test_a_database_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """Never a service on a database that was not migrated."""
    with pytest.raises(OSError, match=r"."):
        await migrate("postgresql://mesh@127.0.0.1:1/nothing", revisions(tmp_path, A))
