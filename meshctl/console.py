"""What meshctl prints: for people on a terminal, for people in a log, and for programs.

Results go to standard output, progress and errors to standard error, so that a pipe carries the
result alone. Colours and tables with lines are for terminals; elsewhere the same words come plain.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

import click

from meshctl.processes import MeshError, ProcessFailedError

if TYPE_CHECKING:
    from rich.status import Status

_COLOURS = {"good": "green", "warning": "yellow"}


class Console:
    """Where meshctl's words go."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._broken = False
        self._busy: Status | None = None

    @property
    def unheard(self) -> bool:
        """Tells whether whoever read what we print has gone, such as `head`."""
        return self._broken

    @contextmanager
    def busy(self, text: str) -> Iterator[None]:
        """Shows on a terminal, below everything else, what is being waited for."""
        if not sys.stderr.isatty():
            yield
            return
        from rich.console import Console as RichConsole

        with RichConsole(stderr=True, highlight=False).status(text) as status:
            self._busy = status
            try:
                yield
            finally:
                self._busy = None

    def busy_with(self, text: str) -> None:
        """Changes what `busy` shows."""
        if self._busy is not None:
            self._busy.update(text)

    def say(self, text: str, level: str = "progress") -> None:
        """Prints a line of progress, with the seconds since the start."""
        seconds = click.style(f"{time.monotonic() - self._began:7.2f} s", dim=True)
        colour = _COLOURS.get(level)
        self._write(f"{seconds}  {click.style(text, fg=colour) if colour else text}", sys.stderr)

    def note(self, text: str) -> None:
        """Prints a plain line beside the result."""
        self._write(text, sys.stderr)

    def result(self, text: str) -> None:
        """Prints a result for people."""
        self._write(text, sys.stdout)

    def json(self, value: Any) -> None:
        """Prints a result for programs."""
        self._write(json.dumps(value, indent=2, ensure_ascii=False), sys.stdout)

    def error(self, error: MeshError, *, as_json: bool = False) -> None:
        """Says what went wrong, what it wrote last, and what to do."""
        if as_json:
            words = json.dumps(error_as_json(error), indent=2, ensure_ascii=False)
            self._write(words, sys.stderr)
            return
        self._write(f"{click.style('error:', fg='red', bold=True)} {error}", sys.stderr)
        if error.hint:
            self._write(f"  {error.hint}", sys.stderr)

    def table(self, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table: with lines and colours on a terminal, aligned columns elsewhere."""
        if sys.stdout.isatty():
            from rich import box
            from rich.console import Console as RichConsole
            from rich.table import Table
            from rich.text import Text

            many_lines = any("\n" in cell for row in rows for cell in row)
            table = Table(
                box=box.HORIZONTALS if many_lines else box.SIMPLE,
                show_lines=many_lines,
                padding=(0, 1, 0, 0),
                pad_edge=False,
            )
            for heading in headings:
                table.add_column(heading, overflow="fold")
            for row in rows:
                table.add_row(*(Text(cell, style=_cell_style(cell)) for cell in row))
            RichConsole().print(table)
            return
        for line in plain_table(headings, rows):
            self._write(line, sys.stdout)

    def _write(self, text: str, stream: IO[str]) -> None:
        # The terminal may go away under a mesh that runs on until it is told to stop.
        if self._broken:
            return
        try:
            if self._busy is not None and stream is sys.stderr:
                from rich.text import Text

                self._busy.console.print(Text.from_ansi(text), soft_wrap=True)
            else:
                click.echo(text, file=stream)
        except OSError:
            self._broken = True


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lays out a table as aligned text; a cell may hold several lines."""
    split = [[cell.split("\n") for cell in row] for row in [headings, *rows]]
    widths = [
        max(len(line) for row in split for line in row[column]) for column in range(len(headings))
    ]
    lines = []
    for row in split:
        for index in range(max(len(cell) for cell in row)):
            cells = [cell[index] if index < len(cell) else "" for cell in row]
            padded = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            lines.append("  ".join(padded).rstrip())
    return lines


def error_as_json(error: MeshError) -> dict[str, Any]:
    """Answers an error for programs."""
    answer: dict[str, Any] = {"error": str(error), "hint": error.hint, "exit_code": error.exit_code}
    if isinstance(error, ProcessFailedError):
        answer["process"] = error.process_name
        answer["log"] = str(error.log)
    return answer


def _cell_style(cell: str) -> str:
    word = (cell.split() or [""])[0]
    if word in {"healthy", "CONFIRMED", "PAID", "CAPTURED", "SENT", "COMPLETED", "ok"}:
        return "green"
    if word in {"FAILED", "unhealthy", "DEAD", "differs"}:
        return "red"
    if word in {"restarting", "starting", "CANCELLED", "CANCELLING", "REFUNDED"}:
        return "yellow"
    return ""
