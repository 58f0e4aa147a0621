"""The tables of the broker in PostgreSQL, and the one statement for each thing that happens."""

from __future__ import annotations

from typing import Final

CHANNEL: Final = "mesh_broker"
"""Where notifications say which queues have got something: their ids, with commas between."""

SCHEMA_LOCK: Final = 6_011_957_268
"""Advisory lock under which the schema and the bindings are changed."""

DUE_ROWS_MAX: Final = 500
"""Most rows that one `RETURN_DUE` moves."""

SCHEMA: Final[tuple[str, ...]] = (
    """
    CREATE TABLE mesh_broker.queue (
        id smallint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        consumer text NOT NULL UNIQUE
    );
    CREATE TABLE mesh_broker.binding (
        type text NOT NULL,
        queue_id smallint NOT NULL REFERENCES mesh_broker.queue,
        PRIMARY KEY (type, queue_id)
    );
    CREATE TABLE mesh_broker.message (
        queue_id smallint NOT NULL,
        id bigint GENERATED ALWAYS AS IDENTITY,
        leased_until timestamptz NOT NULL DEFAULT '-infinity',
        owner bigint NOT NULL DEFAULT 0,
        deliveries smallint NOT NULL DEFAULT 0,
        attempt smallint NOT NULL,
        event_id uuid NOT NULL,
        enqueue_time timestamptz NOT NULL DEFAULT now(),
        first_death_time timestamptz,
        type text NOT NULL,
        headers text NOT NULL,
        body bytea STORAGE EXTERNAL NOT NULL,
        PRIMARY KEY (queue_id, id)
    ) WITH (
        -- Every row is changed once, by its claim: half of a page is kept for that.
        fillfactor = 50,
        toast_tuple_target = 8160,
        -- Every row is soon dead: clear by number, at every round, and do not give pages back
        -- to the file system only to ask for them again.
        autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0,
        autovacuum_vacuum_cost_delay = 0, vacuum_truncate = off
    );
    CREATE TABLE mesh_broker.delayed (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        queue_id smallint NOT NULL,
        due_time timestamptz NOT NULL,
        attempt smallint NOT NULL,
        event_id uuid NOT NULL,
        first_death_time timestamptz NOT NULL,
        type text NOT NULL,
        headers text NOT NULL,
        body bytea STORAGE EXTERNAL NOT NULL
    ) WITH (autovacuum_vacuum_threshold = 500, autovacuum_vacuum_scale_factor = 0);
    CREATE INDEX delayed_due ON mesh_broker.delayed (queue_id, due_time);
    CREATE TABLE mesh_broker.dead_letter (
        queue_id smallint NOT NULL,
        id bigint GENERATED ALWAYS AS IDENTITY,
        attempt smallint NOT NULL,
        event_id uuid NOT NULL,
        first_death_time timestamptz NOT NULL,
        death_time timestamptz NOT NULL DEFAULT now(),
        error_class text NOT NULL,
        error_detail text NOT NULL,
        type text NOT NULL,
        headers text NOT NULL,
        body bytea NOT NULL,
        PRIMARY KEY (queue_id, id)
    );
    """,
)

DECLARE_QUEUES = """
INSERT INTO mesh_broker.queue (consumer)
SELECT consumer FROM unnest($1::text[]) AS n(consumer)
WHERE NOT EXISTS (SELECT FROM mesh_broker.queue AS q WHERE q.consumer = n.consumer)
"""

DECLARE_BINDINGS = """
INSERT INTO mesh_broker.binding (type, queue_id)
SELECT n.type, q.id
FROM unnest($1::text[], $2::text[]) AS n(type, consumer)
JOIN mesh_broker.queue AS q USING (consumer)
ON CONFLICT DO NOTHING
"""

# Answers the types among the published ones that nobody subscribes to.
PUBLISH = f"""
WITH inserted AS (
    INSERT INTO mesh_broker.message (queue_id, event_id, type, headers, body, attempt)
    SELECT b.queue_id, m.event_id, m.type, m.headers, m.body, m.attempt
    FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::smallint[])
         WITH ORDINALITY AS m(event_id, type, headers, body, attempt, position)
    JOIN mesh_broker.binding AS b USING (type)
    ORDER BY m.position
    RETURNING queue_id
), woken AS (
    SELECT pg_notify('{CHANNEL}', string_agg(DISTINCT queue_id::text, ','))
    FROM inserted HAVING count(*) > 0
)
SELECT (SELECT count(*) FROM woken) AS woken, array(
    SELECT DISTINCT t FROM unnest($2::text[]) AS t
    WHERE NOT EXISTS (SELECT FROM mesh_broker.binding AS b WHERE b.type = t)
) AS unroutable
"""

