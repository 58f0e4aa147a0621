"""The order service's first tables."""

from alembic import op

from chassis.migrations import create_inbox_v1, create_outbox_v1, create_requests_v1

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_outbox_v1()
    create_inbox_v1()
    create_requests_v1()
    op.execute(
        """
        CREATE TABLE orders (
            merchant text,
            order_id uuid,
            version bigint NOT NULL,
            announcement text NOT NULL,
            client_order_ref text,
            document jsonb NOT NULL,
            state text NOT NULL,
            payment_state text NOT NULL,
            fulfillment_state text NOT NULL,
            payment text NOT NULL,
            failure_reason text NOT NULL,
            cancel_reason text NOT NULL,
            attention_reason text NOT NULL,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            state_time timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (merchant, order_id)
        ) WITH (fillfactor = 80)
        """
    )
    op.execute(
        "CREATE UNIQUE INDEX orders_client_order_ref ON orders (merchant, client_order_ref)"
        " WHERE client_order_ref IS NOT NULL"
    )
    op.execute(
        """
        CREATE TABLE order_customers (
            merchant text,
            order_id uuid,
            customer_id text NOT NULL,
            email text NOT NULL,
            locale text NOT NULL,
            shipping_address jsonb,
            billing_address jsonb,
            PRIMARY KEY (merchant, order_id)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE order_history (
            merchant text,
            order_id uuid,
            version bigint,
            event_id uuid NOT NULL,
            event_type text NOT NULL,
            state text NOT NULL,
            payment_state text NOT NULL,
            document jsonb NOT NULL,
            occur_time timestamptz NOT NULL,
            correlation_id text NOT NULL,
            causation_id text NOT NULL,
            trace_id text NOT NULL,
            PRIMARY KEY (merchant, order_id, version)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE order_reads (
            merchant text,
            order_id uuid,
            version bigint NOT NULL,
            resource bytea NOT NULL,
            PRIMARY KEY (merchant, order_id)
        ) WITH (fillfactor = 80)
        """
    )


def downgrade() -> None:
    for table in (
        "order_reads", "order_history", "order_customers", "orders", "requests", "inbox", "outbox",
    ):  # fmt: skip
        op.execute(f"DROP TABLE {table}")
