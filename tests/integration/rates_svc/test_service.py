"""The rates service as its callers meet it: a process, a port and generated stubs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import pytest
import pytest_asyncio
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from google.type.date_pb2 import Date
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ordermesh.common.v1.money_pb2 import Money
from ordermesh.rates.v1 import exchange_rate_service_pb2 as rates_pb2
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc as rates_grpc
from tests.eventually import eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

PATIENCE_SECONDS = 30
IDENTITY = (("x-mesh-merchant", "default"),)
SERVICE = rates_pb2.DESCRIPTOR.services_by_name["ExchangeRateService"].full_name

# Days long past, so that no clock makes them the future.
HISTORY = """\
Date,USD,JPY,HRK,KWD,
2016-10-28,1.25,160,N/A,0.3333,
2016-10-27,1.2345,159.5,N/A,0.3332,
2015-12-30,1.0666,140.66,7.5365,N/A,
"""


@dataclass
class RunningService:
    """The service's process and the ways to reach it."""

    process: asyncio.subprocess.Process
    channel: grpc.aio.Channel
    http_port: int

    @property
    def rates(self) -> rates_grpc.ExchangeRateServiceAsyncStub:
        """The generated client."""
        stub: rates_grpc.ExchangeRateServiceAsyncStub = rates_grpc.ExchangeRateServiceStub(
            self.channel
        )
        return stub


def clean_environment() -> dict[str, str]:
    """The environment without a developer's own mesh in it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("MESH_")}


@asynccontextmanager
async def a_service(folder: Path, **settings: str) -> AsyncIterator[RunningService]:
    """Runs `python -m rates_svc all` on free ports until the block ends."""
    merchants = folder / "merchants.json"
    merchant = {
        "id": "default",
        "name": "Default",
        "email": "merchant@default.example",
        "settlement_currency": "EUR",
    }
    merchants.write_text(json.dumps({"merchants": [merchant]}))
    environment = {
        **clean_environment(),
        "MESH_INSECURE": "true",
        "MESH_GRPC_ADDRESS": "127.0.0.1:0",
        "MESH_HTTP_ADDRESS": "127.0.0.1:0",
        "MESH_MERCHANTS": str(merchants),
        "MESH_PAGE_TOKEN_KEY": "secret",
        "MESH_DRAIN_SECONDS": "0",
        **settings,
    }
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rates_svc", "all"),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        ready = await asyncio.wait_for(_line_of(process, "ready"), PATIENCE_SECONDS)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{ready['grpc_port']}") as channel:
            # The published types of these two packages know neither coroutines nor streams.
            health: Any = health_pb2_grpc.HealthStub(channel)

            async def is_serving() -> bool:
                answer = await health.Check(health_pb2.HealthCheckRequest(service=SERVICE))
                return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

            await eventually(is_serving, within_seconds=PATIENCE_SECONDS)
            yield RunningService(process, channel, int(str(ready["http_port"])))
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    assert process.returncode == 0


async def _line_of(process: asyncio.subprocess.Process, event: str) -> dict[str, object]:
    """The log line of an event."""
    assert process.stdout is not None
    async for raw in process.stdout:
        line: dict[str, object] = json.loads(raw)
        if line["event"] == event:
            return line
    raise AssertionError(f"the service ended without saying {event!r}")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RunningService]:
    """The service over a small history: one process for all tests, since none changes it."""
    folder = tmp_path_factory.mktemp("rates")
    history = folder / "eurofxref-hist.csv"
    history.write_text(HISTORY)
    async with a_service(folder, MESH_RATES_HISTORY=str(history)) as running:
        yield running


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, error_details_pb2.ErrorInfo]:
    """The status and the reason with which a call fails."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    trailing = dict(caught.value.trailing_metadata() or ())
    status = status_pb2.Status.FromString(bytes(trailing["grpc-status-details-bin"]))
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "ordermesh"
    return caught.value.code(), info


