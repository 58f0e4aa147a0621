"""The payment service's tables. The merchant is the first column of every key.

Write model: `payments` holds each payment as it is now, and what is due for it;
`payment_attempts` each charge under its provider key; `refunds` each refund under its
own. Read model: `payment_reads` holds the resource as callers read it, serialized, and
can be rebuilt from the others at any time. `outbox` and `inbox` are the chassis's.

Nothing of these is ever deleted: they are the record of what was asked of the provider.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.inbox import inbox_table
from chassis.outbox import outbox_table

metadata = sa.MetaData()


def _key() -> tuple[sa.Column[str], sa.Column[object]]:
    return (
        sa.Column("merchant", sa.Text, primary_key=True),
        sa.Column("payment_id", PgUuid(as_uuid=True), primary_key=True),
    )


payments = sa.Table(
    "payments",
    metadata,
    *_key(),
    sa.Column("order_id", PgUuid(as_uuid=True), nullable=False),
    sa.Column("provider", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("captured", sa.BigInteger, nullable=False),
    sa.Column("refunded", sa.BigInteger, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failure_reason", sa.Text, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("cancel_reason", sa.Text, nullable=False),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("events", sa.BigInteger, nullable=False),
    # What is to be asked of the provider next, and from when on. While somebody is at
    # it, that is RESOLVE, from the moment their lease ends: one column says both.
    sa.Column("due", sa.Text),
    sa.Column("due_time", sa.DateTime(timezone=True)),
    sa.Column("fence", sa.BigInteger, nullable=False),
    sa.Column("correlation_id", sa.Text, nullable=False),
    sa.Column("causation_id", sa.Text, nullable=False),
    sa.Column("traceparent", sa.Text, nullable=False),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("update_time", sa.DateTime(timezone=True), nullable=False),
    sa.UniqueConstraint("merchant", "order_id", name="payments_order"),
    sa.CheckConstraint("0 <= refunded AND refunded <= captured", name="payments_conserved"),
    sa.CheckConstraint("(due IS NULL) = (due_time IS NULL)", name="payments_due"),
    postgresql_with={"fillfactor": "80"},
)
sa.Index(
    "payments_due_time",
    payments.c.due,
    payments.c.due_time,
    postgresql_where=payments.c.due.is_not(None),
)

payment_attempts = sa.Table(
    "payment_attempts",
    metadata,
    *_key(),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("attempt_id", PgUuid(as_uuid=True), nullable=False),
    sa.Column("order_id", PgUuid(as_uuid=True), nullable=False),
    sa.Column("provider_key", sa.Text, nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("payment_method", sa.Text, nullable=False),
    sa.Column("capture_method", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("provider_reference", sa.Text, nullable=False),
    sa.Column("failure_reason", sa.Text, nullable=False),
    sa.Column("asked", sa.Integer, nullable=False),
    sa.Column("sent_time", sa.DateTime(timezone=True)),
    sa.CheckConstraint("amount > 0", name="payment_attempts_amount"),
    postgresql_with={"fillfactor": "80"},
)
# At most one charge of an order is live, whatever goes wrong above.
sa.Index(
    "payment_attempts_live",
    payment_attempts.c.merchant,
    payment_attempts.c.order_id,
    unique=True,
    postgresql_where=payment_attempts.c.state.not_in(["DECLINED", "FAILED", "VOIDED"]),
)

refunds = sa.Table(
    "refunds",
    metadata,
    *_key(),
    sa.Column("refund_id", PgUuid(as_uuid=True), primary_key=True),
    sa.Column("provider_key", sa.Text, nullable=False),
    sa.Column("amount", sa.BigInteger, nullable=False),
    sa.Column("currency", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("provider_reference", sa.Text, nullable=False),
    sa.Column("failure_reason", sa.Text, nullable=False),
    sa.Column("asked", sa.Integer, nullable=False),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("sent_time", sa.DateTime(timezone=True)),
    sa.CheckConstraint("amount > 0", name="refunds_amount"),
)

# A payment's id begins with its time of creation (UUIDv7), so the primary key is also
# the order in which payments are listed.
payment_reads = sa.Table(
    "payment_reads",
    metadata,
    *_key(),
    sa.Column("revision", sa.BigInteger, nullable=False),
    sa.Column("resource", BYTEA, nullable=False),
    postgresql_with={"fillfactor": "80"},
)

outbox = outbox_table(metadata)
inbox = inbox_table(metadata)
