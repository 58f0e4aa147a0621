"""The payment service's first tables."""

from alembic import op

from chassis.migrations import create_inbox_v1, create_outbox_v1

revision = "0001"
down_revision = None


def upgrade() -> None:
    create_outbox_v1()
    create_inbox_v1()
    op.execute(
        """
        CREATE TABLE payments (
            merchant text,
            payment_id uuid,
            order_id uuid NOT NULL,
            provider text NOT NULL,
            state text NOT NULL,
            currency text NOT NULL,
            captured bigint NOT NULL,
            refunded bigint NOT NULL,
            attempts integer NOT NULL,
            failure_reason text NOT NULL,
            cancel_requested boolean NOT NULL,
            cancel_reason text NOT NULL,
            revision bigint NOT NULL,
            events bigint NOT NULL,
            due text,
            due_time timestamptz,
            fence bigint NOT NULL,
            correlation_id text NOT NULL,
            causation_id text NOT NULL,
            traceparent text NOT NULL,
            create_time timestamptz NOT NULL,
            update_time timestamptz NOT NULL,
            PRIMARY KEY (merchant, payment_id),
            CONSTRAINT payments_order UNIQUE (merchant, order_id),
            CONSTRAINT payments_conserved CHECK (0 <= refunded AND refunded <= captured),
            CONSTRAINT payments_due CHECK ((due IS NULL) = (due_time IS NULL))
        ) WITH (fillfactor = 80)
        """
    )
    op.execute("CREATE INDEX payments_due_time ON payments (due, due_time) WHERE due IS NOT NULL")
    op.execute(
        """
        CREATE TABLE payment_attempts (
            merchant text,
            payment_id uuid,
            seq integer,
            attempt_id uuid NOT NULL,
            order_id uuid NOT NULL,
            provider_key text NOT NULL,
            amount bigint NOT NULL,
            currency text NOT NULL,
            payment_method text NOT NULL,
            capture_method text NOT NULL,
            state text NOT NULL,
            provider_reference text NOT NULL,
            failure_reason text NOT NULL,
            asked integer NOT NULL,
            sent_time timestamptz,
            PRIMARY KEY (merchant, payment_id, seq),
            CONSTRAINT payment_attempts_amount CHECK (amount > 0)
        ) WITH (fillfactor = 80)
        """
    )
    op.execute(
        "CREATE UNIQUE INDEX payment_attempts_live ON payment_attempts (merchant, order_id)"
        " WHERE state NOT IN ('DECLINED', 'FAILED', 'VOIDED')"
    )
    op.execute(
        """
        CREATE TABLE refunds (
            merchant text,
            payment_id uuid,
            refund_id uuid,
            provider_key text NOT NULL,
            amount bigint NOT NULL,
            currency text NOT NULL,
            reason text NOT NULL,
            state text NOT NULL,
            provider_reference text NOT NULL,
            failure_reason text NOT NULL,
            asked integer NOT NULL,
            create_time timestamptz NOT NULL,
            sent_time timestamptz,
            PRIMARY KEY (merchant, payment_id, refund_id),
            CONSTRAINT refunds_amount CHECK (amount > 0)
        )
        """
    )
    op.execute(
        """
        CREATE TABLE payment_reads (
            merchant text,
            payment_id uuid,
            revision bigint NOT NULL,
            resource bytea NOT NULL,
            PRIMARY KEY (merchant, payment_id)
        ) WITH (fillfactor = 80)
        """
    )


def downgrade() -> None:
    for table in (
        "payment_reads", "refunds", "payment_attempts", "payments", "inbox", "outbox",
    ):  # fmt: skip
        op.execute(f"DROP TABLE {table}")
