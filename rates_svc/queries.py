"""How each question is answered: which rate applies, and when there is none."""

from __future__ import annotations

from datetime import date, datetime, timedelta

from chassis.errors import InvalidInputError, NotFoundError, RuleViolationError
from chassis.ids import Now
from chassis.money import (
    CURRENCY_CODES,
    AmountOutOfRangeError,
    convert_unrounded,
    minor_unit_digits,
    round_to_minor_units,
)
from chassis.paging import PageTokens
from rates_svc.providers import EcbHistory, end_of
from rates_svc.rates import (
    Conversion,
    ConvertMoney,
    Currency,
    CurrencyPage,
    ExchangeRate,
    GetExchangeRate,
    ListCurrencies,
    rate_name,
)


class GetExchangeRateHandler:
    """Finds the rate that applies, and refuses one that is too old.

    Age and staleness are counted up to now; for a past day, up to the end of that day
    in Frankfurt. So Friday's rate is good for the Sunday after it, and last year's
    rates are not called stale for being asked about today.

    Args:
        history: Where the rates are.
        now: Tells the time.
    """

    def __init__(self, *, history: EcbHistory, now: Now) -> None:
        self._history = history
        self._now = now

    async def __call__(self, query: GetExchangeRate) -> ExchangeRate:
        """Answers the rate.

        Raises:
            InvalidInputError: The day has not come yet, anywhere on earth.
            NotFoundError: RATE_NOT_FOUND, nothing was published for this pair.
            RuleViolationError: RATE_TOO_STALE, the rate is older than the caller accepts.
        """
        at = self._moment_of(query.as_of_date)
        name = rate_name(query.base, query.quote)
        found = self._history.find(query.base, query.quote, on=query.as_of_date)
        if found is None:
            day = "" if query.as_of_date is None else f" on {query.as_of_date}"
            raise NotFoundError(
                "RATE_NOT_FOUND", f"no rate is known for {name}{day}", metadata={"name": name}
            )
        rate = ExchangeRate(
            base=query.base,
            quote=query.quote,
            rate=found.rate,
            provider=self._history.name,
            as_of_time=found.as_of_time,
            stale=self._history.is_stale(found, at=at),
        )
        limit = query.max_staleness
        if limit is not None and at - rate.as_of_time > limit:
            raise RuleViolationError(
                "RATE_TOO_STALE",
                f"the newest rate of {name} is of {rate.as_of_time.isoformat()}, older than asked",
                metadata={
                    "name": name,
                    "as_of_time": rate.as_of_time.isoformat().replace("+00:00", "Z"),
                    "max_staleness": _seconds(limit),
                },
            )
        return rate

    def _moment_of(self, day: date | None) -> datetime:
        """The moment up to which the age of a rate is counted."""
        now = self._now()
        if day is None:
            return now
        # The date line is 14 hours ahead of UTC: by then every caller's today has begun.
        if day > (now + timedelta(hours=14)).date():
            raise InvalidInputError.of_field("INVALID_FIELD", "as_of_date", "lies in the future")
        return min(now, end_of(day))


class ConvertMoneyHandler:
    """Converts at the rate that applies, rounding half to even, once.

    Args:
        rates: Finds the rate.
    """

    def __init__(self, *, rates: GetExchangeRateHandler) -> None:
        self._rates = rates

    async def __call__(self, query: ConvertMoney) -> Conversion:
        """Answers the converted amount.

        Raises:
            InvalidInputError: AMOUNT_OUT_OF_RANGE, the converted amount does not fit;
                or the target is no currency.
            NotFoundError: As `GetExchangeRateHandler`.
            RuleViolationError: As `GetExchangeRateHandler`.
        """
        target = query.target_currency_code
        if target not in CURRENCY_CODES:
            raise InvalidInputError.of_field(
                "INVALID_FIELD", "target_currency_code", "is not an active ISO 4217 currency"
            )
        rate = await self._rates(
            GetExchangeRate(
                base=query.amount.currency_code,
                quote=target,
                as_of_date=query.as_of_date,
                max_staleness=query.max_staleness,
            )
        )
        unrounded = convert_unrounded(query.amount, rate.rate, target)
        try:
            amount = round_to_minor_units(unrounded, target)
        except AmountOutOfRangeError as error:
            raise InvalidInputError.of_field(
                "AMOUNT_OUT_OF_RANGE", "amount", f"is more than fits when converted to {target}"
            ) from error
        return Conversion(amount=amount, exchange_rate=rate, unrounded_minor_units=unrounded)


class ListCurrenciesHandler:
    """Lists the currencies that have a rate and a minor unit, by code.

    Args:
        history: Where the rates are.
        page_tokens: Signs the tokens.
    """

    def __init__(self, *, history: EcbHistory, page_tokens: PageTokens) -> None:
        self._page_tokens = page_tokens
        # Neither the history nor ISO's table changes while the process runs.
        self._currencies = tuple(
            Currency(code=code, minor_unit_digits=minor_unit_digits(code))
            for code in sorted(history.currencies() & CURRENCY_CODES)
        )

    async def __call__(self, query: ListCurrencies) -> CurrencyPage:
        """Answers a page.

        Raises:
            InvalidInputError: PAGE_TOKEN_INVALID, the token is not of this list.
        """
        position = self._page_tokens.read(query.page_token, "ListCurrencies")
        after = position[0] if position else ""
        left = [currency for currency in self._currencies if currency.code > after]
        page = left[: query.page_size] if query.page_size else left
        last = len(page) == len(left)
        return CurrencyPage(
            currencies=tuple(page),
            next_page_token=""
            if last
            else self._page_tokens.make([page[-1].code], "ListCurrencies"),
        )


def _seconds(duration: timedelta) -> str:
    """A duration as proto3 JSON prints it: `3600s`, `0.500s`."""
    seconds, rest = divmod(duration, timedelta(seconds=1))
    micros = rest.microseconds
    if not micros:
        return f"{seconds}s"
    return f"{seconds}.{micros // 1000:03}s" if micros % 1000 == 0 else f"{seconds}.{micros:06}s"
