"""The one error tree: what a failure means to a caller and to a consumer.

```
ServiceError(reason, message)         gRPC                  consumer
├── InvalidInputError                 INVALID_ARGUMENT      dead-letter
├── UnauthenticatedError              UNAUTHENTICATED       dead-letter
├── PermissionDeniedError             PERMISSION_DENIED     dead-letter
├── NotFoundError                     NOT_FOUND             dead-letter
├── AlreadyExistsError                ALREADY_EXISTS        dead-letter
├── RuleViolationError                FAILED_PRECONDITION   dead-letter
├── ConflictError                     ABORTED               retry
├── OverloadedError                   RESOURCE_EXHAUSTED    retry
├── UnavailableError                  UNAVAILABLE           retry
└── DeadlineError                     DEADLINE_EXCEEDED     retry
anything else                         INTERNAL, text hidden retry, then dead-letter
```

Envoy derives the HTTP status from the gRPC status. This module imports no I/O, so
that a domain may raise from it; `chassis.grpc_server` and `chassis.consumer` are
the only places that translate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field at fault: its path as the caller wrote it, and what is wrong with it."""

    field: str
    description: str
    reason: str = "INVALID_FIELD"


class ServiceError(Exception):
    """A failure with an enumerated reason; its subclass says what the failure means.

    Args:
        reason: Name of an `ErrorReason` value of the protos, without its prefix.
        message: One sentence for the developer who calls us; never secret.
        metadata: Facts that belong to the reason, as the proto's comment shows.
        violations: The fields at fault, where fields are.
        retry_after_seconds: How long a caller should wait before it repeats the call.
    """

    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = True

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_after_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)
        self.retry_after_seconds = retry_after_seconds


class InvalidInputError(ServiceError):
    """The request can never be accepted as it is."""

    status = "INVALID_ARGUMENT"
    retryable = False

    @classmethod
    def of_field(
        cls, reason: str, field: str, description: str, **metadata: str
    ) -> InvalidInputError:
        """The error of one field; its path also stands in the metadata as `field`."""
        return cls(
            reason,
            f"{field}: {description}",
            metadata={"field": field, **metadata},
            violations=[FieldViolation(field, description, reason)],
        )


class UnauthenticatedError(ServiceError):
    """The caller has not shown who they are."""

    status = "UNAUTHENTICATED"
    retryable = False


class PermissionDeniedError(ServiceError):
    """The caller may not do this, whether or not the thing exists (AIP-211)."""

    status = "PERMISSION_DENIED"
    retryable = False


class NotFoundError(ServiceError):
    """The named thing does not exist."""

    status = "NOT_FOUND"
    retryable = False


class AlreadyExistsError(ServiceError):
    """What was to be created is there already."""

    status = "ALREADY_EXISTS"
    retryable = False


class RuleViolationError(ServiceError):
    """The system is not in a state in which this is allowed."""

    status = "FAILED_PRECONDITION"
    retryable = False


class ConflictError(ServiceError):
    """Another change came first; the same call may succeed when repeated."""

    status = "ABORTED"


class OverloadedError(ServiceError):
    """More is asked of us than we can do in time; wait before repeating."""

    status = "RESOURCE_EXHAUSTED"


class UnavailableError(ServiceError):
    """Something we depend on does not answer; repeating the call is safe (AIP-194)."""

    status = "UNAVAILABLE"


class DeadlineError(ServiceError):
    """The caller's time has run out."""

    status = "DEADLINE_EXCEEDED"
