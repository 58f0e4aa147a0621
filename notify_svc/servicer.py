"""The gRPC face of the notification service: translate, send, translate."""

from __future__ import annotations

from typing import Any

from chassis.mediator import Mediator
from notify_svc.messages import (
    notification_to_proto,
    order_from_filter,
    split_notification_name,
)
from notify_svc.queries import GetNotification, ListNotifications
from ordermesh.notification.v1 import notification_service_pb2 as pb
from ordermesh.notification.v1 import notification_service_pb2_grpc


class NotificationServicer(notification_service_pb2_grpc.NotificationServiceServicer):
    """Answers `ordermesh.notification.v1.NotificationService`.

    Validation ran before it and the mapping of errors runs after it, both in
    `chassis.grpc_server`.
    """

    def __init__(self, mediator: Mediator) -> None:
        self._mediator = mediator

    async def GetNotification(
        self, request: pb.GetNotificationRequest, context: Any
    ) -> pb.Notification:
        """Answers one notification."""
        merchant, notification_id = split_notification_name(request.name)
        row = await self._mediator.send(
            GetNotification(merchant=merchant, notification_id=notification_id)
        )
        return notification_to_proto(row)

    async def ListNotifications(
        self, request: pb.ListNotificationsRequest, context: Any
    ) -> pb.ListNotificationsResponse:
        """Answers a page of notifications."""
        merchant = request.parent.removeprefix("merchants/")
        page = await self._mediator.send(
            ListNotifications(
                merchant=merchant,
                order_id=order_from_filter(request.filter, merchant=merchant),
                page_size=request.page_size,
                page_token=request.page_token,
            )
        )
        return pb.ListNotificationsResponse(
            notifications=[notification_to_proto(row) for row in page.rows],
            next_page_token=page.next_page_token,
        )
