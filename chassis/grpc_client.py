"""Channels to other services, by way of Envoy's internal listener.

Envoy balances, retries and knows who is healthy, so a channel of ours does none of
that: one layer retries. The deadline of the call being handled travels on, less what
the hop needs, and so do its correlation id and its merchant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc

from chassis.context import HOP_SECONDS, current
from chassis.errors import DeadlineError
from chassis.settings import ServiceSettings


def channel_to_mesh(settings: ServiceSettings) -> grpc.aio.Channel:
    """A channel over which every service of the mesh is reached; close it when done.

    Raises:
        OSError: A certificate cannot be read.
    """
    options = [
        ("grpc.ssl_target_name_override", settings.internal_name),
        ("grpc.enable_retries", 0),
        ("grpc.keepalive_time_ms", 30_000),
        # A service that was away must not be waited for longer than it was away.
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]
    interceptors: Any = [_CarryContext()]
    if settings.tls_cert is None or settings.tls_key is None or settings.tls_ca is None:
        return grpc.aio.insecure_channel(
            settings.internal_address, options=options[1:], interceptors=interceptors
        )
    credentials = grpc.ssl_channel_credentials(
        settings.tls_ca.read_bytes(), settings.tls_key.read_bytes(), settings.tls_cert.read_bytes()
    )
    return grpc.aio.secure_channel(
        settings.internal_address, credentials, options=options, interceptors=interceptors
    )


class _CarryContext(grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(
        self,
        continuation: Callable[[Any, Any], Any],
        client_call_details: grpc.aio.ClientCallDetails,
        request: Any,
    ) -> Any:
        context = current()
        metadata = grpc.aio.Metadata(*(client_call_details.metadata or ()))
        if context.correlation_id:
            metadata.add("x-correlation-id", context.correlation_id)
        if context.traceparent and metadata.get("traceparent") is None:
            metadata.add("traceparent", context.traceparent)
        if context.caller is not None and context.caller.merchant:
            metadata.add("x-mesh-merchant", context.caller.merchant)
        details = grpc.aio.ClientCallDetails(
            method=client_call_details.method,
            timeout=_timeout_within(context.deadline, client_call_details.timeout),
            metadata=metadata,
            credentials=client_call_details.credentials,
            wait_for_ready=client_call_details.wait_for_ready,
        )
        return await continuation(details, request)


def _timeout_within(deadline: float | None, timeout: float | None) -> float | None:
    """The time for a call, cut to what the call being handled has left but for our own hop.

    Raises:
        DeadlineError: Nothing is left; gRPC would take a time-out of zero for none.
    """
    if deadline is None:
        return timeout
    left = deadline - HOP_SECONDS - asyncio.get_running_loop().time()
    if left <= 0:
        raise DeadlineError("DEADLINE_EXCEEDED", "no time is left to ask another service")
    return left if timeout is None else min(timeout, left)
