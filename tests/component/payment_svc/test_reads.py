"""Payments as callers read them, over gRPC, with the errors that the contract names."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ordermesh.payment.v1 import payment_service_pb2 as pb
from tests.component.payment_svc.harness import PaymentService
from tests.eventually import eventually
from tests.payments import (
    a_payment_id,
    order_cancellation,
    order_created,
    order_id_of,
    order_name,
)


async def paid(service: PaymentService, count: int, merchant: str = "default") -> list[UUID]:
    """So many orders, each paid; one after the other, so that the last is the newest."""
    orders = []
    before = len(service.events)
    async with service.running():
        for number in range(1, count + 1):
            event = order_created(merchant=merchant)
            await service.hears(event)
            await eventually(lambda n=number: len(service.events) == before + n)  # type: ignore[misc]
            orders.append(order_id_of(event))
    return orders


async def refused(answer: Any) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, reason and metadata of a call that must fail."""
    with pytest.raises(grpc.aio.AioRpcError) as failure:
        await answer
    status = rpc_status.from_call(failure.value)  # type: ignore[arg-type]  # it has all that is read
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "ordermesh"
    return failure.value.code(), info.reason, dict(info.metadata)


async def test_a_payment_is_read_by_its_name(service: PaymentService) -> None:
    """As it was committed."""
    (order_id,) = await paid(service, 1)
    kept = await service.payment_of(order_id)

    async with service.serving() as call:
        answer = await call("GetPayment", pb.GetPaymentRequest(name=kept.name))

    assert answer == kept
    assert (answer.order, answer.state) == (order_name(order_id), pb.Payment.CAPTURED)


async def test_a_refund_is_read_with_its_payment(service: PaymentService) -> None:
    """And the etag tells the states apart."""
    (order_id,) = await paid(service, 1)
    before = await service.payment_of(order_id)
    async with service.running():
        await service.hears(order_cancellation(order_id))
        await service.tells(order_id, "PaymentSucceeded", "RefundSucceeded")

    async with service.serving() as call:
        answer = await call("GetPayment", pb.GetPaymentRequest(name=before.name))

    assert [refund.state for refund in answer.refunds] == [pb.Refund.SUCCEEDED]
    assert answer.refunded.minor_units == 2500
    assert answer.etag != before.etag


async def test_a_payment_that_is_not_there_is_not_found(service: PaymentService) -> None:
    """With the name that was asked for."""
    name = f"merchants/default/payments/{a_payment_id()}"
    async with service.serving() as call:
        answer = await refused(call("GetPayment", pb.GetPaymentRequest(name=name)))

    assert answer == (grpc.StatusCode.NOT_FOUND, "PAYMENT_NOT_FOUND", {"name": name})


async def test_another_merchants_payment_is_denied_whether_or_not_it_exists(
    service: PaymentService,
) -> None:
    """Nothing is read before that is known (AIP-211)."""
    (order_id,) = await paid(service, 1)
    theirs = (await service.payment_of(order_id)).name
    nobodys = f"merchants/default/payments/{a_payment_id()}"

    async with service.serving(merchant="acme") as call:
        answers = [
            await refused(call("GetPayment", pb.GetPaymentRequest(name=name)))
            for name in (theirs, nobodys)
        ]
        listed = await refused(
            call("ListPayments", pb.ListPaymentsRequest(parent="merchants/default"))
        )

    denied = (grpc.StatusCode.PERMISSION_DENIED, "MERCHANT_DENIED", {"merchant": "default"})
    assert [*answers, listed] == [denied] * 3


async def test_the_id_alone_opens_nothing(service: PaymentService) -> None:
    """A payment of one merchant is not there under another's name."""
    (order_id,) = await paid(service, 1)
    payment_id = (await service.payment_of(order_id)).name.rpartition("/")[2]

    async with service.serving(merchant="acme") as call:
        code, reason, _ = await refused(
            call("GetPayment", pb.GetPaymentRequest(name=f"merchants/acme/payments/{payment_id}"))
        )

    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "PAYMENT_NOT_FOUND")


