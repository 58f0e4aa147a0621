"""The broker in memory does what the real ones do, so that tests may rely on it."""

from __future__ import annotations

import pytest

from chassis.broker import connect
from chassis.broker.memory import MemoryServer, server_named
from tests.suites.broker import Backend, BrokerSuite


class MemoryBackend:
    """A broker in memory as a server that can be away."""

    def __init__(self) -> None:
        self.url = f"memory://{id(self)}"
        self._server: MemoryServer = server_named(str(id(self)))

    async def stop(self) -> None:
        """Plays dead."""
        self._server.away = True

    kill = stop

    async def start(self) -> None:
        """Is back."""
        self._server.away = False


@pytest.mark.asyncio(loop_scope="module")
class TestMemoryBroker(BrokerSuite):
    """The suite, over a broker in memory."""

    @pytest.fixture
    def backend(self) -> Backend:
        """A server that no other test knows."""
        return MemoryBackend()


def test_brokers_of_one_name_share_a_server_and_others_do_not() -> None:
    """The URL's name is the server's identity within a process."""
    kept = server_named("shared")
    assert server_named("shared") is kept
    assert server_named("other") is not kept


async def test_an_unknown_scheme_is_refused() -> None:
    """A wrong URL is found out before anything runs."""
    with pytest.raises(ValueError, match="no broker speaks 'kafka'"):
        async with connect("kafka://host", name="suite"):
            pass
