"""The gRPC face of the order service: translate, send, translate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from chassis.mediator import Mediator
from chassis.settings import Merchant
from order_svc.commands import Answer
from order_svc.messages import (
    cancel_order_from_proto,
    create_order_from_proto,
    order_event_to_proto,
    split_order_name,
)
from order_svc.queries import GetOrder, ListOrderEvents, ListOrders
from ordermesh.order.v1 import order_service_pb2 as pb
from ordermesh.order.v1 import order_service_pb2_grpc


class OrderServicer(order_service_pb2_grpc.OrderServiceServicer):
    """Answers `ordermesh.order.v1.OrderService`.

    Validation ran before it and the mapping of errors runs after it, both in
    `chassis.grpc_server`. Single orders are answered serialized, as they were read.
    """

    def __init__(self, mediator: Mediator, merchants: Mapping[str, Merchant]) -> None:
        self._mediator = mediator
        self._merchants = merchants

    async def CreateOrder(self, request: pb.CreateOrderRequest, context: Any) -> Any:
        """Places an order."""
        merchant = self._merchants[request.parent.removeprefix("merchants/")]
        answer = await self._mediator.send(create_order_from_proto(request, merchant))
        return await _answered(answer, context)

    async def GetOrder(self, request: pb.GetOrderRequest, context: Any) -> Any:
        """Answers one order."""
        merchant, order_id = split_order_name(request.name)
        return await self._mediator.send(GetOrder(merchant=merchant, order_id=order_id))

    async def ListOrders(self, request: pb.ListOrdersRequest, context: Any) -> Any:
        """Answers a page of orders."""
        page = await self._mediator.send(
            ListOrders(
                merchant=request.parent.removeprefix("merchants/"),
                page_size=request.page_size,
                page_token=request.page_token,
            )
        )
        return pb.ListOrdersResponse(
            orders=[pb.Order.FromString(row["resource"]) for row in page.rows],
            next_page_token=page.next_page_token,
        )

    async def CancelOrder(self, request: pb.CancelOrderRequest, context: Any) -> Any:
        """Asks for an order to be undone."""
        answer = await self._mediator.send(cancel_order_from_proto(request))
        return await _answered(answer, context)

    async def ListOrderEvents(self, request: pb.ListOrderEventsRequest, context: Any) -> Any:
        """Answers a page of an order's timeline."""
        merchant, order_id = split_order_name(request.parent)
        page = await self._mediator.send(
            ListOrderEvents(
                merchant=merchant,
                order_id=order_id,
                page_size=request.page_size,
                page_token=request.page_token,
            )
        )
        return pb.ListOrderEventsResponse(
            events=[order_event_to_proto(row) for row in page.rows],
            next_page_token=page.next_page_token,
        )


async def _answered(answer: Answer, context: Any) -> bytes:
    if answer.replayed:
        await context.send_initial_metadata((("idempotency-replayed", "true"),))
    return answer.resource
