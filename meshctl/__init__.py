"""meshctl: runs a whole mesh on one machine, and is the command line for using one.

Running:    `cli` > `up` > `mesh` (which parts, told what) > `supervisor` (kept running, ended in
            order) > `servers` (PostgreSQL, Valkey, RabbitMQ, Envoy) > `processes` (one child).
            `guardian` and `leftovers` see to it that nothing stays behind; `state` is the folder
            of one mesh, `credentials` its keys.
Using:      `cli` > `resources`, `load`, `demo` > `client` (REST), `grpc_edge` (gRPC).
"""
