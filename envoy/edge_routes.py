"""Which methods are public, how long they may take, and who may call them.

What is routed is read from the protos' descriptor set; the tables here say the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from google.api import annotations_pb2
from google.protobuf import descriptor_pb2

SERVICES = {
    "order": "ordermesh.order.v1.OrderService",
    "payment": "ordermesh.payment.v1.PaymentService",
    "notification": "ordermesh.notification.v1.NotificationService",
    "rates": "ordermesh.rates.v1.ExchangeRateService",
}
"""Cluster to public gRPC service. A cluster's certificates carry the name `<cluster>.mesh`."""

READS_BY_POST = frozenset({"/ordermesh.rates.v1.ExchangeRateService/ConvertMoney"})
"""Methods that change nothing although their HTTP verb is POST (AIP-136 needs a body)."""

INTERNAL_CALLS = {"rates": ("order",)}
"""Who may call what through the internal listener: callee to callers, by short name."""

ROLES = ("merchant", "operator")
"""Roles that a token may carry; who has none of them is denied everything."""

READ_SECONDS = 2.0
MUTATION_SECONDS = 10.0
TRY_SHARE = 0.45
"""Part of a call's time that one try may take, so that a second one still fits in."""


class DescriptorError(Exception):
    """The descriptor set does not fit the tables here; the message is one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One public method and how it is routed."""

    path: str
    """The gRPC path: what every rule after the transcoder matches."""
    rest: str
    """The REST line, for example `GET /v1/{name=merchants/*/orders/*}`."""
    is_read: bool

    @property
    def seconds(self) -> float:
        """How long a call may take, over all its tries."""
        return READ_SECONDS if self.is_read else MUTATION_SECONDS

    @property
    def seconds_per_try(self) -> float:
        """How long one try may take before another replica is asked."""
        return self.seconds * TRY_SHARE


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One public service, its cluster and its methods."""

    cluster: str
    name: str
    methods: tuple[Method, ...]


REFLECTION = (
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
)


def services_in(descriptor: Path) -> tuple[Service, ...]:
    """The public services in a descriptor set, in the order of `SERVICES`.

    Raises:
        DescriptorError: The file cannot be read, lacks a service or the error details, or
            holds a method that has no REST line or needs limits of its own.
    """
    try:
        files = descriptor_pb2.FileDescriptorSet.FromString(descriptor.read_bytes())
    except OSError as error:
        raise DescriptorError(f"{error.strerror}: {descriptor}") from error
    except ValueError as error:
        raise DescriptorError(f"not a descriptor set: {descriptor}") from error
    if not any(file.name == "google/rpc/error_details.proto" for file in files.file):
        # Without it the transcoder cannot print the details of an error.
        raise DescriptorError("google/rpc/error_details.proto is not in it")
    found = {
        f"{file.package}.{service.name}": service for file in files.file for service in file.service
    }
    services = []
    for cluster, name in SERVICES.items():
        if name not in found:
            raise DescriptorError(f"{name} is not in it")
        methods = tuple(_method_of(name, method) for method in found[name].method)
        services.append(Service(cluster=cluster, name=name, methods=methods))
    unrouted = sorted(name for name in found if name.startswith("ordermesh."))
    unrouted = [name for name in unrouted if name not in SERVICES.values()]
    if unrouted:
        raise DescriptorError(f"{unrouted[0]} is not routed; add it to SERVICES")
    return tuple(services)


def _method_of(service: str, method: descriptor_pb2.MethodDescriptorProto) -> Method:
    path = f"/{service}/{method.name}"
    if method.client_streaming or method.server_streaming:
        raise DescriptorError(f"{path} streams and needs time limits of its own")
    rule = method.options.Extensions[annotations_pb2.http]
    verb = rule.WhichOneof("pattern")
    if verb is None or verb == "custom":
        raise DescriptorError(f"{path} has no REST line")
    is_read = verb == "get" or path in READS_BY_POST
    return Method(path=path, rest=f"{verb.upper()} {getattr(rule, verb)}", is_read=is_read)


def query_over_path(services: Iterable[Service]) -> str:
    """A regular expression for paths whose query names a field that paths hold.

    The transcoder would take the query's value in the path's place, and it decodes names.
    """
    lines = [method.rest for service in services for method in service.methods]
    held = {field for line in lines for field in re.findall(r"\{([\w.]+)", line)}
    # As JSON calls them, too.
    held |= {re.sub(r"_(\w)", lambda match: match[1].upper(), field) for field in held}
    return rf".*[?&]({'|'.join(map(_as_sent, sorted(held)))})=.*"


def _as_sent(name: str) -> str:
    """Matches a name in a query, each character of it percent-encoded or not."""
    return "".join(f"({re.escape(char)}|%(?i:{ord(char):02x}))" for char in name)


def roles_expression() -> str:
    """The roles of the caller's token as `merchant,operator`, in CEL.

    Envoy hands a list claim over as base64 of JSON; services read words. Roles that
    `ROLES` does not name are left out.
    """
    claimed = "metadata.filter_metadata['envoy.filters.http.jwt_authn'].claims.roles"

    # A choice of constants: the formatter's CEL cannot join strings.
    def choose(left: tuple[str, ...], chosen: tuple[str, ...]) -> str:
        if not left:
            return f"'{','.join(chosen)}'"
        first, *rest = left
        yes, no = choose(tuple(rest), (*chosen, first)), choose(tuple(rest), chosen)
        return f"('{first}' in {claimed} ? {yes} : {no})"

    return choose(ROLES, ())


def route_table(descriptor: Path) -> str:
    """The route table in Markdown, as it stands in envoy/README.md."""
    lines = [
        "| REST | gRPC method | cluster | kind | time | one try |",
        "|--|--|--|--|--|--|",
    ]
    for service in services_in(descriptor):
        for method in service.methods:
            short = method.path.rpartition(".")[2]
            kind = "read" if method.is_read else "mutation"
            lines.append(
                f"| `{method.rest}` | `{short}` | {service.cluster} | {kind} "
                f"| {method.seconds:g} s | {method.seconds_per_try:g} s |"
            )
    return "\n".join(lines) + "\n"
