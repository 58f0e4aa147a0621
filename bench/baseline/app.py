"""The HTTP side of the hand-written pipeline."""

from __future__ import annotations

import uuid

from fastapi import FastAPI
from pydantic import BaseModel, Field

from bench.baseline.models import Order, OrderLine, Outbox, Session

app = FastAPI()


class LineIn(BaseModel):
    """A line as it is ordered."""

    sku: str = Field(max_length=64)
    quantity: int = Field(gt=0)
    unit_minor: int = Field(ge=0)


class OrderIn(BaseModel):
    """An order as it is placed."""

    customer_id: str
    currency: str = Field(min_length=3, max_length=3)
    lines: list[LineIn] = Field(min_length=1)


class OrderOut(BaseModel):
    """An order as it is answered."""

    id: uuid.UUID
    customer_id: str
    state: str
    currency: str
    total_minor: int
    lines: list[LineIn]
    model_config = {"from_attributes": True}


@app.post("/orders", response_model=OrderOut, status_code=201)
async def create(body: OrderIn) -> Order:
    """Places an order, and its event, in one transaction."""
    async with Session() as session, session.begin():
        order = Order(
            id=uuid.uuid4(),
            customer_id=body.customer_id,
            currency=body.currency,
            state="PENDING",
            total_minor=sum(line.quantity * line.unit_minor for line in body.lines),
            lines=[OrderLine(**line.model_dump()) for line in body.lines],
        )
        session.add(order)
        session.add(
            Outbox(
                topic="order.created",
                payload={"order_id": str(order.id), "amount_minor": order.total_minor},
            )
        )
    return order
