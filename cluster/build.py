"""From a config to a running cluster and back to nothing: what `baton serve` does, and what embeds it.

    start   model resolved, port held ─► Ray ─┬─► directory ─► workers register ─┐
                                              ├─► routers ───────────────────────┼─► GET /ready answers 200
                                              └─► Serve ─► gateway on the port ──┘
    stop    gateway drains ─► workers drain and end ─► routers, directory ─► Ray (of ours: every process) ─► files, port

What was started is ended, at any moment of the start as well; a stop takes 15 s at most.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from cluster.interrupts import Interrupted, Interrupts
from cluster.port import ReservedPort
from cluster.processes import ProcessId, kill_all
from cluster.reaper import Reaper
from cluster.run_directory import RunDirectory
from control.access import write_access
from control.config import ClusterConfig
from control.memory import available_memory_bytes
from control.run_files import RunFile, remove_run_file, write_run_file
from control.sections import DEMO_MODEL
from control.startup import Notice, Phase, PhaseBegan, PhaseDone, Report, ServerReady, ServerStopping
from engine.demo import DEMO_MODEL_ABOUT, DEMO_MODEL_DIR
from gateway.tracing import check_packages
from protocol.errors import ServiceError
from router import policies

if TYPE_CHECKING:
    from cluster.pieces import Pieces
    from cluster.ray_runtime import Guard, RayRuntime
    from cluster.worker_build import WrapTransport

log = logging.getLogger("baton.cluster")

STOP_DEADLINE_S = 14.0  # of the 15 a stop may take
READY_TIMEOUT_S = 600.0  # large weights from a slow disk; workers that fail are told of at once
READY_POLL_S = 0.05
FAILURE_POLL_S = 1.0


def serve(
    config: ClusterConfig,
    *,
    report: Report = lambda event: None,
    environ: Mapping[str, str] = os.environ,
    wrap_transport: WrapTransport | None = None,
) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop in order. On the main thread of a process.

    wrap_transport: for fault drills; see cluster.worker_build.

    Raises:
        ConfigError, ModelError, ServiceError: why it could not start; nothing is left behind then either.
    """
    cluster = Cluster(config, report=report, environ=environ, wrap_transport=wrap_transport)
    with Interrupts(force=cluster.force_stop) as interrupts:
        try:
            cluster.start(guard=interrupts.welcome)
            with interrupts.welcome():
                cluster.wait()
        except Interrupted as interrupted:
            report(ServerStopping(reason=interrupted.reason))
        finally:
            cluster.stop()


def start(config: ClusterConfig, *, report: Report = lambda event: None, environ: Mapping[str, str] = os.environ) -> Cluster:
    """A running cluster, for embedding and tests; the caller stops it (or uses it as a context). On the main thread of a process."""
    cluster = Cluster(config, report=report, environ=environ)
    try:
        cluster.start()
    except BaseException:
        cluster.stop(drain=False)
        raise
    return cluster


