"""The floor: a gRPC server that takes CreateOrder's message and answers an order, no more."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import grpc
import uvloop

from ordermesh.order.v1 import order_service_pb2 as pb


async def echo(request: pb.CreateOrderRequest, _context: Any) -> pb.Order:
    """Answers the order that it was sent."""
    return request.order


async def main(address: str) -> None:
    """Serves until it is killed."""
    server = grpc.aio.server()
    create_order = grpc.unary_unary_rpc_method_handler(
        echo,
        request_deserializer=pb.CreateOrderRequest.FromString,
        response_serializer=pb.Order.SerializeToString,
    )
    service = pb.DESCRIPTOR.services_by_name["OrderService"].full_name
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"CreateOrder": create_order}),)
    )
    server.add_insecure_port(address)
    await server.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