async def test_a_caller_gets_a_rate(service: RunningService) -> None:
    """Plain digits, whose they are, of when, and that they are old by now."""
    rate = await service.rates.GetExchangeRate(
        rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR"), metadata=IDENTITY
    )
    assert (rate.name, rate.rate, rate.provider) == ("exchangeRates/USD-EUR", "0.8", "ecb")
    assert (rate.base_currency_code, rate.quote_currency_code) == ("USD", "EUR")
    assert rate.as_of_time.ToJsonString() == "2016-10-28T14:00:00Z"
    assert rate.stale


async def test_a_caller_gets_the_rate_of_a_day(service: RunningService) -> None:
    """A withdrawn currency has one too, and it is not stale for its day."""
    rate = await service.rates.GetExchangeRate(
        rates_pb2.GetExchangeRateRequest(
            name="exchangeRates/EUR-HRK", as_of_date=Date(year=2015, month=12, day=30)
        ),
        metadata=IDENTITY,
    )
    assert (rate.rate, rate.stale) == ("7.5365", False)


async def test_a_caller_converts_money(service: RunningService) -> None:
    """The answer shows the rate, the exact product and the rule of its rounding."""
    converted = await service.rates.ConvertMoney(
        rates_pb2.ConvertMoneyRequest(
            amount=Money(currency_code="EUR", minor_units=1250), target_currency_code="USD"
        ),
        metadata=IDENTITY,
    )
    assert converted.amount == Money(currency_code="USD", minor_units=1562)
    assert converted.unrounded_amount == "1562.50"
    assert converted.rounding == "HALF_EVEN"
    assert converted.exchange_rate.name == "exchangeRates/EUR-USD"


async def test_a_caller_pages_through_the_currencies(service: RunningService) -> None:
    """The token of one page leads to the next, the last has none."""
    first = await service.rates.ListCurrencies(
        rates_pb2.ListCurrenciesRequest(page_size=3), metadata=IDENTITY
    )
    rest = await service.rates.ListCurrencies(
        rates_pb2.ListCurrenciesRequest(page_token=first.next_page_token), metadata=IDENTITY
    )
    assert [currency.code for currency in first.currencies] == ["EUR", "JPY", "KWD"]
    assert [currency.minor_unit_digits for currency in first.currencies] == [2, 0, 3]
    assert [currency.code for currency in rest.currencies] == ["USD"]
    assert rest.next_page_token == ""


async def test_a_pair_without_a_rate_is_not_found(service: RunningService) -> None:
    """NOT_FOUND, RATE_NOT_FOUND, and the pair."""
    code, info = await refusal(
        service.rates.GetExchangeRate(
            rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-XXX"), metadata=IDENTITY
        )
    )
    assert (code, info.reason) == (grpc.StatusCode.NOT_FOUND, "RATE_NOT_FOUND")
    assert dict(info.metadata) == {"name": "exchangeRates/USD-XXX"}


async def test_a_rate_older_than_asked_is_refused(service: RunningService) -> None:
    """FAILED_PRECONDITION, RATE_TOO_STALE, and how old the newest is."""
    code, info = await refusal(
        service.rates.GetExchangeRate(
            rates_pb2.GetExchangeRateRequest(
                name="exchangeRates/USD-EUR", max_staleness=Duration(seconds=3600)
            ),
            metadata=IDENTITY,
        )
    )
    assert (code, info.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "RATE_TOO_STALE")
    assert dict(info.metadata) == {
        "name": "exchangeRates/USD-EUR",
        "as_of_time": "2016-10-28T14:00:00Z",
        "max_staleness": "3600s",
    }


