"""The error tree: what each branch means to a caller and to a consumer."""

from __future__ import annotations

import grpc
import pytest

from chassis.errors import (
    AlreadyExistsError,
    ConflictError,
    DeadlineError,
    InvalidInputError,
    NotFoundError,
    OverloadedError,
    PermissionDeniedError,
    RuleViolationError,
    ServiceError,
    UnauthenticatedError,
    UnavailableError,
)

TREE = {
    InvalidInputError: ("INVALID_ARGUMENT", False),
    UnauthenticatedError: ("UNAUTHENTICATED", False),
    PermissionDeniedError: ("PERMISSION_DENIED", False),
    NotFoundError: ("NOT_FOUND", False),
    AlreadyExistsError: ("ALREADY_EXISTS", False),
    RuleViolationError: ("FAILED_PRECONDITION", False),
    ConflictError: ("ABORTED", True),
    OverloadedError: ("RESOURCE_EXHAUSTED", True),
    UnavailableError: ("UNAVAILABLE", True),
    DeadlineError: ("DEADLINE_EXCEEDED", True),
    ServiceError: ("INTERNAL", True),
}


@pytest.mark.parametrize("kind", TREE, ids=lambda kind: kind.__name__)
def test_a_failure_means_what_the_tree_says(kind: type[ServiceError]) -> None:
    """A status that gRPC has, and whether a consumer tries again."""
    status, retryable = TREE[kind]
    assert kind.status == status
    assert kind.status in grpc.StatusCode.__members__
    assert kind.retryable is retryable


def test_no_branch_of_the_tree_is_forgotten_here() -> None:
    """A new kind of failure has to say what it means."""
    assert {ServiceError, *ServiceError.__subclasses__()} == set(TREE)


def test_a_field_at_fault_stands_in_the_metadata_and_in_a_violation() -> None:
    """Once for programs, once for the BadRequest detail."""
    error = InvalidInputError.of_field("DUPLICATE_SKU", "lines[1].sku", "is there", sku="TEA")
    assert error.metadata == {"field": "lines[1].sku", "sku": "TEA"}
    (violation,) = error.violations
    assert (violation.field, violation.reason) == ("lines[1].sku", "DUPLICATE_SKU")
    assert str(error) == "lines[1].sku: is there"


def test_an_errors_metadata_is_its_own() -> None:
    """What the raiser does with a dictionary afterwards does not change the error."""
    metadata = {"name": "a"}
    error = NotFoundError("GONE", "gone", metadata=metadata)
    metadata["name"] = "b"
    assert error.metadata == {"name": "a"}
