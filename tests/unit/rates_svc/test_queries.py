"""Which rate applies to a question, when there is none, and what converting does."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest

from chassis.errors import InvalidInputError, NotFoundError, RuleViolationError, ServiceError
from chassis.mediator import Mediator
from chassis.money import MINOR_UNITS_MAX, Money
from chassis.paging import PageTokens
from rates_svc.rates import ConvertMoney, Currency, GetExchangeRate, ListCurrencies
from rates_svc.wiring import registrations
from tests.unit.rates_svc.a_history import FRIDAY_EVENING, a_history


def a_service(at: datetime = FRIDAY_EVENING) -> Mediator:
    """The service's questions over the small history, at a moment."""
    return Mediator(registrations(a_history(), PageTokens("secret"), lambda: at))


async def test_an_answer_says_who_when_and_whether_it_is_stale() -> None:
    """A rate without its provenance would be a bare number."""
    rate = await a_service().send(GetExchangeRate(base="USD", quote="EUR"))
    assert rate.name == "exchangeRates/USD-EUR"
    assert rate.rate == Decimal("0.8")
    assert rate.provider == "ecb"
    assert rate.as_of_time == datetime(2026, 10, 30, 15, tzinfo=UTC)
    assert rate.stale is False


async def test_an_old_history_still_answers_and_says_that_it_is_old() -> None:
    """Any age is accepted by who names no limit, and the answer does not hide it."""
    service = a_service(FRIDAY_EVENING + timedelta(days=400))
    assert (await service.send(GetExchangeRate(base="USD", quote="EUR"))).stale is True


async def test_a_pair_without_a_rate_is_not_found() -> None:
    """The error names the pair."""
    with pytest.raises(NotFoundError) as caught:
        await a_service().send(GetExchangeRate(base="USD", quote="XXX"))
    assert caught.value.reason == "RATE_NOT_FOUND"
    assert caught.value.metadata == {"name": "exchangeRates/USD-XXX"}


@pytest.mark.parametrize(
    ("max_staleness", "accepted"),
    [
        (timedelta(hours=3), True),
        (timedelta(hours=3) - timedelta(microseconds=1), False),
        (timedelta(0), False),
        (timedelta(days=36500), True),
    ],
)
async def test_a_rate_older_than_the_caller_accepts_is_refused(
    max_staleness: timedelta, accepted: bool
) -> None:
    """Three hours after publication the rate is three hours old, and not a moment less."""
    query = GetExchangeRate(base="USD", quote="EUR", max_staleness=max_staleness)
    if accepted:
        assert (await a_service().send(query)).rate == Decimal("0.8")
        return
    with pytest.raises(RuleViolationError) as caught:
        await a_service().send(query)
    assert caught.value.reason == "RATE_TOO_STALE"


@pytest.mark.parametrize(
    ("max_staleness", "text"),
    [
        (timedelta(hours=1), "3600s"),
        (timedelta(milliseconds=500), "0.500s"),
        (timedelta(seconds=1, microseconds=5), "1.000005s"),
    ],
)
async def test_the_refusal_of_an_old_rate_says_how_old_it_is(
    max_staleness: timedelta, text: str
) -> None:
    """The caller can decide again without asking again."""
    with pytest.raises(RuleViolationError) as caught:
        await a_service().send(
            GetExchangeRate(base="USD", quote="EUR", max_staleness=max_staleness)
        )
    assert caught.value.metadata == {
        "name": "exchangeRates/USD-EUR",
        "as_of_time": "2026-10-30T15:00:00Z",
        "max_staleness": text,
    }


async def test_the_age_of_a_past_days_rate_is_counted_on_that_day() -> None:
    """Thursday's rate was eight hours old when Thursday ended, however long ago that is."""
    service = a_service(FRIDAY_EVENING + timedelta(days=400))
    thursday = GetExchangeRate(
        base="EUR", quote="USD", as_of_date=date(2026, 10, 29), max_staleness=timedelta(hours=8)
    )
    rate = await service.send(thursday)
    assert (rate.rate, rate.stale) == (Decimal("1.2345"), False)


async def test_a_day_after_the_end_of_the_history_has_a_stale_rate() -> None:
    """On Monday evening a rate of Monday should have been there."""
    service = a_service(FRIDAY_EVENING + timedelta(days=400))
    sunday = GetExchangeRate(base="EUR", quote="USD", as_of_date=date(2026, 11, 1))
    monday = GetExchangeRate(base="EUR", quote="USD", as_of_date=date(2026, 11, 2))
    assert (await service.send(sunday)).stale is False
    assert (await service.send(monday)).stale is True


