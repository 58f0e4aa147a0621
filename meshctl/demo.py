"""`meshctl demo`: a mesh of its own, twenty varied orders through the edge, and each one's way.

Every order says beforehand how it has to end; what differs is told, and makes the demo fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import shlex
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import click

from meshctl.client import CallError, Edge, Json, Target
from meshctl.console import Console
from meshctl.grpc_edge import GrpcEdge, grpc_edge
from meshctl.mesh import Mesh, Options
from meshctl.resources import amount_words
from meshctl.samples import Sample, samples
from meshctl.state import StateFolder
from meshctl.supervisor import Level
from meshctl.up import program, run_mesh
from simulators.mail.mailbox import list_mails

_FOLLOW_SECONDS_MAX = 30.0
_POLL_SECONDS = 0.1


@dataclass(slots=True)
class Way:
    """What became of one sample."""

    number: int
    sample: Sample
    name: str = ""
    order: Json = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    payments: list[Json] = field(default_factory=list)
    notifications: list[Json] = field(default_factory=list)
    refusal: CallError | None = None
    replayed: bool = False
    differences: list[str] = field(default_factory=list)


class Caller:
    """Calls the mesh as one merchant, over REST and over gRPC."""

    def __init__(self, rest: Edge, grpc: GrpcEdge, merchant: str) -> None:
        self._rest = rest
        self._rest_lock = asyncio.Lock()
        self._grpc = grpc
        self._parent = f"merchants/{merchant}"

    async def create(self, sample: Sample) -> tuple[Json, bool]:
        """Places a sample's order the way that it wants to go."""
        body: Json = {"order": sample.order, "paymentMethod": sample.payment_method}
        if sample.expected_total is not None:
            body["expectedTotal"] = sample.expected_total
        if sample.via == "gRPC":
            return await self._grpc.create_order(self._parent, body, key=sample.key)
        async with self._rest_lock:
            path = f"{self._parent}/orders"
            return await asyncio.to_thread(self._rest.post, path, body, key=sample.key)

    async def cancel(self, sample: Sample, name: str) -> None:
        """Cancels a sample's order the way that it went."""
        if sample.via == "gRPC":
            await self._grpc.cancel_order(name, sample.cancel)
            return
        async with self._rest_lock:
            await asyncio.to_thread(self._rest.post, f"{name}:cancel", {"reason": sample.cancel})

    async def get(self, sample: Sample, name: str) -> Json:
        """Answers a sample's order as it is now, the way that it went."""
        if sample.via == "gRPC":
            return await self._grpc.get_order(name)
        async with self._rest_lock:
            return await asyncio.to_thread(self._rest.get, name)

    async def listed(self, path: str, field_name: str, order: str = "") -> list[Json]:
        """Answers a list over REST, narrowed to an order when one is named."""
        async with self._rest_lock:
            page = await asyncio.to_thread(
                self._rest.get,
                path if path.startswith("merchants/") else f"{self._parent}/{path}",
                pageSize=100,
                filter=f'order = "{order}"' if order else None,
            )
        found: list[Json] = page.get(field_name, [])
        return found


def run_demo(console: Console, *, keep: Path | None, broker: str, as_json: bool) -> int:
    """Runs the demo, and answers how many samples did not go their way.

    Raises:
        MeshError: The mesh did not start, or a call failed in no expected way.
        click.Abort: A signal ended it before the orders went their way.
    """
    folder = keep or Path(tempfile.mkdtemp(prefix="ordermesh-demo-"))
    ways: list[Way] = []
    placed_seconds = 0.0

    def say(text: str, level: Level) -> None:
        console.say(text, level)

    async def up(mesh: Mesh, stopping: asyncio.Event) -> None:
        nonlocal placed_seconds
        console.say(f"the mesh is up at {mesh.url}", "good")
        began = time.monotonic()
        ways.extend(await _send_all(state, mesh.url, console))
        placed_seconds = time.monotonic() - began
        console.busy_with("stopping the mesh")
        stopping.set()

    state = StateFolder(folder)
    went_well = False
    try:
        with console.busy("starting the mesh"):
            run_mesh(state, Options(broker=broker), say=say, up=up)
        mails = len(list_mails(state.mail)) if state.mail.exists() else 0
        console.say("everything is stopped", "good")
        _judge_mails(ways, mails)
        # A demo that was stopped before its end has nothing to look at either.
        went_well = not any(way.differences for way in ways)
    finally:
        if keep is None and went_well:
            shutil.rmtree(folder, ignore_errors=True)
        elif keep is None:
            console.note(f"logs and mails are kept in {folder}")
    if not ways:
        console.note("stopped before the orders went their way")
        raise click.Abort
    if as_json:
        console.json([_as_json(way) for way in ways])
    else:
        _show(ways, mails, placed_seconds, console)
        if keep is not None:
            where = shlex.quote(str(folder))
            console.note(f"\nthe state is kept: {program('meshctl')} up --state {where}")
        elif went_well:
            console.note(
                f"\nnothing of it is kept; to call a mesh yourself: {program('meshctl')} up"
            )
    return sum(1 for way in ways if way.differences)


