"""Writes docs/settings.md from the settings classes, or checks that it is up to date.

`python tools/settings_table.py docs/settings.md` writes it, with `--check` it only
compares and exits 1 on a difference.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from pydantic_settings import BaseSettings

from chassis.settings import ServiceSettings

SERVICES = ("order", "payment", "notify", "rates")

HEAD = """# Settings

Every process is configured by its environment alone, and refuses to start when a
variable is missing or malformed, naming it. The embedded mesh sets all of them by
itself; `.env.example` and `docker-compose.yml` show a set for containers.

This page is generated from the settings classes: `make settings`.

| variable | read by | default | meaning |
|--|--|--|--|
"""


def settings_of(service: str) -> type[BaseSettings]:
    """The settings class of a service: the one its `settings` module defines."""
    module = importlib.import_module(f"{service}_svc.settings")
    (found,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, ServiceSettings)
        and value.__module__ == module.__name__
    )
    return found


def table() -> str:
    """The page."""
    readers: dict[str, list[str]] = {}
    fields: dict[str, Any] = {}
    for service in SERVICES:
        for name, field in settings_of(service).model_fields.items():
            readers.setdefault(name, []).append(service)
            fields.setdefault(name, field)
    rows = []
    for name in sorted(fields):
        field = fields[name]
        if not field.description:
            raise SystemExit(f"{name} has no docstring; say what it means")
        by = "all" if len(readers[name]) == len(SERVICES) else ", ".join(readers[name])
        meaning = " ".join(field.description.split()).replace("|", "\\|")
        rows.append(f"| `MESH_{name.upper()}` | {by} | {default_of(field)} | {meaning} |\n")
    return HEAD + "".join(rows)


def default_of(field: Any) -> str:
    """A field's default, as it stands in the table."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "":
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    asked = parser.parse_args()
    page = table()
    if not asked.check:
        asked.page.write_text(page)
        return 0
    there = asked.page.read_text() if asked.page.exists() else ""
    if there == page:
        return 0
    sys.stderr.writelines(
        difflib.unified_diff(
            there.splitlines(keepends=True), page.splitlines(keepends=True), str(asked.page), "now"
        )
    )
    sys.stderr.write(f"{asked.page} is out of date: run `make settings`\n")
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
