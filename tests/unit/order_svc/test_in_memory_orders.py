"""The fake of handlers' tests does what PostgreSQL does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from order_svc.domain.order import Order
from order_svc.testing import InMemoryOrders
from tests.suites.order_store import Kept, OrderStoreSuite, Version


class KeptInMemory:
    """A look into an `InMemoryOrders`."""

    def __init__(self) -> None:
        self.store = InMemoryOrders()

    async def order(self, order: Order) -> Order | None:
        """As it is now."""
        return self.store.orders.get(order.name)

    async def versions(self) -> Sequence[Version]:
        """The whole history."""
        return [(order.name, order.version, order.announcement) for order in self.store.history]

    async def published(self) -> Sequence[Version]:
        """What others were told."""
        return self.store.announced


class TestInMemoryOrders(OrderStoreSuite):
    """The suite, over a dictionary."""

    @pytest.fixture
    def kept(self) -> Kept:
        """Empty."""
        return KeptInMemory()