@pytest.mark.parametrize(
    "name", ["", "payments/1", "merchants/default/payments/1", "merchants/default/payments/x/y"]
)
async def test_a_name_of_the_wrong_form_is_refused(service: PaymentService, name: str) -> None:
    """With the field at fault."""
    async with service.serving() as call:
        code, reason, metadata = await refused(call("GetPayment", pb.GetPaymentRequest(name=name)))

    assert (code, reason, metadata["field"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "name",
    )


async def test_payments_are_listed_the_newest_first_page_by_page(
    service: PaymentService,
) -> None:
    """Each once, and only the merchant's own."""
    orders = await paid(service, 5)
    await paid(service, 1, merchant="acme")

    pages: list[list[str]] = []
    token = ""
    async with service.serving() as call:
        while True:
            page = await call(
                "ListPayments",
                pb.ListPaymentsRequest(parent="merchants/default", page_size=2, page_token=token),
            )
            pages.append([payment.order for payment in page.payments])
            token = page.next_page_token
            if not token:
                break

    names = [order_name(order_id) for order_id in reversed(orders)]
    assert pages == [names[:2], names[2:4], names[4:]]


async def test_a_payment_made_meanwhile_moves_no_page(service: PaymentService) -> None:
    """Pages go on after a payment, not after a count."""
    orders = await paid(service, 3)
    first = pb.ListPaymentsRequest(parent="merchants/default", page_size=1)
    async with service.serving() as call:
        page = await call("ListPayments", first)
        await paid(service, 1)
        first.page_token = page.next_page_token
        after = await call("ListPayments", first)

    assert [payment.order for payment in after.payments] == [order_name(orders[1])]


async def test_a_list_can_be_narrowed_to_an_order(service: PaymentService) -> None:
    """One payment; none for an order that has none."""
    orders = await paid(service, 3)
    async with service.serving() as call:
        found = await call(
            "ListPayments",
            pb.ListPaymentsRequest(
                parent="merchants/default", filter=f'order = "{order_name(orders[1])}"'
            ),
        )
        nothing = await call(
            "ListPayments",
            pb.ListPaymentsRequest(
                parent="merchants/default", filter=f'order = "{order_name(a_payment_id())}"'
            ),
        )

    assert [payment.order for payment in found.payments] == [order_name(orders[1])]
    assert (list(nothing.payments), nothing.next_page_token) == ([], "")


@pytest.mark.parametrize(
    "text",
    ['state = "CAPTURED"', "order", f'order = "{order_name(UUID(int=1), "acme")}"'],
)
async def test_a_filter_of_another_form_is_refused(service: PaymentService, text: str) -> None:
    """FILTER_INVALID, rather than an answer to another question."""
    async with service.serving() as call:
        answer = await refused(
            call("ListPayments", pb.ListPaymentsRequest(parent="merchants/default", filter=text))
        )

    assert answer == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "FILTER_INVALID",
        {"field": "filter"},
    )


async def test_a_page_token_is_good_for_its_own_list_alone(service: PaymentService) -> None:
    """Not for other arguments, nor when somebody has changed it (AIP-158)."""
    orders = await paid(service, 2)
    async with service.serving() as call:
        page = await call(
            "ListPayments", pb.ListPaymentsRequest(parent="merchants/default", page_size=1)
        )
        answers = [
            await refused(call("ListPayments", request))
            for request in (
                pb.ListPaymentsRequest(parent="merchants/default", page_token="garbage"),
                pb.ListPaymentsRequest(
                    parent="merchants/default", page_token=page.next_page_token[:-2] + "AA"
                ),
                pb.ListPaymentsRequest(
                    parent="merchants/default",
                    page_token=page.next_page_token,
                    filter=f'order = "{order_name(orders[0])}"',
                ),
            )
        ]

    assert (
        answers
        == [(grpc.StatusCode.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID", {"field": "page_token"})] * 3
    )


async def test_a_negative_page_size_is_refused_and_none_means_fifty(
    service: PaymentService,
) -> None:
    """As AIP-158 says."""
    await paid(service, 1)
    async with service.serving() as call:
        page = await call("ListPayments", pb.ListPaymentsRequest(parent="merchants/default"))
        code, reason, metadata = await refused(
            call("ListPayments", pb.ListPaymentsRequest(parent="merchants/default", page_size=-1))
        )

    assert len(page.payments) == 1
    assert (code, reason, metadata["field"]) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "INVALID_FIELD",
        "page_size",
    )
