"""One effect per request, however often it is sent: the ledger of request ids.

The caller gives each mutating request a UUID (AIP-155). The ledger's row is written in
the transaction of the effect, with the answer in it, so that a repeat is answered
from the row, to the byte, and no request is ever seen half done. PostgreSQL is the
truth; there is nothing to lose anywhere else. The behaviour follows
draft-ietf-httpapi-idempotency-key-header and docs/reliability.md; the 72 hours give a
weekend to notice and a Monday to repair (brandur/rocket-rides-atomic).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from google.protobuf.message import Message as ProtoMessage
from sqlalchemy.dialects.postgresql import BYTEA
from sqlalchemy.dialects.postgresql import UUID as PgUuid

from chassis.database import AnyConnection, Database
from chassis.errors import InvalidInputError
from chassis.request_key import Replay, RequestKey

EXPIRY_HOURS = 72


def request_table(metadata: sa.MetaData) -> sa.Table:
    """The ledger of a service, to stand in its `tables`."""
    table = sa.Table(
        "requests",
        metadata,
        sa.Column("merchant", sa.Text, primary_key=True),
        sa.Column("method", sa.Text, primary_key=True),
        sa.Column("request_id", PgUuid(as_uuid=True), primary_key=True),
        sa.Column("fingerprint", BYTEA, nullable=False),
        sa.Column("resource_id", PgUuid(as_uuid=True), nullable=False),
        sa.Column("answer", BYTEA, nullable=False),
        sa.Column("expire_time", sa.DateTime(timezone=True), nullable=False),
    )
    sa.Index("requests_expiry", table.c.expire_time, postgresql_using="brin")
    return table


def fingerprint_of(request: ProtoMessage) -> bytes:
    """What a request asks for, as 32 bytes, without the `request_id` it asks under.

    It is taken from the decoded message, field by field in the order of their numbers,
    so that JSON and gRPC forms, reordered or repeated JSON members and unknown fields
    make no difference; and not from serialized bytes, which are not canonical.
    """
    listing = _listed(request, skip="request_id")
    return hashlib.sha256(b"v1:" + repr(listing).encode()).digest()


def _listed(message: ProtoMessage, skip: str = "") -> list[tuple[int, Any]]:
    listed: list[tuple[int, Any]] = []
    for field, value in message.ListFields():
        if field.name == skip:
            continue
        if field.message_type is None:
            plain = list(value) if field.is_repeated else value
        elif field.message_type.GetOptions().map_entry:
            of_message = field.message_type.fields_by_name["value"].message_type is not None
            plain = sorted((key, _listed(v) if of_message else v) for key, v in value.items())
        elif field.is_repeated:
            plain = [_listed(item) for item in value]
        else:
            plain = _listed(value)
        listed.append((field.number, plain))
    return listed


_RECORD = f"""
INSERT INTO requests (merchant, method, request_id, fingerprint, resource_id, answer, expire_time)
SELECT n.*, now() + interval '{EXPIRY_HOURS} hours'
FROM unnest($1::text[], $2::text[], $3::uuid[], $4::bytea[], $5::uuid[], $6::bytea[])
     AS n(merchant, method, request_id, fingerprint, resource_id, answer)
ORDER BY n.merchant, n.method, n.request_id
ON CONFLICT (merchant, method, request_id) DO UPDATE
SET fingerprint = excluded.fingerprint, resource_id = excluded.resource_id,
    answer = excluded.answer, expire_time = excluded.expire_time
WHERE requests.expire_time < now()
RETURNING resource_id
"""

_FIND = """
SELECT merchant, method, request_id, fingerprint, answer FROM requests
JOIN unnest($1::text[], $2::text[], $3::uuid[]) AS n(merchant, method, request_id)
     USING (merchant, method, request_id)
WHERE expire_time >= now()
"""

_FORGET = """
DELETE FROM requests USING unnest($1::text[], $2::text[], $3::uuid[])
    AS n(merchant, method, request_id)
