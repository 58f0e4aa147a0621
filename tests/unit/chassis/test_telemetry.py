"""Probes, metrics and logs of a process."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import structlog

from chassis.context import CallContext, Caller, entered
from chassis.settings import ServiceSettings
from chassis.telemetry import HealthServer, configure_logs, configure_tracing

CALL = CallContext(
    correlation_id="corr-1",
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    caller=Caller(merchant="default", subject="ada"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[HealthServer]:
    """A server on a free port."""
    server = HealthServer("127.0.0.1:0")
    yield server
    server.close()


@pytest.fixture
def health(server: HealthServer) -> HealthServer:
    """The server of a process that is starting."""
    server.not_ready = "starting"
    return server


def asked(server: HealthServer, path: str) -> tuple[int, str]:
    """Status and body of an answer."""
    try:
        with urlopen(f"http://127.0.0.1:{server.port}{path}", timeout=5) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_a_process_lives_as_soon_as_it_answers(health: HealthServer) -> None:
    """Starting is no reason to be killed."""
    assert asked(health, "/livez") == (200, "alive\n")


def test_a_process_is_ready_when_it_says_so(health: HealthServer) -> None:
    """Until then, and after, the reason is told."""
    assert asked(health, "/readyz") == (503, "starting\n")
    health.not_ready = None
    assert asked(health, "/readyz") == (200, "ready\n")
    health.not_ready = "database: UnavailableError: away"
    assert asked(health, "/readyz") == (503, "database: UnavailableError: away\n")


def test_metrics_are_there_for_scrapers(health: HealthServer) -> None:
    """In Prometheus' own format."""
    status, body = asked(health, "/metrics")
    assert status == 200
    assert "# TYPE python_info gauge" in body


def test_who_connects_and_says_nothing_keeps_no_one_waiting(health: HealthServer) -> None:
    """Else one scraper that hangs would make a living process look dead."""
    with socket.create_connection(("127.0.0.1", health.port)):
        began = time.monotonic()
        assert asked(health, "/livez") == (200, "alive\n")
        assert time.monotonic() - began < 2


def test_other_paths_say_which_there_are(health: HealthServer) -> None:
    """Nothing else is served here."""
    status, body = asked(health, "/")
    assert status == 404
    assert "/livez" in body


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[ServiceSettings]:
    """Settings of a test; logging is as before afterwards."""
    monkeypatch.setenv("MESH_INSECURE", "true")
    monkeypatch.setenv("MESH_PAGE_TOKEN_KEY", "secret")
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield ServiceSettings(merchants=Path("unread.json"))
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.reset_defaults()


def test_a_log_line_says_whose_and_what_it_belongs_to(
    settings: ServiceSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """One JSON object a line, with correlation and trace ids of what is being handled."""
    configure_logs(settings, "order")
    with entered(CALL):
        structlog.get_logger("anything").info("done", orders=3)
    line = json.loads(capsys.readouterr().out)
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "done",
        "level": "info",
        "orders": 3,
        "service": "order",
        "correlation_id": "corr-1",
        "trace_id": "0af7651916cd43dd8448eb211c80319c",
        "merchant": "default",
    }


def test_libraries_log_in_the_same_form_and_only_what_matters(
    settings: ServiceSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their chatter is not ours to keep."""
    configure_logs(settings, "order")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("trouble")
    line = json.loads(capsys.readouterr().out)
    assert (line["event"], line["logger"], line["service"]) == ("trouble", "some.library", "order")


def test_an_error_is_logged_with_its_traceback_on_one_line(
    settings: ServiceSettings, capsys: pytest.CaptureFixture[str]
) -> None:
    """Programs read lines."""
    configure_logs(settings, "order")
    try:
        raise ZeroDivisionError("by zero")
    except ZeroDivisionError as error:
        structlog.get_logger("anything").error("failed", exc_info=error)
    (raw,) = capsys.readouterr().out.splitlines()
    assert "ZeroDivisionError: by zero" in json.loads(raw)["exception"]


def test_without_an_endpoint_nothing_is_traced(settings: ServiceSettings) -> None:
    """And ending it costs nothing."""
    configure_tracing(settings, "order")()
