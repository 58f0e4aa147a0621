"""The lines that `meshctl up` prints, pasted into a shell; and reflection, which they use."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from meshctl.up import program
from tests.e2e.callers import RestCaller, ended, money, payments_of
from tests.e2e.meshes import CHECKOUT, Mesh
from tests.eventually import eventually

SERVICES = {
    "ordermesh.order.v1.OrderService",
    "ordermesh.payment.v1.PaymentService",
    "ordermesh.notification.v1.NotificationService",
    "ordermesh.rates.v1.ExchangeRateService",
}


def blocks_of(shown: str) -> dict[str, str]:
    """What `meshctl up` printed, block by block: the comment above it, and the commands."""
    blocks = {}
    for block in re.split(r"\n\n+", shown.strip()):
        lines = block.splitlines()
        comment = next((line for line in lines if line.startswith("#")), "")
        commands = [line for line in lines if line and not line.startswith("#")]
        if commands:
            blocks[comment] = "\n".join(commands)
    return blocks


async def paste(mesh: Mesh, commands: str, *, under: str = "bash") -> str:
    """Pastes lines into a shell in which nothing is set, and answers what they print."""
    environment = {
        name: value for name, value in mesh.environment().items() if not name.startswith("MESH_")
    }
    del environment["PYTHONPATH"]
    done = await asyncio.to_thread(
        subprocess.run,
        [under, "-e", "-s"],
        input=commands,
        cwd=CHECKOUT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, f"{commands}\n{done.stdout}\n{done.stderr}"
    return str(done.stdout)


def the_only(blocks: dict[str, str], word: str) -> tuple[str, str]:
    """The one block whose commands begin with a program."""
    (found,) = [
        (comment, commands)
        for comment, commands in blocks.items()
        if Path(commands.split()[0]).name == word
    ]
    return found


@pytest.mark.curl
async def test_the_printed_curl_and_buf_lines_place_orders_that_are_paid(
    mesh: Mesh, rest: RestCaller
) -> None:
    """Pasted as they are, behind the line that sets the variables."""
    blocks = blocks_of(mesh.shown)
    _, first = the_only(blocks, "eval")
    for word in ("curl", "buf"):
        _, commands = the_only(blocks, word)
        order: dict[str, Any] = json.loads(await paste(mesh, f"{first}\n{commands}\n"))
        assert order["total"] == money(2500)
        paid = await ended(rest, order["name"])
        assert paid["lines"][0]["title"] == "Darjeeling 100 g"
        assert len(await payments_of(rest, order["name"])) == 1


async def test_the_printed_meshctl_lines_place_show_and_tell_of_an_order(
    mesh: Mesh, rest: RestCaller
) -> None:
    """An order, the list that it stands in, and the mails about it."""
    blocks = blocks_of(mesh.shown)
    _, first = the_only(blocks, "eval")
    _, commands = the_only(blocks, "meshctl")
    create, list_, mail = commands.splitlines()
    shown = await paste(mesh, f"{first}\n{create}\n{list_}\n", under="sh")
    found = re.search(r"merchants/default/orders/([0-9a-f-]{36})", shown)
    assert found is not None, shown
    assert shown.count(found[1]) == 2, "created and listed"
    assert "25.00 EUR" in shown
    await ended(rest, found[0])
    await eventually(lambda: mesh.mails(found[0]), 15, until=lambda mails: len(mails) == 3)
    told = await paste(mesh, f"{first}\n{mail}\n")
    assert told.count(found[1]) == 3
    assert "ada@example.com" in told
    assert str(mesh.state / "mail") in mail


async def test_the_printed_grpcurl_line_asks_for_what_the_buf_line_asks_for(mesh: Mesh) -> None:
    """It has no package here; where it is installed all the same, it is run."""
    blocks = blocks_of(mesh.shown)
    (_, buf), (_, grpcurl) = the_only(blocks, "buf"), the_only(blocks, "grpcurl")
    asked, same = shlex.split(buf), shlex.split(grpcurl)
    assert asked[-1] == f"$MESH_URL/{same[-1]}"
    assert json.loads(asked[asked.index("-d") + 1]) == json.loads(same[same.index("-d") + 1])
    if shutil.which("grpcurl"):
        _, first = the_only(blocks, "eval")
        order = json.loads(await paste(mesh, f"{first}\n{grpcurl}\n"))
        assert order["total"] == money(2500)


def test_all_printed_lines_together_are_good_shell(mesh: Mesh) -> None:
    """No quote or line continuation is out of place, in bash and in a plain sh."""
    for shell in ("bash", "sh"):
        subprocess.run([shell, "-n"], input=mesh.shown, text=True, check=True)


async def test_buf_curl_lists_services_and_methods_by_reflection_without_a_token(
    mesh: Mesh,
) -> None:
    """All public services, whichever service answers."""
    access = mesh.access()
    buf = f"{program('buf')} curl --protocol grpc --cacert {access.ca}"
    services = (await paste(mesh, f"{buf} --list-services {access.url}\n")).split()
    assert set(services) >= SERVICES
    assert {name for name in services if name.startswith("ordermesh.")} == SERVICES
    methods = (await paste(mesh, f"{buf} --list-methods {access.url}\n")).split()
    assert "ordermesh.order.v1.OrderService/CancelOrder" in methods
    assert "ordermesh.rates.v1.ExchangeRateService/ConvertMoney" in methods


async def test_buf_curl_reads_and_cancels_by_reflection(mesh: Mesh, rest: RestCaller) -> None:
    """Every service can be called so, and a refusal is told with its code."""
    blocks = blocks_of(mesh.shown)
    _, first = the_only(blocks, "eval")
    _, create = the_only(blocks, "buf")
    name = json.loads(await paste(mesh, f"{first}\n{create}\n"))["name"]
    order = await ended(rest, name)
    access = mesh.access()
    buf = (
        f"{program('buf')} curl --protocol grpc --cacert {access.ca}"
        f" -H 'Authorization: Bearer {access.token}'"
    )

    async def call(method: str, request: dict[str, str], options: str = "") -> dict[str, Any]:
        line = f"{buf} {options} -d '{json.dumps(request)}' {access.url}/{method}\n"
        answer: dict[str, Any] = json.loads(await paste(mesh, line))
        return answer

    payment = await call(
        "ordermesh.payment.v1.PaymentService/GetPayment", {"name": order["payment"]}
    )
    assert payment["state"] == "CAPTURED"
    currencies = await call("ordermesh.rates.v1.ExchangeRateService/ListCurrencies", {})
    assert {"code": "JPY"} in [{"code": c["code"]} for c in currencies["currencies"]]
    key = '-H "idempotency-key: $(cat /proc/sys/kernel/random/uuid)"'
    cancelled = await call("ordermesh.order.v1.OrderService/CancelOrder", {"name": name}, key)
    assert cancelled["state"] == "CANCELLING"
    with pytest.raises(AssertionError, match="not_found"):
        await call(
            "ordermesh.order.v1.OrderService/GetOrder",
            {"name": "merchants/default/orders/01890000-0000-7000-8000-000000000000"},
        )


async def test_reflection_describes_every_public_service_and_its_rules(
    mesh: Mesh,
) -> None:
    """What a tool needs to describe a service and its messages, options included."""
    access = mesh.access()

    def describe() -> dict[str, list[str]]:
        credentials = grpc.ssl_channel_credentials(access.ca.read_bytes())
        with grpc.secure_channel(access.url.removeprefix("https://"), credentials) as channel:
            pool = DescriptorPool(ProtoReflectionDescriptorDatabase(channel))
            request = pool.FindMessageTypeByName("ordermesh.order.v1.CreateOrderRequest")
            assert [field.name for field in request.fields][:3] == [
                "parent",
                "order",
                "payment_method",
            ]
            # The rules are options, which come along as they stand in the file.
            assert request.fields_by_name["payment_method"].GetOptions().ByteSize() > 0
            return {
                name: [method.name for method in pool.FindServiceByName(name).methods]
                for name in SERVICES
            }

    methods = await asyncio.to_thread(describe)
    assert methods["ordermesh.order.v1.OrderService"] == [
        "CreateOrder",
        "GetOrder",
        "ListOrders",
        "CancelOrder",
        "ListOrderEvents",
    ]
    assert all(methods.values())
