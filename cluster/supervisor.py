"""Performs what control/supervisor.py decides: starts worker processes, hears of their end from three sides, replaces them.

A worker is lost when Ray says its actor died (10 ms after the process), or when it left the directory (5 ms: the end of its
socket) and does not answer a ping. It is ready when it stands in the directory. The directory and the router are kept up here
too: each is started again at once, the directory on its old port, so everybody finds it by dialing on.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Protocol

from control.supervisor import (
    Command,
    DrainWorker,
    Event,
    PoolGaveUp,
    PoolResized,
    ShutdownStarted,
    StartWorker,
    StopWorker,
    Supervisor,
    Tick,
    WorkerDrained,
    WorkerLost,
    WorkerRegistered,
    WorkerStartFailed,
)
from protocol.messages import Membership
from protocol.worker import Role, WorkerAddress, WorkerId

log = logging.getLogger("baton.supervisor")

_COLOUR = re.compile("\x1b\\[[0-9;]*m")

TICK_S = 0.1
LEFT_GRACE_S = 1.0  # Ray's word usually comes within this after a socket's end
PING_TIMEOUT_S = 2.0
SERVICE_PAUSE_FIRST_S = 0.2
SERVICE_PAUSE_MAX_S = 5.0


class WorkerProcess(Protocol):
    """One worker from outside: cluster/build.py has it as a Ray actor, the tests as a plain process."""

    async def start(self) -> str | None:
        """Until it serves, or the reason why it does not."""
        ...

    async def ended(self) -> str:
        """Until the process has ended, for whatever reason; says which."""
        ...

    async def ping(self) -> None:
        """Returns if the process answers."""
        ...

    async def drain(self) -> None:
        """Until nothing is left to do there."""
        ...

    async def stop(self) -> None:
        """Close its service, then end the process."""
        ...

    def kill(self) -> None:
        """End the process at once."""
        ...


class SupervisorDriver:
    """All of it runs on one event loop. `launch` makes a process; `tell` hears what the user should know."""

    def __init__(self, core: Supervisor, *, launch: Callable[[StartWorker], WorkerProcess], tell: Callable[[str], None]) -> None:
        self._core = core
        self._launch = launch
        self._tell = tell
        self._processes: dict[WorkerId, WorkerProcess] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._in_directory: dict[WorkerId, WorkerAddress] = {}
        self._closed = asyncio.Event()
        self._ending = False
        self.failures: list[str] = []  # why starts failed, at most 16 kept

    @property
    def addresses(self) -> dict[WorkerId, WorkerAddress]:
        """Workers that are registered now."""
        return dict(self._in_directory)

    def start(self, sizes: dict[Role, int]) -> None:
        for role, size in sizes.items():
            if size:
                self._turn(PoolResized(role=role, size=size))
        self._spawn(self._tick())

    async def shut_down(self, *, drain: bool, timeout_s: float) -> None:
        """Drain (or not) and stop every worker; kills who is left at the timeout."""
        self._ending = True
        self._turn(ShutdownStarted(drain=drain))
        try:
            async with asyncio.timeout(timeout_s):
                await self._closed.wait()
        except TimeoutError:
            for process in self._processes.values():
                process.kill()
        for task in list(self._tasks):
            task.cancel()

    def membership_changed(self, membership: Membership) -> None:
        now_here = {address.worker_id: address for address in membership.workers}
        for worker_id in self._in_directory.keys() - now_here.keys():
            if worker_id in self._processes:
                self._spawn(self._look_after(worker_id))
        joined = now_here.keys() - self._in_directory.keys()
        self._in_directory = now_here
        for worker_id in sorted(joined):
            self._turn(WorkerRegistered(worker_id=worker_id))

    # --- turns ------------------------------------------------------------------------------------------------------

    def _turn(self, event: Event) -> None:
        for command in self._core.on(event, asyncio.get_running_loop().time()):
            self._perform(command)
        if self._core.is_closed:
            self._closed.set()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._turn(Tick())

    def _perform(self, command: Command) -> None:
        match command:
            case StartWorker():
                self._processes[command.worker_id] = process = self._launch(command)
                log.info("worker starts", extra={"worker_id": command.worker_id, "role": command.role.value})
                self._spawn(self._run(command.worker_id, process))
                self._spawn(self._await_end(command.worker_id, process))
            case DrainWorker():
                self._spawn(self._drain(command.worker_id))
            case StopWorker():
                self._stop(command)
            case PoolGaveUp():
                log.error("pool gave up", extra={"role": command.role.value, "reason": command.reason})
                self._tell(f"no more {command.role.value} workers are started: {command.reason}")

    def _stop(self, command: StopWorker) -> None:
        process = self._processes.get(command.worker_id)
        if process is None:
            return
        log.info("worker stops", extra={"worker_id": command.worker_id, "reason": command.reason, "force": command.force})
        if command.force:
            process.kill()
        else:
            self._spawn(process.stop())

    # --- one worker -------------------------------------------------------------------------------------------------

    async def _run(self, worker_id: WorkerId, process: WorkerProcess) -> None:
        reason = await process.start()
        if reason is not None and worker_id in self._processes:
            self.failures = [*self.failures[-15:], reason]
            self._gone(worker_id, WorkerStartFailed(worker_id=worker_id, reason=reason))
            process.kill()

    async def _await_end(self, worker_id: WorkerId, process: WorkerProcess) -> None:
        reason = await process.ended()
        if worker_id in self._processes:
            self._gone(worker_id, WorkerLost(worker_id=worker_id, reason=reason))

    async def _look_after(self, worker_id: WorkerId) -> None:
        """It left the directory: give Ray a moment to say why, then ask the worker itself."""
        await asyncio.sleep(LEFT_GRACE_S)
        process = self._processes.get(worker_id)
        if process is None or worker_id in self._in_directory:
            return
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await process.ping()
        except Exception as error:  # whatever it is, this worker does not answer
            if worker_id in self._processes and worker_id not in self._in_directory:
                process.kill()
                self._gone(worker_id, WorkerLost(worker_id=worker_id, reason=f"left the directory and does not answer: {brief(error)}"))

    async def _drain(self, worker_id: WorkerId) -> None:
        process = self._processes.get(worker_id)
        if process is not None:
            await process.drain()
            self._turn(WorkerDrained(worker_id=worker_id))

    def _gone(self, worker_id: WorkerId, event: WorkerLost | WorkerStartFailed) -> None:
        del self._processes[worker_id]
        log.info("worker is gone", extra={"worker_id": worker_id, "reason": event.reason})
        if not self._ending:
            self._tell(f"{worker_id} is gone: {event.reason}")
        self._turn(event)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("supervision failed", exc_info=error)


async def keep_up(name: str, start: Callable[[], Awaitable[Callable[[], Awaitable[str]]]], *, tell: Callable[[str], None]) -> None:
    """Start a service again whenever it ends, after a pause that doubles; cancelled at the end of the run.

    start: makes one, and gives a function that returns, with the reason, when that one has ended.
    """
    pause_s = SERVICE_PAUSE_FIRST_S
    loop = asyncio.get_running_loop()
    while True:
        began_s = loop.time()
        try:
            ended = await start()
            reason = await ended()
        except Exception as error:
            log.warning("service does not start", extra={"service": name}, exc_info=error)
            reason = brief(error)
        tell(f"the {name} ended ({reason}); starting another")
        if loop.time() - began_s > SERVICE_PAUSE_MAX_S:
            pause_s = SERVICE_PAUSE_FIRST_S
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, SERVICE_PAUSE_MAX_S)


def brief(error: BaseException) -> str:
    """One line of an error that may be a remote traceback in colours: its last one says what happened."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines else type(error).__name__


__all__ = ["SupervisorDriver", "WorkerProcess", "brief", "keep_up"]