class Cluster:
    """One run: everything it holds, in the order it was taken."""

    def __init__(
        self, config: ClusterConfig, *, report: Report, environ: Mapping[str, str], wrap_transport: WrapTransport | None = None
    ) -> None:
        self.config = config
        self._wrap_transport = wrap_transport
        self._report = report
        self._environ = environ
        self._run: RunDirectory | None = None
        self._reaper: Reaper | None = None
        self._port: ReservedPort | None = None
        self._runtime: RayRuntime | None = None
        self._pieces: Pieces | None = None
        self._announced = False
        self._notices: list[str] = []
        self._stopped = False

    @property
    def url(self) -> str:
        """Where OpenAI clients point: "http://127.0.0.1:8000" (they add /v1)."""
        assert self._port is not None, "the cluster was not started"
        return self._port.url

    def worker_pids(self) -> dict[str, int]:
        """Process of each registered worker."""
        return {} if self._pieces is None else {name: address.pid for name, address in self._pieces.workers.items()}

    def service_pids(self) -> dict[str, int]:
        """Process of the directory, of each router and of each gateway."""
        return {} if self._pieces is None else self._pieces.service_pids()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # --- start ------------------------------------------------------------------------------------------------------

    def start(self, *, guard: Guard = nullcontext) -> None:
        """Until requests are answered. `guard` is entered around whatever takes long: an interrupt may come there and only there."""
        self._run = RunDirectory()
        self._reaper = Reaper(self._run)
        http = self.config.http
        self._port = ReservedPort(http.host, http.port, locks=self._run.root)  # before anything slow is even imported
        for spec in filter(None, (self.config.router.policy, self.config.router.decode_policy)):
            _check_policy(spec)
        check_packages(self.config.gateway.otlp_traces_endpoint)
        with self._phase(Phase.MODEL, f"looking for {self.config.model.path}") as done, guard():
            from control.compose import compose_worker, pinned

            model_dir = _find_model(self.config)
            plan = compose_worker(self.config, model_dir, memory_bytes=available_memory_bytes())
            self.config = pinned(self.config, plan)
            what = DEMO_MODEL_ABOUT if self.config.model.path == DEMO_MODEL else plan.model.architecture
            done.append(f"{what}, {plan.num_kv_blocks} KV blocks a worker")
        with self._phase(Phase.RAY, self.config.ray.address or "starting a private Ray") as done:
            self._runtime = self._start_ray(guard)
            done.append(self._runtime.address)
        from cluster.pieces import Pieces

        self._pieces = Pieces(
            self.config,
            model_dir=model_dir,
            run=self._run,
            port=self._port,
            runtime=self._runtime,
            tell=self._notices.append,
            wrap_transport=self._wrap_transport,
        )
        workers = self.config.workers
        asked = f"{workers.prefill_workers} prefill, {workers.decode_workers} decode, {workers.mixed_workers} mixed"
        with self._phase(Phase.WORKERS, asked) as done, guard():
            self._pieces.start()
            self._wait_for(self._pieces.workers_are_up)
            done.append(asked)
        with self._phase(Phase.ENDPOINT, f"opening {self.url}") as done, guard():
            self._wait_for(self._answers)
            done.append(self.url)
        self._announce()

    def wait(self) -> None:
        """Until the main thread is interrupted, or nothing can be served any more.

        Raises:
            ServiceError: Ray's processes have ended.
        """
        assert self._pieces is not None and self._runtime is not None
        while True:
            time.sleep(0.2)
            self._tell_notices()
            self._runtime.check()

    def _start_ray(self, guard: Guard) -> RayRuntime:
        from cluster.ray_runtime import RayRuntime

        assert self._run is not None
        namespace = self.config.ray.namespace or f"baton-{self._run.id}"
        if self.config.ray.address is not None:
            return RayRuntime.join(self._run, self.config.ray.address, namespace=namespace, guard=guard)
        return RayRuntime.start(self._run, namespace=namespace, temp_dir=self.config.ray.temp_dir, guard=guard)

    def _wait_for(self, happened: Callable[[], bool]) -> None:
        """Polls; ends early with the reason when a part cannot be started at all."""
        assert self._pieces is not None
        deadline_s = time.monotonic() + READY_TIMEOUT_S
        next_look_s = 0.0
        while not happened():
            self._tell_notices()
            if time.monotonic() >= next_look_s:
                next_look_s = time.monotonic() + FAILURE_POLL_S
                self._pieces.raise_failure()
            if time.monotonic() > deadline_s:
                raise ServiceError(f"not ready after {READY_TIMEOUT_S:g} s; see the logs below {self._run and self._run.path}")
            time.sleep(READY_POLL_S)

    def _answers(self) -> bool:
        assert self._port is not None
        host = self._port.url.removeprefix("http://").rsplit(":", 1)[0].strip("[]")
        connection = http.client.HTTPConnection(host, self._port.port, timeout=2.0)
        try:
            connection.request("GET", "/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _announce(self) -> None:
        assert self._runtime is not None and self._pieces is not None and self._run is not None
        config, workers = self.config, self.config.workers
        write_access(self._pieces.access, self._run.access)
        run = RunFile(
            pid=os.getpid(),
            url=self.url,
            namespace=self._runtime.namespace,
            started=time.time(),
            model_id=config.model.model_id,
            access=str(self._run.access),
        )
        write_run_file(run, self._environ)
        self._announced = True
        self._report(
            ServerReady(
                url=self.url,
                model_id=config.model.model_id,
                needs_api_key=bool(config.gateway.api_keys),
                prefill_workers=workers.prefill_workers,
                decode_workers=workers.decode_workers,
                mixed_workers=workers.mixed_workers,
            )
        )

    @contextlib.contextmanager
    def _phase(self, phase: Phase, detail: str) -> Iterator[list[str]]:
        """Reports begin and end; what was appended to the list is the detail of the end."""
        done: list[str] = []
        self._report(PhaseBegan(phase=phase, detail=detail))
        yield done
        self._report(PhaseDone(phase=phase, detail=done[-1] if done else detail))

    def _tell_notices(self) -> None:
        while self._notices:
            self._report(Notice(text=self._notices.pop(0)))

    # --- stop -------------------------------------------------------------------------------------------------------

    def stop(self, *, drain: bool = True) -> None:
        """End everything; a second call does nothing.

        drain: let open streams end first, for `supervisor.shutdown_drain_s`.
        """
        if self._stopped:
            return
        self._stopped = True
        deadline_s = time.monotonic() + STOP_DEADLINE_S
        if self._announced:
            remove_run_file(os.getpid(), self._environ)
        if self._pieces is not None:
            self._pieces.stop(drain=drain and self._announced, deadline_s=deadline_s - 4.0)
        left: list[ProcessId] = []
        if self._runtime is not None:
            left = self._runtime.stop(deadline_s=max(2.0, deadline_s - time.monotonic()))
        if self._port is not None:
            self._port.release()
        if self._run is not None:
            self._run.close()
        if self._reaper is not None:
            self._reaper.close()
        if left:
            raise ServiceError(f"{len(left)} processes did not end: {', '.join(str(p.pid) for p in left)}; end them with kill -9")

    def force_stop(self) -> None:
        """For a user who will not wait: end every process of the run and its files, ask nobody."""
        if self._runtime is not None:
            kill_all(self._runtime.processes, grace_s=0.0, deadline_s=2.0)
        if self._announced:
            remove_run_file(os.getpid(), self._environ)
        if self._port is not None:
            self._port.release()
        if self._run is not None:
            self._run.close()


def _check_policy(spec: str) -> None:
    """A misspelt one of ours is told before anything is started; a user's own is imported by the router alone.

    Raises:
        ConfigError: no such policy, or no such parameter of it.
    """
    name, _ = policies.split(spec)
    if ":" not in name:
        policies.load(spec)


def _find_model(config: ClusterConfig) -> Path:
    """The checkpoint's directory; downloaded first where it has to be."""
    if config.model.path == DEMO_MODEL:
        return DEMO_MODEL_DIR
    from engine.hub import resolve_model

    return resolve_model(
        config.model.path,
        revision=config.model.revision,
        cache_dir=config.hub.cache_dir,
        token=config.hub.token,
        offline=config.hub.offline,
        endpoint=config.hub.endpoint,
    )


__all__ = ["Cluster", "serve", "start"]
