"""Processes that are killed while orders are placed: nothing is lost, nothing done twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from datetime import datetime
from urllib.parse import urlsplit

import pytest

from chassis.broker import connect
from meshctl.servers.throwaway import throwaway_rabbitmq
from tests.e2e.callers import (
    Caller,
    Ends,
    GrpcCaller,
    Placing,
    RestCaller,
    a_line,
    a_request,
    an_order,
    ended,
    grpc_caller,
    insisted,
    listed,
    new_key,
    rest_caller,
)
from tests.e2e.conftest import a_mesh
from tests.e2e.meshes import RESTART_SECONDS_MAX, Json, Mesh, on_both_brokers, repeated
from tests.eventually import eventually

pytestmark = pytest.mark.timeout(180)

MAILS_OF_A_PAID_ORDER = 3


class Orders:
    """Makes requests of one customer, each over its own quantity."""

    def __init__(self, customer: str) -> None:
        self.customer = customer

    def __call__(self, number: int) -> Json:
        """The request with a number."""
        customer = {"customerId": self.customer, "email": "ada@example.com", "locale": "en"}
        lines = [a_line(quantity=1 + number)]
        return a_request(order=an_order(customer=customer, lines=lines))


@on_both_brokers
async def test_every_order_is_paid_once_though_payment_is_killed_meanwhile(
    mesh: Mesh, rest: RestCaller, grpc: GrpcCaller
) -> None:
    """Killed in the middle, back within 5 s, and every order ends paid by one charge."""
    orders, placing = Orders(f"killed-{new_key()}"), Placing()
    victim = mesh.pid_of("payment")
    async with asyncio.TaskGroup() as group:
        group.create_task(placing.place(rest, per_second=60, times=40, request=orders))
        group.create_task(placing.place(grpc, per_second=60, times=40, request=orders))
        await _in_the_middle(placing, of=80)
        os.kill(victim, signal.SIGKILL)
        await _is_back(mesh, "payment", instead_of=victim)
    assert placing.refusals == []
    await _leases_of_the_dead_end(mesh)
    await _all_paid_once(mesh, rest, placing.placed)


@pytest.mark.rabbitmq
async def test_events_resume_when_rabbitmq_is_killed_and_back(
    rabbitmq_mesh: Mesh,
) -> None:
    """Orders are taken while there is no broker, and paid once it is there again."""
    orders, placing = Orders(f"brokerless-{new_key()}"), Placing()
    victim = rabbitmq_mesh.pid_of("rabbitmq")
    async with rest_caller(rabbitmq_mesh.access()) as rest:
        async with asyncio.TaskGroup() as group:
            group.create_task(placing.place(rest, per_second=10, times=50, request=orders))
            await _in_the_middle(placing, of=50)
            os.kill(victim, signal.SIGKILL)
        assert placing.refusals == [], "orders do not need the broker to be taken"
        # An Erlang node takes longer to start than a service.
        await _is_back(rabbitmq_mesh, "rabbitmq", instead_of=victim)
        await _all_paid_once(rabbitmq_mesh, rest, placing.placed, within_seconds=60)
        again = Placing()
        await again.place(rest, per_second=10, times=5, request=orders)
        await _all_paid_once(rabbitmq_mesh, rest, again.placed)


@pytest.mark.parametrize("name", ["valkey", "notification", "mail", "postgres"])
async def test_orders_are_paid_and_told_of_though_a_part_is_killed(
    mesh: Mesh, rest: RestCaller, name: str
) -> None:
    """Whichever it is: what is placed before, meanwhile and after comes to its end.

    What was being mailed at that very moment may be mailed twice, as SMTP cannot do better;
    so the mails of the earlier orders are waited for.
    """
    placing = Placing()
    orders = Orders(f"{name}-{new_key()}")
    await placing.place(rest, per_second=20, times=5, request=orders)
    await _all_paid_once(mesh, rest, placing.placed)
    victim = mesh.pid_of(name)
    os.kill(victim, signal.SIGKILL)
    *meanwhile, _ = await asyncio.gather(
        *(insisted(rest, "CreateOrder", orders(number)) for number in range(5)),
        _is_back(mesh, name, instead_of=victim),
    )
    after = Placing()
    await after.place(rest, per_second=20, times=5, request=orders)
    names = [order["name"] for order in meanwhile if order is not None]
    await _all_paid_once(mesh, rest, [*names, *after.placed], within_seconds=30)


# ---------------------------------------------------------------------------- replicas


@pytest.fixture(scope="module")
def two_replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh with two processes of the order service."""
    with a_mesh(tmp_path_factory.mktemp("replicas"), "postgres", "--replicas", "2") as mesh:
        yield mesh


