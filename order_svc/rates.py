"""Exchange rates from the exchange-rate service, over the mesh."""

from __future__ import annotations

from datetime import UTC
from decimal import Decimal, InvalidOperation

import grpc
from google.protobuf.duration_pb2 import Duration

from chassis.errors import InvalidInputError, UnavailableError
from order_svc.domain.order import Rate
from ordermesh.rates.v1 import exchange_rate_service_pb2 as pb
from ordermesh.rates.v1 import exchange_rate_service_pb2_grpc


class MeshRates:
    """The `RateSource` of the service.

    Args:
        channel: To Envoy's internal listener, which balances and retries.
        max_age_seconds: How old a rate may be; 0 takes any.
        timeout_seconds: How long to wait for one.
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, max_age_seconds: int, timeout_seconds: float
    ) -> None:
        self._stub = exchange_rate_service_pb2_grpc.ExchangeRateServiceStub(channel)
        self._max_age_seconds = max_age_seconds
        self._timeout_seconds = timeout_seconds

    async def rate(self, base: str, quote: str) -> Rate:
        """The newest rate of a pair; never zero, never a guess.

        Raises:
            InvalidInputError: Nobody publishes a rate of this pair.
            UnavailableError: The service is away, or knows only an old rate.
        """
        name = f"exchangeRates/{base}-{quote}"
        request = pb.GetExchangeRateRequest(name=name)
        if self._max_age_seconds:
            request.max_staleness.CopyFrom(Duration(seconds=self._max_age_seconds))
        try:
            found = await self._stub.GetExchangeRate(request, timeout=self._timeout_seconds)
            value = Decimal(found.rate)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                # Repeating the call would not help: nobody publishes such a rate.
                raise InvalidInputError.of_field(
                    "CURRENCY_UNKNOWN",
                    "order.currency_code",
                    f"there is no exchange rate from {base} to the merchant's {quote}",
                    given=base,
                ) from error
            raise _unavailable(name, error.details() or error.code().name) from error
        except InvalidOperation as error:
            raise _unavailable(name, "the rate is no number") from error
        if not value.is_finite() or value <= 0:
            raise _unavailable(name, f"the rate is {value}")
        return Rate(
            value=value,
            provider=found.provider,
            as_of_time=found.as_of_time.ToDatetime(tzinfo=UTC),
        )


def _unavailable(name: str, why: str) -> UnavailableError:
    return UnavailableError(
        "RATE_UNAVAILABLE",
        f"no exchange rate to pin: {why}",
        metadata={"rate": name},
        retry_after_seconds=1.0,
    )
