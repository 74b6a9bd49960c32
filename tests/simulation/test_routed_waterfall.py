"""The waterfall of the token-accurate run: the run is what it is without it, its parts add up, and they are those of the fast one."""

from __future__ import annotations

import pytest

from control.config import ClusterConfig, load_config
from simulator.routed_waterfall import routed_waterfall_of
from simulator.token_accurate import run_token_accurate
from simulator.traces.generators import Arrivals, generate
from simulator.traces.trace import Run, Trace, TraceRequest
from simulator.waterfall import waterfall_of

pytestmark = pytest.mark.pure


def config(num_kv_blocks: int, **router: object) -> ClusterConfig:
    workers = {"executor": "paced", "prefill_workers": 2, "decode_workers": 2, "block_size": 64, "num_kv_blocks": num_kv_blocks}
    return load_config({"workers": workers | {"max_num_batched_tokens": 2048, "max_waiting": 4096}, "router": router})


@pytest.mark.parametrize("policy", ["round_robin", "prefix_cost"])
def test_a_run_that_is_looked_at_is_the_run(policy: str) -> None:
    """How: with pulls, one policy that prices pools and one that does not. Seen to fail with a policy that is told nothing."""
    trace = generate("toolbench", Arrivals(rate_per_s=20.0), num_requests=60, seed=2)
    served, total = routed_waterfall_of(trace, config(1024), policy=policy, seed=5)
    assert served == run_token_accurate(trace, config(1024), policy=policy, seed=5)
    assert total.available == total.lost + total.found and 0 < total.found <= sum(one.num_cached_tokens for one in served)
    assert total.num_tokens == sum(one.num_prompt_tokens for one in served)


def test_what_is_known_and_passed_by_is_traded_for_load_and_what_was_pushed_out_is_evicted() -> None:
    """Seen to fail with workers that are not listened to."""
    asks = ((0.0, "p"), (10.0, "p"), *((20.0 + 10.0 * i, f"q{i}") for i in range(12)), (300.0, "p"))
    trace = Trace(
        name="asks",
        requests=tuple(
            TraceRequest(at_s=at_s, runs=(Run(name, 1024), Run(f"own {i}", 16)), output_tokens=2) for i, (at_s, name) in enumerate(asks)
        ),
    )
    _, total = routed_waterfall_of(trace, config(64, prefix_pull=False, disaggregate="always"), policy="round_robin", seed=0)
    assert (total.available, total.load_trade, total.eviction, total.lost) == (2048, 1024, 1024, 2048)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["round_robin", "prefix_cost"])
def test_the_fast_mode_loses_reuse_in_the_same_places(policy: str) -> None:
    """How: small caches and load enough that all steps lose something; shares of prompt tokens within 4 points.

    Seen to fail with evictions that nobody hears of.
    """
    asked = config(640, prefix_pull=False, disaggregate="always")
    trace = generate("video_qa", Arrivals(rate_per_s=3.0), num_requests=120, seed=4)
    _, true = routed_waterfall_of(trace, asked, policy=policy, seed=0)
    _, fast = waterfall_of(trace, asked, policy=policy, seed=0)
    assert true.available == fast.available
    for name in ("in_flight", "staleness", "load_trade", "eviction", "found"):
        ours, theirs = getattr(fast, name) / fast.num_tokens, getattr(true, name) / true.num_tokens
        assert ours == pytest.approx(theirs, abs=0.04), (name, fast, true)
