"""The servers under the mesh: started, stopped, killed, and never left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import aio_pika
import asyncpg
import psutil
import pytest
from redis.asyncio import Redis

from meshctl.processes import MeshError, ProcessFailedError, free_port
from meshctl.servers import (
    Postgres,
    RabbitMQ,
    Valkey,
    base,
    start,
    throwaway,
    throwaway_postgres,
    throwaway_valkey,
    unprivileged,
)
from tests.eventually import soon
from tests.integration.meshctl.conftest import CHECKOUT, await_gone

pytestmark = pytest.mark.timeout(120)

AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root has to become somebody else")


@pytest.fixture
def identities(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test narrow how root may become somebody else."""
    unprivileged.cache_clear()
    yield monkeypatch
    unprivileged.cache_clear()


async def test_a_throwaway_postgres_is_empty_and_gone_afterwards() -> None:
    """Version 18, a superuser's URL, and no process left."""
    async with throwaway(Postgres) as held:
        connection = await asyncpg.connect(held.url)
        assert (await connection.fetchval("SHOW server_version")).startswith("18")
        await connection.close()
        pid = held.pid
    assert not psutil.pid_exists(pid)
    assert not held.server.folder.exists()


async def test_a_cache_asks_for_its_password() -> None:
    """Nobody else on the machine reads it."""
    async with throwaway_valkey() as url:
        known: Redis = Redis.from_url(url)
        assert await known.set("a", "b")
        await known.aclose()
        stranger: Redis = Redis.from_url(url.partition(":")[0] + "://" + url.partition("@")[2])
        with pytest.raises(Exception, match=r"(?i)auth"):
            await stranger.get("a")
        await stranger.aclose()


async def test_each_service_gets_a_database_and_no_way_into_another_s(tmp_path: Path) -> None:
    """Roles own their database, cannot connect to others, and passwords are asked for."""
    postgres = Postgres(tmp_path / "pg", port=free_port(), password="super")
    child = await start(postgres)
    try:
        await postgres.ensure_databases({"order": "one", "payment": "two"})
        await postgres.ensure_databases({"order": "one", "payment": "two"})
        await postgres.kept()
        own = await asyncpg.connect(postgres.url("order", role="order", password="one"))
        await own.execute("CREATE TABLE t (id int)")
        assert await own.fetchval("SHOW fsync") == "on"
        await own.close()
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await asyncpg.connect(postgres.url("payment", role="order", password="one"))
        with pytest.raises(asyncpg.InvalidPasswordError):
            await asyncpg.connect(postgres.url("order", role="order", password="wrong"))
    finally:
        await child.stop()


async def test_what_was_committed_outlives_a_kill(tmp_path: Path) -> None:
    """A power cut and a restart, with fsync on."""
    postgres = Postgres(tmp_path / "pg", port=free_port(), password="super")
    child = await start(postgres)
    await postgres.kept()
    connection = await asyncpg.connect(postgres.url())
    await connection.execute("CREATE TABLE kept (id int); INSERT INTO kept VALUES (42)")
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    child = await start(postgres)
    try:
        connection = await asyncpg.connect(postgres.url())
        assert await connection.fetchval("SELECT id FROM kept") == 42
        await connection.close()
    finally:
        await child.stop()


async def test_a_cluster_whose_making_was_cut_short_is_made_again(tmp_path: Path) -> None:
    """Half a cluster never counts as one."""
    postgres = Postgres(tmp_path / "pg", port=free_port(), password="super")
    (tmp_path / "pg" / "data" / "global").mkdir(parents=True)
    (tmp_path / "pg" / "data" / "PG_VERSION").write_text("18")
    child = await start(postgres)
    await postgres.kept()
    await child.stop()


def _has_user_namespaces() -> bool:
    # Not in a chroot, nor in most containers.
    done = subprocess.run(["unshare", "--user", "true"], capture_output=True, check=False)
    return done.returncode == 0


