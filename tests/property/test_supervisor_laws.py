"""Whatever happens to workers, the supervisor keeps its laws: never too many, no id twice, pools converge, a shutdown ends."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
    SupervisorConfig,
    Tick,
    WorkerDrained,
    WorkerLost,
    WorkerRegistered,
    WorkerStartFailed,
)
from protocol.worker import Role

pytestmark = pytest.mark.pure

CONFIG = SupervisorConfig(
    startup_deadline_s=5,
    drain_deadline_s=3,
    shutdown_drain_s=2,
    stop_deadline_s=1,
    backoff_first_s=0.5,
    backoff_max_s=4,
    stable_after_s=2,
    max_young_deaths=4,
)
STEP_S = 0.25


class World:
    """Processes that do as they are told, or not: how likely is what the constructor is told."""

    def __init__(self, seed: int, *, start_fails: float, dies: float, deaf: float) -> None:
        self.rng = random.Random(seed)
        self.start_fails, self.dies, self.deaf = start_fails, dies, deaf
        self.supervisor = Supervisor(CONFIG)
        self.now = 0.0
        self.size = dict.fromkeys(Role, 0)
        self.role: dict[str, Role] = {}
        self.starting: list[str] = []
        self.alive: list[str] = []
        self.leaving: set[str] = set()
        self.used: set[str] = set()
        self.starts: dict[Role, list[float]] = {role: [] for role in Role}
        self.gave_up: set[Role] = set()

    def tell(self, event: Event) -> None:
        if isinstance(event, PoolResized):
            self.size[event.role] = event.size
            self.gave_up.discard(event.role)
        for command in self.supervisor.on(event, self.now):
            self.perform(command)
        self.check()

    def perform(self, command: Command) -> None:
        match command:
            case StartWorker():
                assert command.worker_id not in self.used, "an id is used once"
                assert command.role not in self.gave_up, "a pool that gave up starts nothing"
                self.used.add(command.worker_id)
                self.role[command.worker_id] = command.role
                self.starting.append(command.worker_id)
                self.starts[command.role].append(self.now)
            case DrainWorker():
                assert command.worker_id in self.alive and command.worker_id not in self.leaving
                self.leaving.add(command.worker_id)
            case StopWorker():
                self.leaving.add(command.worker_id)
                if command.force or self.rng.random() >= self.deaf:
                    self.starting = [w for w in self.starting if w != command.worker_id]
                    self.alive = [w for w in self.alive if w != command.worker_id]
            case PoolGaveUp():
                assert command.role not in self.gave_up and command.reason
                self.gave_up.add(command.role)

    def check(self) -> None:
        for status in self.supervisor.status(self.now):
            serving = len(status.starting) + len(status.ready)
            known = serving + len(status.draining) + len(status.stopping)
            assert serving <= status.size, "never more than the size serve or start"
            assert known <= len(self.used)
            assert status.next_start_in_s <= CONFIG.backoff_max_s

    def step(self) -> None:
        """A quarter of a second of life."""
        self.now += STEP_S
        for worker_id in list(self.starting):
            if worker_id in self.starting and self.rng.random() < 0.5:  # it may have been stopped while another was told of
                self.starting.remove(worker_id)
                if self.rng.random() < self.start_fails:
                    self.tell(WorkerStartFailed(worker_id=worker_id, reason="start"))
                else:
                    self.alive.append(worker_id)
                    self.tell(WorkerRegistered(worker_id=worker_id))
        for worker_id in list(self.alive):
            if worker_id not in self.alive:
                continue
            if self.rng.random() < self.dies:
                self.alive.remove(worker_id)
                self.tell(WorkerLost(worker_id=worker_id, reason="death"))
            elif worker_id in self.leaving and self.rng.random() >= self.deaf:
                self.tell(WorkerDrained(worker_id=worker_id))
        for worker_id in sorted(self.leaving - set(self.alive) - set(self.starting)):
            self.leaving.discard(worker_id)
            self.tell(WorkerLost(worker_id=worker_id, reason="stopped"))
        self.tell(Tick())


chances = st.sampled_from([0.0, 0.05, 0.3, 1.0])


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32),
    chances,
    st.sampled_from([0.0, 0.01, 0.1]),
    chances,
    st.lists(st.tuples(st.sampled_from(Role), st.integers(0, 4)), min_size=1),
)
def test_laws_hold_under_any_life(seed: int, start_fails: float, dies: float, deaf: float, sizes: list[tuple[Role, int]]) -> None:
    """Sizes change while workers fail; afterwards all calms down. Seen to fail with `missing` counted from READY ones only, and with
    an id taken from the number of members.
    """
    world = World(seed, start_fails=start_fails, dies=dies, deaf=deaf)
    for role, size in sizes:
        world.tell(PoolResized(role=role, size=size))
        for _ in range(world.rng.randrange(20)):
            world.step()
    world.start_fails = world.dies = world.deaf = 0.0
    for role, size in list(world.size.items()):
        world.tell(PoolResized(role=role, size=size))  # lifts a verdict
    for _ in range(int(40 / STEP_S)):
        world.step()
    for role in Role:
        ready = [w for w in world.alive if world.role[w] is role]
        assert len(ready) == world.size[role], "every pool reaches its size when nothing fails any more"
    world.tell(ShutdownStarted(drain=bool(seed % 2)))
    for _ in range(int((CONFIG.shutdown_drain_s + 2 * CONFIG.stop_deadline_s) / STEP_S) + 2):
        world.step()
    assert world.supervisor.is_closed and not world.alive and not world.starting


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 4))
def test_a_pool_that_cannot_start_gives_up_after_a_bounded_number_of_tries(seed: int, size: int) -> None:
    """Seen to fail with the verdict never given."""
    world = World(seed, start_fails=1.0, dies=0.0, deaf=0.0)
    world.tell(PoolResized(role=Role.DECODE, size=size))
    for _ in range(int(60 / STEP_S)):
        world.step()
    assert world.gave_up == {Role.DECODE}
    assert len(world.used) <= CONFIG.max_young_deaths + size
    gaps = [b - a for a, b in pairwise(world.starts[Role.DECODE])]
    assert all(gap == 0 or gap >= CONFIG.backoff_first_s for gap in gaps)
