"""One policy under one trace, token by token: the cluster's own cores on a virtual clock, what each request came to handed back."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from control.config import ClusterConfig
from simulator.estimate_error import EXACT, EstimateError
from simulator.routed_cluster import MODEL_ID, VOCAB_SIZE, RoutedCluster
from simulator.routed_gateway import Served
from simulator.traces.trace import Trace
from simulator.true_steps import TrueSteps
from simulator.workload import requests_of

MAX_TOKENS = 2048
DEFAULT_CLUSTER: dict[str, dict[str, object]] = {  # for who names none
    "model": {"path": "demo"},
    "workers": {
        "executor": "paced",
        "prefill_workers": 8,
        "decode_workers": 8,
        "block_size": 64,  # not 16: a prompt of 12k tokens is 190 blocks to book and not 750
        "num_kv_blocks": 4096,
        "max_num_batched_tokens": 2048,
        "max_waiting": 4096,
    },
}


def run_token_accurate(
    trace: Trace,
    config: ClusterConfig,
    *,
    policy: str,
    seed: int,
    max_tokens: int | None = MAX_TOKENS,
    steps: TrueSteps | None = None,
    estimate_error: EstimateError = EXACT,
    on_over: Callable[[int, float], None] = lambda num_over, now_s: None,
) -> list[Served]:
    """Every request of the trace, in its order, and what came of it. The same arguments are the same run.

    policy: as `router.policies.load` takes it. seed: of the router's draws, the prompts' tokens and the network.
    max_tokens: what clients are taken to allow; None, for an oracle alone: the router is told how long each answer will be.
    steps, estimate_error: what steps take, and how wrong it is reported, as in RoutedCluster.
    on_over(how many requests are over, seconds on the virtual clock) is told now and then.

    Raises:
        ConfigError: no such policy, or workers that cannot be simulated.
        AssertionError: a law is broken, or something never ends.
    """
    cluster = RoutedCluster(config, policy=policy, seed=seed, max_tokens=max_tokens, steps=steps, estimate_error=estimate_error)
    requests = requests_of(trace, model_id=MODEL_ID, vocab_size=VOCAB_SIZE, seed=seed)
    with _seldom_collected():
        served = cluster.run(requests, on_over=lambda num_over: on_over(num_over, cluster.loop.now))
    cluster.router.check()
    return served


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """Python's collector of cycles walks over every block that is booked and finds next to none: a tenth of the time of a run."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*before)


__all__ = ["DEFAULT_CLUSTER", "MAX_TOKENS", "run_token_accurate"]
