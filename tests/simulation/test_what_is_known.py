"""No inverse crime: what decides knows of times only what workers report, and steps take other times than anybody fits."""

from __future__ import annotations

import gc
import itertools
from array import array
from types import FunctionType, ModuleType

import pytest

from baton.bench.policy_traffic import traffic
from control.config import ClusterConfig, load_config
from engine.core.executor import BatchPlan, Entries, PlanEntry, SampleEntry, Samples, SequenceStart
from engine.step_time import FittedStepTime, LinearStepTime, RooflineStepTime
from protocol.messages import Done, KvEvents, KvSnapshot, Place, PrefillDone, SnapshotFrame
from protocol.request import SamplingParams
from router.core import RouterCore
from router.events import Event, FromGateway, FromWorker, GatewayUp, MembershipChanged, Tick, WorkerUp
from simulator.estimate_error import EXACT, EstimateError
from simulator.loop import VirtualLoop
from simulator.noise import Lognormal
from simulator.prompt_tokens import PromptTokens
from simulator.routed_cluster import RoutedCluster
from simulator.routed_gateway import Served
from simulator.sim_executor import SimExecutor
from simulator.true_steps import OverlappedStepTime, TiledStepTime, TrueSteps, plain_steps, true_steps
from tests.sim_router import run

pytestmark = pytest.mark.pure

WORKERS = {
    "executor": "paced",
    "prefill_workers": 2,
    "decode_workers": 2,
    "num_kv_blocks": 2048,
    "max_num_batched_tokens": 512,
    "step_time_budget_s": 0.05,
}
TRUTH = (TrueSteps, TiledStepTime, OverlappedStepTime, RooflineStepTime, LinearStepTime, SimExecutor, VirtualLoop, RoutedCluster)


def config() -> ClusterConfig:
    return load_config({"workers": WORKERS})


def cluster_of(*, seed: int = 0, estimate_error: EstimateError = EXACT, sigma: float = 0.05) -> RoutedCluster:
    steps = true_steps(config(), seed=seed, sigma=sigma)
    return RoutedCluster(config(), policy="prefix_cost", seed=seed, steps=steps, estimate_error=estimate_error)


def served(cluster: RoutedCluster, *, seconds: float = 2.0) -> list[Served]:
    return run(cluster, traffic("unshared", seconds=seconds, seed=0, num_workers=4))


def known_to(root: object) -> list[object]:
    """Everything that can be reached from `root`, but for what modules and types hold."""
    found, left, seen = [], [root], {id(root)}
    while left:
        here = left.pop()
        found.append(here)
        of_function = [here.__closure__, here.__defaults__, here.__kwdefaults__] if isinstance(here, FunctionType) else None
        for there in gc.get_referents(here) if of_function is None else of_function:
            if id(there) not in seen and not isinstance(there, ModuleType | type):
                seen.add(id(there))
                left.append(there)
    return found


def test_neither_router_nor_policy_nor_scheduler_can_reach_the_true_times() -> None:
    """Every object reachable from them after a run. Seen to fail with the steps' model given to the worker core, and to the router."""
    cluster = cluster_of()
    served(cluster)
    assert not [thing for thing in known_to(cluster.router) if isinstance(thing, TRUTH)]
    for worker in cluster.workers.values():
        reached = known_to(worker.core)
        assert not [thing for thing in reached if isinstance(thing, TRUTH)]
        assert len([thing for thing in reached if isinstance(thing, FittedStepTime)]) == 1
    assert any(isinstance(thing, TrueSteps) for thing in known_to(cluster)), "the search itself finds what is there"


def test_the_router_hears_what_a_live_one_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds of everything it is told. Seen to fail with a message of the simulator's own among them."""
    heard: set[type] = set()
    on = RouterCore.on

    def listen(self: RouterCore, event: Event, now: float) -> object:
        heard.add(type(event.message) if isinstance(event, FromGateway | FromWorker) else type(event))
        return on(self, event, now)

    monkeypatch.setattr(RouterCore, "on", listen)
    served(cluster_of())
    assert heard == {MembershipChanged, WorkerUp, GatewayUp, Tick, Place, PrefillDone, Done, SnapshotFrame, KvSnapshot, KvEvents}


