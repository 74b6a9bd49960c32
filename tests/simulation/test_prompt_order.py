"""What ordering a deep inbox by cached shares is worth: one worker core on a virtual clock, open arrivals, half of the prompts cached."""

from __future__ import annotations

from random import Random
from statistics import fmean

import pytest

from engine.core.config import SchedulerConfig, WorkerCoreConfig
from engine.core.worker_core import WorkerCore
from prefill_workers.policy import ChunkedPrefill, PromptOrder
from protocol.worker import Role
from tests.core_bench import Bench, prompt
from tests.sim_cluster import FINGERPRINT, layout, make_request

pytestmark = pytest.mark.pure

NUM_REQUESTS = 400
STEP_S, TOKEN_S = 5e-3, 1e-4
LOAD = 0.9  # of what the worker can compute, steps' own time left out: it is full


def waits(order_by: PromptOrder, seed: int) -> dict[bool, list[float]]:
    """Seconds from arrival to first token, sorted, of prompts of which 960 of 1,000 tokens are cached (True) and of 800 with none."""
    rng, hot = Random(seed), prompt(960, 7)
    bench = Bench()
    bench.core = WorkerCore(
        WorkerCoreConfig(scheduler=SchedulerConfig(max_num_batched_tokens=512, max_num_seqs=16), offer_early=False, max_waiting=2000),
        worker_id="w0",
        epoch=1,
        role=Role.BOTH,
        layout=layout(),
        num_blocks=6000,
        fingerprint=FINGERPRINT,
        max_model_len=2000,
        prefill=ChunkedPrefill(max_offered_bytes=1 << 40, order_by=order_by),
    )
    bench.submit(make_request(NUM_REQUESTS, hot, max_tokens=1))
    while bench.steps:
        bench.finish_step()
    arrivals: list[tuple[float, bool]] = []
    at_s = 0.0
    for _ in range(NUM_REQUESTS):
        at_s += rng.expovariate(1.0) * (40 + 800) / 2 * TOKEN_S / LOAD
        arrivals.append((at_s, rng.random() < 0.5))
    now, num_submitted = 0.0, 0
    found: dict[bool, list[float]] = {True: [], False: []}
    while num_submitted < NUM_REQUESTS or bench.steps:
        while num_submitted < NUM_REQUESTS and arrivals[num_submitted][0] <= now:
            own = 10_000 + 1000 * num_submitted
            tokens = hot + prompt(40, own) if arrivals[num_submitted][1] else prompt(800, own)
            bench.submit(make_request(num_submitted, tokens, max_tokens=1))
            num_submitted += 1
        if not bench.steps:
            now = arrivals[num_submitted][0]
            continue
        plan = bench.steps[0]
        now += STEP_S + TOKEN_S * plan.num_tokens
        for sample in plan.samples:
            arrived_s, is_cached = arrivals[sample.sequence_id - 1]
            found[is_cached].append(now - arrived_s)
        bench.finish_step()
    return {is_cached: sorted(s) for is_cached, s in found.items()}


@pytest.mark.slow
def test_cached_prompts_go_first_and_the_slowest_of_the_others_wait_hardly_longer() -> None:
    """Three seeds. First come: mean 0.61 s, p99 of what is not cached 1.33 s. By cached share: 0.40 s and 1.38 s.

    Seen to fail with all groups worth the same.
    """
    means, slowest = {}, {}
    for order_by in (PromptOrder.FIRST_COME, PromptOrder.HIT_RATIO):
        runs = [waits(order_by, seed) for seed in range(3)]
        means[order_by] = fmean(fmean(run[True] + run[False]) for run in runs)
        slowest[order_by] = fmean(run[False][len(run[False]) * 99 // 100] for run in runs)
    assert means[PromptOrder.HIT_RATIO] < 0.8 * means[PromptOrder.FIRST_COME]
    assert slowest[PromptOrder.HIT_RATIO] < 1.1 * slowest[PromptOrder.FIRST_COME]
