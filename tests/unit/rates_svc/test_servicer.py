"""The servicer speaks the contract: every RPC of the descriptor, in its own types.

grpcio-testing calls servicers that block, ours are coroutines; `Blocking` runs each
call to its end. What it then tests is real: the methods are looked up by the names in
the service's descriptor, and requests and answers pass through its message types.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from typing import Any

import grpc
import grpc_testing
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.type.date_pb2 import Date

from chassis import money
from chassis.errors import InvalidInputError
from chassis.mediator import Mediator
from chassis.paging import PageTokens
from ordermesh.common.v1.money_pb2 import Money
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from rates_svc import messages
from rates_svc.rates import Conversion, ExchangeRate
from rates_svc.servicer import ExchangeRateServicer
from rates_svc.wiring import registrations
from tests.unit.rates_svc.a_history import FRIDAY_EVENING, a_history

SERVICE = rates_pb2.DESCRIPTOR.services_by_name["ExchangeRateService"]


class Blocking:
    """A servicer whose coroutines are run to their end, as grpcio-testing needs them."""

    def __init__(self, servicer: ExchangeRateServicer) -> None:
        self._servicer = servicer

    def __getattr__(self, method: str) -> Callable[[Message, Any], Message]:
        coroutine = getattr(self._servicer, method)

        def call(request: Message, context: Any) -> Message:
            answer: Message = asyncio.run(coroutine(request, context))
            return answer

        return call


@pytest.fixture
def server() -> grpc_testing.Server:
    """A test server of the service over the small history."""
    mediator = Mediator(registrations(a_history(), PageTokens("secret"), lambda: FRIDAY_EVENING))
    return grpc_testing.server_from_dictionary(
        {SERVICE: Blocking(ExchangeRateServicer(mediator))}, grpc_testing.strict_real_time()
    )


def answer(server: grpc_testing.Server, method: str, request: Message) -> Any:
    """What a method of the descriptor answers."""
    call = server.invoke_unary_unary(SERVICE.methods_by_name[method], (), request, timeout=10)
    response, _, code, details = call.termination()
    assert code is grpc.StatusCode.OK, details
    assert response.DESCRIPTOR is SERVICE.methods_by_name[method].output_type
    return response


def test_every_method_of_the_contract_is_answered(server: grpc_testing.Server) -> None:
    """A method that the protos gain is missed here first."""
    requests: dict[str, Message] = {
        "ListCurrencies": rates_pb2.ListCurrenciesRequest(),
        "GetExchangeRate": rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR"),
        "ConvertMoney": rates_pb2.ConvertMoneyRequest(
            amount=Money(currency_code="EUR", minor_units=1250), target_currency_code="USD"
        ),
    }
    assert set(requests) == set(SERVICE.methods_by_name)
    for method, request in requests.items():
        assert answer(server, method, request).ByteSize() > 0


def test_a_rate_is_a_plain_decimal_string_with_its_provenance(
    server: grpc_testing.Server,
) -> None:
    """No exponent, no float: the string can be read by any decimal type."""
    request = rates_pb2.GetExchangeRateRequest(name="exchangeRates/JPY-KWD")
    rate = answer(server, "GetExchangeRate", request)
    assert rate.name == "exchangeRates/JPY-KWD"
    assert rate.base_currency_code == "JPY"
    assert rate.quote_currency_code == "KWD"
    assert rate.rate == "0.002083125"
    assert rate.provider == "ecb"
    assert rate.as_of_time.ToJsonString() == "2026-10-30T15:00:00Z"
    assert rate.stale is False


def test_a_conversion_shows_what_was_rounded_and_how(server: grpc_testing.Server) -> None:
    """The caller can check the cent."""
    request = rates_pb2.ConvertMoneyRequest(
        amount=Money(currency_code="EUR", minor_units=1250), target_currency_code="USD"
    )
    converted = answer(server, "ConvertMoney", request)
    assert converted.amount == Money(currency_code="USD", minor_units=1562)
    assert converted.exchange_rate.rate == "1.25"
    assert converted.unrounded_amount == "1562.50"
    assert converted.rounding == "HALF_EVEN"


def test_currencies_carry_the_digits_of_their_minor_unit(server: grpc_testing.Server) -> None:
    """Zero digits are zero, not absent."""
    listed = answer(server, "ListCurrencies", rates_pb2.ListCurrenciesRequest(page_size=3))
    assert [(c.code, c.minor_unit_digits) for c in listed.currencies] == [
        ("EUR", 2),
        ("GBP", 2),
        ("JPY", 0),
    ]
    assert listed.next_page_token


def test_no_number_is_written_with_an_exponent() -> None:
    """Python would print 5E-8 and 1E+4; not every caller's decimal type reads that."""
    rate = ExchangeRate(
        base="IDR",
        quote="EUR",
        rate=Decimal("5E-8"),
        provider="ecb",
        as_of_time=FRIDAY_EVENING,
        stale=False,
    )
    conversion = Conversion(
        amount=money.Money("EUR", 10_000),
        exchange_rate=rate,
        unrounded_minor_units=Decimal("1E+4"),
    )
    answer = messages.conversion_to_proto(conversion)
    assert answer.exchange_rate.rate == "0.00000005"
    assert answer.unrounded_amount == "10000"


def test_day_and_staleness_reach_the_question() -> None:
    """An absent field is None, a given one is what it says, zero included."""
    bare = messages.get_exchange_rate_from_proto(
        rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR")
    )
    assert (bare.base, bare.quote) == ("USD", "EUR")
    assert (bare.as_of_date, bare.max_staleness) == (None, None)
    full = messages.get_exchange_rate_from_proto(
        rates_pb2.GetExchangeRateRequest(
            name="exchangeRates/USD-EUR",
            as_of_date=Date(year=2026, month=2, day=28),
            max_staleness=Duration(),
        )
    )
    assert str(full.as_of_date) == "2026-02-28"
    assert full.max_staleness == timedelta(0)


@pytest.mark.parametrize(
    "day", [Date(), Date(year=2026, month=5), Date(year=2026, month=2, day=29), Date(year=-1)]
)
def test_a_day_that_is_in_no_calendar_is_refused(day: Date) -> None:
    """A month without a day, a thirtieth of February: no rate has such a date."""
    request = rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR", as_of_date=day)
    with pytest.raises(InvalidInputError) as caught:
        messages.get_exchange_rate_from_proto(request)
    assert caught.value.metadata == {"field": "as_of_date"}


def test_a_duration_that_is_none_is_refused() -> None:
    """Protobuf can carry more seconds than a duration may have."""
    request = rates_pb2.GetExchangeRateRequest(
        name="exchangeRates/USD-EUR", max_staleness=Duration(seconds=10**18)
    )
    with pytest.raises(InvalidInputError) as caught:
        messages.get_exchange_rate_from_proto(request)
    assert caught.value.metadata == {"field": "max_staleness"}


@pytest.mark.parametrize("code", ["XXX", "HRK", "ABC"])
def test_an_amount_of_no_currency_is_refused(code: str) -> None:
    """Three capitals are not yet a currency."""
    request = rates_pb2.ConvertMoneyRequest(
        amount=Money(currency_code=code, minor_units=1), target_currency_code="EUR"
    )
    with pytest.raises(InvalidInputError) as caught:
        messages.convert_money_from_proto(request)
    assert caught.value.metadata == {"field": "amount.currency_code"}