@AS_ROOT
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            0,
            marks=pytest.mark.skipif(
                not _has_user_namespaces(), reason="this machine allows no user namespaces"
            ),
        ),
        1,
    ],
    ids=["unshare", "setpriv"],
)
async def test_root_runs_postgres_as_somebody_without_its_powers(
    way: int, identities: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Both ways work below a folder that is closed to others."""
    identities.setattr(base, "_IDENTITIES_FOR_ROOT", base._IDENTITIES_FOR_ROOT[way : way + 1])
    closed = tmp_path / "home"
    closed.mkdir(mode=0o700)
    postgres = Postgres(closed / "a folder with spaces" / "pg", port=free_port(), password="super")
    child = await start(postgres)
    try:
        # setpriv leaves it CAP_DAC_READ_SEARCH, bit 2, to come through a 0700 home.
        assert _effective_capabilities(child.pid) in {0, 1 << 2}
        connection = await asyncpg.connect(postgres.url())
        await connection.close()
    finally:
        assert await child.stop()


@AS_ROOT
async def test_a_cluster_moves_with_the_way_in_which_it_is_run(
    identities: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Made in one container, started in another that forbids user namespaces."""
    postgres = Postgres(tmp_path / "pg", port=free_port(), password="super")
    for ways in (base._IDENTITIES_FOR_ROOT, base._IDENTITIES_FOR_ROOT[1:]):
        unprivileged.cache_clear()
        identities.setattr(base, "_IDENTITIES_FOR_ROOT", ways)
        child = await start(postgres)
        await postgres.kept()
        assert await child.stop()


@AS_ROOT
def test_a_machine_that_refuses_every_way_is_told_in_words(
    identities: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With what each of them said."""
    identities.setattr(base, "_IDENTITIES_FOR_ROOT", ((("false",), 0),))
    with pytest.raises(MeshError, match="must not run as root"):
        unprivileged(Path("/bin/ls"), tmp_path)


async def test_a_server_that_cannot_start_is_told_with_its_log(tmp_path: Path) -> None:
    """The port is taken: PostgreSQL's own words are in the error, and nothing is left."""
    port = free_port()
    first = Valkey(tmp_path / "first", port=port, password="p")
    child = await start(first)
    try:
        second = Postgres(tmp_path / "second", port=port, password="super")
        with pytest.raises(ProcessFailedError, match=f"port {port}") as failure:
            await start(second)
        assert failure.value.process_name == "postgres"
    finally:
        await child.stop()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGTERM])
def test_servers_die_with_the_process_that_started_them(blow: signal.Signals) -> None:
    """Whoever starts a server and is killed leaves no postmaster and no backend."""
    script = (
        "import asyncio\n"
        "from meshctl.servers import throwaway, Postgres\n"
        "async def main():\n"
        "    async with throwaway(Postgres) as held:\n"
        "        print(held.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(CHECKOUT)},
    ) as parent:
        try:
            assert parent.stdout is not None
            postmaster = psutil.Process(int(parent.stdout.readline()))
            soon(
                lambda: len(postmaster.children()) >= 3,
                within_seconds=10,
                describe="PostgreSQL works",
            )
            everything = [postmaster, *postmaster.children(recursive=True)]
            parent.send_signal(blow)
            parent.wait()
            await_gone(everything, within=5)
        finally:
            parent.kill()


@pytest.mark.rabbitmq
async def test_a_private_rabbitmq_keeps_confirmed_messages_over_a_kill() -> None:
    """Own user, own virtual host, durable queue, kill -9, the message is there."""
    async with throwaway(RabbitMQ) as held:
        connection = await aio_pika.connect(held.url)
        channel = await connection.channel()
        quorum = {"x-queue-type": "quorum"}
        await channel.declare_queue("kept", durable=True, arguments=dict(quorum))
        # RabbitMQ 3.10 saves the registration of a quorum queue half a second after declaring it
        # (dets' auto_save); killed before, it does not find the queue's log again.
        await asyncio.sleep(1.0)
        message = aio_pika.Message(b"42", delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, "kept")
        await held.kill()
        await held.start()
        connection = await aio_pika.connect(held.url)
        channel = await connection.channel()
        queue = await channel.declare_queue("kept", durable=True, arguments=dict(quorum))
        async with queue.iterator(timeout=30) as messages:
            assert (await anext(messages)).body == b"42"
        assert "kept" in await held.server.ctl("list_queues", "--vhost", "mesh", "name")
        await connection.close()


async def test_two_throwaway_servers_run_side_by_side() -> None:
    """Ports, folders and passwords of their own."""
    async with throwaway_postgres() as one, throwaway_postgres() as other:
        assert one != other


async def test_a_throwaway_postgres_is_up_soon() -> None:
    """Tests start one often enough to care."""
    began = time.monotonic()
    async with throwaway(Postgres):
        # A second on a quiet machine; the rest is for one that is not.
        assert time.monotonic() - began < 20


def _effective_capabilities(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("CapEff")).split()[1], 16)
