"""Outcome regret: where the better worker is known beforehand, regret is exactly the difference."""

from __future__ import annotations

import pytest

from control.config import ClusterConfig, load_config
from simulator.policy_only import run_policy_only
from simulator.regret import Fork, Regret, forks_of, regret_section
from simulator.traces.generators import Arrivals, generate
from simulator.traces.trace import Run, Trace, TraceRequest

pytestmark = pytest.mark.pure

PREFIX, OWN, CHUNK = 2048, 64, 4096


def config() -> ClusterConfig:
    workers = {"executor": "paced", "prefill_workers": 2, "decode_workers": 1, "num_kv_blocks": 4096, "max_num_batched_tokens": CHUNK}
    return load_config({"workers": workers, "router": {"prefix_pull": False, "disaggregate": "always"}})


def two_asks() -> Trace:
    """The second, long after the first, over its prefix."""
    return Trace(
        name="two",
        requests=tuple(TraceRequest(at_s=60.0 * i, runs=(Run("p", PREFIX), Run(f"own {i}", OWN)), output_tokens=1) for i in range(2)),
    )


def test_regret_is_what_the_better_worker_would_have_saved() -> None:
    """How: round_robin sends the second request away from its prefix, to an idle worker. Seen to fail with forks that force nothing."""
    forks = forks_of(two_asks(), config(), policy="round_robin", seed=0, num_forks=8)
    assert [fork.number for fork in forks] == [0, 1]
    first, second = forks
    assert first.regret_s == pytest.approx(0.0, abs=1e-9)
    saved_s = PREFIX * config().paced.prefill_token_s
    assert second.regret_s == pytest.approx(saved_s, rel=1e-9)
    assert second.regret_of_all_s == pytest.approx(saved_s / 2, rel=1e-9)
    assert Regret.of(forks) == Regret(
        num_forks=2,
        mean_s=pytest.approx(saved_s / 2),
        p90_s=pytest.approx(saved_s),
        best_share=0.5,
        mean_of_all_s=pytest.approx(saved_s / 4),
    )


def test_a_policy_that_follows_the_prefix_regrets_nothing() -> None:
    """Seen to fail with regret against the worst worker."""
    regret = Regret.of([fork for fork in forks_of(two_asks(), config(), policy="prefix_cost", seed=0) if fork.number == 1])
    assert regret is not None and regret.best_share == 1.0 and regret.mean_s == 0.0
    assert regret_section({"a": regret, "b": None})["a"]["num_forks"] == 1 and Regret.of([]) is None


def test_the_chosen_worker_forced_is_the_run_itself() -> None:
    """Seen to fail with a policy that is not asked where it is overruled, so that the generator draws otherwise from there on."""
    trace, asked = generate("toolbench", Arrivals(rate_per_s=10.0), num_requests=60, seed=0), config()
    free = run_policy_only(trace, asked, policy="random", seed=3)
    forced = run_policy_only(trace, asked, policy="random", seed=3, forced={20: free[20].prefill_worker})
    assert forced == free and run_policy_only(trace, asked, policy="random", seed=4) != free


def test_a_fork_counts_each_worker_once() -> None:
    fork = Fork(number=0, chosen="a", ttft_s={"a": 2.0, "b": 1.5, "c": 3.0}, mean_ttft_s={"a": 1.0, "b": 1.25, "c": 1.5})
    assert fork.regret_s == 0.5 and fork.regret_of_all_s == 0.0
