"""Calls through the edge over gRPC, with the generated stubs; requests and answers as JSON values.

The same words go over REST and over gRPC, so that the two can be compared (`client` has the REST
half).
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import urlsplit

import grpc
from google.protobuf.json_format import MessageToDict, MessageToJson, ParseDict
from google.rpc import error_details_pb2, status_pb2
from grpc import aio

from meshctl.client import CallError, Json, Target
from ordermesh.order.v1 import order_service_pb2, order_service_pb2_grpc

_DEADLINE_SECONDS = 15.0

M = TypeVar("M", order_service_pb2.CreateOrderRequest, order_service_pb2.CancelOrderRequest)

# The details of a status are packed; naming their types here makes them known to protobuf.
_DETAILS = (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest)


class GrpcEdge:
    """A gRPC channel to the edge, for one caller."""

    def __init__(self, channel: aio.Channel, token: str) -> None:
        self._orders = order_service_pb2_grpc.OrderServiceStub(channel)
        self._authorization = ("authorization", f"Bearer {token}")

    async def create_order(self, parent: str, body: Json, *, key: str = "") -> tuple[Json, bool]:
        """Places an order, and answers it and whether it was a replay.

        Args:
            parent: ``merchants/<merchant>``.
            body: The request as over REST.
            key: Idempotency key, a UUID; a new one when empty.

        Raises:
            CallError: The mesh refused.
        """
        request = ParseDict({**body, "parent": parent}, order_service_pb2.CreateOrderRequest())
        return await self._mutate(self._orders.CreateOrder, request, key)

    async def get_order(self, name: str) -> Json:
        """Answers an order.

        Raises:
            CallError: The mesh refused.
        """
        request = order_service_pb2.GetOrderRequest(name=name)
        try:
            answer = await self._orders.GetOrder(
                request, metadata=(self._authorization,), timeout=_DEADLINE_SECONDS
            )
        except aio.AioRpcError as error:
            raise as_call_error(error) from error
        return MessageToDict(answer)

    async def cancel_order(self, name: str, reason: str, *, key: str = "") -> tuple[Json, bool]:
        """Cancels an order, and answers it and whether it was a replay.

        Raises:
            CallError: The mesh refused.
        """
        request = order_service_pb2.CancelOrderRequest(name=name, reason=reason)
        return await self._mutate(self._orders.CancelOrder, request, key)

    async def _mutate(
        self,
        method: aio.UnaryUnaryMultiCallable[M, order_service_pb2.Order],
        request: M,
        key: str,
    ) -> tuple[Json, bool]:
        metadata = (self._authorization, ("idempotency-key", key or str(uuid.uuid4())))
        call = method(request, metadata=metadata, timeout=_DEADLINE_SECONDS)
        try:
            answer = await call
        except aio.AioRpcError as error:
            raise as_call_error(error) from error
        initial = dict(await call.initial_metadata())
        return MessageToDict(answer), initial.get("idempotency-replayed") == "true"


@asynccontextmanager
async def grpc_edge(called: Target) -> AsyncIterator[GrpcEdge]:
    """Opens a channel to the edge, trusting the mesh's own CA."""
    roots = await asyncio.to_thread(called.ca.read_bytes) if called.ca else None
    parts = urlsplit(called.url)
    address = f"{parts.hostname}:{parts.port or 443}"
    async with aio.secure_channel(address, grpc.ssl_channel_credentials(roots)) as channel:
        yield GrpcEdge(channel, called.token)


def as_call_error(error: aio.AioRpcError) -> CallError:
    """Answers a gRPC failure as REST would have told it."""
    trailing = dict(error.trailing_metadata() or ())
    packed = trailing.get("grpc-status-details-bin")
    if isinstance(packed, bytes):
        body = MessageToJson(status_pb2.Status.FromString(packed))
    else:
        body = json.dumps({"code": error.code().value[0], "message": error.details() or ""})
    return CallError(0, body.encode())
