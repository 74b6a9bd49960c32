"""Faults by seed: which, when, whom, for how long; and which requests each of them hit, in which state of their attempt.

A fault counts where it took effect: a request lost its worker, a copy broke off, a word did not arrive. One that met nobody counts nothing.
Half of them wait for a state to come up, so that short states are hit as well as long ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum
from random import Random

from engine.core.executor import BatchPlan
from gateway.events import ClientGone, Event, RouterLost, Start, WorkerLost, WorkerSaid
from gateway.session import Session
from protocol.kv import KVHandoff
from protocol.lifecycle import AttemptState
from protocol.messages import Assigned, AttemptFailed, HandoffDone, KvEvents, OfferCompleted, Offered
from simulator.faulty_cluster import ROUTER, FaultyCluster
from simulator.routed_cluster import GATEWAY
from simulator.sim_processes import SimWorkerProcess
from simulator.sim_transport import NetworkFaults, TransferFault

LIVE_STATES = (AttemptState.QUEUED, AttemptState.PREFILLING, AttemptState.WAITING_KV, AttemptState.DECODING)


class Kind(Enum):
    KILL = "kill"  # a worker dies, and comes back as another epoch
    HANG = "hang"  # a worker or the router stands still for a while
    SLOW = "slow"  # a worker's steps take several times as long
    PARTITION = "partition"  # two processes do not hear each other: their connection ends, or what is on it waits
    RESET = "reset"  # a connection ends and what was on its way is lost; it is dialed again at once
    WORDS = "words"  # words between two workers are lost, or come late or twice
    PULL = "pull"  # copies break off, hang, or end long after their deadline
    CORRUPT = "corrupt"  # a copied block is not what its source holds
    KV_LOSS = "kv_loss"  # frames of KV events do not reach the router
    KV_LAG = "kv_lag"  # they come after the snapshots that tell of them
    ROUTER = "router"  # the router dies; another is rebuilt from the workers
    CANCEL = "cancel"  # a client goes away
    STEP = "step"  # a step fails


_ON_WORKER = "a queued attempt is on no worker, and nothing of it is on a link to one"
_NO_COPY = "nothing is copied for an attempt that has no place yet"
_COPIED = "whoever decodes has its blocks: copies that end later, and words about them, are of no account to it"
_BELIEF = "what the router believes of caches is read when an attempt is placed, and never again"

UNREACHABLE: dict[tuple[Kind, AttemptState], str] = {
    **{(kind, AttemptState.QUEUED): _ON_WORKER for kind in (Kind.KILL, Kind.SLOW, Kind.STEP)},
    **{(kind, AttemptState.QUEUED): _NO_COPY for kind in (Kind.PULL, Kind.CORRUPT, Kind.WORDS)},
    **{(kind, AttemptState.DECODING): _COPIED for kind in (Kind.PULL, Kind.CORRUPT, Kind.WORDS)},
    **{(kind, state): _BELIEF for kind in (Kind.KV_LOSS, Kind.KV_LAG) for state in LIVE_STATES[1:]},
    (Kind.STEP, AttemptState.WAITING_KV): "an attempt whose blocks are on their way is in no step",
}
REACHABLE = tuple((kind, state) for kind in Kind for state in LIVE_STATES if (kind, state) not in UNREACHABLE)

NUM_KINDS = 3  # that must take effect in a run
_SURE = (Kind.ROUTER, Kind.SLOW, Kind.KILL, Kind.RESET, Kind.CANCEL)  # they meet whoever is there

_SOON_S = 0.0015  # a fault that waited for a state comes within this
_BRINGS: dict[AttemptState, tuple[type, ...]] = {  # by the event that moves a session into it
    AttemptState.QUEUED: (Start,),
    AttemptState.PREFILLING: (Assigned,),
    AttemptState.WAITING_KV: (Offered, OfferCompleted),
    AttemptState.DECODING: (HandoffDone,),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One fault of a plan. `awaits`: it comes once a session reaches this state, after `at_s`; None: at `at_s`."""

    kind: Kind
    at_s: float
    awaits: AttemptState | None


def draw_plan(rng: Random, kinds: tuple[Kind, ...], *, begin_s: float, end_s: float) -> list[Injection]:
    """Between five and eight of these kinds, some three of each, in order of time."""
    chosen = rng.sample(kinds, min(len(kinds), rng.randint(5, 8)))
    plan = []
    for kind in chosen:
        states = [state for state in LIVE_STATES if (kind, state) not in UNREACHABLE]
        for _ in range(rng.randint(2, 4) * (4 if kind is Kind.CANCEL else 1)):
            awaits = rng.choice(states) if rng.random() < 0.5 else None
            plan.append(Injection(kind=kind, at_s=rng.uniform(begin_s, end_s), awaits=awaits))
    return sorted(plan, key=lambda injection: injection.at_s)