BAD_RATE_REQUESTS = {
    "no name": (rates_pb2.GetExchangeRateRequest(), "name"),
    "no pair": (rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD"), "name"),
    "small letters": (rates_pb2.GetExchangeRateRequest(name="exchangeRates/usd-eur"), "name"),
    "more than a pair": (
        rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR\n"),
        "name",
    ),
    "negative staleness": (
        rates_pb2.GetExchangeRateRequest(
            name="exchangeRates/USD-EUR", max_staleness=Duration(seconds=-1)
        ),
        "max_staleness",
    ),
    "no duration at all": (
        rates_pb2.GetExchangeRateRequest(
            name="exchangeRates/USD-EUR", max_staleness=Duration(seconds=10**18)
        ),
        "max_staleness",
    ),
    "half a date": (
        rates_pb2.GetExchangeRateRequest(
            name="exchangeRates/USD-EUR", as_of_date=Date(year=2016, month=10)
        ),
        "as_of_date",
    ),
    "a date to come": (
        rates_pb2.GetExchangeRateRequest(
            name="exchangeRates/USD-EUR", as_of_date=Date(year=9999, month=12, day=31)
        ),
        "as_of_date",
    ),
}


@pytest.mark.parametrize(
    ("request_", "field"), BAD_RATE_REQUESTS.values(), ids=BAD_RATE_REQUESTS.keys()
)
async def test_a_malformed_question_names_the_field_at_fault(
    service: RunningService, request_: rates_pb2.GetExchangeRateRequest, field: str
) -> None:
    """INVALID_ARGUMENT with INVALID_FIELD, whoever found it: the rules or the service."""
    code, info = await refusal(service.rates.GetExchangeRate(request_, metadata=IDENTITY))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD")
    assert info.metadata["field"] == field


def a_conversion(code: str, minor_units: int, target: str) -> rates_pb2.ConvertMoneyRequest:
    """A request to convert an amount."""
    return rates_pb2.ConvertMoneyRequest(
        amount=Money(currency_code=code, minor_units=minor_units), target_currency_code=target
    )


BAD_CONVERSIONS = {
    "no amount": (
        rates_pb2.ConvertMoneyRequest(target_currency_code="USD"),
        *("INVALID_FIELD", "amount"),
    ),
    "no target": (a_conversion("EUR", 1, ""), "INVALID_FIELD", "target_currency_code"),
    "unknown target": (a_conversion("EUR", 1, "XXX"), "INVALID_FIELD", "target_currency_code"),
    "unknown currency": (a_conversion("XXX", 1, "EUR"), "INVALID_FIELD", "amount.currency_code"),
    "too much": (a_conversion("EUR", 10**15 + 1, "USD"), "INVALID_FIELD", "amount.minor_units"),
    "too much once converted": (
        a_conversion("EUR", 10**15, "USD"),
        "AMOUNT_OUT_OF_RANGE",
        "amount",
    ),
}


@pytest.mark.parametrize(
    ("request_", "reason", "field"), BAD_CONVERSIONS.values(), ids=BAD_CONVERSIONS.keys()
)
async def test_a_conversion_that_cannot_be_names_the_field_at_fault(
    service: RunningService,
    request_: rates_pb2.ConvertMoneyRequest,
    reason: str,
    field: str,
) -> None:
    """Every refusal is INVALID_ARGUMENT with its reason and its field."""
    code, info = await refusal(service.rates.ConvertMoney(request_, metadata=IDENTITY))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert info.metadata["field"] == field


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (rates_pb2.ListCurrenciesRequest(page_size=-1), "INVALID_FIELD"),
        (rates_pb2.ListCurrenciesRequest(page_token="x" * 1025), "INVALID_FIELD"),
        (rates_pb2.ListCurrenciesRequest(page_token="forged"), "PAGE_TOKEN_INVALID"),
    ],
)
async def test_a_bad_page_is_refused(
    service: RunningService, request_: rates_pb2.ListCurrenciesRequest, reason: str
) -> None:
    """A negative size, a token too long, and one that the service never made."""
    code, info = await refusal(service.rates.ListCurrencies(request_, metadata=IDENTITY))
    assert (code, info.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)


