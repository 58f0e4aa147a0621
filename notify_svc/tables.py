"""The notification service's tables. The merchant is the first column of every key.

`recipients` is what is known of an order's customer and the only place with personal
data: setting `email` to null erases a customer, and what is still to be sent to them is
then suppressed. `notifications` holds one row per message for ever, with the address
shortened for people and hashed for the unique constraint.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA, JSONB
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.inbox import inbox_table

metadata = sa.MetaData()

recipients = sa.Table(
    "recipients",
    metadata,
    sa.Column("merchant", sa.Text, primary_key=True),
    sa.Column("order_id", PgUuid(as_uuid=True), primary_key=True),
    sa.Column("email", sa.Text),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("locale", sa.Text, nullable=False),
    sa.Column("client_order_ref", sa.Text, nullable=False),
    sa.Column("currency_code", sa.Text, nullable=False),
    sa.Column("total_minor_units", sa.BigInteger, nullable=False),
    # [[quantity, title], …], as the mails list them.
    sa.Column("lines", JSONB, nullable=False),
    sa.Column("order_time", sa.DateTime(timezone=True), nullable=False),
)

notifications = sa.Table(
    "notifications",
    metadata,
    sa.Column("merchant", sa.Text, primary_key=True),
    # Begins with its time of making (UUIDv7), so the key is also the order of lists.
    sa.Column("notification_id", PgUuid(as_uuid=True), primary_key=True),
    sa.Column("order_id", PgUuid(as_uuid=True), nullable=False),
    sa.Column("event_id", PgUuid(as_uuid=True), nullable=False),
    sa.Column("channel", sa.Text, nullable=False),
    sa.Column("audience", sa.Text, nullable=False),
    sa.Column("template", sa.Text, nullable=False),
    sa.Column("locale", sa.Text, nullable=False),
    sa.Column("recipient", sa.Text, nullable=False),
    sa.Column("recipient_hash", BYTEA, nullable=False),
    # What the event said and the mail repeats.
    sa.Column("currency_code", sa.Text, nullable=False),
    sa.Column("minor_units", sa.BigInteger, nullable=False),
    sa.Column("payment_state", sa.Text, nullable=False),
    sa.Column("detail", sa.Text, nullable=False),
    sa.Column("occur_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("correlation_id", sa.Text, nullable=False),
    sa.Column("traceparent", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("failure_reason", sa.Text, nullable=False, server_default=""),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("send_time", sa.DateTime(timezone=True)),
    # Who is sending it; null while nobody is.
    sa.Column("claim", PgUuid(as_uuid=True)),
    # When somebody may claim it: the next try, or the end of the present claim.
    sa.Column("due_time", sa.DateTime(timezone=True), nullable=False),
    sa.UniqueConstraint(
        "merchant", "event_id", "recipient_hash", "channel", "template", name="notifications_once"
    ),
    postgresql_with={
        "autovacuum_vacuum_scale_factor": "0.02",
        "autovacuum_vacuum_insert_scale_factor": "0.05",
    },
)
sa.Index(
    "notifications_of_order",
    notifications.c.merchant,
    notifications.c.order_id,
    notifications.c.notification_id,
)
sa.Index(
    "notifications_due",
    notifications.c.due_time,
    postgresql_where=notifications.c.state.in_(["QUEUED", "SENDING", "RETRYING"]),
)

inbox = inbox_table(metadata)