class FaultInjector:
    """Performs a plan on a cluster. `hits`: requests by fault and state; `effects`: how often each fault met anybody.

    A run in which fewer than `NUM_KINDS` of `kinds` have met anybody by one of the times `top_up_s` gets some that do.
    """

    def __init__(
        self, cluster: FaultyCluster, plan: list[Injection], rng: Random, *, kinds: tuple[Kind, ...], top_up_s: list[float]
    ) -> None:
        self.hits: Counter[tuple[Kind, AttemptState]] = Counter()
        self.effects: Counter[Kind] = Counter()
        self._cluster = cluster
        self._rng = rng
        self._kinds = kinds
        self._causes: dict[str, Kind] = {}  # worker -> why its link to the gateway ended last
        self._waiting: list[Injection] = []  # for a state
        self._transfer_until_s: dict[Kind, float] = {}
        self._blind: dict[str, tuple[Kind, int]] = {}  # worker -> the router misses its KV events up to this one
        self._router_cause = Kind.ROUTER
        self._router_stands_until_s = 0.0
        self._step_draw = Random(rng.getrandbits(32))
        cluster.transport.on_fault = self._on_transfer_fault
        cluster.on_kv_fault = self._on_kv_fault
        for injection in plan:
            cluster.loop.call_at(injection.at_s, lambda injection=injection: self._due(injection))  # type: ignore[misc]
        for at_s in top_up_s:
            cluster.loop.call_at(at_s, self._top_up)

    def started(self, process: SimWorkerProcess) -> None:
        """A worker came up: forget what ailed the one before."""
        self._blind.pop(process.address.worker_id, None)

    # --- what sessions go through ---

    def hear(self, session: Session, event: Event) -> None:
        """Before the session is told."""
        fact = event.fact if isinstance(event, WorkerSaid) else event
        if isinstance(event, WorkerLost):
            if event.worker_id in session.workers:
                self._hit(self._causes.get(event.worker_id, Kind.KILL), session)
        elif isinstance(event, RouterLost):
            if session.state is AttemptState.QUEUED:
                self._hit(self._router_cause, session)
        elif isinstance(event, ClientGone):
            self._hit(Kind.CANCEL, session)
        elif isinstance(event, Start):
            if self._cluster.loop.now < self._router_stands_until_s:
                self._hit(self._router_cause, session)
        elif isinstance(fact, AttemptFailed):
            if fact.reason.startswith("step ") and fact.attempt == session.attempt.number:
                self._hit(Kind.STEP, session)
        elif isinstance(fact, Assigned) and self._blind:
            self._place(session, fact)
        due = next((i for i in self._waiting if i.awaits is not None and isinstance(fact, _BRINGS[i.awaits])), None)
        if due is not None:
            kind = due.kind
            self._waiting.remove(due)
            self._cluster.loop.call_later(self._rng.random() * _SOON_S, lambda: self._inject(kind, session))

    def _place(self, session: Session, assigned: Assigned) -> None:
        if session.state is not AttemptState.QUEUED or assigned.assignment.attempt != session.attempt.number:
            return  # told once more
        index = self._cluster.router.index
        for worker_id, (kind, number) in list(self._blind.items()):
            if index.next_number(worker_id) > number:
                del self._blind[worker_id]
            elif worker_id in (assigned.assignment.prefill_worker, assigned.assignment.decode_worker):
                self._hit(kind, session)

    def _hit(self, kind: Kind, session: Session) -> None:
        self.hits[kind, session.state] += 1
        self.effects[kind] += 1

    def _hit_all_on(self, kind: Kind, worker_id: str) -> None:
        for live in self._cluster.gateway.live.values():
            if worker_id in live.session.workers:
                self._hit(kind, live.session)

    def _hit_queued(self, kind: Kind) -> None:
        for live in self._cluster.gateway.live.values():
            if live.session.state is AttemptState.QUEUED:
                self._hit(kind, live.session)

    def _on_transfer_fault(self, fault: TransferFault, handoff: KVHandoff) -> None:
        live = self._cluster.gateway.live.get(handoff.request_id)
        if live is None or live.session.attempt.number != handoff.attempt or live.session.state is AttemptState.QUEUED:
            return
        if fault is TransferFault.CUT:
            kind = Kind.PARTITION
        elif fault is TransferFault.CORRUPT:
            kind = Kind.CORRUPT
        elif fault is TransferFault.WORD_LOST:
            kind = Kind.WORDS if self._transfer_until_s.get(Kind.WORDS, 0.0) > self._cluster.loop.now else Kind.PARTITION
        else:
            kind = Kind.PULL
        if (kind, live.session.state) not in UNREACHABLE:
            self._hit(kind, live.session)

    def _on_kv_fault(self, worker_id: str, frame: KvEvents) -> None:
        kind = Kind.KV_LOSS if self._cluster.is_missing_kv_events.get(worker_id, 0.0) > self._cluster.loop.now else Kind.KV_LAG
        self._blind[worker_id] = (kind, frame.events[-1].number)

    # --- faults ---

    def _due(self, injection: Injection) -> None:
        if injection.awaits is None:
            self._inject(injection.kind, None)
        else:
            self._waiting.append(injection)

    def _top_up(self) -> None:
        for kind in _SURE:
            if len(+self.effects) < NUM_KINDS and kind in self._kinds and not self.effects[kind]:
                self._inject(kind, None)

    def _inject(self, kind: Kind, session: Session | None) -> None:
        """`session`: one that is to be hit, as far as it is on this kind's way; None: anybody."""
        perform: dict[Kind, Callable[[Session | None], None]] = {
            Kind.KILL: self._kill,
            Kind.HANG: self._hang,
            Kind.SLOW: self._slow,
            Kind.PARTITION: self._partition,
            Kind.RESET: self._reset,
            Kind.KV_LOSS: self._lose_kv_events,
            Kind.KV_LAG: self._delay_kv_events,
            Kind.ROUTER: self._restart_router,
            Kind.CANCEL: self._cancel,
            Kind.STEP: self._fail_steps,
        }
        if kind in perform:
            perform[kind](session)
        else:
            self._spoil_transfers(kind)

    def _worker(self, session: Session | None) -> str:
        """One that this session depends on, or one that somebody does; a live one."""
        cluster = self._cluster
        alive = [name for name, worker in cluster.workers.items() if worker.is_alive]
        if session is not None and session.end is None:
            named = [name for name in session.workers if name in alive]
            if named:
                return self._rng.choice(named)
        busy = [name for name in alive if not cluster.workers[name].core.is_at_rest]
        return self._rng.choice(busy or alive or list(cluster.workers))

    def _kill(self, session: Session | None) -> None:
        cluster, worker_id = self._cluster, self._worker(session)
        if not cluster.workers[worker_id].is_alive:
            return
        self._causes[worker_id] = Kind.KILL
        cluster.kill(worker_id)
        cluster.loop.call_later(self._rng.uniform(0.02, 0.4), lambda: cluster.respawn(worker_id))

    def _hang(self, session: Session | None) -> None:
        cluster, seconds = self._cluster, self._rng.choice((0.03, 0.1, 0.4, 1.0))
        is_queued = session is not None and session.state is AttemptState.QUEUED
        if is_queued or (session is None and self._rng.random() < 0.3):
            if cluster.router_process.is_alive and not cluster.router_process.is_stopped:
                self._router_stands(Kind.HANG, seconds)
                cluster.stop_router(seconds)
            return
        worker_id = self._worker(session)
        if cluster.workers[worker_id].is_running:
            self._hit_all_on(Kind.HANG, worker_id)
            cluster.stop_worker(worker_id, seconds)

    def _slow(self, session: Session | None) -> None:
        worker_id = self._worker(session)
        pace = self._cluster.paces[worker_id]
        pace.slowness = self._rng.choice((3.0, 10.0, 30.0))
        self._hit_all_on(Kind.SLOW, worker_id)

        def recover() -> None:
            pace.slowness = 1.0

        self._cluster.loop.call_later(self._rng.uniform(0.05, 0.5), recover)

    def _partition(self, session: Session | None) -> None:
        cluster, rng, seconds = self._cluster, self._rng, self._rng.choice((0.02, 0.1, 0.4, 0.8))
        worker_id = self._worker(session)
        is_queued = session is not None and session.state is AttemptState.QUEUED
        pair = (
            "gateway-router"
            if is_queued
            else rng.choice(("gateway-worker", "gateway-worker", "gateway-router", "router-worker", "workers"))
        )
        if pair == "workers":
            others = [name for name in cluster.workers if name != worker_id]
            for other in others:
                cluster.cut_workers(worker_id, other, seconds)
        elif pair == "router-worker":
            self._end_link(Kind.PARTITION, ROUTER, worker_id, seconds, is_cut=rng.random() < 0.5)
        elif pair == "gateway-router":
            self._end_link(Kind.PARTITION, GATEWAY, ROUTER, seconds, is_cut=rng.random() < 0.5)
        else:
            self._end_link(Kind.PARTITION, GATEWAY, worker_id, seconds, is_cut=rng.random() < 0.5)

    def _reset(self, session: Session | None) -> None:
        is_queued = session is not None and session.state is AttemptState.QUEUED
        if is_queued or (session is None and self._rng.random() < 0.3):
            self._end_link(Kind.RESET, GATEWAY, ROUTER, 0.0, is_cut=True)
        else:
            self._end_link(Kind.RESET, self._rng.choice((GATEWAY, GATEWAY, ROUTER)), self._worker(session), 0.0, is_cut=True)

    def _end_link(self, kind: Kind, one: str, other: str, seconds: float, *, is_cut: bool) -> None:
        cluster = self._cluster
        if other == ROUTER:
            self._router_stands(kind, seconds)
        elif one == ROUTER:
            self._hit_all_on(kind, other)
        else:
            self._causes[other] = kind
            if not is_cut:
                self._hit_all_on(kind, other)
        if is_cut:
            cluster.network.cut(one, other)
            cluster.loop.call_later(seconds, lambda: cluster.network.mend(one, other))
        else:
            cluster.network.hold(one, other, seconds)

    def _router_stands(self, kind: Kind, seconds: float) -> None:
        """Nothing passes between gateway and router for so long; a connection that ended asks anew."""
        self._router_cause = kind
        self._router_stands_until_s = self._cluster.loop.now + seconds
        self._hit_queued(kind)

    def _spoil_transfers(self, kind: Kind) -> None:
        """For a while; what is spoilt is told by the transport."""
        transport, rng, loop = self._cluster.transport, self._rng, self._cluster.loop
        before, seconds = transport.faults, rng.uniform(0.05, 0.5)
        if kind is Kind.WORDS:
            changes = {"lose_message": 0.4, "repeat_message": 0.3, "delay_s_max": rng.choice((0.0, 0.02, 0.2))}
        elif kind is Kind.CORRUPT:
            changes = {"corrupt_pull": 0.5}
        else:
            changes = rng.choice(({"fail_pull": 0.6}, {"hang_pull": 0.6}, {"deaf_pull": 0.4, "deaf_s": 0.3}))
        transport.faults = replace(before, **changes)
        self._transfer_until_s[kind] = loop.now + seconds

        def recover() -> None:
            if self._transfer_until_s[kind] <= loop.now:
                sound = NetworkFaults()
                transport.faults = replace(transport.faults, **{name: getattr(sound, name) for name in changes})

        loop.call_later(seconds, recover)

    def _lose_kv_events(self, session: Session | None) -> None:
        self._cluster.is_missing_kv_events[self._worker(session)] = self._cluster.loop.now + self._rng.uniform(0.02, 0.3)

    def _delay_kv_events(self, session: Session | None) -> None:
        until_s = self._cluster.loop.now + self._rng.uniform(0.05, 0.5)
        self._cluster.late_kv_events[self._worker(session)] = (until_s, self._rng.choice((0.03, 0.1, 0.3)))

    def _restart_router(self, session: Session | None) -> None:
        cluster = self._cluster
        if not cluster.router_process.is_alive:
            return
        self._blind.clear()
        for live in cluster.gateway.live.values():
            self._hit(Kind.ROUTER, live.session)
        seconds = self._rng.choice((0.01, 0.1, 0.5))
        self._router_cause, self._router_stands_until_s = Kind.ROUTER, cluster.loop.now + seconds
        cluster.restart_router(down_s=seconds)

    def _cancel(self, session: Session | None) -> None:
        live = self._cluster.gateway.live
        if session is not None:
            self._cluster.gateway.cancel(session.request.request_id)
        elif live:
            self._cluster.gateway.cancel(self._rng.choice(list(live)))

    def _fail_steps(self, session: Session | None) -> None:
        """The worker's next steps, some of them."""
        executor, draw = self._cluster.workers[self._worker(session)].executor, self._step_draw
        num_left = draw.randint(1, 3)

        def error(_: BatchPlan) -> str | None:
            nonlocal num_left
            if num_left == 0 or draw.random() < 0.3:
                return None
            num_left -= 1
            return "out of memory"

        executor.error = error
