"""Calls through the edge, over REST, as any caller outside would make them.

Which mesh is called: the one of ``--state`` or MESH_STATE when either is given; else the one of
MESH_URL, MESH_CA and MESH_TOKEN (`meshctl env` prints all of them); else the one in ``.mesh``.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import ssl
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import jwt

from meshctl.processes import MeshError
from meshctl.state import VARIABLE, NotRunningError, StateFolder

_TIMEOUT_SECONDS = 15.0
_PAGE_SIZE = 200

# google.rpc.Code, by number, as the edge's JSON errors carry it.
_CODES = {
    1: "CANCELLED",
    2: "UNKNOWN",
    3: "INVALID_ARGUMENT",
    4: "DEADLINE_EXCEEDED",
    5: "NOT_FOUND",
    6: "ALREADY_EXISTS",
    7: "PERMISSION_DENIED",
    8: "RESOURCE_EXHAUSTED",
    9: "FAILED_PRECONDITION",
    10: "ABORTED",
    11: "OUT_OF_RANGE",
    12: "UNIMPLEMENTED",
    13: "INTERNAL",
    14: "UNAVAILABLE",
    15: "DATA_LOSS",
    16: "UNAUTHENTICATED",
}

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Target:
    """A mesh to call: where, trusting whom, as whom."""

    url: str
    ca: Path | None
    token: str
    state: StateFolder | None

    def as_merchant(self, merchant: str) -> Target:
        """Answers the same mesh with a token of this merchant.

        Raises:
            MeshError: The token at hand is another merchant's and we cannot sign one.
        """
        claims = _claims(self.token)
        if claims.get("merchant") == merchant and not _expired(self.token):
            return self
        if self.state is None:
            why = "has run out" if _expired(self.token) else f"is not merchant {merchant}'s"
            raise MeshError(
                f"the token in MESH_TOKEN {why}",
                hint=f"name the mesh's folder with --state DIR, or take a token from its machine: "
                f"meshctl token --merchant {merchant}",
            )
        token = self.state.token_key.token(merchant=merchant)
        return Target(self.url, self.ca, token, self.state)

    def tls(self) -> ssl.SSLContext:
        """Answers a context that trusts the mesh's CA alone, or the system's when none is named.

        Raises:
            MeshError: The CA's file cannot be read.
        """
        try:
            return ssl.create_default_context(cafile=str(self.ca) if self.ca else None)
        except OSError as error:
            raise MeshError(
                f"cannot read the CA of the mesh in {self.ca}: {error.strerror}",
                hint='is MESH_CA an old one? eval "$(meshctl env --state DIR)" sets it anew',
            ) from error


def target(option: str | None) -> Target:
    """Finds the mesh to call; see the module's docstring.

    Raises:
        NotRunningError: The state folder's mesh is not up.
        MeshError: MESH_URL is given without MESH_TOKEN, or is no such URL.
    """
    url, token = os.environ.get("MESH_URL", ""), os.environ.get("MESH_TOKEN", "")
    ca = os.environ.get("MESH_CA", "")
    picked = option or os.environ.get(VARIABLE)
    if not picked and url:
        if not token:
            raise MeshError(
                "MESH_URL is set and MESH_TOKEN is not", hint='eval "$(meshctl env --state DIR)"'
            )
        if not re.fullmatch(r"https://[^/:@]+(:\d{1,5})?/?", url):
            raise MeshError(
                f"MESH_URL is {url!r}, not the URL of an edge",
                hint="such as https://localhost:8443",
            )
        return Target(url, Path(ca) if ca else None, token, None)
    state = StateFolder.chosen(option)
    run = state.running()
    if run.state != "running":
        raise NotRunningError(
            f"the mesh in {state.path} is {run.state}", hint="meshctl status shows how far it is"
        )
    given = token if token and url == run.url else ""
    if not given or _expired(given):
        given = state.token_key.token()
    return Target(run.url, Path(run.ca), given, state)


class CallError(MeshError):
    """The mesh refused a call; the parts of its `google.rpc.Status` are at hand."""

    def __init__(self, http_status: int, body: bytes) -> None:
        self.http_status = http_status
        try:
            self.status: Json = json.loads(body)
        except ValueError:
            self.status = {"message": body.decode(errors="replace").strip()}
        details = self.status.get("details") or []
        self.code = _CODES.get(self.status.get("code", 2), "UNKNOWN")
        self.reason = next((d["reason"] for d in details if "reason" in d), "")
        self.violations: list[Json] = [
            violation for detail in details for violation in detail.get("fieldViolations", [])
        ]
        reason = f" ({self.reason})" if self.reason else ""
        message = f"{self.code}{reason}: {self.status.get('message') or http_status}"
        fields = [f"{v.get('field', '?')}: {v.get('description', '')}" for v in self.violations]
        fields = [field for field in fields if field not in message]
        super().__init__("\n  ".join([message, *fields]), hint=_hint(self.code))


class Edge:
    """A connection to the edge, for one caller after another; not for threads to share."""

    def __init__(self, called: Target) -> None:
        """Opens nothing yet."""
        self.target = called
        parts = urlsplit(called.url)
        self._connection = http.client.HTTPSConnection(
            parts.hostname or "localhost",
            parts.port or 443,
            timeout=_TIMEOUT_SECONDS,
            context=called.tls(),
        )

    def get(self, path: str, **query: object) -> Json:
        """Answers a resource, or a page of a list.

        Args:
            path: After ``/v1/``, such as ``merchants/default/orders``.
            query: Parameters; None is left out.

        Raises:
            CallError: The mesh refused.
            MeshError: The mesh cannot be reached.
        """
        given = {name: value for name, value in query.items() if value is not None}
        # The transcoder takes %20 for a space and + for a plus.
        return self._call("GET", f"{path}?{urlencode(given, quote_via=quote)}" if given else path)[
            0
        ]

    def post(self, path: str, body: Json, *, key: str = "") -> tuple[Json, bool]:
        """Calls a mutation, and answers the resource and whether it was a replay.

        Args:
            path: After ``/v1/``, such as ``merchants/default/orders``.
            body: Request in proto3 JSON.
            key: Idempotency key, a UUID; a new one when empty.

        Raises:
            CallError: The mesh refused.
            MeshError: The mesh cannot be reached.
        """
        headers = {"Idempotency-Key": key or str(uuid.uuid4())}
        answer, answered = self._call("POST", path, body, headers)
        return answer, answered.get("idempotency-replayed") == "true"

    def pages(self, path: str, field: str, *, at_most: int, **query: object) -> Iterator[Json]:
        """Yields the items of a list, page by page, `at_most` of them."""
        token: str | None = None
        left = at_most
        while left > 0:
            size = min(left, _PAGE_SIZE)
            page = self.get(path, pageSize=size, pageToken=token, **query)
            items = page.get(field, [])[:left]
            yield from items
            left -= len(items)
            token = page.get("nextPageToken")
            if not token or not items:
                return

    def close(self) -> None:
        """Closes the connection."""
        self._connection.close()

    def _call(
        self,
        method: str,
        path: str,
        body: Json | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[Json, dict[str, str]]:
        sent = {"Authorization": f"Bearer {self.target.token}", **(headers or {})}
        if body is not None:
            sent["Content-Type"] = "application/json"
        try:
            try:
                response, content = self._exchange(method, path, body, sent)
            except (http.client.RemoteDisconnected, ConnectionResetError):
                # The edge closed an idle connection. A mutation carries its key, so that doing
                # it again is safe.
                self._connection.close()
                response, content = self._exchange(method, path, body, sent)
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            raise MeshError(
                f"cannot reach the mesh at {self.target.url}: {error}",
                hint="meshctl status shows what runs",
            ) from error
        if response.status != 200:
            raise CallError(response.status, content)
        answered = {name.lower(): value for name, value in response.getheaders()}
        return json.loads(content), answered

    def _exchange(
        self, method: str, path: str, body: Json | None, headers: Mapping[str, str]
    ) -> tuple[http.client.HTTPResponse, bytes]:
        safe_path = quote(path, safe="/:?&=%*-._~+,")
        content = json.dumps(body) if body is not None else None
        self._connection.request(method, f"/v1/{safe_path}", content, dict(headers))
        response = self._connection.getresponse()
        return response, response.read()


def _hint(code: str) -> str:
    return {
        "UNAUTHENTICATED": 'the token is missing or has run out: eval "$(meshctl env)"',
        "UNAVAILABLE": "a service is away for the moment, safe to try again; see meshctl status",
        "RESOURCE_EXHAUSTED": "too many calls at once; try again in a moment",
    }.get(code, "")


def _claims(token: str) -> Json:
    try:
        return jwt.decode(token, options={"verify_signature": False, "verify_exp": False})
    except jwt.InvalidTokenError:
        return {}


def _expired(token: str) -> bool:
    try:
        jwt.decode(
            token, options={"verify_signature": False, "verify_exp": True, "verify_aud": False}
        )
    except jwt.InvalidTokenError:
        return True
    return False
