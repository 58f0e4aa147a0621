"""The settings of one edge: what settings.json may say, and what it must."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass

from edge_routes import SERVICES


class SettingsError(Exception):
    """The settings do not fit; the message is one line and names the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where something listens, or is reached."""

    host: str
    port: int

    @property
    def is_ip(self) -> bool:
        """Whether the host is an IP address and needs no DNS."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return False
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """A certificate with its key, as PEM files that Envoy reads."""

    certificate: str
    key: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one client, or all of them together, may take.

    `per client` is per subject of the token. Before the token is read, an address may take
    ten times as much: behind one address there may be many subjects.
    """

    requests_per_second_per_client: int = 200
    burst_per_client: int = 400
    max_request_bytes: int = 65_536
    max_connections: int = 1024
    max_heap_bytes: int = 536_870_912


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that differs between two running edges of the same kind."""

    edge: Address
    edge_identity: Identity
    edge_hosts: tuple[str, ...]
    edge_trusted_proxies: int
    internal: Address
    internal_identity: Identity
    admin: Address
    metrics: Address | None
    ca: str
    upstream_client: Identity
    upstreams: Mapping[str, tuple[Address, ...]]
    descriptor: str
    jwks: str
    jwt_issuer: str
    jwt_audience: str
    jwt_max_lifetime_seconds: int
    access_log: str
    otlp: Address | None
    limits: Limits
    reflection: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What differs between the three places to run in, whatever the settings say."""

    name: str
    discovery: str
    """How upstreams become hosts: STATIC takes addresses, DNS one host for each address
    behind a name, so that every replica is balanced and checked by itself."""
    reflection: bool
    """Whether reflection is open unless the settings say otherwise."""
    jwt_max_lifetime_seconds: int
    """The longest life of a token that is accepted unless the settings say otherwise."""


PLACES = {
    place.name: place
    for place in (
        Place(
            name="embedded",
            discovery="STATIC",
            reflection=True,
            jwt_max_lifetime_seconds=86_400,
        ),
        Place(
            name="compose",
            discovery="DNS",
            reflection=True,
            jwt_max_lifetime_seconds=86_400,
        ),
        Place(
            name="kubernetes",
            discovery="DNS",
            reflection=False,
            jwt_max_lifetime_seconds=3600,
        ),
    )
}


class _Reader:
    """Takes keys out of a JSON object one by one and names what is wrong with them."""

    def __init__(self, value: object, path: str = "") -> None:
        if not isinstance(value, dict):
            raise SettingsError(f"{path or 'settings'}: must be an object")
        self._values: dict[str, object] = dict(value)
        self._path = path

    def _name(self, key: str) -> str:
        return f"{self._path}.{key}" if self._path else key

    def has(self, key: str) -> bool:
        """Whether the key is given and not null; a null is taken out."""
        if self._values.get(key) is None:
            self._values.pop(key, None)
            return False
        return True

    def take(self, key: str) -> object:
        """The key's value. Raises SettingsError when it is not there."""
        if not self.has(key):
            raise SettingsError(f"{self._name(key)}: missing")
        return self._values.pop(key)

    def text(self, key: str, default: str | None = None) -> str:
        """A string without control characters, not empty."""
        if default is not None and not self.has(key):
            return default
        value = self.take(key)
        if not isinstance(value, str) or not value or re.search(r"[\x00-\x1f\x7f]", value):
            raise SettingsError(f"{self._name(key)}: must be a non-empty string")
        return value

    def number(self, key: str, *, low: int, high: int, default: int | None = None) -> int:
        """A whole number between two bounds, both included."""
        if default is not None and not self.has(key):
            return default
        value = self.take(key)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise SettingsError(f"{self._name(key)}: must be a whole number, {low} to {high}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        if not self.has(key):
            return default
        value = self.take(key)
        if not isinstance(value, bool):
            raise SettingsError(f"{self._name(key)}: must be true or false")
        return value

    def texts(self, key: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """A list of non-empty strings."""
        if not self.has(key):
            return default
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise SettingsError(f"{self._name(key)}: must be a list of strings")
        items = _Reader({str(index): item for index, item in enumerate(value)}, self._name(key))
        return tuple(items.text(str(index)) for index in range(len(value)))

    def inner(self, key: str) -> _Reader:
        """The reader of an object within this one; of an empty one when it is not given."""
        if not self.has(key):
            return _Reader({}, self._name(key))
        return _Reader(self.take(key), self._name(key))

    def address(self) -> Address:
        """The keys host and port of this object."""
        return Address(host=self.text("host"), port=self.number("port", low=1, high=65_535))

    def identity(self) -> Identity:
        """The keys certificate and key of this object."""
        return Identity(certificate=self.text("certificate"), key=self.text("key"))

    def endpoints(self, key: str) -> tuple[Address, ...]:
        """A list of [host, port] pairs, not empty."""
        value = self.take(key)
        if not isinstance(value, list) or not value:
            raise SettingsError(f"{self._name(key)}: must be a list of [host, port]")
        found = []
        for index, pair in enumerate(value):
            name = f"{self._name(key)}[{index}]"
            if not isinstance(pair, list) or len(pair) != 2:
                raise SettingsError(f"{name}: must be [host, port]")
            found.append(_Reader({"host": pair[0], "port": pair[1]}, name).address())
        return tuple(found)

    def finish(self) -> None:
        """Raises SettingsError when a key was given that nobody asked for."""
        if self._values:
            raise SettingsError(f"{self._name(next(iter(self._values)))}: unknown key")


def settings_from(document: object, place: Place) -> Settings:
    """Reads settings.json.

    Raises:
        SettingsError: A key is missing, unknown, or its value does not fit.
    """
    top = _Reader(document)
    edge = top.inner("edge")
    internal = top.inner("internal")
    admin = top.inner("admin")
    client = top.inner("upstream_client")
    upstreams = top.inner("upstreams")
    jwt = top.inner("jwt")
    limits = top.inner("limits")
    metrics = top.inner("metrics") if top.has("metrics") else None
    otlp = top.inner("otlp") if top.has("otlp") else None

    edge_address = edge.address()
    usual = Limits()
    settings = Settings(
        edge=edge_address,
        edge_identity=edge.identity(),
        edge_hosts=edge.texts("hosts", _hosts_of(edge_address)),
        edge_trusted_proxies=edge.number("trusted_proxies", low=0, high=10, default=0),
        internal=internal.address(),
        internal_identity=internal.identity(),
        admin=admin.address(),
        metrics=metrics.address() if metrics else None,
        ca=top.text("ca"),
        upstream_client=client.identity(),
        upstreams={name: upstreams.endpoints(name) for name in SERVICES},
        descriptor=top.text("descriptor"),
        jwks=top.text("jwks"),
        jwt_issuer=jwt.text("issuer"),
        jwt_audience=jwt.text("audience"),
        jwt_max_lifetime_seconds=jwt.number(
            "max_lifetime_seconds", low=60, high=604_800, default=place.jwt_max_lifetime_seconds
        ),
        access_log=top.text("access_log"),
        otlp=otlp.address() if otlp else None,
        limits=Limits(
            requests_per_second_per_client=limits.number(
                "requests_per_second_per_client",
                low=1,
                high=1_000_000,
                default=usual.requests_per_second_per_client,
            ),
            burst_per_client=limits.number(
                "burst_per_client", low=1, high=1_000_000, default=usual.burst_per_client
            ),
            max_request_bytes=limits.number(
                "max_request_bytes", low=1024, high=16_777_216, default=usual.max_request_bytes
            ),
            max_connections=limits.number(
                "max_connections", low=8, high=1_000_000, default=usual.max_connections
            ),
            max_heap_bytes=limits.number(
                "max_heap_bytes", low=67_108_864, high=1 << 40, default=usual.max_heap_bytes
            ),
        ),
        reflection=top.flag("reflection", place.reflection),
    )
    # How many threads run is said on Envoy's command line; the key is for the reader.
    top.number("concurrency", low=1, high=256, default=1)
    for reader in (edge, internal, admin, client, upstreams, jwt, limits, metrics, otlp, top):
        if reader is not None:
            reader.finish()

    if not settings.admin.is_ip or not ipaddress.ip_address(settings.admin.host).is_loopback:
        raise SettingsError("admin.host: must be a loopback address, whoever reaches it owns Envoy")
    for name, address in (("edge", settings.edge), ("internal", settings.internal)):
        if not address.is_ip:
            raise SettingsError(f"{name}.host: must be an IP address to listen on")
    if place.discovery == "STATIC":
        for name, addresses in settings.upstreams.items():
            if not all(address.is_ip for address in addresses):
                raise SettingsError(f"upstreams.{name}: must be IP addresses")
    return settings


def _hosts_of(edge: Address) -> tuple[str, ...]:
    """The names under which an edge at this address answers when none are given."""
    hosts = ["localhost", "127.0.0.1", "[::1]"]
    if edge.is_ip and not ipaddress.ip_address(edge.host).is_unspecified:
        own = f"[{edge.host}]" if ":" in edge.host else edge.host
        if own not in hosts:
            hosts.append(own)
    return tuple(hosts)
