"""docker-compose.yml and the Dockerfile, checked without an engine."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from compose_spec import PyCompose

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
# The parser knows neither merge keys (`<<`) nor variables, so it is given the file with
# both resolved.
RESOLVED = re.sub(
    r"\$\{[A-Z_]+(?::([-?])([^}]*))?\}",
    lambda found: found[2] if found[1] == "-" else "given",
    yaml.safe_dump(COMPOSE),
)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_file_follows_the_compose_specification() -> None:
    """Unknown keys, bad durations and wrong types are refused by the parser."""
    assert sorted(PyCompose.from_yaml(RESOLVED).service_names()) == sorted(SERVICES)


@pytest.mark.parametrize(
    ("right", "wrong", "told"),
    [
        ("interval: 5s", "interval: 5 parsecs", "interval"),
        ("condition: service_healthy", "condition: healthy", "condition|healthy"),
        ("image: ordermesh:local", "imagee: ordermesh:local", "imagee"),
    ],
)
def test_the_parser_would_notice_a_mistake(right: str, wrong: str, told: str) -> None:
    """The check above can fail."""
    assert right in RESOLVED
    with pytest.raises(ValueError, match=told):
        PyCompose.from_yaml(RESOLVED.replace(right, wrong))


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_has_a_health_check(name: str) -> None:
    """Compose can wait for every container, and tell a sick one."""
    assert SERVICES[name]["healthcheck"]["test"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_on_the_one_network(name: str) -> None:
    """Nothing is reachable from outside but the edge's port."""
    assert list(COMPOSE["networks"]) == ["mesh"]
    assert SERVICES[name]["networks"] == ["mesh"]
    assert ("ports" in SERVICES[name]) == (name == "envoy")


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_container_waits_for_exists(name: str) -> None:
    """The parser accepts a dependency on nobody; we do not."""
    assert set(SERVICES[name].get("depends_on", {})) <= set(SERVICES)


def test_the_mesh_is_whole() -> None:
    """The four services, their servers and the edge."""
    assert {
        "order", "payment", "notification", "rates", "postgres", "rabbitmq", "redis", "envoy",
        "mail",
    } <= set(SERVICES)  # fmt: skip


def test_every_variable_stands_in_the_example_environment() -> None:
    """Copying .env.example is all that a first start needs."""
    used = set(re.findall(r"(?<!\$)\$\{([A-Z_]+)", TEXT))
    lines = (ROOT / ".env.example").read_text().splitlines()
    given = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert used == given


def test_every_setting_is_one_that_a_service_reads() -> None:
    """A misspelt variable would be ignored in silence."""
    known = set(re.findall(r"`(MESH_[A-Z_]+)`", (ROOT / "docs" / "settings.md").read_text()))
    used = {
        key
        for service in SERVICES.values()
        for key in service.get("environment", {})
        if key.startswith("MESH_")
    }
    assert used
    assert used <= known


def test_every_mounted_file_is_there() -> None:
    """A missing file would be made by the engine, as an empty folder."""
    mounted = {
        volume.partition(":")[0]
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if volume.startswith("./")
    }
    assert mounted
    assert [path for path in mounted if not (ROOT / path).is_file()] == []


def test_envoy_is_configured_for_these_containers() -> None:
    """The rendering names hosts that are services here, and the ports they listen on."""
    place = json.loads((ROOT / "envoy" / "places" / "compose.json").read_text())
    for service, endpoints in place["upstreams"].items():
        for host, port in endpoints:
            assert host == service
            assert SERVICES[host]["environment"]["MESH_GRPC_ADDRESS"] == f"0.0.0.0:{port}"
    published = SERVICES["envoy"]["ports"][0]
    assert published.endswith(f":{place['edge']['port']}")


def test_the_image_copies_what_exists_and_nothing_is_ignored_that_it_needs() -> None:
    """Each COPY of the Dockerfile has its source, and .dockerignore lets it through."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    let_through = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", dockerfile, re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in let_through
