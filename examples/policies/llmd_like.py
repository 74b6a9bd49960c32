"""llm-d's scheduler as a policy of ours: filter, weighted scores between 0 and 1, the best wins (llm-d-router, precise-prefix profile).

    baton serve --policy examples.policies.llmd_like:LlmdLike:prefix_weight=2,queue_weight=1

    filter   a worker with queue >= queue_depth, KV use >= kv_util or a signal older than stale_s is saturated; all saturated: none is
    prefix   cached / prompt              queue   (longest - own) / (longest - shortest), 1 where all are alike         kv   1 - use
    score    prefix_weight * prefix + queue_weight * queue + kv_weight * kv

Reproduced: these three scorers with the usual weights 2, 1, 1 and the limits of the saturation filter. Not reproduced: the decider
between prefill and decode (our router has its own), queue depth of decoding workers (not told apart from running here), no-hit-LRU,
sessions, LoRA, the latency predictor, and shedding when everything is saturated. Ties go to the worker chosen least recently,
theirs to a random one.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies import Cost, PlacementView, Pool, Stateless, WorkerView


class LlmdLike(Stateless):
    """Its "seconds" are what is missing to a full score, by scorer."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        prefix_weight: float = 2.0
        queue_weight: float = 1.0
        kv_weight: float = 1.0
        queue_depth: int = 5
        kv_util: float = 0.8
        stale_s: float = 0.2

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        config = self.config
        fit = [worker for worker in view.workers if not self._is_saturated(worker, view, now)] or view.workers
        queues = [_queue(worker, view.pool) for worker in fit]
        longest, shortest = max(queues), min(queues)
        costs = {}
        for worker, queue in zip(fit, queues, strict=True):
            prefix = config.prefix_weight * (1.0 - view.cached_tokens.get(worker.worker_id, 0) / request.num_tokens)
            waiting = config.queue_weight * (queue - shortest) / (longest - shortest) if longest > shortest else 0.0
            memory = config.kv_weight * _kv_use(worker)
            costs[worker.worker_id] = Cost(prefix + waiting + memory, (("prefix", prefix), ("queue", waiting), ("kv", memory)))
        return costs

    def _is_saturated(self, worker: WorkerView, view: PlacementView, now: float) -> bool:
        config = self.config
        if worker.signal_age_s(now) > config.stale_s:
            return True
        is_deep = view.pool is not Pool.DECODE and _queue(worker, view.pool) >= config.queue_depth
        return is_deep or _kv_use(worker) >= config.kv_util


def _queue(worker: WorkerView, pool: Pool) -> int:
    """Prompts not computed yet; of a decode pool, which has none of them, sequences."""
    return worker.num_sequences if pool is Pool.DECODE else worker.num_prefills


def _kv_use(worker: WorkerView) -> float:
    """Blocks that only the prefix cache holds are free to vLLM, whose metric this is."""
    return 1.0 - (worker.free_kv_tokens + worker.reclaimable_kv_tokens) / max(worker.kv_capacity_tokens, 1)
