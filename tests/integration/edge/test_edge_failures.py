"""What callers notice when replicas die, hang, drain or refuse: as little as can be."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from ordermesh.order.v1 import order_service_pb2 as order
from ordermesh.order.v1 import order_service_pb2_grpc as order_grpc
from tests.eventually import eventually
from tests.integration.edge.harness import Edge, a_stub, an_edge, details_of, reason_of, told

ORDERS = "/v1/merchants/default/orders"
ORDER = f"{ORDERS}/1"
CALLERS = 32


@pytest.fixture
def own_edge(tmp_path: Path) -> Iterator[Edge]:
    """An edge with two order replicas that a test may kill."""
    with an_edge(tmp_path) as running:
        yield running


@asynccontextmanager
async def calls_all_the_while(edge: Edge) -> AsyncIterator[Counter[str]]:
    """Reads and mutations, over REST and gRPC, until the block ends; counts the outcomes."""
    outcomes: Counter[str] = Counter()
    stopping = False

    async def over_grpc(stub: order_grpc.OrderServiceAsyncStub, index: int) -> None:
        metadata = edge.metadata()
        while not stopping:
            try:
                if index % 2:
                    request = order.CreateOrderRequest(request_id=str(uuid.uuid4()))
                    await stub.CreateOrder(request, metadata=metadata)
                else:
                    name = ORDER.removeprefix("/v1/")
                    await stub.GetOrder(order.GetOrderRequest(name=name), metadata=metadata)
                outcomes["ok"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[f"{error.code().name}: {error.details()}"] += 1

    async def over_rest(index: int) -> None:
        async with edge.client() as client:
            while not stopping:
                if index % 2:
                    answer = await client.post(ORDERS, json={"requestId": str(uuid.uuid4())})
                else:
                    answer = await client.get(ORDER)
                outcomes["ok" if answer.status_code == 200 else answer.text] += 1

    async with edge.channel() as one, edge.channel() as two, asyncio.TaskGroup() as group:
        stubs = [order_grpc.OrderServiceStub(channel) for channel in (one, two)]
        for index in range(CALLERS - 4):
            group.create_task(over_grpc(stubs[index // 2 % 2], index))
        for index in range(4):
            group.create_task(over_rest(index))
        await eventually(lambda: outcomes["ok"] > 200, describe="the calls have begun")
        try:
            yield outcomes
            enough = outcomes["ok"] + 200
            await eventually(lambda: outcomes["ok"] > enough, describe="the calls go on")
        finally:
            stopping = True


def retries(edge: Edge) -> int:
    """How often Envoy has asked the order service again."""
    return edge.counters("^cluster.order.upstream_rq_retry$")["cluster.order.upstream_rq_retry"]


async def test_a_replica_killed_under_calls_is_not_noticed(own_edge: Edge) -> None:
    """Reads and mutations in flight on it are repeated on the other one."""
    async with calls_all_the_while(own_edge) as outcomes:
        await asyncio.to_thread(own_edge.order_stubs[1].kill)
        await eventually(lambda: own_edge.healthy("order") == 1, describe="it is found dead")
    assert outcomes.keys() == {"ok"}
    assert retries(own_edge) > 0


async def test_a_replica_that_drains_is_not_noticed(own_edge: Edge) -> None:
    """NOT_SERVING takes it out before it stops, so that nothing has to be repeated."""
    async with calls_all_the_while(own_edge) as outcomes:
        await asyncio.to_thread(own_edge.order_stubs[1].stop)
    assert outcomes.keys() == {"ok"}


async def test_a_replica_that_comes_back_is_used_again(own_edge: Edge) -> None:
    """Within a few seconds, by itself."""
    dead = own_edge.order_stubs[1]
    await asyncio.to_thread(dead.kill)
    await eventually(lambda: own_edge.healthy("order") == 1)
    with a_stub(own_edge.folder / "tls", ["order"], "b", [dead.ports["order"]]):
        await eventually(lambda: own_edge.healthy("order") == 2, within_seconds=5)
        async with own_edge.client() as client:

            async def answered_by_b() -> bool:
                return told((await client.get(ORDER)).json())["stub-replica"] == "b"

            await eventually(answered_by_b)


async def test_a_mutation_is_repeated_elsewhere_when_its_replica_dies_of_it(
    own_edge: Edge,
) -> None:
    """A reset in the middle of a call: the key in it makes the repetition safe."""
    victim = own_edge.order_stubs[1].process
    body = {"order": {"clientOrderRef": "dieon-b"}}
    async with own_edge.client() as client:

        async def killed_by_a_call() -> bool:
            answer = await client.post(ORDERS, json=body)
            assert answer.status_code == 200, answer.text
            assert told(answer.json())["stub-replica"] == "a"
            return victim.poll() is not None

        await eventually(killed_by_a_call)
    assert victim.returncode == -signal.SIGKILL
    assert retries(own_edge) == 1


@pytest.mark.parametrize(("method", "path", "within"), [("GET", ORDER, 2), ("POST", ORDERS, 10)])
async def test_a_call_that_hangs_is_tried_elsewhere_in_time(
    own_edge: Edge, method: str, path: str, within: float
) -> None:
    """A stopped replica costs the caller a part of the time limit, not the answer."""
    stopped = own_edge.order_stubs[1].process
    async with own_edge.client() as client:

        async def slowest_of_some() -> float:
            async def one() -> float:
                started = time.monotonic()
                answer = await client.request(method, path, json={} if method == "POST" else None)
                assert answer.status_code == 200, answer.text
                return time.monotonic() - started

            return max(await asyncio.gather(*(one() for _ in range(8))))

        await slowest_of_some()  # so that there are connections to both replicas
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            slowest = await slowest_of_some()
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
    assert 0.4 * within < slowest < within, "none of them met the stopped replica"


async def test_a_replica_that_says_unavailable_is_passed_over_once(edge: Edge) -> None:
    """Its UNAVAILABLE is the other replica's answer a moment later."""
    async with edge.client() as client:
        answers = [await client.get(f"{ORDERS}/awayon-a") for _ in range(10)]
    assert [answer.status_code for answer in answers] == [200] * 10
    assert {told(answer.json())["stub-replica"] for answer in answers} == {"b"}


