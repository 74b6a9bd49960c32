"""The supervisor, event by event: sizes, replacements, pauses, giving up, shrinking and the order of a shutdown."""

from __future__ import annotations

from itertools import pairwise

import pytest

from control.supervisor import (
    Command,
    DrainWorker,
    PoolGaveUp,
    PoolResized,
    PoolStatus,
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
from protocol.errors import ConfigError
from protocol.worker import Role

pytestmark = pytest.mark.pure

CONFIG = SupervisorConfig(
    startup_deadline_s=60, drain_deadline_s=30, shutdown_drain_s=6, stop_deadline_s=3, backoff_first_s=1, backoff_max_s=4, stable_after_s=10
)


def started(commands: list[Command]) -> list[str]:
    return [c.worker_id for c in commands if isinstance(c, StartWorker)]


def pool(supervisor: Supervisor, role: Role, now: float) -> PoolStatus:
    return next(status for status in supervisor.status(now) if status.role is role)


def with_ready(prefill: int = 0, decode: int = 0) -> Supervisor:
    """Workers registered at second 1."""
    supervisor = Supervisor(CONFIG)
    commands = supervisor.on(PoolResized(role=Role.PREFILL, size=prefill), 0.0)
    commands += supervisor.on(PoolResized(role=Role.DECODE, size=decode), 0.0)
    for worker_id in started(commands):
        supervisor.on(WorkerRegistered(worker_id=worker_id), 1.0)
    return supervisor


def test_pool_is_filled_at_once() -> None:
    supervisor = Supervisor(CONFIG)
    commands = supervisor.on(PoolResized(role=Role.DECODE, size=3), 0.0)
    assert commands == [StartWorker(role=Role.DECODE, worker_id=f"decode-{i}") for i in range(3)]
    assert supervisor.on(Tick(), 1.0) == []
    supervisor.on(WorkerRegistered(worker_id="decode-1"), 2.0)
    assert pool(supervisor, Role.DECODE, 2.0).ready == ("decode-1",)
    assert pool(supervisor, Role.DECODE, 2.0).starting == ("decode-0", "decode-2")


def test_stable_worker_is_replaced_at_once_under_a_new_id() -> None:
    """Seen to fail with the stable worker's death counted like a young one's."""
    supervisor = with_ready(prefill=2)
    assert started(supervisor.on(WorkerLost(worker_id="prefill-0", reason="killed by signal 9"), 20.0)) == ["prefill-2"]
    status = pool(supervisor, Role.PREFILL, 20.0)
    assert status.last_reason == "prefill-0: killed by signal 9" and status.young_deaths == 0


def test_second_news_of_one_death_changes_nothing() -> None:
    supervisor = with_ready(prefill=1)
    supervisor.on(WorkerLost(worker_id="prefill-0", reason="socket closed"), 20.0)
    assert supervisor.on(WorkerLost(worker_id="prefill-0", reason="actor died"), 20.1) == []
    assert supervisor.on(WorkerRegistered(worker_id="prefill-0"), 20.2) == []


def test_pause_doubles_up_to_its_bound_and_then_the_pool_gives_up_with_the_reason() -> None:
    """Starts that fail at once, seen at every tenth of a second. Seen to fail with the exponent one too high."""
    supervisor = Supervisor(CONFIG)
    starts, last, end = [], None, None
    commands = supervisor.on(PoolResized(role=Role.PREFILL, size=1), 0.0)
    for tenth in range(300):
        now = tenth / 10
        for worker_id in started(commands):
            starts.append(now)
            last = supervisor.on(WorkerStartFailed(worker_id=worker_id, reason="no such file model.safetensors"), now)
            end = next((c for c in last if isinstance(c, PoolGaveUp)), end)
        commands = supervisor.on(Tick(), now)
    assert [int(b - a) for a, b in pairwise(starts)] == [1, 2, 4, 4]
    assert end is not None and "5 prefill workers" in end.reason and end.reason.endswith("prefill-4: no such file model.safetensors")
    status = pool(supervisor, Role.PREFILL, 30.0)
    assert status.gave_up and status.last_reason == "prefill-4: no such file model.safetensors"
    assert started(supervisor.on(PoolResized(role=Role.PREFILL, size=1), 31.0)) == ["prefill-5"], "resizing tries anew"


def test_while_starts_fail_one_is_tried_at_a_time() -> None:
    supervisor = Supervisor(CONFIG)
    for worker_id in started(supervisor.on(PoolResized(role=Role.DECODE, size=3), 0.0)):
        assert started(supervisor.on(WorkerStartFailed(worker_id=worker_id, reason="x"), 0.1)) == []
    assert started(supervisor.on(Tick(), 9.0)) == ["decode-3"]
    assert started(supervisor.on(Tick(), 9.1)) == []
    assert started(supervisor.on(WorkerRegistered(worker_id="decode-3"), 10.0)) == ["decode-4"]


def test_a_replacement_that_became_stable_ends_the_series_and_an_old_worker_does_not() -> None:
    """Seen to fail when any stable worker reset the count: one worker in a loop beside a healthy one was never given up."""
    supervisor = with_ready(decode=2)
    supervisor.on(WorkerLost(worker_id="decode-1", reason="x"), 2.0)
    supervisor.on(Tick(), 3.0)
    supervisor.on(WorkerStartFailed(worker_id="decode-2", reason="x"), 11.5)
    assert pool(supervisor, Role.DECODE, 12.0).young_deaths == 2, "decode-0 was stable all along"
    supervisor.on(Tick(), 14.0)
    supervisor.on(WorkerRegistered(worker_id="decode-3"), 15.0)
    supervisor.on(Tick(), 24.9)
    assert pool(supervisor, Role.DECODE, 24.9).young_deaths == 2
    supervisor.on(Tick(), 25.0)
    assert pool(supervisor, Role.DECODE, 25.0).young_deaths == 0


def test_worker_that_never_registers_is_killed_and_replaced() -> None:
    supervisor = Supervisor(CONFIG)
    supervisor.on(PoolResized(role=Role.PREFILL, size=1), 0.0)
    commands = supervisor.on(Tick(), 60.0)
    assert commands == [StopWorker(worker_id="prefill-0", force=True, reason="startup deadline")]
    assert "did not register within 60 s" in pool(supervisor, Role.PREFILL, 60.0).last_reason
    assert started(supervisor.on(WorkerLost(worker_id="prefill-0", reason="killed"), 60.1)) == []
    assert started(supervisor.on(Tick(), 61.0)) == ["prefill-1"]


def test_shrinking_takes_starting_ones_first_then_drains_the_newest() -> None:
    supervisor = with_ready(decode=3)
    supervisor.on(PoolResized(role=Role.DECODE, size=4), 2.0)
    commands = supervisor.on(PoolResized(role=Role.DECODE, size=2), 3.0)
    assert commands == [
        StopWorker(worker_id="decode-3", force=True, reason="the pool shrank"),
        DrainWorker(worker_id="decode-2"),
    ]
    assert supervisor.on(WorkerDrained(worker_id="decode-2"), 4.0) == [StopWorker(worker_id="decode-2", force=False, reason="drained")]
    assert supervisor.on(WorkerLost(worker_id="decode-2", reason="exit 0"), 4.5) == []
    assert pool(supervisor, Role.DECODE, 5.0).ready == ("decode-0", "decode-1")


def test_drain_and_stop_end_by_their_deadlines() -> None:
    """A worker that never drains and never stops. Seen to fail with the force left out."""
    supervisor = with_ready(decode=2)
    assert supervisor.on(PoolResized(role=Role.DECODE, size=1), 10.0) == [DrainWorker(worker_id="decode-1")]
    assert supervisor.on(Tick(), 39.9) == []
    assert supervisor.on(Tick(), 40.0) == [StopWorker(worker_id="decode-1", force=False, reason="drain deadline")]
    assert supervisor.on(Tick(), 43.0) == [StopWorker(worker_id="decode-1", force=True, reason="stop deadline")]
    assert supervisor.on(Tick(), 46.0) == []
    assert pool(supervisor, Role.DECODE, 46.0).stopping == ()


def test_shutdown_drains_prefill_before_decode_and_kills_what_starts() -> None:
    """A hand-off in flight needs both its ends. Seen to fail with all pools drained at once."""
    supervisor = with_ready(prefill=1, decode=1)
    supervisor.on(PoolResized(role=Role.DECODE, size=2), 2.0)
    commands = supervisor.on(ShutdownStarted(drain=True), 3.0)
    assert commands == [StopWorker(worker_id="decode-1", force=True, reason="shutdown"), DrainWorker(worker_id="prefill-0")]
    assert supervisor.on(WorkerLost(worker_id="decode-1", reason="killed"), 3.1) == []
    commands = supervisor.on(WorkerDrained(worker_id="prefill-0"), 4.0)
    assert commands == [StopWorker(worker_id="prefill-0", force=False, reason="drained"), DrainWorker(worker_id="decode-0")]
    supervisor.on(WorkerLost(worker_id="prefill-0", reason="exit 0"), 4.5)
    assert supervisor.on(WorkerDrained(worker_id="decode-0"), 5.0) == [StopWorker(worker_id="decode-0", force=False, reason="drained")]
    assert not supervisor.is_closed
    supervisor.on(WorkerLost(worker_id="decode-0", reason="exit 0"), 5.5)
    assert supervisor.is_closed


def test_shutdown_ends_within_its_deadlines_when_nobody_answers() -> None:
    supervisor = with_ready(prefill=1, decode=1)
    supervisor.on(ShutdownStarted(drain=True), 100.0)
    now = 100.0
    while not supervisor.is_closed and now < 200:
        now += 0.25
        supervisor.on(Tick(), now)
    assert now - 100.0 <= CONFIG.shutdown_drain_s + 2 * CONFIG.stop_deadline_s + 0.5


def test_second_ctrl_c_stops_without_draining() -> None:
    supervisor = with_ready(prefill=1, decode=1)
    supervisor.on(ShutdownStarted(drain=True), 3.0)
    commands = supervisor.on(ShutdownStarted(drain=False), 3.5)
    assert {c.worker_id for c in commands if isinstance(c, StopWorker)} == {"prefill-0", "decode-0"}


def test_nothing_starts_during_shutdown() -> None:
    supervisor = with_ready(prefill=1, decode=1)
    supervisor.on(ShutdownStarted(drain=True), 3.0)
    assert started(supervisor.on(WorkerLost(worker_id="prefill-0", reason="x"), 3.1)) == []
    assert started(supervisor.on(PoolResized(role=Role.DECODE, size=5), 3.2)) == []


def test_patience_has_limits() -> None:
    with pytest.raises(ConfigError, match="max_young_deaths is 0, the least is 1"):
        SupervisorConfig(max_young_deaths=0)
