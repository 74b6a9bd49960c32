"""The fast fidelity: waiting is what queueing theory says, hits are what a cache says, a seed is a run."""

from __future__ import annotations

from collections import OrderedDict
from math import sqrt
from random import Random
from statistics import fmean, stdev

import pytest

from control.config import ClusterConfig, load_config
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.errors import ConfigError
from simulator.policy_only import run_policy_only
from simulator.routed_cluster import LINK_S
from simulator.traces.generators import Arrivals, generate
from simulator.traces.trace import Run, Trace, TraceRequest

pytestmark = pytest.mark.pure

BATCH = 512


def config(prefill: int = 2, decode: int = 2, *, num_kv_blocks: int = 4096, **router: object) -> ClusterConfig:
    workers = {"executor": "paced", "prefill_workers": prefill, "decode_workers": decode, "num_kv_blocks": num_kv_blocks}
    return load_config({"workers": workers | {"max_num_batched_tokens": BATCH, "max_waiting": 4096}, "router": router})


def serial(prompts: list[tuple[Run, ...]], gap_s: float = 100.0) -> Trace:
    """One after the other, each long over when the next comes."""
    requests = tuple(TraceRequest(at_s=i * gap_s, runs=runs, output_tokens=1) for i, runs in enumerate(prompts))
    return Trace(name="serial", requests=requests)


def waits_s(load: float, seed: int, count: int = 1500) -> float:
    """Mean wait of prompts that each fill a step, at one prefill worker."""
    paced = config(1, 1)
    service_s = paced.paced.prefill_base_s + BATCH * paced.paced.prefill_token_s
    moments = Arrivals(rate_per_s=load / service_s).moments_s(Random(seed))
    requests = tuple(
        TraceRequest(at_s=at_s, runs=(Run(f"{i}", BATCH),), output_tokens=1) for i, at_s in zip(range(count), moments, strict=False)
    )
    served = run_policy_only(Trace(name="poisson", requests=requests), paced, policy="least_work", seed=seed)
    ttfts_s = [one.ttft_s for one in served[count // 10 :] if one.ttft_s is not None]
    return fmean(ttfts_s) - service_s - 4 * LINK_S


@pytest.mark.parametrize("load", [0.3, 0.5, 0.7])
def test_one_worker_waits_as_an_m_d_1_queue(load: float) -> None:
    """How: ten seeds pooled, against load * service / (2 * (1 - load)). Seen to fail with a step that leaves its base out."""
    paced = config().paced
    service_s = paced.prefill_base_s + BATCH * paced.prefill_token_s
    means = [waits_s(load, seed) for seed in range(10)]
    expected_s = load * service_s / (2 * (1 - load))
    assert abs(fmean(means) - expected_s) < 4 * stdev(means) / sqrt(len(means)), (fmean(means), expected_s)


def least_recently_used(prompts: list[tuple[Run, ...]], num_blocks: int) -> list[int]:
    """Blocks each prompt finds in one cache, block by block: let go of deepest first, evicted least recently used first."""
    held: OrderedDict[tuple[object, ...], None] = OrderedDict()
    found = []
    for runs in prompts:
        tokens = [(run.name, i) for run in runs for i in range(run.num_tokens)]
        chain: list[tuple[object, ...]] = []
        for start in range(0, len(tokens) - HASH_BLOCK_SIZE_TOKENS + 1, HASH_BLOCK_SIZE_TOKENS):
            chain.append((chain[-1] if chain else (), *tokens[start : start + HASH_BLOCK_SIZE_TOKENS]))
        hits = 0
        while hits < len(chain) and chain[hits] in held:
            hits += 1
        found.append(hits)
        for block in chain[:hits]:
            held.move_to_end(block)
        needed = -(-len(tokens) // HASH_BLOCK_SIZE_TOKENS)  # the last one too, which is not full
        while len(held) - hits + needed > num_blocks:
            held.popitem(last=False)
        for block in reversed(chain):
            held[block] = None
            held.move_to_end(block)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_prefix_hit_is_what_a_cache_of_blocks_finds(seed: int) -> None:
    """How: prompts over a tree of prefixes through one small worker. Seen to fail with parents let go of before their children."""
    rng = Random(seed)
    prompts = []
    for number in range(150):
        runs = [Run("head", 40)]
        for depth in range(rng.randrange(4)):
            runs.append(Run(f"{depth} {rng.randrange(3)}", rng.choice((24, 80, 160))))
        prompts.append((*runs, Run(f"own {number}", rng.randrange(1, 90))))
    num_blocks = 64
    asked = config(1, 1, num_kv_blocks=num_blocks, disaggregate="always", prefix_pull=False)
    served = run_policy_only(serial(prompts), asked, policy="round_robin", seed=seed)
    expected = [hits * HASH_BLOCK_SIZE_TOKENS for hits in least_recently_used(prompts, num_blocks)]
    assert [one.num_cached_tokens for one in served] == [
        min(tokens, one.num_prompt_tokens - 1) for tokens, one in zip(expected, served, strict=True)
    ]
    assert 0 < sum(expected) < sum(one.num_prompt_tokens for one in served) / 2


@pytest.mark.parametrize("policy", ["round_robin", "power_of_two", "prefix_cost", "e2"])
def test_a_seed_is_a_run_and_all_requests_end(policy: str) -> None:
    """Seen to fail with ties drawn from the system."""
    trace = generate("toolbench", Arrivals(rate_per_s=40.0), num_requests=300, seed=1)
    first, again = (run_policy_only(trace, config(), policy=policy, seed=5) for _ in range(2))
    assert first == again and {one.terminal for one in first} == {"finished"}
    assert [one.num_output_tokens for one in first] == [request.output_tokens for request in trace.requests]
    assert all(one.ttft_s is not None and one.end_s is not None and one.end_s >= one.arrived_s + one.ttft_s for one in first)


def test_the_decode_pool_has_its_own_policy_where_it_is_given_one() -> None:
    """How: prompts far apart, so that prefill workers are the same; one decode worker after the other, or any. Seen to fail with one policy
    for both pools.
    """
    trace = serial([(Run(f"{i}", 100),) for i in range(40)])
    one, two = (run_policy_only(trace, config(decode_policy=other), policy="round_robin", seed=0) for other in ("", "random"))
    assert [a.prefill_worker for a in one] == [b.prefill_worker for b in two]
    assert {a.decode_worker for a in one[::2]} != {a.decode_worker for a in one[1::2]}
    assert {b.decode_worker for b in two[::2]} == {b.decode_worker for b in two[1::2]}


def test_what_it_does_not_simulate_is_an_error() -> None:
    trace = serial([(Run("p", 16),)])
    for tree, why in (
        ({"workers": {"executor": "paced"}}, "workers.num_kv_blocks"),
        ({"workers": {"num_kv_blocks": 64}}, "workers.executor: paced"),
        ({"workers": {"executor": "paced", "num_kv_blocks": 64}, "prefill": {"order_by": "shortest_first"}}, "order_by is shortest_first"),
    ):
        with pytest.raises(ConfigError, match=why):
            run_policy_only(trace, load_config(tree), policy="least_work", seed=0)
