"""The notification service's first tables."""

from alembic import op

from chassis.migrations import create_inbox_v1

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_inbox_v1()
    op.execute(
        """
        CREATE TABLE recipients (
            merchant text,
            order_id uuid,
            email text,
            customer_id text NOT NULL,
            locale text NOT NULL,
            client_order_ref text NOT NULL,
            currency_code text NOT NULL,
            total_minor_units bigint NOT NULL,
            lines jsonb NOT NULL,
            order_time timestamptz NOT NULL,
            PRIMARY KEY (merchant, order_id)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE notifications (
            merchant text,
            notification_id uuid,
            order_id uuid NOT NULL,
            event_id uuid NOT NULL,
            channel text NOT NULL,
            audience text NOT NULL,
            template text NOT NULL,
            locale text NOT NULL,
            recipient text NOT NULL,
            recipient_hash bytea NOT NULL,
            currency_code text NOT NULL,
            minor_units bigint NOT NULL,
            payment_state text NOT NULL,
            detail text NOT NULL,
            occur_time timestamptz NOT NULL,
            correlation_id text NOT NULL,
            traceparent text NOT NULL,
            state text NOT NULL,
            attempts integer NOT NULL,
            failure_reason text NOT NULL DEFAULT '',
            create_time timestamptz NOT NULL,
            send_time timestamptz,
            claim uuid,
            due_time timestamptz NOT NULL,
            PRIMARY KEY (merchant, notification_id),
            CONSTRAINT notifications_once
                UNIQUE (merchant, event_id, recipient_hash, channel, template)
        ) WITH (autovacuum_vacuum_scale_factor = 0.02,
                autovacuum_vacuum_insert_scale_factor = 0.05)
        """
    )
    op.execute(
        "CREATE INDEX notifications_of_order ON notifications (merchant, order_id, notification_id)"
    )
    op.execute(
        "CREATE INDEX notifications_due ON notifications (due_time)"
        " WHERE state IN ('QUEUED', 'SENDING', 'RETRYING')"
    )


def downgrade() -> None:
    for table in ("notifications", "recipients", "inbox"):
        op.execute(f"DROP TABLE {table}")
