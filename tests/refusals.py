"""What a caller sees of a call that was refused: the status and its enumerated details."""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Refusal:
    """A refused call.

    Attributes:
        code: The gRPC status.
        message: The sentence for the developer.
        reason: Name of the `ErrorReason`.
        metadata: What belongs to the reason.
        fields: The fields at fault, as BadRequest names them.
        retry_after_seconds: The wait that RetryInfo asks for, if it does.
        states: What PreconditionFailure says, if it is there.
        trailing: The trailing metadata.
    """

    code: grpc.StatusCode
    message: str
    reason: str
    metadata: dict[str, str]
    fields: list[str]
    retry_after_seconds: float | None
    states: list[str]
    trailing: dict[str, str | bytes]


def refusal_of(error: grpc.aio.AioRpcError) -> Refusal:
    """Reads the details of an error, which must carry an ErrorInfo of ours."""
    trailing = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailing, f"{error.code()}: {error.details()}"
    status = status_pb2.Status.FromString(bytes(trailing["grpc-status-details-bin"]))
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info = error_details_pb2.ErrorInfo()
    bad = error_details_pb2.BadRequest()
    wait = error_details_pb2.RetryInfo()
    states = error_details_pb2.PreconditionFailure()
    found = {type(one) for one in (info, bad, wait, states) if _unpacked(status, one)}
    assert error_details_pb2.ErrorInfo in found
    assert info.domain == "ordermesh"
    return Refusal(
        code=error.code(),
        message=status.message,
        reason=info.reason,
        metadata=dict(info.metadata),
        fields=[violation.field for violation in bad.field_violations],
        retry_after_seconds=(
            wait.retry_delay.ToTimedelta().total_seconds()
            if error_details_pb2.RetryInfo in found
            else None
        ),
        states=[violation.subject for violation in states.violations],
        trailing=trailing,
    )


async def refused(call: Awaitable[object]) -> Refusal:
    """Awaits a call that must be refused by us, and answers how."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return refusal_of(caught.value)


def _unpacked(status: status_pb2.Status, detail: Message) -> bool:
    return any(held.Unpack(detail) for held in status.details)
