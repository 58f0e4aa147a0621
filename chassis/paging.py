"""Page tokens: opaque, signed, and bound to the arguments they were made for (AIP-158)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from collections.abc import Sequence

from chassis.errors import InvalidInputError

_SIGNATURE_BYTES = 16


class PageTokens:
    """Makes and reads page tokens under one secret, the same for all replicas."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    def make(self, position: Sequence[str], *arguments: str) -> str:
        """The token that goes on after `position`, for a list with these arguments."""
        body = json.dumps(list(position), separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(self._sign(body, arguments) + body).decode().rstrip("=")

    def read(self, token: str, *arguments: str) -> list[str]:
        """The position in a token; an empty list for an empty token.

        Raises:
            InvalidInputError: The token was not made by `make` with these arguments.
        """
        if not token:
            return []
        try:
            raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        except ValueError:
            raise _invalid() from None
        signature, body = raw[:_SIGNATURE_BYTES], raw[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(body, arguments)):
            raise _invalid()
        position: list[str] = json.loads(body)
        return position

    def _sign(self, body: bytes, arguments: Sequence[str]) -> bytes:
        bound = json.dumps(list(arguments)).encode() + b"\x00" + body
        return hmac.new(self._key, bound, hashlib.sha256).digest()[:_SIGNATURE_BYTES]


def _invalid() -> InvalidInputError:
    return InvalidInputError.of_field(
        "PAGE_TOKEN_INVALID",
        "page_token",
        "is not a token of this list; begin again without one",
    )
