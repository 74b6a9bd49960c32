"""The router's process as a Ray actor, and a look at whether it still turns: a policy that never returns ends it.

A process that hangs keeps its sockets, so neither Ray nor the directory tells of it. Gateways place by themselves meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal

import ray

from cluster.actors import HostAddress, Refusal, RouterHost, spawn
from cluster.processes import ProcessId, process_id
from cluster.ray_worker import ref
from cluster.router_build import RouterSpec
from cluster.supervisor import brief

log = logging.getLogger("baton.cluster")

LOOK_INTERVAL_S = 1.0
CALL_SLACK_S = 1.0  # of Ray's call around the look


class RayRouter:
    """One router process. hang_s: a loop that does not turn for so long is taken to stand still."""

    def __init__(self, name: str, *, near: str, user_path: str, hang_s: float) -> None:
        self._actor = spawn(RouterHost, name=f"{name}-{secrets.token_hex(2)}", near=near, user_path=user_path)
        self._hang_s = hang_s
        self._process: ProcessId | None = None
        self.hung = False  # it was ended because it stood still

    async def start(self, spec: RouterSpec) -> Refusal | None:
        """Until it serves, or why it never will.

        Raises:
            RayActorError: the process ended.
        """
        answer: HostAddress | Refusal = await ref(self._actor.start.remote(spec))
        if isinstance(answer, Refusal):
            return answer
        self._process = process_id(answer.pid)
        return None

    async def ended(self) -> str:
        """Until the process has ended, by itself or because it stood still; says which."""
        life = asyncio.ensure_future(ref(self._actor.life.remote()))
        life.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to hear it when a cluster stops
        while True:
            done, _ = await asyncio.wait((life,), timeout=LOOK_INTERVAL_S)
            if done:
                error = life.exception()
                return "stopped" if error is None else brief(error)
            if not await self._turns() and not life.done():
                self.hung = True
                log.error("the router stands still", extra={"hang_s": self._hang_s})
                self.kill()
                life.cancel()
                return f"it stood still for {self._hang_s:g} s, as with a policy that does not return"

    def kill(self) -> None:
        """By Ray, and by signal as well: a process that hangs does not hear of the first."""
        with contextlib.suppress(Exception):
            ray.kill(self._actor, no_restart=True)
        if self._process is not None and self._process.title.startswith(f"ray::{RouterHost.__name__}"):
            self._process.signal(signal.SIGKILL)

    async def _turns(self) -> bool:
        """False: its loop did not come round in time. An actor that died is `life`'s to tell."""
        try:
            async with asyncio.timeout(self._hang_s + CALL_SLACK_S):
                return bool(await ref(self._actor.turns.remote(self._hang_s)))
        except TimeoutError:
            return False
        except Exception:
            return True


__all__ = ["RayRouter"]
