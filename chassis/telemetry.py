"""Structured logs, spans and metrics: set up once per process.

Logs are JSON lines with the correlation and trace ids of whatever is being handled.
Nothing is logged that could be secret or personal: log calls name ids and reasons,
never requests, addresses or tokens.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from socketserver import ThreadingMixIn
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import structlog
from prometheus_client import make_wsgi_app

from chassis.context import current
from chassis.settings import ServiceSettings


def configure_logs(settings: ServiceSettings, service: str) -> None:
    """Sends structlog's and the standard library's logs to standard output."""
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_context(service),
    ]
    renderer: Any = (
        structlog.processors.JSONRenderer()
        if settings.log_format == "json"
        else structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    )
    exceptions = [structlog.processors.format_exc_info] if settings.log_format == "json" else []
    structlog.configure(
        processors=[*shared, *exceptions, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                *exceptions,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    # Libraries speak at warning: their chatter at info is not ours to keep.
    root.setLevel(max(level, logging.WARNING))


def _with_context(service: str) -> Callable[[Any, str, dict[str, Any]], dict[str, Any]]:
    def add(_logger: Any, _method: str, line: dict[str, Any]) -> dict[str, Any]:
        line["service"] = service
        context = current()
        if context.correlation_id:
            line["correlation_id"] = context.correlation_id
        if context.traceparent:
            line["trace_id"] = context.trace_id
        if context.caller is not None and context.caller.merchant:
            line["merchant"] = context.caller.merchant
        return line

    return add


def configure_tracing(settings: ServiceSettings, service: str) -> Callable[[], None]:
    """Exports spans when an endpoint is set; answers what to call before the process ends.

    Instruments gRPC, asyncpg and redis, so it must run before any of their
    clients or servers are made.
    """
    if not settings.otlp_endpoint:
        return lambda: None
    # Imported here, because the exporter costs a third of a second at start.
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asyncpg import AsyncPGInstrumentor
    from opentelemetry.instrumentation.grpc import GrpcAioInstrumentorClient
    from opentelemetry.instrumentation.redis import RedisInstrumentor
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(
        resource=Resource.create({"service.name": service, "service.namespace": "ordermesh"})
    )
    provider.add_span_processor(
        BatchSpanProcessor(
            OTLPSpanExporter(
                endpoint=settings.otlp_endpoint,
                insecure=settings.otlp_endpoint.startswith("http://"),
            )
        )
    )
    trace.set_tracer_provider(provider)
    for instrumentor in (
        GrpcAioInstrumentorClient(),
        AsyncPGInstrumentor(),
        RedisInstrumentor(),
    ):
        instrumentor.instrument()
    return provider.shutdown


class HealthServer:
    """Plain HTTP for probes and scrapers: `/livez`, `/readyz`, `/metrics`.

    It runs in threads of its own, so that a busy event loop is still scraped. It
    answers `/readyz` with 503 and the reason while `not_ready` holds one.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.not_ready: str | None = "starting"
        self._metrics = make_wsgi_app()
        self._server = make_server(
            host, int(port), self._answer, server_class=_Server, handler_class=_QuietHandler
        )
        self._thread = Thread(target=self._server.serve_forever, name="health", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._server.server_port

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return self._metrics(environ, start_response)
        reason = self.not_ready
        if path == "/livez":
            status, body = "200 OK", "alive"
        elif path == "/readyz":
            status, body = ("200 OK", "ready") if reason is None else ("503 Not Ready", reason)
        else:
            status, body = "404 Not Found", "one of /livez /readyz /metrics"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [body.encode() + b"\n"]


class _Server(ThreadingMixIn, WSGIServer):
    # One thread for all would make a scraper that connects and says nothing hold up probes.
    daemon_threads = True


class _QuietHandler(WSGIRequestHandler):
    timeout = 5

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name above
        return
