"""What every process reads from its environment, checked when it starts.

Each service adds its own settings in its `settings` module. The table of all of them
is generated into docs/settings.md by `make settings`.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from chassis.money import CURRENCY_CODES

_ADDRESS = r"^\S+:\d{1,5}$"
_BROKERS = ("amqp://", "amqps://", "postgresql://", "postgres://", "memory://")


class Merchant(BaseModel):
    """One merchant of the merchants file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")
    name: str = Field(min_length=1, max_length=200)
    email: str = Field(max_length=254, pattern=r"^[!-?A-~]+@[!-?A-~]+$")
    settlement_currency: str = Field(pattern=r"^[A-Z]{3}$")
    capture_method: Literal["automatic", "manual"] = "automatic"
    # A BCP 47 tag, as a customer's: `de-AT`, not `de_AT`.
    locale: str = Field(default="en", max_length=35, pattern=r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")

    @field_validator("settlement_currency")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value not in CURRENCY_CODES:
            raise ValueError(f"{value} is not a currency that anybody settles in")
        return value


class _MerchantsFile(BaseModel):
    model_config = ConfigDict(extra="forbid")
    merchants: list[Merchant] = Field(min_length=1)


class ServiceSettings(BaseSettings):
    """The settings that all services share.

    Raises:
        pydantic.ValidationError: A variable is missing or malformed; the message
            names each of them.
    """

    model_config = SettingsConfigDict(
        env_prefix="MESH_",
        frozen=True,
        extra="ignore",
        use_attribute_docstrings=True,
        # What is refused may be a URL with a password in it.
        hide_input_in_errors=True,
    )

    broker_url: SecretStr = SecretStr("")
    """Where events flow: `amqp://user:password@host:port/vhost` (RabbitMQ) or
    `postgresql://role:password@host:port/database` (a queue in PostgreSQL)."""

    redis_url: SecretStr = SecretStr("")
    """The cache, `redis://:password@host:port/0`; empty runs without one."""

    grpc_address: str = Field(default="127.0.0.1:0", pattern=_ADDRESS)
    """Host and port for gRPC (mutual TLS); port 0 picks a free one."""

    http_address: str = Field(default="127.0.0.1:0", pattern=_ADDRESS)
    """Host and port for `/livez`, `/readyz` and `/metrics`, plain HTTP, inside only."""

    tls_cert: Path | None = None
    """PEM certificate chain of this service, for both sides of mutual TLS."""

    tls_key: Path | None = None
    """PEM private key of `MESH_TLS_CERT`."""

    tls_ca: Path | None = None
    """PEM certificates of the authority that signed every peer's certificate."""

    insecure: bool = False
    """Serve without TLS and believe the identity headers. For tests only."""

    trusted_proxy: str = "edge.mesh"
    """The certificate name of Envoy, whose identity headers are believed."""

    internal_address: str = ""
    """Host and port of Envoy's internal listener, for calls to other services."""

    internal_name: str = "envoy.mesh"
    """The certificate name of Envoy's internal listener."""

    merchants: Path = Path("merchants.json")
    """The file of merchants, JSON, checked at start."""

    page_token_key: SecretStr
    """Secret under which page tokens are signed; the same for all replicas."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least level that is logged."""

    log_format: Literal["json", "console"] = "json"
    """`json` for programs, `console` for people."""

    otlp_endpoint: str = ""
    """Where spans go, `http://host:4317` (OTLP over gRPC); empty traces nothing."""

    reflection: bool = True
    """Serve gRPC reflection. Off in production, where the protos are published."""

    drain_seconds: float = Field(default=3.0, ge=0, le=60)
    """How long to go on serving after health says NOT_SERVING, so that balancers
    notice; longer than their health-check interval."""

    grace_seconds: float = Field(default=10.0, ge=0, le=300)
    """How long what is in flight may take to finish after that."""

    concurrency_max: int = Field(default=256, ge=1)
    """Calls handled at once; more are answered RESOURCE_EXHAUSTED."""

    @field_validator("page_token_key")
    @classmethod
    def _is_secret(cls, value: SecretStr) -> SecretStr:
        # Whoever guesses it could forge tokens.
        if not value.get_secret_value():
            raise ValueError("is empty; give every replica the same secret")
        return value

    @model_validator(mode="after")
    def _tls_or_insecure(self) -> ServiceSettings:
        given = [value is not None for value in (self.tls_cert, self.tls_key, self.tls_ca)]
        if any(given) and not all(given):
            raise ValueError("MESH_TLS_CERT, MESH_TLS_KEY and MESH_TLS_CA go together")
        if not any(given) and not self.insecure:
            raise ValueError(
                "set MESH_TLS_CERT, MESH_TLS_KEY and MESH_TLS_CA, or MESH_INSECURE=true in a test"
            )
        return self

    @cached_property
    def merchants_by_id(self) -> dict[str, Merchant]:
        """The merchants of the file, by id.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is malformed, or names a merchant twice.
        """
        text = self.merchants.read_text()
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ValueError(f"MESH_MERCHANTS: {self.merchants} is no JSON: {error}") from error
        listed = _MerchantsFile.model_validate(given)
        by_id = {merchant.id: merchant for merchant in listed.merchants}
        if len(by_id) != len(listed.merchants):
            raise ValueError(f"{self.merchants} names a merchant twice")
        return by_id


class DatabaseSettings(ServiceSettings):
    """The settings of a service that has a database of its own."""

    database_url: SecretStr
    """The service's own database, `postgresql://role:password@host:port/database`."""

    database_pool_max: int = Field(default=10, ge=1, le=200)
    """Connections to the database at the most."""

    @field_validator("database_url")
    @classmethod
    def _is_postgresql(cls, value: SecretStr) -> SecretStr:
        if not value.get_secret_value().startswith(("postgresql://", "postgres://")):
            raise ValueError("must begin with postgresql://")
        return value

    @model_validator(mode="after")
    def _has_a_broker(self) -> DatabaseSettings:
        # What is written to a database is told to others, so there must be a way.
        if not self.broker_url.get_secret_value().startswith(_BROKERS):
            raise ValueError("MESH_BROKER_URL must begin with amqp://, amqps:// or postgresql://")
        return self
