"""What meshctl reads from a command line, and how it words what it found."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from meshctl.cli import _without_password, cli
from meshctl.client import CallError, Target, target
from meshctl.console import plain_table
from meshctl.processes import MeshError, ProcessFailedError, checkout, exit_words, last_lines
from meshctl.resources import _line, amount_words, money
from meshctl.session import Duration, merchant_of, resource_name
from tests.eventually import soon

ORDER = "0199f3d2-8c1e-7c3a-9b51-1f0f6c3e2a77"


@pytest.mark.parametrize(
    ("amount", "currency", "minor_units"),
    [
        ("12.50", "EUR", "1250"),
        ("12.5", "EUR", "1250"),
        ("0.07", "EUR", "7"),
        ("1250", "JPY", "1250"),
        ("1.234", "KWD", "1234"),
        ("0", "USD", "0"),
        ("9999999999999.99", "EUR", "999999999999999"),
    ],
)
def test_an_amount_is_read_exactly(amount: str, currency: str, minor_units: str) -> None:
    """In the currency's own decimals, without a float in between."""
    assert money(amount, currency) == {"currencyCode": currency, "minorUnits": minor_units}


@pytest.mark.parametrize(
    ("amount", "currency"),
    [
        ("12.505", "EUR"),
        ("1.5", "JPY"),
        ("twelve", "EUR"),
        ("1", "XXZ"),
        ("1e40", "EUR"),
        ("NaN", "EUR"),
        ("Infinity", "EUR"),
    ],
)
def test_what_is_no_amount_is_refused_in_words(amount: str, currency: str) -> None:
    """Rounding is not meshctl's to do."""
    with pytest.raises(click.BadParameter):
        money(amount, currency)


def test_a_line_holds_sku_quantity_price_and_a_title_with_colons() -> None:
    """Only the first three colons divide."""
    assert _line("TEA-001:2:12.50:Tea: black", "EUR") == {
        "sku": "TEA-001",
        "quantity": 2,
        "unitPrice": {"currencyCode": "EUR", "minorUnits": "1250"},
        "title": "Tea: black",
    }


@pytest.mark.parametrize("given", ["TEA-001", "TEA-001:two:1", "TEA-001:-1:1", "TEA-001:1"])
def test_a_malformed_line_is_refused_in_words(given: str) -> None:
    """The message shows the form."""
    with pytest.raises(click.BadParameter, match="SKU:QTY:PRICE"):
        _line(given, "EUR")


def test_amounts_are_worded_in_the_currency_s_decimals() -> None:
    """Zero is left out of the API's JSON by gRPC, and an amount all the same."""
    assert amount_words({"currencyCode": "EUR", "minorUnits": "1250"}) == "12.50 EUR"
    assert amount_words({"currencyCode": "JPY", "minorUnits": 1250}) == "1250 JPY"
    assert amount_words({"currencyCode": "EUR"}) == "0.00 EUR"
    assert amount_words(None) == ""


@pytest.mark.parametrize(
    "given",
    [
        ORDER,
        f"merchants/acme/orders/{ORDER}",
        f"/v1/merchants/acme/orders/{ORDER}",
        f"v1/merchants/acme/orders/{ORDER}",
    ],
)
def test_an_order_is_named_by_its_id_or_its_full_name(given: str) -> None:
    """As it stands in a list, in an answer, or in a URL."""
    name = resource_name("orders", "acme", given)
    assert name == f"merchants/acme/orders/{ORDER}"
    assert merchant_of(name, "default") == "acme"


@pytest.mark.parametrize("given", ["", "42", "merchants/acme/payments/" + ORDER, "../secrets"])
def test_what_names_no_order_is_refused(given: str) -> None:
    """Before anything is called."""
    with pytest.raises(click.BadParameter):
        resource_name("orders", "default", given)


def test_durations_are_read_with_their_unit() -> None:
    """Seconds, minutes, hours, days; nothing without a unit."""
    duration = Duration()
    assert [duration.convert(text, None, None) for text in ("90s", "15m", "12h", "2d")] == [
        90,
        900,
        43_200,
        172_800,
    ]
    with pytest.raises(click.BadParameter):
        duration.convert("12", None, None)


def test_a_refusal_says_code_reason_and_the_fields_at_fault() -> None:
    """What the edge answers in JSON, worded for a person."""
    body = {
        "code": 3,
        "message": "two fields are wrong",
        "details": [
            {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "INVALID_FIELD"},
            {
                "@type": "type.googleapis.com/google.rpc.BadRequest",
                "fieldViolations": [
                    {"field": "order.lines", "description": "at least one"},
                    {"field": "order.customer", "description": "is required"},
                ],
            },
        ],
    }
    error = CallError(400, json.dumps(body).encode())
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert str(error).splitlines() == [
        "INVALID_ARGUMENT (INVALID_FIELD): two fields are wrong",
        "  order.lines: at least one",
        "  order.customer: is required",
    ]


def test_a_refusal_that_is_no_json_is_told_as_it_is() -> None:
    """Something else may listen on the port."""
    assert "not a mesh" in str(CallError(502, b"<h1>not a mesh</h1>"))


def test_a_table_is_aligned_and_its_cells_may_have_several_lines() -> None:
    """Plain text for logs and pipes."""
    assert plain_table(["a", "bb"], [["long cell", "x"], ["y", "one\ntwo"]]) == [
        "a          bb",
        "long cell  x",
        "y          one",
        "           two",
    ]