def test_steps_take_the_true_times_and_a_seed_is_a_run() -> None:
    """Seen to fail with the noise left out of the executor."""
    first, again, other, exact = served(cluster_of()), served(cluster_of()), served(cluster_of(seed=1)), served(cluster_of(sigma=0.0))
    assert first == again
    assert first != other and first != exact
    plain = served(RoutedCluster(config(), policy="prefix_cost", steps=plain_steps(config())))
    assert plain == served(RoutedCluster(config(), policy="prefix_cost")) and plain != exact


def prefill_s(cluster: RoutedCluster) -> float:
    """What the router has fitted for a prompt of 512 tokens, on average over the workers that prefill."""
    workers = [worker for worker in cluster.router.fleet if worker.role.prefills]
    assert all(worker.model.is_fitted for worker in workers)
    return sum(worker.model.fitted.prefill_s(512, 512) for worker in workers) / len(workers)


def test_reports_that_are_twice_as_long_double_what_the_router_learns() -> None:
    """Seen to fail with the factor left out."""
    exact, doubled = cluster_of(), cluster_of(estimate_error=EstimateError(factor=2.0))
    first = served(exact, seconds=4.0)
    assert served(doubled, seconds=4.0) == first, "where nothing is cached, who is quickest does not depend on the unit of time"
    assert prefill_s(doubled) == pytest.approx(2 * prefill_s(exact), rel=0.1)
    noisy = [cluster_of(estimate_error=EstimateError(factor=2.0, sigma=0.6)) for _ in range(2)]
    assert served(noisy[0], seconds=4.0) == served(noisy[1], seconds=4.0)
    assert prefill_s(noisy[0]) == prefill_s(noisy[1]) != pytest.approx(prefill_s(doubled), rel=0.01)


def decode_plan(step_id: int, start: int, num_steps: int) -> BatchPlan:
    """One sequence of 7 tokens of prompt, at token `start`."""
    begin = SequenceStart(
        sequence_id=0, token_ids=array("I", range(8)), num_prompt_tokens=7, choice=0, sampling=SamplingParams(max_tokens=100)
    )
    entry = PlanEntry(sequence_id=0, start=start, num_tokens=1, block_table=array("I", [0]))
    return BatchPlan(
        step_id=step_id,
        ended=(),
        starts=(begin,) if start == 7 else (),
        block_copies=(),
        entries=Entries.of([entry]),
        samples=Samples.of([SampleEntry(entry_index=0, sequence_id=0)]),
        num_steps=num_steps,
    )


def ends_of(plans: list[BatchPlan]) -> list[float]:
    loop, ends = VirtualLoop(), [0.0]
    noise = Lognormal(0, "step", "w", sigma=0.5)
    model = LinearStepTime(prefill_token_s=1.0, decode_base_s=0.01, decode_sequence_s=0.001, decode_read_s=1e-4)
    executor = SimExecutor(loop, PromptTokens(vocab_size=100), model, noise)
    executor.start(lambda result: ends.append(loop.now))
    for plan in plans:
        executor.submit(plan)
    loop.run(lambda: False, deadline_s=100.0)
    return ends


def test_leaps_meet_the_noise_of_single_steps() -> None:
    """Three leaps of 2, 3 and 2 steps end when 7 single steps do. Seen to fail with noise counted by plan."""
    single = ends_of([decode_plan(i, 7 + i, 1) for i in range(7)])
    leaps = ends_of([decode_plan(0, 7, 2), decode_plan(1, 9, 3), decode_plan(2, 12, 2)])
    assert leaps == pytest.approx([single[0], single[2], single[5], single[7]])
    gaps = [later - earlier for earlier, later in itertools.pairwise(single)]
    assert max(gaps) > 1.3 * min(gaps), "the noise is there"
