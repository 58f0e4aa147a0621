"""Schema migrations with Alembic, safe to run from every replica at once.

A service keeps its revisions in `migrations/versions`, named `NNNN_pre_…` when they run
before the new code and `NNNN_post_…` when they run after it has replaced the old:
expand, then contract, so that the previous release always runs on the new schema.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import asyncpg
import structlog
from alembic import command, context, op
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from chassis.broker import Subscription, connect
from chassis.settings import DatabaseSettings

_LOCK = 0x6D657368  # "mesh": one migration at a time per database
_log = structlog.get_logger("migrations")


async def prepare(
    settings: DatabaseSettings, *, service: str, migrations: Path, subscription: Subscription
) -> None:
    """Migrates a service's database and declares what the service listens to.

    Done for every service before any is served, so that no event is published before
    those who listen to it have a queue.

    Args:
        settings: Where the database and the broker are.
        service: Its name, for the broker's operators.
        migrations: Its `migrations` folder.
        subscription: What it listens to.

    Raises:
        OSError: The database does not answer.
        sqlalchemy.exc.SQLAlchemyError: A revision failed; nothing of it was kept.
        BrokerUnavailableError: The broker is still away after a minute.
        TopologyError: The queue exists with other properties.
    """
    await migrate(settings.database_url.get_secret_value(), migrations)
    async with connect(settings.broker_url.get_secret_value(), name=service) as broker:
        await broker.declare([subscription])


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
        "postgresql+asyncpg://",
        # The driver reads the URL as it does for the pool, parameters included.
        async_creator=lambda: asyncpg.connect(url),
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


def create_outbox_v1() -> None:
    """Frozen: the outbox as of the first release (`chassis.outbox.outbox_table`)."""
    op.execute(
        """
        CREATE TABLE outbox (
            event_id uuid PRIMARY KEY,
            merchant text NOT NULL,
            aggregate text NOT NULL,
            aggregate_version bigint NOT NULL,
            type text NOT NULL,
            body bytea NOT NULL,
            correlation_id text NOT NULL,
            traceparent text NOT NULL,
            create_time timestamptz NOT NULL DEFAULT now(),
            claim uuid,
            claimed_until timestamptz,
            attempts integer NOT NULL DEFAULT 0,
            next_attempt_time timestamptz NOT NULL DEFAULT now(),
            last_outcome text,
            sent_time timestamptz,
            park_time timestamptz,
            CONSTRAINT outbox_version UNIQUE (aggregate, aggregate_version)
        ) WITH (autovacuum_vacuum_scale_factor = 0.01,
                autovacuum_vacuum_insert_scale_factor = 0.05)
        """
    )
    op.execute(
        "CREATE INDEX outbox_unsent ON outbox (aggregate, aggregate_version)"
        " WHERE sent_time IS NULL"
    )
    op.execute(
        "CREATE INDEX outbox_waiting ON outbox (create_time)"
        " WHERE sent_time IS NULL AND park_time IS NULL"
    )
    op.execute("CREATE INDEX outbox_sent ON outbox (sent_time) WHERE sent_time IS NOT NULL")


def create_inbox_v1() -> None:
    """Frozen: the inbox as of the first release (`chassis.inbox.inbox_table`)."""
    op.execute(
        """
        CREATE TABLE inbox (
            consumer text,
            event_id uuid,
            aggregate text NOT NULL,
            aggregate_version bigint NOT NULL,
            receive_time timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (consumer, event_id)
        ) WITH (autovacuum_vacuum_insert_scale_factor = 0.05)
        """
    )
    op.execute("CREATE INDEX inbox_received ON inbox USING brin (receive_time)")


def create_requests_v1() -> None:
    """Frozen: the ledger as of the first release (`chassis.idempotency.request_table`)."""
    op.execute(
        """
        CREATE TABLE requests (
            merchant text,
            method text,
            request_id uuid,
            fingerprint bytea NOT NULL,
            resource_id uuid NOT NULL,
            answer bytea NOT NULL,
            expire_time timestamptz NOT NULL,
            PRIMARY KEY (merchant, method, request_id)
        )
        """
    )
    op.execute("CREATE INDEX requests_expiry ON requests USING brin (expire_time)")
