"""`ordermesh.rates.v1.ExchangeRateService`: translate, send, translate."""

from __future__ import annotations

from typing import Any

from chassis.mediator import Mediator
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from rates_svc import messages


class ExchangeRateServicer(rates_grpc.ExchangeRateServiceServicer):
    """Answers exchange rates.

    Fields are checked before a call gets here, and errors are translated after it left,
    both in `chassis.grpc_server`.
    """

    def __init__(self, mediator: Mediator) -> None:
        self._mediator = mediator

    async def ListCurrencies(
        self, request: rates_pb2.ListCurrenciesRequest, context: Any
    ) -> rates_pb2.ListCurrenciesResponse:
        """Lists the currencies that can be converted."""
        page = await self._mediator.send(messages.list_currencies_from_proto(request))
        return messages.currency_page_to_proto(page)

    async def GetExchangeRate(
        self, request: rates_pb2.GetExchangeRateRequest, context: Any
    ) -> rates_pb2.ExchangeRate:
        """Answers one rate."""
        rate = await self._mediator.send(messages.get_exchange_rate_from_proto(request))
        return messages.exchange_rate_to_proto(rate)

    async def ConvertMoney(
        self, request: rates_pb2.ConvertMoneyRequest, context: Any
    ) -> rates_pb2.ConvertMoneyResponse:
        """Converts one amount."""
        conversion = await self._mediator.send(messages.convert_money_from_proto(request))
        return messages.conversion_to_proto(conversion)