# ---------------------------------------------------------------------------- following


async def _send_all(state: StateFolder, url: str, console: Console) -> list[Way]:
    ways = [Way(number, sample) for number, sample in enumerate(samples(), start=1)]
    done: set[int] = set()
    console.say(f"placing {len(ways)} orders", "progress")
    async with contextlib.AsyncExitStack() as stack:
        callers = {
            merchant: await stack.enter_async_context(_caller(state, url, merchant))
            for merchant in sorted({way.sample.merchant for way in ways})
        }
        async with asyncio.TaskGroup() as group:
            for way in ways:
                caller = callers[way.sample.merchant]
                await _place(way, ways, caller)
                group.create_task(_follow(way, caller, console, done, len(ways)))
    return ways


@asynccontextmanager
async def _caller(state: StateFolder, url: str, merchant: str) -> AsyncIterator[Caller]:
    token = state.token_key.token(merchant=merchant)
    called = Target(url, state.certificates.ca, token, state)
    rest = Edge(called)
    try:
        async with grpc_edge(called) as grpc:
            yield Caller(rest, grpc, merchant)
    finally:
        rest.close()


async def _place(way: Way, ways: Sequence[Way], caller: Caller) -> None:
    try:
        order, way.replayed = await caller.create(way.sample)
    except CallError as error:
        way.refusal = error
    else:
        way.name, way.order = order["name"], order
        original = way.sample.repeats
        if original is not None and ways[original - 1].name != way.name:
            way.differences.append(f"the repeat of {original} made another order")
        if original is not None and not way.replayed:
            way.differences.append("the answer does not say that it is a repeat's")


async def _follow(way: Way, caller: Caller, console: Console, done: set[int], total: int) -> None:
    sample = way.sample
    began = time.monotonic()
    if way.name and sample.repeats is None:
        if sample.cancel:
            await _until(way, caller, "CONFIRMED", "PAID")
            await caller.cancel(sample, way.name)
        await _until(way, caller, sample.state, sample.payment_state)
        await _gather(way, caller)
    _judge(way)
    done.add(way.number)
    console.busy_with(f"{len(done)} of {total} orders have gone their way")
    words = _outcome(way)
    seconds = time.monotonic() - began
    level: Level = "warning" if way.differences else "good"
    console.say(
        f"{way.number:>2}/{total} {sample.via:<4} {sample.title}: {words} ({seconds:.2f} s)", level
    )
    for difference in way.differences:
        console.say(f"      differs: {difference}", "warning")


async def _until(way: Way, caller: Caller, state: str, payment_state: str) -> None:
    deadline = time.monotonic() + _FOLLOW_SECONDS_MAX
    while time.monotonic() < deadline:
        way.order = await caller.get(way.sample, way.name)
        if (way.order.get("state"), way.order.get("paymentState")) == (state, payment_state):
            return
        await asyncio.sleep(_POLL_SECONDS)


async def _gather(way: Way, caller: Caller) -> None:
    """Collects an order's events, payments and notifications, the latter once all are sent."""
    way.events = await caller.listed(f"{way.name}/events", "events")
    way.payments = await caller.listed("payments", "payments", way.name)
    deadline = time.monotonic() + _FOLLOW_SECONDS_MAX
    while True:
        way.notifications = await caller.listed("notifications", "notifications", way.name)
        sent = {n["template"] for n in way.notifications if n.get("state") == "SENT"}
        if way.sample.mails <= sent or time.monotonic() > deadline:
            return
        await asyncio.sleep(_POLL_SECONDS)


# ---------------------------------------------------------------------------- judging


