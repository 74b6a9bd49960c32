"""Taking many steps at once changes nothing: requests come and go at the same moments as step by step, with KV simulated and checked."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from control.config import load_config
from simulator.routed_cluster import MODEL_ID, VOCAB_SIZE, RoutedCluster
from simulator.routed_gateway import Served
from simulator.token_accurate import MAX_TOKENS
from simulator.traces.generators import Arrivals, generate
from simulator.workload import requests_of

pytestmark = pytest.mark.pure

SMALL = {
    "workers": {"executor": "paced", "prefill_workers": 2, "decode_workers": 2, "num_kv_blocks": 2048, "max_num_batched_tokens": 512},
    "router": {
        "prefix_pull_min_tokens": 1 << 20,
        "disaggregate": "always",
    },  # what is chosen by estimates differs with the moment of a report
}


def run(generator: str, policy: str, *, is_checked: bool) -> tuple[list[Served], list[dict[str, object]]]:
    """Who was served, and what decode workers said of themselves every 0.2137 s."""
    trace = generate(generator, Arrivals(rate_per_s=8.0), num_requests=100, seed=3)
    cluster = RoutedCluster(load_config(SMALL), policy=policy, seed=1, max_tokens=MAX_TOKENS, is_checked=is_checked)
    told: list[dict[str, object]] = []

    def listen() -> None:
        for worker_id in ("decode-0", "decode-1"):
            snapshot = asdict(cluster.workers[worker_id].snapshot())
            told.append({name: snapshot[name] for name in ("step_count", "num_running", "running_kv_tokens")})

    for i in range(20):
        cluster.loop.call_at(1.0 + i * 0.2137, listen)
    served = cluster.run(requests_of(trace, model_id=MODEL_ID, vocab_size=VOCAB_SIZE))
    assert all(one.terminal == "finished" for one in served)
    assert sum(w.executor.num_wrong_reads for w in cluster.workers.values()) == 0
    return served, told


@pytest.mark.parametrize("generator", ["fan_out", "toolbench"])
def test_leaps_and_steps_serve_alike(generator: str) -> None:
    """A policy that looks at no report: equal to the last bit. Seen to fail with the batch not cut when an attempt comes."""
    assert run(generator, "round_robin", is_checked=False) == run(generator, "round_robin", is_checked=True)


def test_a_report_in_the_middle_of_a_leap_says_what_steps_would() -> None:
    """At 20 moments of a run. Seen to fail with reports that leave out the steps that are over."""
    leapt, stepped = ([*run("toolbench", "round_robin", is_checked=checked)[1]] for checked in (False, True))
    assert leapt == stepped and len({told["step_count"] for told in leapt}) > 20
