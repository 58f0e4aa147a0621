"""Envoy's own refusals, made to look as the services' do.

Every reason stands in ordermesh.common.v1.ErrorReason.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass

from edge_settings import Limits
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

RETRY_SECONDS = 1
"""What a caller is told to wait after 429 and 503: the limits refill and the health
checks run every second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EdgeError:
    """How Envoy's own refusals look: as the services' do, over REST and gRPC alike.

    The first error whose `statuses` or `flags` fit, and `path` and `authenticated` too,
    is taken.
    """

    reason: str
    """Value of ordermesh.common.v1.ErrorReason, without its prefix."""
    message: str
    grpc_code: int
    http_status: int | None = None
    """What REST callers see; None keeps what Envoy would answer."""
    rest_code: int | None = None
    """The code in the JSON where it is not `grpc_code`."""
    statuses: tuple[int, int] | None = None
    """Envoy's own HTTP status, lowest and highest."""
    flags: tuple[str, ...] = ()
    """Envoy's response flags, as access logs print them."""
    path: str = ""
    """A regular expression that the path with its query has to match as well."""
    authenticated: bool | None = None
    """Whether the caller's token was accepted before; None where it makes no difference."""
    keeps_message: bool = False
    """Whether REST callers see Envoy's message: it says where their JSON is broken."""
    waits: bool = False
    """Whether to tell the caller to try again later."""

    @property
    def code_in_json(self) -> int:
        """The code that REST callers read."""
        return self.grpc_code if self.rest_code is None else self.rest_code

    @property
    def details_bin(self) -> str:
        """The google.rpc.Status for gRPC callers, as the metadata carries it."""
        status = status_pb2.Status(code=self.grpc_code, message=self.message)
        status.details.add().Pack(
            error_details_pb2.ErrorInfo(reason=self.reason, domain="ordermesh")
        )
        if self.waits:
            delay = duration_pb2.Duration(seconds=RETRY_SECONDS)
            status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        return base64.b64encode(status.SerializeToString(deterministic=True)).decode().rstrip("=")

    @property
    def details_json(self) -> list[dict[str, object]]:
        """The details for REST callers."""
        details: list[dict[str, object]] = [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": self.reason,
                "domain": "ordermesh",
                "metadata": {},
            }
        ]
        if self.waits:
            details.append(
                {
                    "@type": "type.googleapis.com/google.rpc.RetryInfo",
                    "retryDelay": f"{RETRY_SECONDS}s",
                }
            )
        return details


def edge_errors(limits: Limits, query_over_path: str) -> tuple[EdgeError, ...]:
    """Envoy's own refusals, the more particular ones first.

    Args:
        limits: How much a caller may send.
        query_over_path: Matches paths whose query names what the path says.
    """
    return (
        EdgeError(
            reason="UNAUTHENTICATED",
            message="The call carries no valid token: send `authorization: Bearer <token>`.",
            grpc_code=code_pb2.UNAUTHENTICATED,
            statuses=(401, 401),
        ),
        EdgeError(
            reason="UNAUTHENTICATED",
            message="The call carries a token that is not for this service.",
            grpc_code=code_pb2.UNAUTHENTICATED,
            # Envoy answers 403 to a token for another audience; it is no better than none.
            http_status=401,
            statuses=(403, 403),
            authenticated=False,
        ),
        EdgeError(
            reason="MALFORMED_REQUEST",
            message="A query parameter names a field that the path says already.",
            grpc_code=code_pb2.INVALID_ARGUMENT,
            # Envoy denies it; it is no question of permission.
            http_status=400,
            statuses=(403, 403),
            path=query_over_path,
        ),
        EdgeError(
            reason="METHOD_DENIED",
            message="There is no such method, or it is not open to the caller.",
            grpc_code=code_pb2.PERMISSION_DENIED,
            statuses=(403, 403),
        ),
        EdgeError(
            reason="ROUTE_NOT_FOUND",
            message="There is no such path, or not with this verb.",
            grpc_code=code_pb2.UNIMPLEMENTED,
            rest_code=code_pb2.NOT_FOUND,
            statuses=(404, 404),
        ),
        EdgeError(
            reason="REQUEST_TOO_LARGE",
            message=f"The request is larger than {limits.max_request_bytes} bytes.",
            # Not RESOURCE_EXHAUSTED: that invites to try the same again.
            grpc_code=code_pb2.INVALID_ARGUMENT,
            statuses=(413, 413),
        ),
        EdgeError(
            reason="RATE_LIMITED",
            message="The caller has sent more requests than it may.",
            grpc_code=code_pb2.RESOURCE_EXHAUSTED,
            statuses=(429, 429),
            waits=True,
        ),
        EdgeError(
            reason="DEADLINE_EXCEEDED",
            message="The call took longer than it may.",
            grpc_code=code_pb2.DEADLINE_EXCEEDED,
            http_status=504,
            statuses=(504, 504),
            flags=("DT", "UT"),
        ),
        EdgeError(
            reason="DEADLINE_EXCEEDED",
            message="The request was not complete in time.",
            grpc_code=code_pb2.DEADLINE_EXCEEDED,
            statuses=(408, 408),
        ),
        EdgeError(
            reason="OVERLOADED",
            message="There is more work than can be done in time.",
            grpc_code=code_pb2.RESOURCE_EXHAUSTED,
            http_status=429,
            flags=("OM",),
            waits=True,
        ),
        EdgeError(
            reason="DEPENDENCY_UNAVAILABLE",
            message="The service did not answer. Repeating the call with its key is safe.",
            grpc_code=code_pb2.UNAVAILABLE,
            http_status=503,
            statuses=(502, 503),
            waits=True,
        ),
        EdgeError(
            reason="MALFORMED_REQUEST",
            message="The request is malformed.",
            grpc_code=code_pb2.INVALID_ARGUMENT,
            statuses=(400, 400),
            authenticated=True,
            # The transcoder's: which field or parameter it could not read.
            keeps_message=True,
        ),
        EdgeError(
            reason="MALFORMED_REQUEST",
            message="The request is malformed.",
            grpc_code=code_pb2.INVALID_ARGUMENT,
            statuses=(400, 499),
        ),
        EdgeError(
            reason="INTERNAL",
            message="The answer could not be passed on.",
            grpc_code=code_pb2.INTERNAL,
            http_status=500,
            statuses=(500, 599),
        ),
    )
