"""Settings: read from the environment alone, and checked before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from chassis.settings import DatabaseSettings, ServiceSettings

URL = "postgresql://order:secret@127.0.0.1:5432/order"


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """An environment that is enough to start."""
    file = tmp_path / "merchants.json"
    file.write_text(json.dumps({"merchants": [merchant()]}))
    monkeypatch.setenv("MESH_MERCHANTS", str(file))
    monkeypatch.setenv("MESH_INSECURE", "true")
    monkeypatch.setenv("MESH_DATABASE_URL", URL)
    monkeypatch.setenv("MESH_BROKER_URL", "memory://test")
    monkeypatch.setenv("MESH_PAGE_TOKEN_KEY", "secret")
    return monkeypatch


def merchant(**changes: str) -> dict[str, str]:
    """A merchant as the file holds one."""
    return {
        "id": "default",
        "name": "Default",
        "email": "merchant@default.example",
        "settlement_currency": "EUR",
        **changes,
    }


def write(path: Path, *merchants: object) -> None:
    """Writes a file of merchants."""
    path.write_text(json.dumps({"merchants": merchants}))


def test_what_is_not_set_has_its_documented_default(environment: pytest.MonkeyPatch) -> None:
    """Ports are free ones, reflection is on, nothing is traced."""
    settings = ServiceSettings()
    assert (settings.grpc_address, settings.http_address) == ("127.0.0.1:0", "127.0.0.1:0")
    assert (settings.reflection, settings.otlp_endpoint) == (True, "")
    assert (settings.drain_seconds, settings.grace_seconds) == (3.0, 10.0)
    assert settings.merchants_by_id["default"].capture_method == "automatic"


def test_every_setting_says_what_it_is_for() -> None:
    """The generated table has no empty cell."""
    for name, field in DatabaseSettings.model_fields.items():
        assert field.description, name


def test_secrets_are_not_printed(environment: pytest.MonkeyPatch) -> None:
    """Neither by repr nor in a dump."""
    environment.setenv("MESH_PAGE_TOKEN_KEY", "topsecret")
    settings = DatabaseSettings()
    assert "secret@" not in repr(settings)
    assert "topsecret" not in str(settings.model_dump())
    assert settings.database_url.get_secret_value() == URL


def refused() -> str:
    """What is said of an environment that is not right."""
    with pytest.raises(ValidationError) as caught:
        DatabaseSettings()
    return str(caught.value)


def test_a_missing_variable_is_named(environment: pytest.MonkeyPatch) -> None:
    """By the name by which it is to be set."""
    environment.delenv("MESH_DATABASE_URL")
    assert "database_url" in refused().lower()


def test_a_database_of_another_kind_is_refused(environment: pytest.MonkeyPatch) -> None:
    """And its password is not repeated."""
    environment.setenv("MESH_DATABASE_URL", "mysql://order:secret@host/order")
    said = refused()
    assert "must begin with postgresql://" in said
    assert "order:secret" not in said


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MESH_LOG_LEVEL", "loud"),
        ("MESH_LOG_FORMAT", "xml"),
        ("MESH_DRAIN_SECONDS", "-1"),
        ("MESH_GRACE_SECONDS", "never"),
        ("MESH_CONCURRENCY_MAX", "0"),
        ("MESH_DATABASE_POOL_MAX", "0"),
        ("MESH_INSECURE", "perhaps"),
        ("MESH_GRPC_ADDRESS", "localhost"),
        ("MESH_HTTP_ADDRESS", "8080"),
    ],
)
def test_a_value_out_of_bounds_is_refused(
    environment: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """With the setting's name."""
    environment.setenv(name, value)
    assert name.removeprefix("MESH_").lower() in refused().lower()


def test_without_certificates_a_process_refuses_to_start(
    environment: pytest.MonkeyPatch,
) -> None:
    """Insecure is something that one has to say."""
    environment.delenv("MESH_INSECURE")
    assert "MESH_INSECURE=true" in refused()


def test_certificate_key_and_authority_go_together(environment: pytest.MonkeyPatch) -> None:
    """Half of them would be no TLS at all."""
    environment.setenv("MESH_TLS_CERT", "/somewhere/cert.pem")
    assert "go together" in refused()


@pytest.mark.parametrize("url", ["", "kafka://host"])
def test_a_broker_that_nobody_speaks_is_refused_at_start(
    environment: pytest.MonkeyPatch, url: str
) -> None:
    """Not at the first event."""
    environment.setenv("MESH_BROKER_URL", url)
    assert "MESH_BROKER_URL" in refused()


def test_settings_do_not_change_after_start(environment: pytest.MonkeyPatch) -> None:
    """A process is what it was started as."""
    with pytest.raises(ValidationError):
        setattr(ServiceSettings(), "log_level", "debug")  # noqa: B010 - mypy knows it already


BAD_FILES: dict[str, list[object]] = {
    "nobody": [],
    "twice the same": [merchant(), merchant()],
    "an id that is no name": [merchant(id="Default Shop")],
    "no mail": [merchant(email="")],
    "a mail address without its server": [merchant(email="shop")],
    "a mail address that no server takes": [merchant(email="grüße@shop.example")],
    "a locale that is no language tag": [merchant(locale="de_DE")],
    "a currency that is none": [merchant(settlement_currency="euro")],
    "a currency that nobody knows": [merchant(settlement_currency="XXX")],
    "a capture method that is none": [merchant(capture_method="later")],
    "something unknown": [merchant(colour="blue")],
    "no merchant at all": ["default"],
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_malformed_file_of_merchants_is_refused(
    environment: pytest.MonkeyPatch, tmp_path: Path, case: str
) -> None:
    """All of it is checked when the process starts."""
    write(tmp_path / "merchants.json", *BAD_FILES[case])
    with pytest.raises(ValueError, match=r"."):
        _ = ServiceSettings().merchants_by_id


def test_a_file_of_merchants_that_is_no_json_is_refused(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With its name, since the parser knows only lines."""
    (tmp_path / "merchants.json").write_text("merchants: []")
    with pytest.raises(ValueError, match=r"merchants\.json is no JSON"):
        _ = ServiceSettings().merchants_by_id


def test_a_file_of_merchants_that_is_not_there_is_an_error(
    environment: pytest.MonkeyPatch,
) -> None:
    """Never a mesh without merchants."""
    environment.setenv("MESH_MERCHANTS", "/nowhere/merchants.json")
    with pytest.raises(OSError, match="nowhere"):
        _ = ServiceSettings().merchants_by_id
