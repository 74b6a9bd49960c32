"""A routed cluster in which things go wrong on demand: processes die, stand still and come back, links end and lag, copies spoil.

Each act does what it says and nothing else; who does what when is drawn in simulator/faults.py.
"""

from __future__ import annotations

from collections.abc import Callable

from control.config import ClusterConfig
from engine.step_time import StepShape, StepTimeModel
from protocol.messages import KvEvents
from protocol.worker import WorkerAddress
from simulator.estimate_error import EXACT, ReportedTimes
from simulator.routed_cluster import GATEWAY, LINK_S, RoutedCluster
from simulator.sim_network import SimConnection
from simulator.sim_processes import SimWorkerProcess

ROUTER = "router-0"
NOTICED_S = 0.005  # until the directory knows that a process is gone


class Pace:
    """A worker's step time, times what slows it down."""

    def __init__(self, model: StepTimeModel) -> None:
        self.slowness = 1.0
        self._model = model

    def step_s(self, shape: StepShape) -> float:
        return self.slowness * self._model.step_s(shape)


class FaultyCluster(RoutedCluster):
    """Workers read what their tokens call for, or are caught; gateways hear every snapshot.

    max_kept_kv_events: a router that missed more is told everything anew. on_start: told of each incarnation of a worker.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        policy: str = "",
        seed: int = 0,
        max_kept_kv_events: int,
        on_start: Callable[[SimWorkerProcess], None],
    ) -> None:
        self.paces: dict[str, Pace] = {}
        self.is_missing_kv_events: dict[str, float] = {}  # worker -> its frames of KV events are lost until then
        self.late_kv_events: dict[str, tuple[float, float]] = {}  # worker -> (until when, how late) they are
        self.on_kv_fault: Callable[[str, KvEvents], None] = lambda worker_id, frame: None
        self._max_kept_kv_events = max_kept_kv_events
        self._on_start = on_start
        self._unreachable: dict[frozenset[str], float] = {}  # workers that do not reach each other, until when
        super().__init__(config, policy=policy, seed=seed, is_checked=True)
        self.transport.is_reachable = self._is_reachable

    # --- processes ---

    def kill(self, worker_id: str) -> None:
        """kill -9: nothing is said, nothing is finished."""
        self.processes[worker_id].kill()
        self._announce_without(worker_id)

    def respawn(self, worker_id: str) -> None:
        """Another incarnation under the same name."""
        address = self.processes[worker_id].address
        self._start(worker_id, address.role, epoch=address.epoch + 1)
        self.announce()

    def restart_router(self, *, down_s: float) -> None:
        """A router that knows nothing comes `down_s` after the old one died."""
        self.router_process.kill()

        def come_back() -> None:
            self.router_process = self._start_router()
            self.router_process.follow(self.membership())
            self.announce()

        self.loop.call_later(down_s, come_back)

    def stop_router(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        process = self.router_process
        process.is_stopped = True
        for name in (GATEWAY, *self.workers):
            self.network.hold(ROUTER, name, seconds)

        def go_on() -> None:
            process.is_stopped = False

        self.loop.call_later(seconds, go_on)

    def stop_worker(self, worker_id: str, seconds: float) -> None:
        worker = self.workers[worker_id]
        worker.stop()
        for name in (GATEWAY, ROUTER):
            self.network.hold(worker_id, name, seconds)
        self.loop.call_later(seconds, worker.go_on)

    def announce(self) -> None:
        """The directory tells everybody."""
        membership = self.membership()
        self.loop.call_later(LINK_S, lambda: self.gateway.follow(membership))
        self.loop.call_later(LINK_S, lambda: self.router_process.follow(membership))

    # --- between workers ---

    def cut_workers(self, one: str, other: str, seconds: float) -> None:
        self._unreachable[frozenset((one, other))] = self.loop.now + seconds

    def _is_reachable(self, one: str, other: str) -> bool:
        return not self._unreachable or self._unreachable.get(frozenset((one, other)), 0.0) <= self.loop.now

    # --- how processes are made ---

    def _process(self, address: WorkerAddress) -> SimWorkerProcess:
        process = SimWorkerProcess(
            self.loop,
            self.network,
            address,
            reported=ReportedTimes(EXACT, seed=0, worker_id=address.worker_id),
            tells_gateways=True,
            max_kept_kv_events=self._max_kept_kv_events,
        )
        process.carry_kv_events = lambda connection, frame: self._carry(address.worker_id, connection, frame)
        return process

    def _step_time(self, worker_id: str) -> StepTimeModel:
        pace = self.paces[worker_id] = Pace(super()._step_time(worker_id))
        return pace

    def _started(self, process: SimWorkerProcess) -> None:
        self._on_start(process)

    def _carry(self, worker_id: str, connection: SimConnection, frame: KvEvents) -> None:
        """A frame of KV events: lost, late, or as it should be."""
        now = self.loop.now
        if self.is_missing_kv_events.get(worker_id, 0.0) > now:
            self.on_kv_fault(worker_id, frame)
            return
        until_s, late_s = self.late_kv_events.get(worker_id, (0.0, 0.0))
        if until_s > now:
            self.on_kv_fault(worker_id, frame)
            self.loop.call_later(late_s, lambda: connection.send(frame))
        else:
            connection.send(frame)

    def _announce_without(self, worker_id: str) -> None:
        epoch = self.processes[worker_id].address.epoch

        def notice() -> None:
            if self.processes[worker_id].address.epoch == epoch:
                self.announce()

        self.loop.call_later(NOTICED_S, notice)
