"""The supervisor: starts the parts of a mesh, keeps them running, and ends them in order.

A part starts when the parts that it needs are ready, so independent ones start together. A part
that dies later is said so and started again, within seconds and for as long as it takes; parts
that need it are left running, as every service outlives a restart of what it leans on. Parts end
rank by rank: the edge first, the stores last.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from meshctl.leftovers import MARK, end, processes_of
from meshctl.processes import (
    Child,
    MeshError,
    NotReadyError,
    ProcessFailedError,
    exit_words,
    import_roots,
    spawn,
)
from meshctl.servers import Server
from meshctl.state import ProcessStatus, StateFolder, timestamp

_BACKOFF_FIRST_SECONDS = 0.2
_BACKOFF_MAX_SECONDS = 4.0
_CALM_SECONDS = 30.0
"""A part that ran this long has recovered: its next restart is quick again."""
_HEALTH_EVERY_SECONDS = 2.0

Level = Literal["progress", "good", "warning"]
Say = Callable[[str, Level], None]
"""Tells the user something that happened."""


@dataclass(slots=True, kw_only=True)
class Part:
    """A server in its place in the mesh."""

    server: Server
    address: str
    """Where it listens, for `meshctl status`."""
    stop_rank: int
    """Parts of a lower rank are ended before those of a higher one."""
    needs: tuple[str, ...] = ()
    """Names of the parts that have to be ready before this one starts."""
    first_after: tuple[str, ...] = ()
    """Further ones that its first start waits for, but no restart."""
    once_ready: Callable[[], Awaitable[None]] | None = None
    """Run after the first start, before the part counts as ready."""
    before_stop: Callable[[], Awaitable[None]] | None = None
    """Run before the part is asked to end; may fail when it is dead already."""

    child: Child | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    health: str = "starting"
    detail: str = ""
    restarts: int = 0

    @property
    def name(self) -> str:
        """Name in status, logs and messages."""
        return self.server.name

    def status(self) -> ProcessStatus:
        """Answers what `meshctl status` shows of it."""
        running = self.child is not None and self.child.exit_code is None
        return ProcessStatus(
            name=self.name,
            pid=self.child.pid if self.child and running else None,
            address=self.address,
            health=self.health,
            detail=self.detail,
            restarts=self.restarts,
            since=timestamp(self.child.started_at) if self.child else "",
        )


class Supervisor:
    """Runs the parts of one mesh."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        state: StateFolder,
        say: Say,
        changed: Callable[[], None],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Takes the parts; nothing starts yet.

        Args:
            parts: Those that others need come first.
            state: Where logs and events go; its lock is held by the caller.
            say: Tells the user.
            changed: Called when any part's status has changed.
            environment: Added to every part's.
        """
        self.parts = list(parts)
        self.hurry = asyncio.Event()
        """Set to end everything at once instead of in an orderly way."""
        self._by_name = {part.name: part for part in self.parts}
        self._state = state
        self._say = say
        self._changed = changed
        self._environment = dict(environment or {}) | {MARK: state.id}
        self._guard: asyncio.subprocess.Process | None = None

    async def run(self, *, up: Callable[[], Awaitable[None]], stopping: asyncio.Event) -> None:
        """Starts everything, calls `up`, and keeps everything running until `stopping` is set.

        However it is left, nothing runs any more afterwards.

        Raises:
            MeshError: Something did not start.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._stand_guard())]
                tasks += [group.create_task(self._keep(part)) for part in self.parts]
                tasks.append(group.create_task(self._look_after_health()))
                started = group.create_task(self._all_ready(up))
                await _first_of(group, started, stopping)
                await stopping.wait()
                for task in (*tasks, started):
                    task.cancel()
        except BaseExceptionGroup as failures:
            expected, other = failures.split(MeshError)
            if expected is None or other is not None:
                raise
            raise _first_leaf(expected) from failures
        finally:
            await self._end()

    async def _all_ready(self, up: Callable[[], Awaitable[None]]) -> None:
        for part in self.parts:
            await part.ready.wait()
        await up()

    # ------------------------------------------------------------------ keeping one part

    async def _keep(self, part: Part) -> None:
        backoff = _BACKOFF_FIRST_SECONDS
        while True:
            first = part.restarts == 0
            self._set(part, "starting")
            began = time.monotonic()
            try:
                part.child = None
                await part.server.prepare()
                spent = time.monotonic() - began
                for need in (*part.needs, *(part.first_after if first else ())):
                    await self._by_name[need].ready.wait()
                began = time.monotonic() - spent  # waiting for others is not its own time
                await self._start(part, first=first)
            except (MeshError, OSError) as error:
                if part.child is not None:
                    await part.child.stop(grace_seconds=0)
                if first and isinstance(error, MeshError):
                    raise
                if first:
                    raise MeshError(f"{part.name} cannot be started: {error}") from error
                self._set(part, "restarting", str(error).splitlines()[0])
                self._tell(f"{part.name} did not come back: {error}", "warning")
            else:
                took = time.monotonic() - began
                again = "" if first else " again"
                self._tell(f"{part.name} ready{again} on {part.address} ({took:.2f} s)", "good")
                ended = await self._until_it_ends(part)
                self._tell(f"{part.name} died ({ended})", "warning")
                if time.monotonic() - began > _CALM_SECONDS:
                    backoff = _BACKOFF_FIRST_SECONDS
            part.restarts += 1
            self._set(part, "restarting", part.detail)
            self._tell(f"{part.name} is started again in {backoff:.1f} s", "progress")
            await asyncio.sleep(backoff)
            backoff = min(backoff * 2, _BACKOFF_MAX_SECONDS)

    async def _start(self, part: Part, *, first: bool) -> None:
        command = part.server.command()
        command = replace(
            command,
            log=self._state.log_of(part.name),
            environment={**command.environment, **self._environment},
        )
        child = part.child = await spawn(command)
        self._changed()
        await child.until(part.server.ready, within_seconds=part.server.ready_within_seconds)
        if first and part.once_ready is not None:
            await part.once_ready()
        part.ready.set()
        self._set(part, "healthy")

    async def _until_it_ends(self, part: Part) -> str:
        if part.child is None:
            raise RuntimeError(f"{part.name} was not started")
        code = await part.child.wait()
        part.ready.clear()
        part.child.kill_group()
        self._set(part, "restarting", exit_words(code))
        return exit_words(code)

    async def _look_after_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_EVERY_SECONDS)
            standing = [part for part in self.parts if part.ready.is_set()]
            await asyncio.gather(*(self._check(part) for part in standing))

    async def _check(self, part: Part) -> None:
        try:
            async with asyncio.timeout(3.0):
                await part.server.ready()
        except (NotReadyError, TimeoutError, OSError) as error:
            if part.ready.is_set():
                self._set(part, "unhealthy", str(error) or "no answer within 3 s")
        else:
            if part.ready.is_set():
                self._set(part, "healthy")

    def _set(self, part: Part, health: str, detail: str = "") -> None:
        if (part.health, part.detail) == (health, detail):
            return
        before, part.health, part.detail = part.health, health, detail
        if "unhealthy" in (before, health) and part.ready.is_set():
            self._tell(f"{part.name} is {health} {detail}".rstrip(), "warning")
        self._changed()

    def _tell(self, text: str, level: Level) -> None:
        self._state.record(text)
        self._say(text, level)

    # ------------------------------------------------------------------ the end

    async def _end(self) -> None:
        hurried = asyncio.create_task(self.hurry.wait())
        try:
            for rank in sorted({part.stop_rank for part in self.parts}):
                ending = [part for part in self.parts if part.stop_rank == rank and part.child]
                for part in ending:
                    part.ready.clear()
                    self._set(part, "stopping")
                await asyncio.gather(*(self._end_part(part, hurried) for part in ending))
        finally:
            hurried.cancel()
            # Whatever escaped, such as a child of a start that was cut short.
            left = processes_of(self._state.id, cluster_of(self._state))
            for process in end(left, within_seconds=2.0):
                self._tell(f"had to kill {process.command} ({process.pid})", "warning")
            await self._dismiss_guard()

    async def _end_part(self, part: Part, hurried: asyncio.Task[Literal[True]]) -> None:
        child = part.child
        if child is None or child.exit_code is not None:
            return
        if part.before_stop is not None and not self.hurry.is_set():
            with contextlib.suppress(NotReadyError):
                await part.before_stop()
        stop = asyncio.create_task(child.stop())
        await asyncio.wait({stop, hurried}, return_when=asyncio.FIRST_COMPLETED)
        if not stop.done():
            child.signal(child.command.hurry_signal)
        if not await stop and not self.hurry.is_set():
            self._tell(f"{part.name} did not end by itself and was killed", "warning")

    # ------------------------------------------------------------------ the guardian

    async def _stand_guard(self) -> None:
        """Keeps a guardian: the process that tidies up when this one is killed."""
        while True:
            self._guard = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "meshctl.guardian",
                str(self._state.path),
                self._state.id,
                str(cluster_of(self._state)),
                cwd=self._state.path,
                env={"PYTHONPATH": import_roots()},
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
            await self._guard.wait()
            self._state.record("the guardian died and is replaced")
            await asyncio.sleep(_BACKOFF_FIRST_SECONDS)

    async def _dismiss_guard(self) -> None:
        guard = self._guard
        if guard is None or guard.stdin is None or guard.returncode is not None:
            return
        with contextlib.suppress(ConnectionError):
            guard.stdin.write(b"done")
            await guard.stdin.drain()
            guard.stdin.close()
        await guard.wait()


async def _first_of(
    group: asyncio.TaskGroup, task: asyncio.Task[None], event: asyncio.Event
) -> None:
    waiting = group.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def _first_leaf(group: BaseExceptionGroup[MeshError]) -> MeshError:
    # A process's own failure says more than what failed because of it.
    leaves: list[MeshError] = []
    pending: list[BaseException] = [group]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        elif isinstance(error, MeshError):
            leaves.append(error)
    return next((leaf for leaf in leaves if isinstance(leaf, ProcessFailedError)), leaves[0])


def clear_leftovers(state: StateFolder) -> int:
    """Ends what a killed supervisor left in this state, and answers how many processes it was.

    The caller holds the lock.
    """
    found = processes_of(state.id, cluster_of(state))
    end(found, within_seconds=6.0)
    state.clear_run()
    return len(found)


def cluster_of(state: StateFolder) -> Path:
    """Answers PostgreSQL's data folder, by which its processes are known."""
    return state.postgres / "data"
