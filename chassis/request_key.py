"""What identifies a request, free of any I/O, so that commands may carry it."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestKey:
    """What makes two requests the same one: merchant, method and id, never the id alone.

    `fingerprint` tells an honest repeat from a reused id.
    """

    merchant: str
    method: str
    request_id: UUID
    fingerprint: bytes

    @property
    def identity(self) -> tuple[str, str, UUID]:
        """The key under which the ledger keeps the request."""
        return (self.merchant, self.method, self.request_id)


@dataclass(frozen=True, slots=True)
class Replay:
    """The request was answered before; `answer` is that answer, to the byte."""

    answer: bytes
