"""One order is one trace: from the edge through order, payment and notification.

Who collects traces here is a real OTLP receiver. Envoy and the services export to it over
gRPC, as they do to any other, and the trace context travels with the events.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1 import trace_pb2

from tests.e2e.callers import a_request, ended, listed, rest_caller
from tests.e2e.conftest import a_mesh
from tests.eventually import eventually

EXPORTED_WITHIN_SECONDS = 40
"""Envoy and the SDK send what they have every 5 s; a busy machine takes longer."""


@dataclass(frozen=True, slots=True)
class Span:
    """A span as it was exported."""

    service: str
    name: str
    trace: str
    id: str
    parent: str
    """Empty for the first of a trace."""
    begin: int
    """Nanoseconds since 1970, by the clock that all processes share here."""
    links: tuple[tuple[str, str], ...]
    """Trace and span of each, where several causes are handled together."""


@dataclass
class Collector:
    """What an OTLP receiver was sent."""

    endpoint: str = ""
    spans: list[Span] = field(default_factory=list)

    def export(
        self, request: ExportTraceServiceRequest, _: grpc.ServicerContext
    ) -> ExportTraceServiceResponse:
        """The receiver's one method."""
        for resource in request.resource_spans:
            attributes = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [_span(attributes["service.name"], span) for span in scope.spans]
        return ExportTraceServiceResponse()

    def trace(self, trace: str) -> dict[str, Span]:
        """The spans that are in a trace or say that they go on from it, by their id."""
        return {
            span.id: span
            for span in list(self.spans)
            if span.trace == trace or any(linked == trace for linked, _ in span.links)
        }


@contextmanager
def collecting() -> Iterator[Collector]:
    """An OTLP receiver on a free port of the loopback interface."""
    collector = Collector()
    method = grpc.unary_unary_rpc_method_handler(
        collector.export,
        request_deserializer=ExportTraceServiceRequest.FromString,
        response_serializer=ExportTraceServiceResponse.SerializeToString,
    )
    # One thread: exports come one after another.
    server = grpc.server(ThreadPoolExecutor(1))
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(service, {"Export": method})]
    )
    collector.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield collector
    finally:
        server.stop(grace=None).wait()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_one_trace_leads_from_the_callers_span_through_the_edge_to_every_consumer(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Of the caller's own trace; what is handled for it comes under it, in the order it was."""
    trace, callers_span = secrets.token_hex(16), secrets.token_hex(8)
    traceparent = f"00-{trace}-{callers_span}-01"
    folder = tmp_path_factory.mktemp("traces")
    with (
        collecting() as collector,
        a_mesh(folder, "postgres", otlp_endpoint=collector.endpoint) as mesh,
    ):
        async with rest_caller(mesh.access()) as rest:
            answer = await rest.call(
                "CreateOrder", a_request(), headers={"traceparent": traceparent}
            )
            name = answer.resource["name"]
            await ended(rest, name)
            timeline = await listed(rest, "ListOrderEvents", "events", parent=name)
        assert [event["traceId"] for event in timeline] == [trace, trace]

        # What each service does for one order that is paid, whatever else it may do.
        heard = {
            ("payment", "consume payment"): 1,  # OrderCreated
            ("order", "consume order"): 1,  # PaymentSucceeded
            ("notification", "consume notification"): 3,  # both, and OrderConfirmed
        }

        def told() -> dict[str, Span]:
            spans = collector.trace(trace)
            times = Counter[tuple[str, str]]()
            for span in spans.values():
                times[span.service, span.name] += len(span.links) or 1
            missing = {which: n - times[which] for which, n in heard.items() if times[which] < n}
            assert not missing
            # Nobody is left hanging: each span's parent was exported too, or is the caller's.
            inside = [span for span in spans.values() if span.trace == trace]
            assert {span.parent for span in inside} - spans.keys() == {callers_span}
            return spans

        spans = await eventually(told, EXPORTED_WITHIN_SECONDS, describe="the trace is exported")

    (edge,) = (span for span in spans.values() if span.parent == callers_span)
    assert edge.service == "edge"
    # From parent to child: the edge's request, its call, the service's answer, the command.
    path = [edge]
    for service in ("edge", "order", "order"):
        (child,) = (
            span
            for span in spans.values()
            if (span.parent, span.service) == (path[-1].id, service)
            and not span.name.startswith("consume ")
        )
        path.append(child)
    call, answered, command = path[1:]
    assert answered.name == "/ordermesh.order.v1.OrderService/CreateOrder"
    assert command.name == "CreateOrder"
    # Every event carries the context of the call that set it off, so each consumer goes on
    # from there: as a child, or by links where several events were handled together.
    consumed = [span for span in spans.values() if span.name.startswith("consume ")]
    for span in consumed:
        assert {span.parent, *(linked for _, linked in span.links)} - {""} == {call.id}, span
    begun = {name: min(s.begin for s in consumed if s.service == name) for name, _ in heard}
    assert edge.begin <= call.begin <= answered.begin <= command.begin
    assert command.begin < begun["payment"] < begun["order"]
    assert command.begin < begun["notification"]
    last = max(span.begin for span in consumed if span.service == "notification")
    assert begun["order"] < last, "the customer is told once the order is confirmed"


def _span(service: str, span: trace_pb2.Span) -> Span:
    return Span(
        service=service,
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        begin=span.start_time_unix_nano,
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
    )
