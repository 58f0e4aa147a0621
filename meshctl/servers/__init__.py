"""The servers under the mesh: PostgreSQL, Valkey, RabbitMQ with its epmd, and Envoy.

Each class knows how to prepare its folder, which command runs it, and when it is ready; the
supervisor uses them for a mesh that keeps its data, and `throwaway` for tests::

    async with throwaway_postgres() as url:      # an empty cluster, fsync off, gone afterwards
        ...
    async with throwaway(RabbitMQ) as broker:    # the handle, to restart or kill it
        await broker.kill()

All of them listen on 127.0.0.1 only. PostgreSQL and RabbitMQ are not run as root: started by
root, they run as a user that owns nothing else (see `unprivileged`).
"""

from meshctl.servers.base import Server, http_request, http_status, start, unprivileged
from meshctl.servers.envoy import Envoy
from meshctl.servers.postgres import Postgres
from meshctl.servers.rabbitmq import Epmd, RabbitMQ, require_rabbitmq
from meshctl.servers.throwaway import (
    Throwaway,
    throwaway,
    throwaway_postgres,
    throwaway_rabbitmq,
    throwaway_valkey,
)
from meshctl.servers.valkey import Valkey

__all__ = [
    "Envoy",
    "Epmd",
    "Postgres",
    "RabbitMQ",
    "Server",
    "Throwaway",
    "Valkey",
    "http_request",
    "http_status",
    "require_rabbitmq",
    "start",
    "throwaway",
    "throwaway_postgres",
    "throwaway_rabbitmq",
    "throwaway_valkey",
    "unprivileged",
]
