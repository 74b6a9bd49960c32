"""Keeps each pool of workers at its size: who is started, who is replaced after what pause, who is stopped and when to give up.

A plain state machine; cluster/supervisor_driver performs its commands. A worker's life as the supervisor sees it:

    StartWorker ──► STARTING ──registered──► READY ──too many──► DRAINING ──drained or deadline──► STOPPING ──► gone
                       │                       │                    │                                 ▲
                       └── failed, deadline ───┴────── lost ────────┴─────────────────────────────────┘ (deadline: by force)

- A pool never holds more STARTING + READY workers than its size; DRAINING and STOPPING ones come on top for a bounded time.
- A worker that dies young (before it was ready for `stable_after_s`) is replaced after a pause that doubles, one at a time;
  one that had been stable is replaced at once. After `max_young_deaths` without a replacement that became stable the pool
  gives up, and its status says why.
- An id is never used twice: after "prefill-0" and "prefill-1" comes "prefill-2".
- Shutdown drains what prefills before what decodes, since a hand-off in flight needs both its ends.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from control.binding import check_limits, limited
from protocol.worker import Role, WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig:
    """Pauses and patience of the supervisor."""

    startup_deadline_s: float = limited(120.0, minimum=1.0)  # from StartWorker to registration
    drain_deadline_s: float = limited(30.0, minimum=0.0)  # of one worker leaving its pool; what still runs then goes on elsewhere
    shutdown_drain_s: float = limited(6.0, minimum=0.0)  # of the whole cluster; what still runs then is cut off
    stop_deadline_s: float = limited(3.0, minimum=0.1)  # from StopWorker to its end; then by force
    router_hang_s: float = limited(5.0, minimum=0.5)  # a router whose loop stands still for so long is ended; another places by least_work
    backoff_first_s: float = limited(0.5, minimum=0.01)
    backoff_max_s: float = limited(30.0, minimum=0.01)
    stable_after_s: float = limited(5.0, minimum=0.0)
    max_young_deaths: int = limited(5, minimum=1)  # of one pool, with no newer worker that became stable

    def __post_init__(self) -> None:
        check_limits(self)


# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolResized:
    """The pool of `role` shall have `size` workers. Also lifts a verdict of giving up."""

    role: Role
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRegistered:
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStartFailed:
    """The process could not be started, or ended before it registered."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """The process has ended, asked or not. Told once it is sure; later news of the same worker is ignored."""

    worker_id: WorkerId
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDrained:
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class ShutdownStarted:
    """Start nothing more and end everything: drained first, or at once."""

    drain: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed. At least four times a second."""


Event = PoolResized | WorkerRegistered | WorkerStartFailed | WorkerLost | WorkerDrained | ShutdownStarted | Tick

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class StartWorker:
    role: Role
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainWorker:
    """Admit nothing new there; WorkerDrained follows when it is empty."""

    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class StopWorker:
    """End the process; WorkerLost follows. `force`: kill it."""

    worker_id: WorkerId
    force: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolGaveUp:
    """Said once: no more starts for this pool until it is resized."""

    role: Role
    reason: str


Command = StartWorker | DrainWorker | StopWorker | PoolGaveUp

# --- state ------------------------------------------------------------------------------------------------------------


