"""Fills the template."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import jinja2
from edge_errors import RETRY_SECONDS, edge_errors
from edge_routes import (
    INTERNAL_CALLS,
    REFLECTION,
    ROLES,
    query_over_path,
    roles_expression,
    services_in,
)
from edge_settings import Place, Settings, SettingsError

HERE = Path(__file__).resolve().parent
TEMPLATE = HERE / "envoy.yaml.j2"
DESCRIPTOR = HERE.parent / "generated" / "ordermesh.binpb"

SUBJECTS_PER_ADDRESS = 10
"""How many times a subject's limit one address may take: callers behind one address
are many, and who sends no valid token is held back as well."""


def render(place: Place, settings: Settings, descriptor: Path) -> str:
    """Envoy's configuration as YAML.

    Args:
        place: Where it is going to run.
        settings: What differs from one edge to the next.
        descriptor: The descriptor set to derive routes from. Envoy reads
            `settings.descriptor`, which may be a path inside a container.

    Raises:
        DescriptorError: The descriptor set does not fit.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # YAML, not HTML; every value goes through `q`, which quotes it as JSON.
        autoescape=False,  # noqa: S701
    )
    environment.filters["q"] = lambda value: json.dumps(value, ensure_ascii=True)
    environment.filters["seconds"] = lambda value: f"{value:g}s"
    services = services_in(descriptor)
    over_path = query_over_path(services)
    return environment.get_template(TEMPLATE.name).render(
        place=place,
        settings=settings,
        services=services,
        query_over_path=over_path,
        reflection=REFLECTION if settings.reflection else (),
        internal_calls=INTERNAL_CALLS,
        roles=ROLES,
        roles_expression=roles_expression(),
        errors=edge_errors(settings.limits, over_path),
        retry_seconds=RETRY_SECONDS,
        subjects_per_address=SUBJECTS_PER_ADDRESS,
    )


def committed_settings(place: Place) -> dict[str, object]:
    """The settings that are kept in the repository for a place, as JSON.

    Raises:
        SettingsError: There are none: the embedded mesh makes its own at each start.
    """
    path = HERE / "places" / f"{place.name}.json"
    if not path.exists():
        raise SettingsError("--settings: needed, the repository holds none for this place")
    document = json.loads(path.read_text())
    if not isinstance(document, dict):
        raise SettingsError("settings: must be an object")
    return document


def write(path: Path, text: str) -> None:
    """Writes a file in one step, readable by its owner alone."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        # A device or a pipe is written to, not replaced.
        path.write_text(text)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