WHERE requests.merchant = n.merchant AND requests.method = n.method
  AND requests.request_id = n.request_id
"""

# Expiry is asked of the row that is deleted, too: a request that is made anew under an
# expired id may have changed it since it was selected.
_DROP_EXPIRED = """
DELETE FROM requests WHERE expire_time < now() AND (merchant, method, request_id) IN (
    SELECT merchant, method, request_id FROM requests WHERE expire_time < now() LIMIT $1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A request about to be done: its key, what it touches, and what it will answer.

    `resource_id` must be unique among the entries of one `record`: it tells which of
    several entries won.
    """

    key: RequestKey
    resource_id: UUID
    answer: bytes


async def record(
    connection: AnyConnection, entries: Sequence[Entry]
) -> list[Replay | InvalidInputError | None]:
    """Writes requests into the ledger, inside the transaction of their effect.

    Waits for a concurrent twin to commit or roll back. Answers, for each entry: None
    when it is to be done now; the earlier answer when it was done before; the error
    when its id was used for something else. Of twins within `entries` the first is
    done and the others replay its answer.
    """
    firsts: dict[tuple[str, str, UUID], Entry] = {}
    for entry in entries:
        firsts.setdefault(entry.key.identity, entry)
    chosen = list(firsts.values())
    rows = await connection.fetch(
        _RECORD,
        [entry.key.merchant for entry in chosen],
        [entry.key.method for entry in chosen],
        [entry.key.request_id for entry in chosen],
        [entry.key.fingerprint for entry in chosen],
        [entry.resource_id for entry in chosen],
        [entry.answer for entry in chosen],
    )
    fresh = {row["resource_id"] for row in rows}
    known = {
        entry.key.identity: (entry.key.fingerprint, entry.answer)
        for entry in chosen
        if entry.resource_id in fresh
    }
    if len(fresh) < len(chosen):
        known |= await _known(
            connection, [entry.key for entry in chosen if entry.resource_id not in fresh]
        )
    return [
        None
        if entry.resource_id in fresh and firsts[entry.key.identity] is entry
        else _answered(entry.key, *known[entry.key.identity])
        for entry in entries
    ]


async def find(connection: AnyConnection, key: RequestKey) -> Replay | None:
    """The earlier answer of a request, if it has one.

    Raises:
        InvalidInputError: The request id was used for something else.
    """
    known = await _known(connection, [key])
    if key.identity not in known:
        return None
    answered = _answered(key, *known[key.identity])
    if isinstance(answered, InvalidInputError):
        raise answered
    return answered


async def forget(connection: AnyConnection, keys: Sequence[RequestKey]) -> None:
    """Takes requests back whose effect turned out to be refused, in the same transaction."""
    await connection.execute(
        _FORGET,
        [key.merchant for key in keys],
        [key.method for key in keys],
        [key.request_id for key in keys],
    )


async def drop_expired(database: Database) -> int:
    """Deletes expired entries; says how many."""
    return await database.delete_all(_DROP_EXPIRED)


async def _known(
    connection: AnyConnection, keys: Sequence[RequestKey]
) -> dict[tuple[str, str, UUID], tuple[bytes, bytes]]:
    rows = await connection.fetch(
        _FIND,
        [key.merchant for key in keys],
        [key.method for key in keys],
        [key.request_id for key in keys],
    )
    return {
        (row["merchant"], row["method"], row["request_id"]): (row["fingerprint"], row["answer"])
        for row in rows
    }


def _answered(key: RequestKey, fingerprint: bytes, answer: bytes) -> Replay | InvalidInputError:
    if fingerprint == key.fingerprint:
        return Replay(answer)
    return InvalidInputError.of_field(
        "IDEMPOTENCY_KEY_REUSED",
        "request_id",
        "was used before with another request; take a fresh one",
        request_id=str(key.request_id),
    )