class Phase(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPING = "stopping"


@dataclass(slots=True)
class _Member:
    worker_id: WorkerId
    phase: Phase
    since_s: float  # when it entered the phase
    forced: bool = False


@dataclass(slots=True)
class _Pool:
    role: Role
    size: int = 0
    next_index: int = 0
    young_deaths: int = 0
    last_young_death_s: float = 0.0
    not_before_s: float = 0.0  # no start before this moment
    last_reason: str = ""
    gave_up: bool = False
    members: dict[WorkerId, _Member] = field(default_factory=dict)  # in the order started

    def in_phase(self, *phases: Phase) -> list[_Member]:
        return [m for m in self.members.values() if m.phase in phases]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """A pool for `baton status`."""

    role: Role
    size: int
    starting: tuple[WorkerId, ...]
    ready: tuple[WorkerId, ...]
    draining: tuple[WorkerId, ...]
    stopping: tuple[WorkerId, ...]
    young_deaths: int
    last_reason: str  # why a worker was last lost; empty: none was
    gave_up: bool
    next_start_in_s: float


class Supervisor:
    """`on(event, now) -> commands`; `now` is any clock that only grows, in seconds."""

    def __init__(self, config: SupervisorConfig) -> None:
        self._config = config
        self._pools = {role: _Pool(role) for role in Role}
        self._role_of: dict[WorkerId, Role] = {}
        self._shutdown: ShutdownStarted | None = None
        self._shutdown_at_s = 0.0

    def on(self, event: Event, now: float) -> list[Command]:
        commands: list[Command] = []
        match event:
            case PoolResized():
                self._resize(event)
            case WorkerRegistered():
                self._registered(event.worker_id, now)
            case WorkerStartFailed() | WorkerLost():
                self._ended(event.worker_id, event.reason, now, commands)
            case WorkerDrained():
                self._drained(event.worker_id, now, commands)
            case ShutdownStarted():
                if self._shutdown is None:
                    self._shutdown_at_s = now
                self._shutdown = event
            case Tick():
                pass
        self._pass_deadlines(now, commands)
        if self._shutdown is not None:
            self._close(now, commands)
        else:
            for pool in self._pools.values():
                self._shrink(pool, now, commands)
                self._grow(pool, now, commands)
        return commands

    @property
    def is_closed(self) -> bool:
        """After ShutdownStarted: nobody is left."""
        return self._shutdown is not None and not self._role_of

    def status(self, now: float) -> tuple[PoolStatus, ...]:
        """Every pool that has, or should have, a worker."""
        return tuple(
            PoolStatus(
                role=pool.role,
                size=pool.size,
                starting=tuple(m.worker_id for m in pool.in_phase(Phase.STARTING)),
                ready=tuple(m.worker_id for m in pool.in_phase(Phase.READY)),
                draining=tuple(m.worker_id for m in pool.in_phase(Phase.DRAINING)),
                stopping=tuple(m.worker_id for m in pool.in_phase(Phase.STOPPING)),
                young_deaths=pool.young_deaths,
                last_reason=pool.last_reason,
                gave_up=pool.gave_up,
                next_start_in_s=max(0.0, pool.not_before_s - now),
            )
            for pool in self._pools.values()
            if pool.size or pool.members
        )

    # --- one worker -------------------------------------------------------------------------------------------------

    def _find(self, worker_id: WorkerId) -> tuple[_Pool, _Member] | None:
        """None for news of a worker that is gone already."""
        role = self._role_of.get(worker_id)
        if role is None:
            return None
        pool = self._pools[role]
        return pool, pool.members[worker_id]

    def _registered(self, worker_id: WorkerId, now: float) -> None:
        found = self._find(worker_id)
        if found is not None and found[1].phase is Phase.STARTING:
            found[1].phase, found[1].since_s = Phase.READY, now

    def _ended(self, worker_id: WorkerId, reason: str, now: float, commands: list[Command]) -> None:
        found = self._find(worker_id)
        if found is None:
            return
        pool, member = found
        self._forget(pool, member)
        if member.phase in (Phase.STARTING, Phase.READY):
            self._mourn(pool, member, reason, now, commands)

    def _drained(self, worker_id: WorkerId, now: float, commands: list[Command]) -> None:
        found = self._find(worker_id)
        if found is not None and found[1].phase is Phase.DRAINING:
            self._stop(found[1], now, commands, reason="drained", force=False)

    def _mourn(self, pool: _Pool, member: _Member, reason: str, now: float, commands: list[Command]) -> None:
        """A worker ended that should not have: count it and set the pause before the next start."""
        pool.last_reason = f"{member.worker_id}: {reason}"
        if member.phase is Phase.READY and now - member.since_s >= self._config.stable_after_s:
            return
        pool.young_deaths += 1
        pool.last_young_death_s = now
        if pool.young_deaths >= self._config.max_young_deaths and not pool.gave_up:
            pool.gave_up = True
            told = f"{pool.young_deaths} {pool.role.value} workers ended before or within {self._config.stable_after_s:g} s of being ready"
            commands.append(PoolGaveUp(role=pool.role, reason=f"{told}; the last was {pool.last_reason}"))
        pause_s = min(self._config.backoff_first_s * 2.0 ** (pool.young_deaths - 1), self._config.backoff_max_s)
        pool.not_before_s = now + pause_s

    def _stop(self, member: _Member, now: float, commands: list[Command], *, reason: str, force: bool) -> None:
        member.phase, member.since_s, member.forced = Phase.STOPPING, now, force
        commands.append(StopWorker(worker_id=member.worker_id, force=force, reason=reason))

    def _drain(self, member: _Member, now: float, commands: list[Command]) -> None:
        member.phase, member.since_s = Phase.DRAINING, now
        commands.append(DrainWorker(worker_id=member.worker_id))

    def _forget(self, pool: _Pool, member: _Member) -> None:
        del pool.members[member.worker_id]
        del self._role_of[member.worker_id]

    # --- pools ------------------------------------------------------------------------------------------------------

    def _resize(self, event: PoolResized) -> None:
        assert event.size >= 0
        pool = self._pools[event.role]
        pool.size, pool.gave_up, pool.young_deaths, pool.not_before_s = event.size, False, 0, 0.0

    def _grow(self, pool: _Pool, now: float, commands: list[Command]) -> None:
        missing = pool.size - len(pool.in_phase(Phase.STARTING, Phase.READY))
        if pool.gave_up or now < pool.not_before_s:
            return
        if pool.young_deaths and pool.in_phase(Phase.STARTING):
            return  # one trial at a time while starts fail
        for _ in range(min(missing, 1) if pool.young_deaths else missing):
            worker_id = f"{pool.role.value}-{pool.next_index}"
            pool.next_index += 1
            pool.members[worker_id] = _Member(worker_id, Phase.STARTING, now)
            self._role_of[worker_id] = pool.role
            commands.append(StartWorker(role=pool.role, worker_id=worker_id))

    def _shrink(self, pool: _Pool, now: float, commands: list[Command]) -> None:
        """The newest go first: those that start have nothing to lose, the oldest have the fullest cache."""
        surplus = len(pool.in_phase(Phase.STARTING, Phase.READY)) - pool.size
        leaving = [*reversed(pool.in_phase(Phase.STARTING)), *reversed(pool.in_phase(Phase.READY))]
        for member in leaving[: max(0, surplus)]:
            if member.phase is Phase.STARTING:
                self._stop(member, now, commands, reason="the pool shrank", force=True)
            else:
                self._drain(member, now, commands)

    def _close(self, now: float, commands: list[Command]) -> None:
        assert self._shutdown is not None
        patient = self._shutdown.drain and now - self._shutdown_at_s < self._config.shutdown_drain_s
        for pool in self._pools.values():
            for member in pool.in_phase(Phase.STARTING):
                self._stop(member, now, commands, reason="shutdown", force=True)
            if not patient:
                for member in pool.in_phase(Phase.READY, Phase.DRAINING):
                    self._stop(member, now, commands, reason="shutdown", force=False)
        if not patient:
            return
        prefill_left = self._pools[Role.PREFILL].in_phase(Phase.READY, Phase.DRAINING)
        stage = [Role.PREFILL] if prefill_left else [Role.DECODE, Role.BOTH]
        for role in stage:
            for member in self._pools[role].in_phase(Phase.READY):
                self._drain(member, now, commands)

    def _pass_deadlines(self, now: float, commands: list[Command]) -> None:
        config = self._config
        for pool in self._pools.values():
            for member in list(pool.members.values()):
                waited_s = now - member.since_s
                if member.phase is Phase.STARTING and waited_s >= config.startup_deadline_s:
                    self._mourn(pool, member, f"did not register within {config.startup_deadline_s:g} s", now, commands)
                    self._stop(member, now, commands, reason="startup deadline", force=True)
                elif member.phase is Phase.READY and member.since_s >= pool.last_young_death_s and waited_s >= config.stable_after_s:
                    pool.young_deaths = 0
                elif member.phase is Phase.DRAINING and waited_s >= config.drain_deadline_s:
                    self._stop(member, now, commands, reason="drain deadline", force=False)
                elif member.phase is Phase.STOPPING and waited_s >= config.stop_deadline_s:
                    if member.forced:
                        self._forget(pool, member)  # killed twice over: the machine itself is gone
                    else:
                        self._stop(member, now, commands, reason="stop deadline", force=True)
