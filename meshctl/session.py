"""What every command of meshctl shares: which mesh, in which form to answer, and how to fail."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import click

from meshctl.client import Edge, target
from meshctl.console import Console
from meshctl.processes import MeshError
from meshctl.state import StateFolder

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = """\b
Exit codes:
  0  done
  1  something failed, or the mesh refused; the message says what and why
  2  the command line or the machine is not right: an option, a missing package,
     a mesh that is up already
  3  no mesh is up in the state folder
"""


def examples(*lines: str) -> str:
    """Answers the end of a command's help: these command lines, then the exit codes."""
    shown = "".join(f"  {line}\n" for line in lines)
    return f"\b\nExamples:\n{shown}\n{EXIT_CODES}"


_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(slots=True)
class Session:
    """One run of meshctl."""

    console: Console = field(default_factory=Console)
    state_option: str | None = None
    json: bool = False

    @property
    def state(self) -> StateFolder:
        """The state folder that ``--state`` or MESH_STATE picks."""
        return StateFolder.chosen(self.state_option)

    def edge(self, merchant: str) -> Edge:
        """Answers a connection to the edge as this merchant."""
        return Edge(target(self.state_option).as_merchant(merchant))


def session() -> Session:
    """Answers the session of the command that runs."""
    return click.get_current_context().ensure_object(Session)


def _remember_state(_: click.Context, __: click.Parameter, value: str | None) -> None:
    if value is not None:
        session().state_option = value


def _remember_json(_: click.Context, __: click.Parameter, value: bool) -> None:
    if value:
        session().json = True


state_option = click.option(
    "--state",
    metavar="DIR",
    expose_value=False,
    is_eager=True,
    callback=_remember_state,
    help="State folder of the mesh; else $MESH_STATE, else ./.mesh.",
)

json_option = click.option(
    "--json",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_remember_json,
    help="Answer as JSON, for programs.",
)


def calls_the_mesh(function: F) -> F:
    """Adds the options of a command that calls the mesh: merchant, state and JSON."""
    merchant = click.option(
        "--merchant", metavar="ID", default="default", show_default=True, help="As which merchant."
    )
    return state_option(json_option(merchant(function)))


def resource_name(collection: str, merchant: str, given: str) -> str:
    """Answers a resource's full name, for a name or a bare id.

    Raises:
        click.BadParameter: It is neither.
    """
    name = given.removeprefix("/").removeprefix("v1/")
    if _UUID.fullmatch(name):
        return f"merchants/{merchant}/{collection}/{name}"
    if re.fullmatch(rf"merchants/[a-z0-9-]+/{collection}/{_UUID.pattern}", name):
        return name
    raise click.BadParameter(f"{given!r} is neither an id (a UUID) nor merchants/…/{collection}/…")


def merchant_of(name: str, default: str) -> str:
    """Answers the merchant that a resource name begins with."""
    parts = name.split("/")
    return parts[1] if len(parts) > 1 and parts[0] == "merchants" else default


class Group(click.Group):
    """A group whose commands fail with words and an exit code, of a `MeshError` or the system."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Answers the commands in the order in which they were written down."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command; an expected failure becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except (MeshError, OSError) as error:
            # The system's own words: a full disk, a file that is not ours.
            told = error if isinstance(error, MeshError) else MeshError(str(error))
            shared = ctx.ensure_object(Session)
            shared.console.error(told, as_json=shared.json)
            raise click.exceptions.Exit(told.exit_code) from error


class Duration(click.ParamType[int]):
    """A duration in seconds, written as ``90s``, ``15m``, ``12h`` or ``2d``."""

    name = "duration"
    _UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Reads the duration."""
        if isinstance(value, int):
            return value
        matched = re.fullmatch(r"(\d+)([smhd])", value)
        if matched is None:
            self.fail(f"{value!r} is no duration such as 90s, 15m or 12h", param, ctx)
        return int(matched[1]) * self._UNITS[matched[2]]
