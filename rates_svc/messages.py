"""Proto to questions, and answers to proto: the only module that knows both."""

from __future__ import annotations

from datetime import UTC, date, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.type.date_pb2 import Date

from chassis.errors import InvalidInputError
from chassis.money import Money, MoneyError
from ordermesh.common.v1 import money_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from rates_svc.rates import (
    Conversion,
    ConvertMoney,
    CurrencyPage,
    ExchangeRate,
    GetExchangeRate,
    ListCurrencies,
)


def get_exchange_rate_from_proto(request: rates_pb2.GetExchangeRateRequest) -> GetExchangeRate:
    """The question in a request whose fields keep their rules.

    Raises:
        InvalidInputError: `as_of_date` is no day of the calendar, or `max_staleness` no
            duration.
    """
    pair = request.name.removeprefix("exchangeRates/")
    base, _, quote = pair.partition("-")
    return GetExchangeRate(
        base=base,
        quote=quote,
        as_of_date=_day(request.as_of_date) if request.HasField("as_of_date") else None,
        max_staleness=_timedelta(request.max_staleness)
        if request.HasField("max_staleness")
        else None,
    )


def convert_money_from_proto(request: rates_pb2.ConvertMoneyRequest) -> ConvertMoney:
    """The question in a request whose fields keep their rules.

    Raises:
        InvalidInputError: The amount's currency is none of ISO 4217's, `as_of_date` no
            day of the calendar, or `max_staleness` no duration.
    """
    try:
        amount = Money(request.amount.currency_code, request.amount.minor_units)
    except MoneyError as error:
        raise InvalidInputError.of_field(
            "INVALID_FIELD", "amount.currency_code", "is not an active ISO 4217 currency"
        ) from error
    return ConvertMoney(
        amount=amount,
        target_currency_code=request.target_currency_code,
        as_of_date=_day(request.as_of_date) if request.HasField("as_of_date") else None,
        max_staleness=_timedelta(request.max_staleness)
        if request.HasField("max_staleness")
        else None,
    )


def list_currencies_from_proto(request: rates_pb2.ListCurrenciesRequest) -> ListCurrencies:
    """The question in a request whose fields keep their rules."""
    return ListCurrencies(page_size=request.page_size, page_token=request.page_token)


def exchange_rate_to_proto(rate: ExchangeRate) -> rates_pb2.ExchangeRate:
    """The rate as the contract has it; the number in plain digits, without an exponent."""
    as_of_time = Timestamp()
    as_of_time.FromDatetime(rate.as_of_time.astimezone(UTC))
    return rates_pb2.ExchangeRate(
        name=rate.name,
        base_currency_code=rate.base,
        quote_currency_code=rate.quote,
        rate=f"{rate.rate:f}",
        provider=rate.provider,
        as_of_time=as_of_time,
        stale=rate.stale,
    )


def conversion_to_proto(conversion: Conversion) -> rates_pb2.ConvertMoneyResponse:
    """The conversion as the contract has it."""
    amount = conversion.amount
    return rates_pb2.ConvertMoneyResponse(
        amount=money_pb2.Money(currency_code=amount.currency_code, minor_units=amount.minor_units),
        exchange_rate=exchange_rate_to_proto(conversion.exchange_rate),
        unrounded_amount=f"{conversion.unrounded_minor_units:f}",
        rounding="HALF_EVEN",
    )


def currency_page_to_proto(page: CurrencyPage) -> rates_pb2.ListCurrenciesResponse:
    """The page as the contract has it."""
    return rates_pb2.ListCurrenciesResponse(
        currencies=[
            rates_pb2.Currency(code=currency.code, minor_unit_digits=currency.minor_unit_digits)
            for currency in page.currencies
        ],
        next_page_token=page.next_page_token,
    )


def _day(value: Date) -> date:
    # google.type.Date also says "some day in May" by zeros; a rate needs a whole date.
    try:
        return date(value.year, value.month, value.day)
    except ValueError as error:
        raise InvalidInputError.of_field(
            "INVALID_FIELD", "as_of_date", f"is not a whole date: {error}"
        ) from error


def _timedelta(value: Duration) -> timedelta:
    try:
        return value.ToTimedelta()
    except (ValueError, OverflowError) as error:
        raise InvalidInputError.of_field(
            "INVALID_FIELD", "max_staleness", f"is not a duration: {error}"
        ) from error
