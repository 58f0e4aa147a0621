"""Every reason that the protos document is answered somewhere, and none but those is."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import chassis
import order_svc
from ordermesh.common.v1 import error_reason_pb2 as common_reasons
from ordermesh.notification.v1 import error_reason_pb2 as notification_reasons
from ordermesh.order.v1 import error_reason_pb2 as order_reasons
from ordermesh.payment.v1 import error_reason_pb2 as payment_reasons
from ordermesh.rates.v1 import error_reason_pb2 as rates_reasons

ROOT = Path(next(iter(chassis.__path__))).parent
PREFIX = "ERROR_REASON_"

ENUMS = {
    "order_svc": order_reasons,
    "payment_svc": payment_reasons,
    "notify_svc": notification_reasons,
    "rates_svc": rates_reasons,
}
"""Each service's own reasons; those of common are everybody's."""

NOT_ANSWERED = {
    "REQUEST_IN_PROGRESS": "no method has an effect elsewhere yet, so a twin waits for the"
    " first one's commit; the payment service's mutations will answer it",
}
"""Documented reasons that no code answers, and why they stand in the contract all the same."""


def names(module: object) -> set[str]:
    """The reasons that an enumeration documents."""
    values = module.ErrorReason.DESCRIPTOR.values_by_name  # type: ignore[attr-defined]
    return {name.removeprefix(PREFIX) for name in values} - {"UNSPECIFIED"}


COMMON = names(common_reasons)
ALL = COMMON.union(*(names(module) for module in ENUMS.values()))


def raised_in(package: str) -> Iterator[tuple[str, str]]:
    """Reasons that a package's errors are made with, and where.

    An error of the tree takes its reason first: `ConflictError("ETAG_MISMATCH", …)`,
    `InvalidInputError.of_field("DUPLICATE_SKU", …)`.
    """
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if not called.endswith(("Error", "Error.of_field", "_unavailable", "_out_of_range")):
                continue
            first = node.args[0]
            if isinstance(first, ast.Constant) and re.fullmatch(r"[A-Z][A-Z_]+", str(first.value)):
                yield str(first.value), f"{path.relative_to(ROOT)}:{node.lineno}"


PACKAGES = ["chassis", *ENUMS]


@pytest.mark.parametrize("package", PACKAGES)
def test_every_reason_that_is_answered_is_documented(package: str) -> None:
    """In the common enumeration, or in the service's own."""
    documented = COMMON | (names(ENUMS[package]) if package in ENUMS else set())
    unknown = [(reason, where) for reason, where in raised_in(package) if reason not in documented]
    assert unknown == []


def test_reasons_are_found_where_they_are_raised() -> None:
    """Else the test above would agree to anything."""
    found = {reason for reason, _ in raised_in(Path(order_svc.__file__).parent.name)}
    assert {"ETAG_MISMATCH", "DUPLICATE_SKU", "ILLEGAL_TRANSITION", "ORDER_NOT_FOUND"} <= found


def written_in(*packages: str) -> str:
    """All source text of packages, the edge's scripts and template among them."""
    return "\n".join(
        path.read_text()
        for package in packages
        for pattern in ("*.py", "*.j2")
        for path in sorted((ROOT / package).rglob(pattern))
    )


def answers(reason: str, text: str) -> bool:
    """Whether a reason is written there as a word of its own."""
    return re.search(rf"\b{reason}\b", text) is not None


def test_every_common_reason_is_answered_by_somebody() -> None:
    """By a service or at the edge; the contract promises nothing that never comes."""
    text = written_in(*PACKAGES, "envoy")
    missing = {reason for reason in COMMON if not answers(reason, text)}
    assert missing == set(NOT_ANSWERED)


@pytest.mark.parametrize("package", ENUMS)
def test_every_reason_of_a_service_is_answered_by_it(package: str) -> None:
    """By its own code."""
    text = written_in(package)
    assert {reason for reason in names(ENUMS[package]) if not answers(reason, text)} == set()


def test_every_reason_says_its_status_and_shows_a_sample() -> None:
    """The comment is what callers read: status, HTTP status, an ErrorInfo."""
    for path in sorted((ROOT / "protos").rglob("error_reason.proto")):
        comment: list[str] = []
        for line in path.read_text().splitlines():
            stripped = line.strip()
            if stripped.startswith("//"):
                comment.append(stripped.removeprefix("//").strip())
            elif stripped.startswith(PREFIX):
                reason = stripped.split()[0].removeprefix(PREFIX)
                said = " ".join(comment)
                if reason != "UNSPECIFIED":
                    assert re.search(r"[A-Z_]+ \(\d{3}\)", said), f"{path}: {reason}"
                    assert f'{{"reason": "{reason}", "domain": "ordermesh"' in said, reason
                comment = []
            elif not stripped:
                comment = []
