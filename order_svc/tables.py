"""The order service's tables. The merchant is the first column of every key.

Write model: `orders` holds each order as it is now, `order_customers` its personal
data, apart so that it can be erased; `order_history` holds every version for ever.
Read model: `order_reads` holds the resource as callers read it, serialized, and can be
rebuilt from the others at any time. `outbox`, `inbox` and `requests` are the chassis's.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import BYTEA, JSONB
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.idempotency import request_table
from chassis.inbox import inbox_table
from chassis.outbox import outbox_table

metadata = sa.MetaData()


def _key() -> tuple[sa.Column[str], sa.Column[object]]:
    return (
        sa.Column("merchant", sa.Text, primary_key=True),
        sa.Column("order_id", PgUuid(as_uuid=True), primary_key=True),
    )


orders = sa.Table(
    "orders",
    metadata,
    *_key(),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("announcement", sa.Text, nullable=False),
    sa.Column("client_order_ref", sa.Text),
    sa.Column("document", JSONB, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("payment_state", sa.Text, nullable=False),
    sa.Column("fulfillment_state", sa.Text, nullable=False),
    sa.Column("payment", sa.Text, nullable=False),
    sa.Column("failure_reason", sa.Text, nullable=False),
    sa.Column("cancel_reason", sa.Text, nullable=False),
    sa.Column("attention_reason", sa.Text, nullable=False),
    sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("update_time", sa.DateTime(timezone=True), nullable=False),
    # By the database's clock: how long an order has been in its state is compared
    # across replicas.
    sa.Column(
        "state_time", sa.DateTime(timezone=True), nullable=False, server_default=sa.func.now()
    ),
    # An order is updated about once, in place.
    postgresql_with={"fillfactor": "80"},
)
sa.Index(
    "orders_client_order_ref",
    orders.c.merchant,
    orders.c.client_order_ref,
    unique=True,
    postgresql_where=orders.c.client_order_ref.is_not(None),
)

order_customers = sa.Table(
    "order_customers",
    metadata,
    *_key(),
    sa.Column("customer_id", sa.Text, nullable=False),
    sa.Column("email", sa.Text, nullable=False),
    sa.Column("locale", sa.Text, nullable=False),
    sa.Column("shipping_address", JSONB),
    sa.Column("billing_address", JSONB),
)

order_history = sa.Table(
    "order_history",
    metadata,
    *_key(),
    sa.Column("version", sa.BigInteger, primary_key=True),
    sa.Column("event_id", PgUuid(as_uuid=True), nullable=False),
    sa.Column("event_type", sa.Text, nullable=False),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("payment_state", sa.Text, nullable=False),
    sa.Column("document", JSONB, nullable=False),
    sa.Column("occur_time", sa.DateTime(timezone=True), nullable=False),
    sa.Column("correlation_id", sa.Text, nullable=False),
    sa.Column("causation_id", sa.Text, nullable=False),
    sa.Column("trace_id", sa.Text, nullable=False),
)

# An order's id begins with its time of creation (UUIDv7), so the primary key is also
# the order in which orders are listed.
order_reads = sa.Table(
    "order_reads",
    metadata,
    *_key(),
    sa.Column("version", sa.BigInteger, nullable=False),
    sa.Column("resource", BYTEA, nullable=False),
    postgresql_with={"fillfactor": "80"},
)

outbox = outbox_table(metadata)
inbox = inbox_table(metadata)
requests = request_table(metadata)