async def test_no_request_fails_when_one_of_two_replicas_is_killed(two_replicas: Mesh) -> None:
    """Under steady load of both protocols, reads among it: everybody is answered."""
    mesh = two_replicas
    orders, placing = Orders(f"replica-{new_key()}"), Placing()
    reads: list[Json] = []
    done = asyncio.Event()

    async def read(caller: Caller) -> None:
        while not done.is_set():
            reads.extend(
                await listed(caller, "ListOrders", "orders", parent="merchants/default", pageSize=1)
            )
            await asyncio.sleep(0.05)

    async with rest_caller(mesh.access()) as rest, grpc_caller(mesh.access()) as grpc:
        victim, survivor = mesh.pid_of("order-1"), mesh.pid_of("order-2")
        async with asyncio.TaskGroup() as group:
            readers = [group.create_task(read(caller)) for caller in (rest, grpc)]
            load = [
                group.create_task(placing.place(caller, per_second=12, times=45, request=orders))
                for caller in (rest, grpc)
            ]
            await _in_the_middle(placing, of=90)
            os.kill(victim, signal.SIGKILL)
            await asyncio.gather(*load)
            done.set()
            await asyncio.gather(*readers)
        assert placing.refusals == []
        assert len(set(placing.placed)) == 90
        assert len(reads) > 20
        await _is_back(mesh, "order-1", instead_of=victim)
        assert mesh.pid_of("order-2") == survivor
        await _all_paid_once(mesh, rest, placing.placed, within_seconds=40)
        served = [entry for entry in mesh.accesses() if entry["rpc"].endswith("/CreateOrder")]
        assert {entry["status"] for entry in served} == {200}
        assert len({entry["upstream"] for entry in served}) == 2, "both had their share"


async def test_a_state_folder_survives_a_restart_with_its_orders(two_replicas: Mesh) -> None:
    """Ended with work in hand and started again: same URL, CA and token, all orders paid."""
    mesh = two_replicas
    before, ca = mesh.access(), mesh.access().ca.read_bytes()
    orders, placing = Orders(f"restart-{new_key()}"), Placing()
    async with rest_caller(before) as rest:
        kept = (await rest.call("CreateOrder", orders(0))).resource["name"]
        paid = await ended(rest, kept)
        # Held still until the mesh is told to end, which so meets work in hand on any machine.
        payment = mesh.pid_of("payment")
        os.kill(payment, signal.SIGSTOP)
        try:
            await placing.place(rest, per_second=200, times=20, request=orders)
            ending = asyncio.create_task(asyncio.to_thread(mesh.down))
            await eventually(
                lambda: mesh.process("payment")["health"] == "stopping",
                describe="payment is told to end",
            )
        finally:
            os.kill(payment, signal.SIGCONT)
    assert await ending == []
    await asyncio.to_thread(mesh.up)
    after = mesh.access()
    assert (after.url, after.ca, after.ca.read_bytes()) == (before.url, before.ca, ca)
    async with rest_caller(before) as rest:
        assert (await rest.call("GetOrder", {"name": kept})).resource == paid
        await _leases_of_the_dead_end(mesh)
        await _all_paid_once(mesh, rest, placing.placed)
        again = Placing()
        await again.place(rest, per_second=20, times=3, request=orders)
        await _all_paid_once(mesh, rest, again.placed)


