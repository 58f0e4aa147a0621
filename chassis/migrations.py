"""Schema migrations with Alembic, safe to run from every replica at once.

A service keeps its revisions in `migrations/versions`, named `NNNN_pre_…` when they run
before the new code and `NNNN_post_…` when they run after it has replaced the old:
expand, then contract, so that the previous release always runs on the new schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
from alembic import command, context
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

_LOCK = 0x6D657368  # "mesh": one migration at a time per database
_log = structlog.get_logger("migrations")


async def migrate(url: str, migrations: Path) -> None:
    """Brings a database to the newest revision; does nothing when it is there.

    Args:
        url: `postgresql://…` of a role that owns the schema.
        migrations: The service's `migrations` folder.

    Raises:
        OSError: The database does not answer.
        sqlalchemy.exc.SQLAlchemyError: A revision failed; nothing of it was kept.
    """
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    head = ScriptDirectory.from_config(config).get_current_head()
    engine = create_async_engine(
        url.replace("postgres://", "postgresql://").replace(
            "postgresql://", "postgresql+asyncpg://", 1
        ),
        poolclass=NullPool,
    )
    try:
        async with engine.begin() as connection:
            # Held to the end of the transaction: replicas that start together wait
            # here, and then find nothing left to do.
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            await connection.run_sync(_upgrade, config)
    finally:
        await engine.dispose()
    _log.info("migrated", revision=head)


def _upgrade(connection: Connection, config: Config) -> None:
    config.attributes["connection"] = connection
    command.upgrade(config, "head")


def run_environment(target_metadata: Any = None) -> None:
    """What each service's `migrations/env.py` calls."""
    connection = context.config.attributes["connection"]
    context.configure(connection=connection, target_metadata=target_metadata)
    context.run_migrations()
