"""Bounds bound: no policy finds more than the ceiling or waits less than the least time, and closed cases come out as on paper."""

from __future__ import annotations

from statistics import fmean

import pytest

from control.config import ClusterConfig, load_config
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from simulator.bounds import blind_share, bounds_of, bounds_section, least_mean_ttft_s, pooled_share, share_of_ceiling
from simulator.policy_only import prompts_of, run_policy_only
from simulator.prompt_tree import prompt_tree
from simulator.routed_cluster import LINK_S
from simulator.traces.content import hashes_of
from simulator.traces.generators import Arrivals, generate
from simulator.traces.trace import Run, Trace, TraceRequest

pytestmark = pytest.mark.pure


def config(**router: object) -> ClusterConfig:
    workers = {"executor": "paced", "prefill_workers": 2, "decode_workers": 2, "num_kv_blocks": 1024, "max_num_batched_tokens": 1024}
    return load_config({"workers": workers, "router": router})


def trace_of(*prompts: tuple[float, tuple[Run, ...]]) -> Trace:
    return Trace(name="t", requests=tuple(TraceRequest(at_s=at_s, runs=runs, output_tokens=1) for at_s, runs in prompts))


@pytest.mark.parametrize("name", ["toolbench", "programming", "fan_out", "unshared"])
def test_the_ceiling_is_what_hashes_find_in_a_set(name: str) -> None:
    """How: against the block hashes of simulator.traces.content, one by one. Seen to fail with blocks that belong where they begin."""
    trace = generate(name, Arrivals(rate_per_s=10.0), num_requests=120, seed=4)
    seen: set[bytes] = set()
    tree = prompt_tree(trace, block_tokens=16, max_tokens=64)
    for request, prompt in zip(trace.requests, tree.prompts, strict=True):
        hashes = hashes_of(b"root", request.runs)
        found = next((i for i, h in enumerate(hashes) if h not in seen), len(hashes))
        seen.update(hashes)
        assert prompt.reusable_tokens == min(found * HASH_BLOCK_SIZE_TOKENS, request.num_prompt_tokens - 1)
        assert len(prompt.names) == len(hashes) == len(set(prompt.names)) and list(prompt.names) == [
            prompt.names[i] for i in range(len(hashes))
        ]


def test_prompts_have_a_block_name_in_common_where_they_have_its_hash_in_common() -> None:
    """How: two names are equal if and only if two hashes are, over runs cut short and runs of odd lengths. Seen to fail with a longer run
    that does not hang below the shorter one of its content."""
    runs = [
        (Run("a", 100), Run("b", 50)),
        (Run("a", 60), Run("c", 90)),
        (Run("a", 160),),
        (Run("a", 100), Run("b", 50), Run("d", 33)),
        (Run("a", 100),),
        (Run("a", 100), Run("b", 20), Run("e", 40)),
    ]
    trace = trace_of(*[(float(i), each) for i, each in enumerate(runs)])
    named: dict[bytes, bytes] = {}
    for request, prompt in zip(trace.requests, prompt_tree(trace, block_tokens=16, max_tokens=1).prompts, strict=True):
        for name, block_hash in zip(prompt.names, hashes_of(b"root", request.runs), strict=True):
            assert named.setdefault(block_hash, name) == name
    assert len(set(named.values())) == len(named)


def test_caches_dealt_in_turn_and_one_of_all_are_as_on_paper() -> None:
    """Two prefixes, asked for a, a, b, b, a, a: in turn at two workers each prefix is computed twice; one cache with room for one prompt
    finds each second ask. Seen to fail with one set for all workers."""
    trace = trace_of(*[(float(i), (Run(name, 160),)) for i, name in enumerate("aabbaa")])
    tree = prompt_tree(trace, block_tokens=16, max_tokens=1)
    assert tree.reusable_share == pytest.approx(4 * 159 / 960)
    assert blind_share(tree, 1) == tree.reusable_share and blind_share(tree, 2) == pytest.approx(2 * 159 / 960)
    assert pooled_share(tree, 10) == pytest.approx(3 * 159 / 960) and pooled_share(tree, 20) == tree.reusable_share


def test_least_time_is_that_of_one_fast_worker_or_of_prompts_alone() -> None:
    """Two prompts at once, on two workers that may compute: alone each takes its time. Many at once: the shorter ones first, at twice the
    pace. Seen to fail with first come, first served."""
    asked = config(disaggregate="always")
    base_s, token_s = asked.paced.prefill_base_s, asked.paced.prefill_token_s
    two = trace_of((0.0, (Run("a", 1024),)), (0.0, (Run("b", 1024),)))
    assert least_mean_ttft_s(prompt_tree(two, block_tokens=16, max_tokens=1), asked) == pytest.approx(base_s + 1024 * token_s + 4 * LINK_S)
    many = trace_of(*[(0.0, (Run(f"{i}", 1024 * (8 - i)),)) for i in range(8)])
    step_s = base_s + 1024 * token_s
    ends_s = [step_s * sum(range(1, n + 1)) / 2 for n in range(1, 9)]
    assert least_mean_ttft_s(prompt_tree(many, block_tokens=16, max_tokens=1), asked) == pytest.approx(fmean(ends_s) + 4 * LINK_S)


@pytest.mark.parametrize("rate_per_s", [5.0, 60.0])
@pytest.mark.parametrize("policy", ["round_robin", "prefix_cost", "e2"])
def test_no_policy_passes_a_bound(policy: str, rate_per_s: float) -> None:
    """How: idle and far beyond capacity, pulls and all. Seen to fail with prompts that find nothing."""
    trace = generate("toolbench", Arrivals(rate_per_s=rate_per_s), num_requests=250, seed=3)
    bounds = bounds_of(trace, config(), seed=0)
    tree = prompts_of(trace, config())
    served = run_policy_only(trace, config(), policy=policy, seed=0, prompts=tree)
    ttfts_s = [one.ttft_s for one in served if one.ttft_s is not None]
    assert len(ttfts_s) == len(served) and fmean(ttfts_s) > bounds.ttft_bound
    assert 0.5 < share_of_ceiling(served, tree) <= 1.0
    assert bounds.blind_infinite_cache < bounds.infinite_cache
    section = bounds_section([bounds, bounds])
    assert section["clairvoyant_ttft"]["unit"] == "s" and section["infinite_cache"]["values"] == [tree.reusable_share] * 2
