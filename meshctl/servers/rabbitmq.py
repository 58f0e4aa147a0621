"""RabbitMQ from the system's package, as a private node with an epmd of its own."""

from __future__ import annotations

import asyncio
import secrets
import shutil
from pathlib import Path

from meshctl.processes import (
    Command,
    MeshError,
    MissingProgramError,
    NotReadyError,
    base_environment,
    port_answers,
)
from meshctl.servers.base import Identity, unprivileged

_RABBITMQ_SCRIPTS = Path("/usr/lib/rabbitmq/bin")


class Epmd:
    """Erlang's port mapper, run by us in the foreground so that it ends with the broker.

    RabbitMQ would otherwise start one that detaches and stays behind.
    """

    name = "epmd"
    ready_within_seconds = 10.0

    def __init__(self, folder: Path, *, port: int) -> None:
        """Describes a port mapper of our own on a loopback port."""
        self.folder = folder
        self.port = port

    async def prepare(self) -> None:
        """Makes the folder.

        Raises:
            MissingProgramError: Erlang is not installed.
        """
        require_rabbitmq()
        self.folder.mkdir(parents=True, exist_ok=True)

    def command(self) -> Command:
        """Answers the foreground command."""
        return Command(
            name=self.name,
            argv=("epmd", "-address", "127.0.0.1", "-port", str(self.port)),
            directory=self.folder,
            log=self.folder / "epmd.log",
            grace_seconds=2.0,
        )

    async def ready(self) -> None:
        """Accepts connections."""
        await port_answers(self.port)


class RabbitMQ:
    """A private RabbitMQ node from the system's package: own name, own epmd, loopback only."""

    name = "rabbitmq"
    ready_within_seconds = 60.0
    vhost = "mesh"
    user = "mesh"

    def __init__(
        self,
        folder: Path,
        *,
        port: int,
        epmd_port: int,
        distribution_port: int,
        password: str,
    ) -> None:
        """Describes a node.

        Args:
            folder: Holds its data, configuration and logs.
            port: Loopback port for AMQP.
            epmd_port: Where its `Epmd` listens.
            distribution_port: Loopback port for Erlang's own protocol (rabbitmqctl).
            password: Of the user `mesh`.
        """
        self.folder = folder
        self.port = port
        self.epmd_port = epmd_port
        self.distribution_port = distribution_port
        self.password = password

    def url(self, vhost: str = "") -> str:
        """Answers the ``amqp://`` URL of a virtual host, of `mesh` when none is named."""
        return f"amqp://{self.user}:{self.password}@127.0.0.1:{self.port}/{vhost or self.vhost}"

    async def prepare(self) -> None:
        """Writes the configuration.

        Raises:
            MissingProgramError: RabbitMQ is not installed.
        """
        require_rabbitmq()
        own = self.folder / "node"
        own.mkdir(parents=True, exist_ok=True)
        configuration = own / "rabbitmq.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            f"listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            f"default_user = {self.user}\ndefault_pass = {self.password}\n"
            f"default_vhost = {self.vhost}\n"
            "default_user_tags.administrator = true\n"
            "vm_memory_high_watermark.absolute = 512MB\n"
            "disk_free_limit.absolute = 100MB\n"
            "log.console = true\nlog.console.level = warning\nlog.file = false\n"
        )
        (own / "enabled_plugins").write_text("[].\n")
        cookie = own / ".erlang.cookie"
        if not cookie.exists():
            cookie.write_text(secrets.token_hex(20))
            cookie.chmod(0o400)
        self._identity().adopt(own)

    def environment(self) -> dict[str, str]:
        """Answers the variables for the node and for ``rabbitmqctl`` beside it."""
        own = self.folder / "node"
        beam = "+S 2:2 +sbwt none +sbwtdcpu none +sbwtdio none -start_epmd false"
        return {
            "HOME": str(own),
            "RABBITMQ_NODENAME": "mesh@localhost",
            "RABBITMQ_MNESIA_BASE": str(own / "mnesia"),
            "RABBITMQ_LOG_BASE": str(own / "log"),
            "RABBITMQ_CONFIG_FILE": str(own / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(own / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(own / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_PID_FILE": str(own / "pid"),
            "RABBITMQ_DIST_PORT": str(self.distribution_port),
            "ERL_EPMD_PORT": str(self.epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": (
                f"{beam} -kernel inet_dist_use_interface {{127,0,0,1}}"
            ),
            # Together: the script becomes the node instead of waiting for it, without a shell
            # on standard input.
            "RABBITMQ_ALLOW_INPUT": "1",
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
        }

    def command(self) -> Command:
        """Answers the command, which bypasses Debian's wrapper that wants to be root."""
        return Command(
            name=self.name,
            argv=(str(_RABBITMQ_SCRIPTS / "rabbitmq-server"),),
            directory=self.folder / "node",
            log=self.folder / "rabbitmq.log",
            environment=self.environment(),
            identity=self._identity().prefix,
            grace_seconds=15.0,
        )

    async def ready(self) -> None:
        """The node speaks AMQP: it answers our protocol header with Connection.Start."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError as error:
            raise NotReadyError(str(error)) from error
        try:
            writer.write(b"AMQP\x00\x00\x09\x01")
            async with asyncio.timeout(3.0):
                frame = await reader.readexactly(11)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            raise NotReadyError(f"AMQP: {error!r}") from error
        finally:
            writer.close()
        if frame[:1] != b"\x01" or frame[7:11] != b"\x00\x0a\x00\x0a":
            raise NotReadyError(f"AMQP: {frame!r}")

    async def ctl(self, *arguments: str) -> str:
        """Runs ``rabbitmqctl`` against this node and answers what it printed.

        Raises:
            MeshError: It failed; the message is what it said.
        """
        process = await asyncio.create_subprocess_exec(
            *self._identity().prefix,
            str(_RABBITMQ_SCRIPTS / "rabbitmqctl"),
            *arguments,
            cwd=self.folder / "node",
            env=base_environment() | self.environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise MeshError(f"rabbitmqctl {' '.join(arguments)}: {output.decode().strip()}")
        return output.decode()

    def _identity(self) -> Identity:
        # Any program that answers --version will do for the trial; the scripts start a node.
        return unprivileged(Path("/bin/ls"), self.folder)


def require_rabbitmq() -> None:
    """Checks that RabbitMQ and Erlang are installed.

    Raises:
        MissingProgramError: They are not; the message names the package.
    """
    if not (_RABBITMQ_SCRIPTS / "rabbitmq-server").exists() or shutil.which("epmd") is None:
        raise MissingProgramError(
            "RabbitMQ is not installed (package rabbitmq-server)",
            hint="apt install rabbitmq-server, or give --broker-url amqp://… of one that runs",
        )