async def test_a_call_without_identity_is_refused(service: RunningService) -> None:
    """Rates are no secret, but every caller is known."""
    code, info = await refusal(
        service.rates.GetExchangeRate(
            rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR")
        )
    )
    assert (code, info.reason) == (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED")


async def test_reflection_names_the_service(service: RunningService) -> None:
    """So grpcurl and buf curl find it."""
    channel: Any = service.channel
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    requests: Any = reflection_pb2
    request = requests.ServerReflectionRequest(list_services="")
    answers = [answer async for answer in stub.ServerReflectionInfo(iter([request]))]
    names = [entry.name for entry in answers[0].list_services_response.service]
    assert SERVICE in names
    assert "grpc.health.v1.Health" in names


async def test_probes_and_metrics_are_plain_http(service: RunningService) -> None:
    """It is alive, it is ready, and a question asked shows in its metrics."""

    async def page(path: str) -> str:
        def read() -> str:
            with urlopen(f"http://127.0.0.1:{service.http_port}{path}", timeout=5) as answer:
                text: str = answer.read().decode()
                return text

        return await asyncio.to_thread(read)

    async def questions() -> float:
        line = 'mesh_request_seconds_count{outcome="OK",request="GetExchangeRate"} '
        return sum(
            float(text.removeprefix(line))
            for text in (await page("/metrics")).splitlines()
            if text.startswith(line)
        )

    assert await page("/livez") == "alive\n"
    await eventually(lambda: page("/readyz"), until=lambda text: text == "ready\n")
    before = await questions()
    await service.rates.GetExchangeRate(
        rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR"), metadata=IDENTITY
    )
    assert await questions() == before + 1


async def test_many_questions_at_once_are_all_answered(service: RunningService) -> None:
    """A hundred callers get the same answer."""
    request = rates_pb2.GetExchangeRateRequest(name="exchangeRates/KWD-JPY")
    answers = await asyncio.gather(
        *(service.rates.GetExchangeRate(request, metadata=IDENTITY) for _ in range(100))
    )
    assert {rate.rate for rate in answers} == {"480.048004800480048"}


async def test_the_shipped_history_answers_without_any_file(tmp_path: Path) -> None:
    """With nothing configured and no network there are rates all the same."""
    async with a_service(tmp_path) as service:
        rate = await service.rates.GetExchangeRate(
            rates_pb2.GetExchangeRateRequest(name="exchangeRates/USD-EUR"), metadata=IDENTITY
        )
        assert Decimal("0.5") < Decimal(rate.rate) < 2
        listed = await service.rates.ListCurrencies(
            rates_pb2.ListCurrenciesRequest(), metadata=IDENTITY
        )
        assert len(listed.currencies) >= 25


async def test_a_signal_ends_the_service_in_order(tmp_path: Path) -> None:
    """Told to stop, it leaves by itself and says that all was well."""
    async with a_service(tmp_path) as service:
        service.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(service.process.wait(), 10) == 0


async def test_a_service_without_its_history_does_not_start(tmp_path: Path) -> None:
    """It exits with 1 and says what is wrong."""
    merchants = tmp_path / "merchants.json"
    merchants.write_text(
        '{"merchants": [{"id": "default", "name": "Default", '
        '"email": "m@default.example", "settlement_currency": "EUR"}]}'
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "rates_svc", "all"),
        env={
            **clean_environment(),
            "MESH_INSECURE": "true",
            "MESH_MERCHANTS": str(merchants),
            "MESH_PAGE_TOKEN_KEY": "secret",
            "MESH_RATES_HISTORY": "/nowhere/eurofxref-hist.zip",
        },
        stdout=asyncio.subprocess.PIPE,
    )
    stdout, _ = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    assert process.returncode == 1
    assert "/nowhere/eurofxref-hist.zip" in stdout.decode()