def _judge(way: Way) -> None:
    """Notes what is not as the sample wants it."""
    sample, order, differ = way.sample, way.order, way.differences.append
    if sample.refused:
        if way.refusal is None:
            differ("the request was not refused")
        elif way.refusal.code != "INVALID_ARGUMENT":
            differ(f"refused with {way.refusal.code}, not INVALID_ARGUMENT")
        elif sample.refused not in [v.get("field", "") for v in way.refusal.violations]:
            differ(f"the refusal does not name {sample.refused}: {way.refusal}")
        return
    if way.refusal is not None:
        differ(f"refused: {way.refusal}")
        return
    if sample.repeats is not None:
        return
    ended = f"{order.get('state')} {order.get('paymentState')}"
    if ended != f"{sample.state} {sample.payment_state}":
        differ(f"ended as {ended}, not {sample.state} {sample.payment_state}")
    if order.get("failureReason", "") != sample.failure:
        differ(f"failed for {order.get('failureReason')!r}, not {sample.failure!r}")
    settled_in = order.get("settlement", {}).get("amount", {}).get("currencyCode", "")
    if settled_in != sample.settled_in:
        differ(f"settled in {settled_in!r}, not {sample.settled_in!r}")
    if len(way.payments) != 1:
        differ(f"has {len(way.payments)} payments, not one")
    sent = sorted(n["template"] for n in way.notifications if n.get("state") == "SENT")
    if sent != sorted(sample.mails):
        differ(f"mails sent: {', '.join(sent) or 'none'}; not {', '.join(sorted(sample.mails))}")


def _judge_mails(ways: Sequence[Way], mails: int) -> None:
    """Every notification that was sent is one mail in the sink, none is there twice."""
    sent = sum(len(way.notifications) for way in ways)
    if ways and mails != sent:
        ways[-1].differences.append(f"the sink holds {mails} mails for {sent} notifications")


def _outcome(way: Way) -> str:
    if way.refusal is not None:
        return f"refused, {way.refusal.code} {way.refusal.reason}".rstrip()
    if way.sample.repeats is not None:
        return f"answered with the order of request {way.sample.repeats}"
    money = way.order.get("paymentState")
    state = f"{way.order.get('state')}" + (f", {money}" if money != "NONE" else "")
    reason = way.order.get("failureReason", "")
    return f"{state} ({reason})" if reason else state


# ---------------------------------------------------------------------------- showing


def _show(ways: Sequence[Way], mails: int, seconds: float, console: Console) -> None:
    console.result("")
    rows = [
        [
            str(way.number),
            way.sample.via,
            f"{way.sample.title}\n{amount_words(way.order.get('total'))}".rstrip(),
            "\n".join(_steps(way)),
            "\n".join(_payment_words(way)),
            "\n".join(_mail_words(way)),
            "\n".join(["differs", *way.differences]) if way.differences else "ok",
        ]
        for way in ways
    ]
    console.table(["", "via", "order", "way", "payment", "mails", ""], rows)
    bad = sum(1 for way in ways if way.differences)
    orders = len({way.name for way in ways if way.name})
    console.result(
        f"\n{len(ways)} requests, {orders} orders, {mails} mails in {seconds:.1f} s: "
        + (f"{bad} did not go their way" if bad else "each went its way")
    )


def _steps(way: Way) -> list[str]:
    if way.refusal is not None:
        fields = ", ".join(violation.get("field", "") for violation in way.refusal.violations)
        return [f"{way.refusal.code} {way.refusal.reason}".rstrip(), fields]
    if way.sample.repeats is not None:
        return [f"a repeat: the order of {way.sample.repeats}, nothing done twice"]
    steps: list[str] = []
    began: datetime | None = None
    for event in way.events:
        moment = datetime.fromisoformat(event["occurTime"])
        began = began or moment
        money = event.get("paymentState", "")
        states = f"{event.get('state', '')} {money if money != 'NONE' else ''}".rstrip()
        steps.append(f"{(moment - began).total_seconds():.3f} s {states}")
    return steps


def _payment_words(way: Way) -> list[str]:
    words = []
    for payment in way.payments:
        amount = amount_words(payment.get("amount"))
        words.append(f"{payment.get('state', '')} {amount}")
        if payment.get("failureReason"):
            words.append(payment["failureReason"])
        if int(payment.get("refunded", {}).get("minorUnits", 0)):
            words.append(f"refunded {amount_words(payment['refunded'])}")
    settlement = way.order.get("settlement")
    if settlement:
        words.append(f"settled as {amount_words(settlement.get('amount'))}")
    return words


def _mail_words(way: Way) -> list[str]:
    ordered = sorted(way.notifications, key=lambda n: str(n.get("createTime", "")))
    return [
        f"{n.get('template', '')} {n.get('locale', '')}"
        + ("" if n.get("state") == "SENT" else f" {n.get('state')}")
        for n in ordered
    ]


def _as_json(way: Way) -> Json:
    return {
        "number": way.number,
        "title": way.sample.title,
        "via": way.sample.via,
        "outcome": _outcome(way),
        "order": way.order,
        "events": way.events,
        "payments": way.payments,
        "notifications": way.notifications,
        "refusal": way.refusal.status if way.refusal else None,
        "differences": way.differences,
    }