@pytest.mark.rabbitmq
@pytest.mark.slow
async def test_a_rabbitmq_that_runs_already_is_used_by_its_url(two_replicas: Mesh) -> None:
    """With MESH_BROKER_URL the same mesh runs over that broker, and leaves it running."""
    mesh = two_replicas
    ending = asyncio.create_task(asyncio.to_thread(mesh.down))
    async with throwaway_rabbitmq() as url:
        assert await ending == []
        await asyncio.to_thread(mesh.up, broker_url=url)
        status = mesh.status()
        assert status["broker"] == "external"
        assert (urlsplit(url).password or "none") not in str(status)
        names = {process["name"] for process in status["processes"]}
        assert not names & {"rabbitmq", "epmd"}
        placing = Placing()
        async with rest_caller(mesh.access()) as rest:
            await placing.place(rest, per_second=20, times=5, request=Orders(f"url-{new_key()}"))
            await _all_paid_once(mesh, rest, placing.placed)
        async with connect(url, name="test") as theirs:
            await theirs.ping()
            assert [await theirs.dead_letters(name) for name in ("order", "payment")] == [[], []]


# ---------------------------------------------------------------------------- looking


async def _in_the_middle(placing: Placing, *, of: int) -> None:
    """Waits until a good part of so many orders is placed, and sees that others are to come."""
    await eventually(lambda: len(placing.placed) >= of // 4, describe="orders are placed")
    assert len(placing.placed) < of, "the placing was over too soon"


async def _is_back(mesh: Mesh, name: str, *, instead_of: int) -> None:
    """Waits until a killed process has a successor, started in time and healthy at last."""

    def said() -> datetime:
        died, ready = mesh.said(f"{name} died (SIGKILL)"), mesh.said(f"{name} ready again")
        assert ready > died
        return died

    # An Erlang node takes its time on a busy machine.
    died = await eventually(said, 45, describe=f"{name} is back")
    process = mesh.process(name)
    assert process["pid"] != instead_of
    assert process["health"] == "healthy"
    assert process["restarts"] >= 1
    started = datetime.fromisoformat(process["since"])
    assert (started - died).total_seconds() < RESTART_SECONDS_MAX


async def _leases_of_the_dead_end(mesh: Mesh) -> None:
    """Ends what a killed payment process still held, which time would do in half a minute.

    A process takes a payment for as long as the provider may need, and nobody else touches
    it before. Instead of waiting for that, the rows' times are moved.
    """
    for process in mesh.status()["processes"]:
        if process["name"] == "payment":
            async with mesh.database("payment") as connection:
                await connection.execute(
                    "UPDATE payments SET due_time = now() WHERE due = 'RESOLVE'"
                    " AND due_time > now() AND update_time < $1::text::timestamptz",
                    process["since"],
                )


async def _all_paid_once(
    mesh: Mesh, caller: Caller, orders: list[str], *, within_seconds: float = 20
) -> None:
    """Sees that each order is paid by one charge and told of once."""
    deadline = time.monotonic() + within_seconds
    for order in orders:
        left = max(1.0, deadline - time.monotonic())
        await ended(caller, order, Ends("CONFIRMED", "PAID"), within_seconds=left)
    ids = [order.rpartition("/")[2] for order in orders]
    payments = await mesh.rows(
        "payment",
        """SELECT p.order_id, p.state, p.captured, p.refunded, a.amount, a.state AS attempt
           FROM payments AS p JOIN payment_attempts AS a USING (merchant, payment_id)
           WHERE p.order_id = ANY($1::text[]::uuid[])""",
        ids,
    )
    assert sorted(str(payment["order_id"]) for payment in payments) == sorted(ids)
    for payment in payments:
        assert payment["state"] == payment["attempt"] == "CAPTURED"
        assert payment["captured"] == payment["amount"] > payment["refunded"] == 0

    def told() -> int:
        mails = [mail for mail in mesh.mails() if mail.order in set(orders)]
        assert repeated(mails) == {}
        return len(mails)

    expected = MAILS_OF_A_PAID_ORDER * len(orders)
    await eventually(told, 20, until=lambda seen: seen >= expected, describe=f"{expected} mails")
    assert told() == expected
