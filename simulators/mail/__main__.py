"""`python -m simulators.mail`: runs the mail sink until it is told to stop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path

import click

from simulators.mail.mailbox import Mailbox
from simulators.mail.sink import SIZE_MAX_BYTES, Sink, serve


class Address(click.ParamType[tuple[str, int]]):
    """`host:port`; an IPv6 host stands in brackets."""

    name = "host:port"

    def convert(
        self,
        value: str | tuple[str, int],
        param: click.Parameter | None,
        ctx: click.Context | None,
    ) -> tuple[str, int]:
        """Splits the address, or fails as click does, naming the option."""
        if isinstance(value, tuple):
            return value
        host, _, port = value.rpartition(":")
        if not host or not port.isdecimal() or int(port) > 65535:
            self.fail(f"{value!r} is not host:port", param, ctx)
        return host.removeprefix("[").removesuffix("]"), int(port)


@click.command(help="Take mail over SMTP and keep each as an .eml file.")
@click.option("--address", type=Address(), required=True, help="Where to listen; port 0: any.")
@click.option(
    "--dir",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where to keep mails; made when missing.",
)
@click.option(
    "--size-max-bytes",
    type=click.IntRange(min=1),
    default=SIZE_MAX_BYTES,
    show_default=True,
    help="Refuse larger mails.",
)
def main(address: tuple[str, int], directory: Path, size_max_bytes: int) -> None:
    """Serves until SIGTERM or SIGINT; says so in one line of JSON when it is ready."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    try:
        asyncio.run(run(address, directory.resolve(), size_max_bytes))
    except OSError as error:
        raise click.ClickException(str(error)) from error


async def run(address: tuple[str, int], directory: Path, size_max_bytes: int) -> None:
    """Serves at the address until a signal comes.

    Raises:
        OSError: The folder cannot be made, or the address is taken.
    """
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    sink = Sink(Mailbox(directory), now=lambda: datetime.now(UTC))
    async with serve(sink, *address, size_max_bytes=size_max_bytes) as (host, port):
        ready = {
            "event": "ready",
            "address": f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            "dir": str(directory),
            "pid": os.getpid(),
        }
        click.echo(json.dumps(ready))
        await stopping.wait()


if __name__ == "__main__":
    main()