async def test_a_failing_call_is_tried_twice_and_no_more(edge: Edge) -> None:
    """One layer retries, once; the service's own error arrives."""
    async with edge.client() as client:
        answer = await client.get(f"{ORDERS}/awayon-all")
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "3"
    assert answer.json()["message"] == "away"
    request_id = answer.headers["x-request-id"]

    def attempts() -> int | None:
        lines = (line for line in edge.access_log() if line["request_id"] == request_id)
        return next((line["attempts"] for line in lines), None)

    assert await eventually(attempts) == 2


@pytest.mark.parametrize("word", ["missing", "busy", "broken"])
async def test_an_error_that_repeating_does_not_help_is_not_repeated(
    own_edge: Edge, word: str
) -> None:
    """NOT_FOUND, RESOURCE_EXHAUSTED and UNKNOWN go straight to the caller."""
    async with own_edge.client() as client:
        assert (await client.get(f"{ORDERS}/{word}")).status_code in {404, 429, 500}
    assert retries(own_edge) == 0


async def test_with_no_replica_left_callers_are_told_to_wait_until_one_is_back(
    own_edge: Edge,
) -> None:
    """503 with retry-after, healthz 503; then all is well again."""
    port = own_edge.order_stubs[0].ports["order"]
    for stub in own_edge.order_stubs:
        await asyncio.to_thread(stub.kill)
    await eventually(lambda: own_edge.healthy("order") == 0)
    async with own_edge.client() as client:
        answer = await client.get(ORDER)
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "1"
        assert answer.json()["code"] == 14
        assert reason_of(answer.json()) == "DEPENDENCY_UNAVAILABLE"
        assert details_of(answer.json(), "RetryInfo")["retryDelay"] == "1s"
        assert (await client.get("/healthz")).status_code == 503

        async def reasons() -> set[str]:
            await client.get(ORDER)
            return {line["details"] for line in own_edge.access_log()}

        # Nothing is sent to replicas that are known to be dead.
        await eventually(reasons, until=lambda found: "no_healthy_upstream" in found)
        with a_stub(own_edge.folder / "tls", ["order"], "a", [port]):

            async def well_again() -> None:
                assert (await client.get(ORDER)).status_code == 200
                assert (await client.get("/healthz")).status_code == 200

            await eventually(well_again, within_seconds=5, until=lambda _: True)


async def test_an_edge_that_is_told_to_drain_fails_its_health_check_and_serves_on(
    own_edge: Edge,
) -> None:
    """The load balancer goes elsewhere; who is still here is served."""
    async with own_edge.client(http2=False) as client, own_edge.channel() as channel:
        stub = order_grpc.OrderServiceStub(channel)

        async def both_served() -> None:
            assert (await client.get(ORDER)).status_code == 200
            name = ORDER.removeprefix("/v1/")
            await stub.GetOrder(order.GetOrderRequest(name=name), metadata=own_edge.metadata())

        await both_served()
        assert own_edge.admin("/healthcheck/fail", "POST").status_code == 200
        assert (await client.get("/healthz")).status_code == 503
        drained = own_edge.admin("/drain_listeners?graceful&skip_exit", "POST")
        assert drained.status_code == 200
        await both_served()
