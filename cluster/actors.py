"""Ray actors as hosts: each puts one of our services on a loop thread of its process, and adds nothing of its own.

Ray starts the process, tells us of its death and ends it with its driver. Everything else goes over our own sockets: a Ray call
costs 700 us, a framed message 15. `max_restarts=0`: a restart by Ray would be told 1.8 s late, our supervisor starts a fresh one.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle

from cluster.event_log import log_events
from cluster.loop_thread import LoopThread
from protocol.errors import BatonError
from router.policies.user_path import import_last_from

if TYPE_CHECKING:
    from cluster.router_build import RouterSpec
    from cluster.worker_build import WorkerSpec
    from cluster.worker_host import WorkerHost

# An actor's share of Ray's logical CPUs: packing is ours, Ray must only never make one wait.
CPU_SHARE = 0.001
# start, life, drain and a ping at once, one to spare
CONCURRENT_CALLS = 5
DRAIN_POLL_S = 0.02
CLOSE_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostAddress:
    """Where an actor's service listens, and in which process."""

    host: str
    port: int
    pid: int
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """A start that failed for a reason to tell the user: the kind of BatonError and its text. Others raise."""

    kind: str
    message: str


class _Host:
    """What the actors share: a loop thread, and a `life` call that ends when the actor does."""

    def __init__(self, user_path: str) -> None:
        if user_path:
            import_last_from(user_path)
        log_events()
        self._loop = LoopThread("baton-loop")
        self._ended = threading.Event()

    def ping(self) -> int:
        return os.getpid()

    def life(self) -> None:
        """Pending while the actor lives: its failure is Ray's word of our death, 10 ms after it."""
        self._ended.wait()

    def stop(self) -> None:
        """Close the service; the caller ends the process."""
        self._close()
        self._ended.set()

    def _close(self) -> None:
        raise AssertionError("each host closes its own service")


class DirectoryHost(_Host):
    def start(self, secret: bytes, host: str, port: int) -> HostAddress:
        from cluster.directory import Directory

        epoch = time.time_ns()
        self._directory = Directory(secret=secret, epoch=epoch)
        self._loop.run(self._directory.start(host=host, port=port), timeout_s=CLOSE_TIMEOUT_S)
        return HostAddress(host=self._directory.host, port=self._directory.port, pid=os.getpid(), epoch=epoch)

    def _close(self) -> None:
        async def close() -> None:
            self._directory.close()

        self._loop.run(close(), timeout_s=CLOSE_TIMEOUT_S)


class RouterHost(_Host):
    def start(self, spec: RouterSpec) -> HostAddress | Refusal:
        from cluster.router_build import build_router

        try:
            self._router = build_router(spec)
        except BatonError as error:
            return Refusal(kind=type(error).__name__, message=str(error))
        address = self._loop.run(self._router.start(), timeout_s=CLOSE_TIMEOUT_S)
        return HostAddress(host=address.host, port=address.port, pid=address.pid, epoch=address.epoch)

    def turns(self, within_s: float) -> bool:
        """True when the loop comes round: a policy that does not return keeps it from that."""
        try:
            self._loop.run(asyncio.sleep(0), timeout_s=within_s)
        except TimeoutError:
            return False
        return True

    def _close(self) -> None:
        self._loop.run(self._router.close(), timeout_s=CLOSE_TIMEOUT_S)


class WorkerActor(_Host):
    _host: WorkerHost | None = None

    def prepare(self, threads: int) -> None:
        """Import what is slow to import, while the directory is still starting."""
        import torch

        import cluster.worker_build  # noqa: F401

        torch.set_num_threads(threads)

    def start(self, spec: WorkerSpec) -> HostAddress | Refusal:
        """Load and register. Idempotent it is not: one start a process."""
        from cluster.worker_build import build_worker

        async def build_and_start() -> Any:
            self._host = build_worker(spec)
            return await self._host.start()

        try:
            address = self._loop.run(build_and_start())
        except BatonError as error:
            return Refusal(kind=type(error).__name__, message=str(error))
        return HostAddress(host=address.host, port=address.port, pid=os.getpid(), epoch=address.epoch)

    def drain(self) -> None:
        """Admit nothing new and return when nothing is left: no sequence, and no block a target still reads."""
        host = self._host
        if host is None:
            return
        self._loop.loop.call_soon_threadsafe(host.drain)
        while not self._ended.wait(DRAIN_POLL_S):
            snapshot = self._loop.run(_snapshot(host), timeout_s=CLOSE_TIMEOUT_S)
            if not (snapshot.num_running or snapshot.num_waiting or snapshot.num_blocks_leased):
                return

    def _close(self) -> None:
        if self._host is not None:
            self._loop.run(self._host.close(), timeout_s=CLOSE_TIMEOUT_S)


async def _snapshot(host: WorkerHost) -> Any:
    return host.snapshot()


def spawn(host_class: type[_Host], *, name: str, near: str, user_path: str = "", num_gpus: float = 0.0) -> ActorHandle[Any]:
    """A fresh actor of `host_class` in this job's namespace; it ends with this process, which owns it.

    near: Ray's name of a node's address resource ("node:10.0.0.1"): it runs there.
    user_path: a directory to import from when a module is nowhere else; "" for none.
    """
    options = {
        "name": name,
        "num_cpus": CPU_SHARE,
        "num_gpus": num_gpus,
        "resources": {near: CPU_SHARE},
        "max_restarts": 0,
        "max_task_retries": 0,
        "max_concurrency": CONCURRENT_CALLS,
    }
    return ray.remote(host_class).options(**options).remote(user_path)


__all__ = ["DirectoryHost", "HostAddress", "Refusal", "RouterHost", "WorkerActor", "spawn"]
