"""An incident is a file: the events of a run, given again to a fresh core, make the identical commands.

How: every turn of every worker of crowded, faulty runs is recorded as (now, event, commands) and played back without a clock, a
network or an executor. Seen to fail with hand-off ids drawn from `random`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from engine.core.events import Command, Event
from engine.core.worker_core import WorkerCore
from protocol.worker import Role
from simulator.sim_transport import NetworkFaults
from simulator.sim_worker import SimWorker
from tests.sim_cluster import FINGERPRINT, MAX_MODEL_LEN, SimCluster, layout, make_request

pytestmark = pytest.mark.pure


@dataclass
class Recorder:
    worker: SimWorker
    cluster: SimCluster
    turns: list[tuple[float, Event, list[Command]]] = field(default_factory=list)

    def __call__(self, event: Event, commands: list[Command]) -> None:
        self.turns.append((self.cluster.loop.now, event, commands))


@pytest.mark.parametrize("max_inflight_steps", [1, 2])
def test_recorded_events_give_identical_commands(max_inflight_steps: int) -> None:
    faults = NetworkFaults(lose_message=0.2, fail_pull=0.2, delay_s_max=0.05)
    cluster = SimCluster(
        {"p0": Role.PREFILL, "d0": Role.DECODE, "b0": Role.BOTH},
        seed=5,
        num_blocks=9,
        eos_period=9,
        faults=faults,
        core={"lease_s": 1.0},
        max_inflight_steps=max_inflight_steps,
        step_time_budget_s=0.02,
    )
    recorders = {}
    for worker_id, worker in cluster.workers.items():
        recorders[worker_id] = worker.after_turn = Recorder(worker, cluster)
    cluster.run([make_request(n, list(range(3, 30 + 3 * n)), n=1 + n % 2, eos_token_ids=(2,), max_tokens=40) for n in range(14)])
    cluster.rest()
    assert cluster.counters("d0")["preemptions"] + cluster.counters("b0")["preemptions"] > 0
    for worker_id, recorder in recorders.items():
        fresh = WorkerCore(
            cluster._config,
            worker_id=worker_id,
            epoch=1,
            role=cluster.roles[worker_id],
            layout=layout(),
            num_blocks=9,
            fingerprint=FINGERPRINT,
            max_model_len=MAX_MODEL_LEN,
        )
        for now, event, commands in recorder.turns:
            assert fresh.on(event, now) == commands