async def test_a_day_that_has_not_come_is_refused() -> None:
    """Today's rate is no forecast; but east of here it may be tomorrow already."""
    service = a_service()
    tomorrow = GetExchangeRate(base="EUR", quote="USD", as_of_date=date(2026, 10, 31))
    assert (await service.send(tomorrow)).rate == Decimal("1.25")
    with pytest.raises(InvalidInputError) as caught:
        await service.send(GetExchangeRate(base="EUR", quote="USD", as_of_date=date(2026, 11, 1)))
    assert caught.value.metadata == {"field": "as_of_date"}


@pytest.mark.parametrize(
    ("amount", "target", "converted", "unrounded"),
    [
        (Money("EUR", 1250), "USD", Money("USD", 1562), "1562.50"),
        (Money("EUR", 1254), "USD", Money("USD", 1568), "1567.50"),
        (Money("EUR", -1250), "USD", Money("USD", -1562), "-1562.50"),
        (Money("EUR", 1250), "JPY", Money("JPY", 2000), "2000"),
        (Money("JPY", 1), "EUR", Money("EUR", 1), "0.625"),
        (Money("EUR", 1), "KWD", Money("KWD", 3), "3.333"),
        (Money("USD", 0), "EUR", Money("EUR", 0), "0"),
        (Money("EUR", 1250), "EUR", Money("EUR", 1250), "1250"),
    ],
)
async def test_an_amount_is_converted_exactly_and_rounded_once(
    amount: Money, target: str, converted: Money, unrounded: str
) -> None:
    """Halves go to even, other numbers of digits are heeded, and the product is shown."""
    answer = await a_service().send(ConvertMoney(amount=amount, target_currency_code=target))
    assert answer.amount == converted
    assert answer.unrounded_minor_units == Decimal(unrounded)
    assert answer.exchange_rate.name == f"exchangeRates/{amount.currency_code}-{target}"


async def test_a_conversion_uses_the_rate_of_the_day_asked_for() -> None:
    """A refund reckons with the rate of its order's day."""
    answer = await a_service().send(
        ConvertMoney(
            amount=Money("EUR", 100), target_currency_code="USD", as_of_date=date(2026, 10, 16)
        )
    )
    assert answer.amount == Money("USD", 110)


@pytest.mark.parametrize(
    ("query", "error", "reason"),
    [
        (
            ConvertMoney(amount=Money("EUR", MINOR_UNITS_MAX), target_currency_code="USD"),
            InvalidInputError,
            "AMOUNT_OUT_OF_RANGE",
        ),
        (
            ConvertMoney(amount=Money("EUR", 1), target_currency_code="XXX"),
            InvalidInputError,
            "INVALID_FIELD",
        ),
        (
            ConvertMoney(amount=Money("EUR", 1), target_currency_code="CHF"),
            NotFoundError,
            "RATE_NOT_FOUND",
        ),
        (
            ConvertMoney(
                amount=Money("EUR", 1), target_currency_code="USD", max_staleness=timedelta(0)
            ),
            RuleViolationError,
            "RATE_TOO_STALE",
        ),
    ],
)
async def test_a_conversion_that_cannot_be_is_refused_with_its_reason(
    query: ConvertMoney, error: type[ServiceError], reason: str
) -> None:
    """Too large, no currency, no rate, too old: four different answers."""
    with pytest.raises(error) as caught:
        await a_service().send(query)
    assert caught.value.reason == reason


async def test_all_currencies_are_listed_by_code() -> None:
    """Those with a rate today and a minor unit, with its digits."""
    page = await a_service().send(ListCurrencies())
    assert [currency.code for currency in page.currencies] == [
        *("EUR", "GBP", "JPY", "KWD", "RUB", "USD")
    ]
    assert page.currencies[2] == Currency(code="JPY", minor_unit_digits=0)
    assert page.next_page_token == ""


@pytest.mark.parametrize("page_size", [1, 2, 3, 5, 6, 7])
async def test_pages_together_are_the_whole_list(page_size: int) -> None:
    """Nothing is left out, nothing comes twice, and the last page says that it is."""
    service = a_service()
    codes: list[str] = []
    token = ""
    for _ in range(10):
        page = await service.send(ListCurrencies(page_size=page_size, page_token=token))
        assert 0 < len(page.currencies) <= page_size
        codes += [currency.code for currency in page.currencies]
        token = page.next_page_token
        if not token:
            break
    assert codes == ["EUR", "GBP", "JPY", "KWD", "RUB", "USD"]


@pytest.mark.parametrize("token", ["nonsense", "AAAA", "ä"])
async def test_a_page_token_of_other_make_is_refused(token: str) -> None:
    """Tokens are signed."""
    with pytest.raises(InvalidInputError) as caught:
        await a_service().send(ListCurrencies(page_token=token))
    assert caught.value.reason == "PAGE_TOKEN_INVALID"
