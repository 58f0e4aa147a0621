"""Which concrete classes the service is made of: the only module that knows them all."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial

import structlog

from chassis.ids import Now, now
from chassis.mediator import Mediator, Registration, usual_behaviours
from chassis.paging import PageTokens
from chassis.runtime import App
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from rates_svc.providers import EcbHistory
from rates_svc.queries import (
    ConvertMoneyHandler,
    GetExchangeRateHandler,
    ListCurrenciesHandler,
)
from rates_svc.rates import ConvertMoney, GetExchangeRate, ListCurrencies
from rates_svc.servicer import ExchangeRateServicer
from rates_svc.settings import RatesSettings

NAME = "rates"

_log = structlog.get_logger(NAME)


@contextlib.asynccontextmanager
async def build(settings: RatesSettings, *, clock: Now = now) -> AsyncIterator[App]:
    """The wired service. Its rates are in memory, so there is nothing to close.

    Raises:
        MalformedHistoryError: The history is missing or damaged.
    """
    history = EcbHistory.read(settings.rates_history)
    _log.info("history", first_day=str(history.first_day), last_day=str(history.last_day))
    mediator = Mediator(
        registrations(history, PageTokens(settings.page_token_key.get_secret_value()), clock),
        usual_behaviours(tracing=bool(settings.otlp_endpoint)),
    )
    servicer = ExchangeRateServicer(mediator)
    service = rates_pb2.DESCRIPTOR.services_by_name["ExchangeRateService"].full_name
    yield App(
        servicers=[
            (service, partial(rates_grpc.add_ExchangeRateServiceServicer_to_server, servicer))
        ]
    )


def registrations(
    history: EcbHistory, page_tokens: PageTokens, clock: Now
) -> tuple[Registration, ...]:
    """Every question of the service and who answers it."""
    rates = GetExchangeRateHandler(history=history, now=clock)
    return (
        Registration(GetExchangeRate, rates),
        Registration(ConvertMoney, ConvertMoneyHandler(rates=rates)),
        Registration(
            ListCurrencies, ListCurrenciesHandler(history=history, page_tokens=page_tokens)
        ),
    )
