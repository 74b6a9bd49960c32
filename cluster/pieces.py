"""The parts of a run that live in Ray, from the driver's side: made all at once, watched, and taken down in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import ray

import protocol.errors
from cluster.actors import DirectoryHost, HostAddress, Refusal, spawn
from cluster.gateway_build import GatewaySpec
from cluster.loop_thread import LoopThread
from cluster.port import ReservedPort
from cluster.processes import ProcessId, process_id, wait_gone
from cluster.ray_router import RayRouter
from cluster.ray_runtime import RayRuntime
from cluster.ray_worker import RayWorker, ref
from cluster.recorder import RecordSpec
from cluster.router_build import HUNG_NOTE, RouterSpec, least_work_instead
from cluster.run_directory import RunDirectory
from cluster.serve_app import Endpoint
from cluster.supervisor import SupervisorDriver, brief, keep_up
from cluster.worker_build import WorkerSpec, WrapTransport
from control.access import Access
from control.compose import pool_sizes
from control.config import ClusterConfig
from control.supervisor import StartWorker, Supervisor
from protocol.errors import BatonError, ServiceError
from protocol.links import MembershipWatch
from protocol.messages import Membership
from protocol.wire import Identity
from protocol.worker import WorkerAddress, WorkerId

log = logging.getLogger("baton.cluster")

StartService = Callable[[], Awaitable[Callable[[], Awaitable[str]]]]  # see keep_up
CALL_TIMEOUT_S = 3.0  # of a Ray call that ends something: a Ray that hangs must not hold up the end


class Pieces:
    """Directory, routers, workers and gateways of one run.

    Ray's calls are made from a loop thread, Serve's (which block) from threads of their own; the public methods are called by the
    thread that owns the run.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        model_dir: Path,
        run: RunDirectory,
        port: ReservedPort,
        runtime: RayRuntime,
        tell: Callable[[str], None],
        wrap_transport: WrapTransport | None = None,
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._run = run
        self._port = port
        self._runtime = runtime
        self._tell = tell
        self._wrap_transport = wrap_transport
        self._secret = secrets.token_bytes(32)
        self._user_path = str(Path.cwd())
        self._near = f"node:{ray.util.get_node_ip_address()}"
        self._loop = LoopThread("baton-driver")
        self._directory: asyncio.Future[HostAddress] = self._loop.run(_future())
        self._directory_actor: Any = None
        self._directory_port = 0
        self._routers: dict[str, RayRouter] = {}  # the newest of each name
        self._watch: MembershipWatch | None = None
        self._membership = Membership(version=0, workers=(), services=())
        self._launched: list[RayWorker] = []
        self._supervisor = SupervisorDriver(Supervisor(config.supervisor), launch=self._launch, tell=tell)
        self._keepers: list[asyncio.Task[None]] = []
        self._opening: threading.Thread | None = None
        self._endpoint: Endpoint | None = None
        self._endpoint_error: BaseException | None = None
        self._ending = False
        self._failure: BatonError | None = None

    # --- what the driver asks ---------------------------------------------------------------------------------------

    @property
    def workers(self) -> dict[WorkerId, WorkerAddress]:
        return self._supervisor.addresses

    @property
    def access(self) -> Access:
        """For an operator, once workers are up."""
        directory = self._directory.result()
        return Access(directory_host=directory.host, directory_port=directory.port, secret=self._secret)

    def service_pids(self) -> dict[str, int]:
        pids = {service.name: service.pid for service in self._membership.services}
        if self._directory.done() and not self._directory.cancelled():
            pids["directory"] = self._directory.result().pid
        return pids

    def workers_are_up(self) -> bool:
        return len(self.workers) >= sum(pool_sizes(self._config).values())

    def raise_failure(self) -> None:
        """Ends a start that cannot succeed.

        Raises:
            BatonError: as the worker, the router or the gateway raised it; ServiceError for a bug.
        """
        for worker in self._launched:
            if worker.refusal is not None:
                raise _as_error(worker.refusal)
        if self._supervisor.failures:
            raise ServiceError(f"a worker does not start: {self._supervisor.failures[-1]}")
        if self._failure is not None:
            raise self._failure
        if self._endpoint_error is not None:
            raise ServiceError(f"the gateway does not start: {brief(self._endpoint_error)}") from self._endpoint_error
        if self._endpoint is not None and (reason := self._endpoint.failure()) is not None:
            raise ServiceError(f"the gateway does not start: {reason}")

    # --- start ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Returns at once; `workers_are_up` and /ready tell when it is done."""
        self._loop.run(self._start())
        self._opening = threading.Thread(target=self._open_endpoint, name="baton-serve", daemon=True)
        self._opening.start()

    async def _start(self) -> None:
        self._supervisor.start(pool_sizes(self._config))
        services: dict[str, StartService] = {"directory": self._start_directory}
        services |= {f"router-{index}": partial(self._start_router, index) for index in range(self._config.cluster.routers)}
        for name, service in services.items():
            self._keepers.append(asyncio.ensure_future(keep_up(name, service, tell=self._tell)))

    async def _start_directory(self) -> Callable[[], Awaitable[str]]:
        self._directory_actor = actor = spawn(DirectoryHost, name=f"directory-{secrets.token_hex(2)}", near=self._near)
        address: HostAddress = await ref(actor.start.remote(self._secret, "127.0.0.1", self._directory_port))
        if self._watch is None:
            self._directory_port = address.port
            identity = Identity(name="supervisor", kind="supervisor", epoch=time.time_ns())
            self._watch = MembershipWatch(identity, self._secret, host=address.host, port=address.port, on_change=self._membership_changed)
            self._watch.start()
            self._directory.set_result(address)
        else:
            self._directory = await _future(address)
        return partial(_ended, actor)

    async def _start_router(self, index: int) -> Callable[[], Awaitable[str]]:
        name = f"router-{index}"
        directory = await self._directory
        before = self._routers.get(name)
        was_hung = before is not None and before.hung
        config, notes = (least_work_instead(self._config.router), (HUNG_NOTE,)) if was_hung else (self._config.router, ())
        router = RayRouter(name, near=self._near, user_path=self._user_path, hang_s=self._config.supervisor.router_hang_s)
        self._routers[name] = router
        spec = RouterSpec(
            config=config,
            notes=notes,
            directory_host=directory.host,
            directory_port=directory.port,
            secret=self._secret,
            seed=(self._config.workers.seed or 0) + index,  # each draws for itself
            name=name,
            record=self._record_spec(),
        )
        refusal = await router.start(spec)
        if refusal is not None:
            self._failure = _as_error(refusal)
            await asyncio.Event().wait()  # the run ends with this error; trying again would say the same
        return router.ended

    def _record_spec(self) -> RecordSpec | None:
        recording = self._config.recording
        return None if recording.dir is None else RecordSpec(folder=Path(self._user_path) / recording.dir, max_bytes=recording.max_bytes)

    def _launch(self, command: StartWorker) -> RayWorker:
        workers = self._config.workers
        worker = RayWorker(
            name=command.worker_id,
            spec=partial(self._worker_spec, command),
            near=self._near,
            user_path=self._user_path,
            num_gpus=1.0 if workers.device == "cuda" and not self._runtime.owned else 0.0,
            threads=workers.threads,
        )
        self._launched = [*self._launched[-63:], worker]
        return worker

    async def _worker_spec(self, command: StartWorker) -> WorkerSpec:
        directory = await self._directory
        return WorkerSpec(
            config=self._config,
            model_dir=self._model_dir,
            worker_id=command.worker_id,
            role=command.role,
            directory_host=directory.host,
            directory_port=directory.port,
            secret=self._secret,
            run_dir=self._run.kv,
            wrap_transport=self._wrap_transport,
        )

    def _membership_changed(self, membership: Membership) -> None:
        self._membership = membership
        self._supervisor.membership_changed(membership)

    def _open_endpoint(self) -> None:
        """On a thread of its own: Serve's calls block."""
        try:
            endpoint = Endpoint.start(f"baton-{self._run.id}")
            while not self._directory.done():
                if self._ending:
                    return
                time.sleep(0.01)
            directory = self._directory.result()
            spec = GatewaySpec(
                config=self._config,
                model_dir=self._model_dir,
                host=self._port.host,
                port=self._port.port,
                directory_host=directory.host,
                directory_port=directory.port,
                secret=self._secret,
                salt=secrets.token_bytes(32),
                drain_s=self._config.supervisor.shutdown_drain_s,
                own_ray=self._runtime.owned,
                application=endpoint.application,
            )
            endpoint.deploy(spec, num_replicas=1, near=self._near)
            self._endpoint = endpoint
        except BaseException as error:
            self._endpoint_error = error

    # --- stop -------------------------------------------------------------------------------------------------------

    def stop(self, *, drain: bool, deadline_s: float) -> None:
        """End everything made here. Nothing raises: what does not end in time goes down with its Ray, or is killed.

        deadline_s: moment of the monotonic clock.
        """
        self._ending = True
        if self._opening is not None:  # Serve, called without a Ray, would start one: let it come back before Ray goes
            self._opening.join(timeout=max(0.0, deadline_s - time.monotonic()))
        gateways = self._gateway_processes()
        if self._endpoint is not None:
            _within(CALL_TIMEOUT_S, self._endpoint.remove)
            if drain or not self._runtime.owned:
                left_s = min(self._config.supervisor.shutdown_drain_s + CALL_TIMEOUT_S, deadline_s - time.monotonic())
                wait_gone(gateways, timeout_s=max(0.0, left_s))
        with contextlib.suppress(Exception):
            self._loop.run(self._stop(drain=drain, deadline_s=deadline_s), timeout_s=max(1.0, deadline_s - time.monotonic()))
        if self._endpoint is not None and not self._runtime.owned:
            _within(max(CALL_TIMEOUT_S, deadline_s - time.monotonic()), self._endpoint.leave)
        self._loop.close()

    async def _stop(self, *, drain: bool, deadline_s: float) -> None:
        for keeper in self._keepers:
            keeper.cancel()
        left_s = max(0.5, deadline_s - time.monotonic() - 1.0)
        await self._supervisor.shut_down(drain=drain, timeout_s=left_s)
        if self._watch is not None:
            await self._watch.close()
        for router in self._routers.values():
            router.kill()
        if self._directory_actor is not None:
            with contextlib.suppress(Exception):
                ray.kill(self._directory_actor, no_restart=True)

    def _gateway_processes(self) -> list[ProcessId]:
        pids = [service.pid for service in self._membership.services if service.kind == "gateway"]
        return [process for pid in pids if (process := process_id(pid)) is not None]


async def _future(value: Any = None) -> asyncio.Future[Any]:
    future = asyncio.get_running_loop().create_future()
    if value is not None:
        future.set_result(value)
    return future


async def _ended(actor: Any) -> str:
    try:
        await ref(actor.life.remote())
    except Exception as error:
        return brief(error)
    return "stopped"


def _as_error(refusal: Refusal) -> BatonError:
    kind = getattr(protocol.errors, refusal.kind, ServiceError)
    assert issubclass(kind, BatonError)
    return kind(refusal.message)


def _within(timeout_s: float, call: Callable[[], None]) -> None:
    """Run `call`, which may hang with the Ray it talks to; give up on it after `timeout_s`."""

    def guarded() -> None:
        try:
            call()
        except Exception as error:
            log.warning("while stopping", exc_info=error)

    thread = threading.Thread(target=guarded, name="baton-stop", daemon=True)
    thread.start()
    thread.join(timeout_s)


__all__ = ["Pieces"]
