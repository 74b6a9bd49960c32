"""A worker process as a Ray actor, in the shape that the supervisor's driver asks for."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import ray
from ray.exceptions import RayActorError

from cluster.actors import Refusal, WorkerActor, spawn
from cluster.processes import ProcessId, process_id
from cluster.supervisor import brief
from cluster.worker_build import WorkerSpec

log = logging.getLogger("baton.cluster")

STOP_TIMEOUT_S = 3.0


class RayWorker:
    """Its actor is made at once, so that the process starts and imports while the directory does the same.

    spec: asked for when the directory's address is known.
    """

    def __init__(
        self, *, name: str, spec: Callable[[], Awaitable[WorkerSpec]], near: str, user_path: str, num_gpus: float, threads: int
    ) -> None:
        self._spec = spec
        self._actor = spawn(WorkerActor, name=name, near=near, user_path=user_path, num_gpus=num_gpus)
        self._life = self._actor.life.remote()
        self._prepared = self._actor.prepare.remote(threads)
        self._process: ProcessId | None = None
        self.refusal: Refusal | None = None

    async def start(self) -> str | None:
        try:
            spec = await self._spec()
            await ref(self._prepared)
            answer = await ref(self._actor.start.remote(spec))
        except RayActorError as error:
            return f"the process ended while it started ({type(error).__name__})"
        except Exception as error:  # a bug of ours: the traceback is the worker's
            log.error("worker does not start", exc_info=error)
            return brief(error)
        if isinstance(answer, Refusal):
            self.refusal = answer
            return answer.message
        self._process = process_id(answer.pid)
        return None

    async def ended(self) -> str:
        try:
            await ref(self._life)
        except Exception as error:
            return f"the process ended ({type(error).__name__})"
        return "stopped"

    async def ping(self) -> None:
        await ref(self._actor.ping.remote())

    async def drain(self) -> None:
        with contextlib.suppress(RayActorError):
            await ref(self._actor.drain.remote())

    async def stop(self) -> None:
        with contextlib.suppress(Exception):  # it may be dead or hang: it ends in either case
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await ref(self._actor.stop.remote())
        self.kill()

    def kill(self) -> None:
        """By Ray, and by signal as well: a process that hangs does not hear of the first."""
        with contextlib.suppress(Exception):
            ray.kill(self._actor, no_restart=True)
        if self._process is not None and self._process.title.startswith(f"ray::{WorkerActor.__name__}"):
            self._process.signal(signal.SIGKILL)


async def ref(pending: Any) -> Any:
    """The value of an ObjectRef, awaited on any event loop."""
    return await asyncio.wrap_future(pending.future())


__all__ = ["RayWorker", "ref"]