def test_a_failure_tells_the_end_of_a_json_log_in_words(tmp_path: Path) -> None:
    """A traceback in one line of JSON is told by its last line."""
    log = tmp_path / "order.log"
    entry = {"event": "failed", "level": "error", "exception": "Traceback\n  x\nValueError: no"}
    log.write_text(f"plain words\n{json.dumps(entry)}\n")
    message = str(ProcessFailedError("order", f"ended with {exit_words(1)}", log))
    assert message.startswith(f"order ended with exit code 1; its log ({log}) ends with:")
    assert "plain words" in message
    assert "error failed\n        ValueError: no" in message
    assert "Traceback" not in message


def test_the_last_lines_of_a_log_are_those_that_were_written_last(tmp_path: Path) -> None:
    """However long the log is; a missing one has none."""
    log = tmp_path / "log"
    log.write_text("".join(f"line {number}\n" for number in range(10_000)))
    assert last_lines(log, 2) == ["line 9998", "line 9999"]
    assert last_lines(tmp_path / "missing") == []


def test_a_signal_is_named() -> None:
    """Minus nine means little to most people."""
    assert exit_words(-9) == "SIGKILL"
    assert exit_words(3) == "exit code 3"


def test_a_broker_s_password_is_not_shown() -> None:
    """`meshctl status --json` is for pasting into reports."""
    assert (
        _without_password("amqp://mesh:secret@127.0.0.1:5672/mesh")
        == "amqp://mesh:***@127.0.0.1:5672/mesh"
    )
    assert _without_password("amqp://127.0.0.1/") == "amqp://127.0.0.1/"


def _commands(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    for name, command in group.commands.items():
        inner = (*path, name)
        found += _commands(command, inner) if isinstance(command, click.Group) else [inner]
    return found


@pytest.mark.parametrize("path", _commands(cli), ids=" ".join)
def test_every_command_explains_itself_and_its_exit_codes(path: tuple[str, ...]) -> None:
    """--help everywhere, and the state folder can be picked on every leaf."""
    shown = CliRunner().invoke(cli, [*path, "--help"])
    assert shown.exit_code == 0
    assert "Exit codes:" in shown.output
    leaf: click.Command = cli
    for name in path:
        assert isinstance(leaf, click.Group)
        leaf = leaf.commands[name]
    # A demo has a folder of its own, and credentials are for machines without one.
    if not isinstance(leaf, click.Group) and path not in {("demo",), ("credentials",)}:
        assert "--state" in shown.output


@pytest.mark.parametrize("path", _commands(cli), ids=" ".join)
def test_every_command_that_answers_can_answer_as_json(path: tuple[str, ...]) -> None:
    """Logs are lines as they were written; credentials print a word for a container's log."""
    leaf: click.Command = cli
    for name in path:
        assert isinstance(leaf, click.Group)
        leaf = leaf.commands[name]
    if not isinstance(leaf, click.Group) and path not in {("logs",), ("credentials",)}:
        assert "--json" in CliRunner().invoke(cli, [*path, "--help"]).output


def test_what_the_system_refuses_is_told_in_a_line(tmp_path: Path) -> None:
    """A file in the way, a full disk: no traceback."""
    (tmp_path / "file").touch()
    done = CliRunner().invoke(cli, ["credentials", str(tmp_path / "file" / "tls")])
    assert done.exit_code == 1
    assert done.output.startswith("error: ")
    assert "Not a directory" in done.output


def test_an_old_ca_in_the_environment_is_told_with_what_sets_it_anew(tmp_path: Path) -> None:
    """The state folder that `meshctl env` named may be gone."""
    gone = Target("https://localhost:8443", tmp_path / "ca.pem", "", None)
    with pytest.raises(MeshError, match="cannot read the CA") as refused:
        gone.tls()
    assert "meshctl env" in refused.value.hint


@pytest.mark.parametrize("url", ["localhost:8443", "http://localhost:8443", "https://x:port"])
def test_a_url_that_is_no_edge_s_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of calling port 443 of this machine."""
    monkeypatch.delenv("MESH_STATE", raising=False)
    monkeypatch.setenv("MESH_URL", url)
    monkeypatch.setenv("MESH_TOKEN", "t")
    with pytest.raises(MeshError, match="not the URL of an edge"):
        target(None)


def test_following_logs_ends_with_its_reader(tmp_path: Path) -> None:
    """`meshctl logs -f | head` does not run on unheard."""
    log = tmp_path / "events.log"
    log.write_text("first\n")
    argv = [sys.executable, "-m", "meshctl", "logs", "supervisor", "-f", "--state", str(tmp_path)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=checkout()) as following:
        assert following.stdout is not None
        assert following.stdout.readline() == b"first\n"
        following.stdout.close()

        def ends_when_there_is_more_to_say() -> bool:
            with log.open("a") as file:
                file.write("another\n")
            return following.poll() is not None

        try:
            soon(ends_when_there_is_more_to_say, describe="nobody reads, so it ends")
        finally:
            following.kill()


@pytest.mark.parametrize("command", ["status", "env", "down"])
def test_without_a_mesh_commands_exit_3_and_say_how_to_start_one(
    command: str, tmp_path: Path
) -> None:
    """Exit code 3 means: no mesh is up here."""
    done = CliRunner().invoke(cli, [command, "--state", str(tmp_path / "none")])
    assert done.exit_code == 3
    assert "meshctl up" in done.output
    assert not (tmp_path / "none").exists()


def test_a_program_that_asks_for_the_status_of_no_mesh_gets_json_and_exit_code_3(
    tmp_path: Path,
) -> None:
    """The same shape as of a running one."""
    done = CliRunner().invoke(cli, ["status", "--json", "--state", str(tmp_path / "none")])
    assert done.exit_code == 3
    assert json.loads(done.output) == {"state": "stopped", "url": None, "processes": []}