# Settles the previous batch and claims the next one in one round trip.
#
# $1 queue, $2 owner, $3 most rows, $4 settled ids, $5 first id to look at, $6 lease seconds.
# Rows that were taken before go alone: were they claimed in company, each death of a process
# that one poisonous row causes would count against its neighbours too, until all of them
# exceeded the delivery limit together.
SETTLE_AND_CLAIM = """
WITH settled AS (
    DELETE FROM mesh_broker.message
    WHERE queue_id = $1 AND id = ANY($4::bigint[]) AND owner = $2
), ready AS MATERIALIZED (
    SELECT id, deliveries FROM mesh_broker.message
    WHERE queue_id = $1 AND id >= $5 AND leased_until < now() AND id <> ALL($4::bigint[])
    ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED
), edge AS (
    SELECT min(id) AS first, min(id) FILTER (WHERE deliveries > 0) AS again FROM ready
)
UPDATE mesh_broker.message
SET owner = $2, deliveries = deliveries + 1,
    leased_until = now() + make_interval(secs => $6::float8)
WHERE queue_id = $1 AND id = ANY(array(
    SELECT id FROM ready, edge
    WHERE again IS NULL OR id < again OR (id = again AND id = first)))
RETURNING id, event_id, type, headers, body, attempt, deliveries
"""

SETTLE = """
DELETE FROM mesh_broker.message
WHERE queue_id = $1 AND owner = $2 AND id = ANY($3::bigint[])
"""

RENEW = """
UPDATE mesh_broker.message SET leased_until = now() + make_interval(secs => $4::float8)
WHERE queue_id = $1 AND owner = $2 AND id = ANY($3::bigint[])
"""

# $3 ids, $4 delays (NULL: a dead letter), $5 error classes, $6 error details.
FAIL = """
WITH failed AS (
    SELECT * FROM unnest($3::bigint[], $4::float8[], $5::text[], $6::text[])
        AS f(id, delay, error_class, error_detail)
), gone AS (
    DELETE FROM mesh_broker.message
    WHERE queue_id = $1 AND owner = $2 AND id = ANY($3::bigint[])
    RETURNING id, attempt, event_id, first_death_time, type, headers, body
), set_aside AS (
    INSERT INTO mesh_broker.delayed
        (queue_id, due_time, attempt, event_id, first_death_time, type, headers, body)
    SELECT $1, now() + make_interval(secs => delay), attempt + 1, event_id,
           coalesce(first_death_time, now()), type, headers, body
    FROM gone JOIN failed USING (id) WHERE delay IS NOT NULL ORDER BY id
)
INSERT INTO mesh_broker.dead_letter
    (queue_id, attempt, event_id, first_death_time, error_class, error_detail,
     type, headers, body)
SELECT $1, attempt, event_id, coalesce(first_death_time, now()), error_class, error_detail,
       type, headers, body
FROM gone JOIN failed USING (id) WHERE delay IS NULL ORDER BY id
"""

RETURN_DUE = f"""
WITH due AS (
    DELETE FROM mesh_broker.delayed WHERE id = ANY(array(
        SELECT id FROM mesh_broker.delayed
        WHERE queue_id = $1 AND due_time <= now()
        ORDER BY due_time LIMIT {DUE_ROWS_MAX} FOR UPDATE SKIP LOCKED))
    RETURNING id, due_time, attempt, event_id, first_death_time, type, headers, body
), returned AS (
    INSERT INTO mesh_broker.message
        (queue_id, attempt, event_id, first_death_time, type, headers, body)
    SELECT $1, attempt, event_id, first_death_time, type, headers, body
    FROM due ORDER BY due_time, id
    RETURNING 1
)
SELECT (SELECT count(*) FROM returned) AS returned,
       (SELECT extract(epoch FROM min(due_time) - now())::float8 FROM mesh_broker.delayed
        WHERE queue_id = $1 AND due_time > now()) AS next_seconds
"""

DEAD_LETTERS = """
SELECT d.event_id, d.type, d.headers, d.body, d.attempt, d.error_class, d.error_detail,
       d.first_death_time, d.death_time
FROM mesh_broker.dead_letter AS d JOIN mesh_broker.queue AS q ON q.id = d.queue_id
WHERE q.consumer = $1 ORDER BY d.id LIMIT $2
"""

# The tables grow and empty too fast for the planner's statistics, and there is one good plan
# for each statement: by index, made once.
PLANNING: Final = {
    "plan_cache_mode": "force_generic_plan",
    "enable_seqscan": "off",
    "enable_bitmapscan": "off",
    "jit": "off",
}
