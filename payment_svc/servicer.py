"""The gRPC face of the payment service: translate, send, translate."""

from __future__ import annotations

from typing import Any

from chassis.mediator import Mediator
from ordermesh.payment.v1 import payment_service_pb2 as pb
from ordermesh.payment.v1 import payment_service_pb2_grpc
from payment_svc.messages import order_of_filter, payments_page, split_payment_name
from payment_svc.queries import GetPayment, ListPayments


class PaymentServicer(payment_service_pb2_grpc.PaymentServiceServicer):
    """Answers `ordermesh.payment.v1.PaymentService`.

    Validation ran before it and the mapping of errors runs after it, both in
    `chassis.grpc_server`. Payments are answered serialized, as they were read.
    """

    def __init__(self, mediator: Mediator) -> None:
        self._mediator = mediator

    async def GetPayment(self, request: pb.GetPaymentRequest, context: Any) -> Any:
        """Answers one payment."""
        merchant, payment_id = split_payment_name(request.name)
        return await self._mediator.send(GetPayment(merchant=merchant, payment_id=payment_id))

    async def ListPayments(self, request: pb.ListPaymentsRequest, context: Any) -> Any:
        """Answers a page of payments."""
        merchant = request.parent.removeprefix("merchants/")
        page = await self._mediator.send(
            ListPayments(
                merchant=merchant,
                order_id=order_of_filter(request.filter, merchant=merchant),
                page_size=request.page_size,
                page_token=request.page_token,
            )
        )
        return payments_page([row["resource"] for row in page.rows], page.next_page_token)
