"""The pipeline to compare with: what a team glues together by hand.

FastAPI, SQLAlchemy's ORM, aio-pika and an outbox, as a careful engineer writes them in
a day. It places an order, "charges" it in a consumer and marks it paid. It has no
idempotency keys, history, validation beyond types, read model, edge, tokens, mutual
TLS, notifications or dead letters: say so whenever it is quoted.
"""
