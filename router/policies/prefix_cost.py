"""E2 of Preble as one cost without a mode switch: reuse a prefix until its queue costs more than computing it again.

    J(w) = Q(w) + P(w) + beta * (P(w) - min P) + M(w) + N(w)          prefill
    J(w) = out * TBT(w) + M(w) + N(w)                                 decode
    J(w) = both, each term once                                       prefilled where it decodes

Q outstanding seconds; P prefill of what is missed; beta the price of duplicating a prefix; M what would be lost by eviction; N moving KV.
A hot prefix spreads by itself once Q of its holders exceeds (1 + beta) * what it saves (section 2 of Preble, ICLR'25).
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Pool, Stateless, WorkerView


class PrefixCost(Stateless):
    """Estimated seconds, with prefixes."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        beta: float = 2.0  # price of a duplicated second of prefill; 0: only this request counts
        eviction: bool = True  # charge for what a prompt pushes out of a cache

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        if view.pool is Pool.DECODE:
            return {w.worker_id: self._decode_cost(view, request, w, now) for w in view.workers}
        num_tokens, cached_tokens, whole = request.num_tokens, view.cached_tokens, view.pool is Pool.WHOLE
        prefill_s = []
        for worker in view.workers:
            prefill_s.append(worker.cost.prefill_s(num_tokens - cached_tokens.get(worker.worker_id, 0), num_tokens))
        least_s = min(prefill_s, default=0.0)
        beta = self.config.beta
        costs = {}
        for worker, own_s in zip(view.workers, prefill_s, strict=True):
            name = worker.worker_id
            queue_s = worker.queued_prefill_s(now)
            duplicate_s = beta * (own_s - least_s)
            evict_s = self._eviction_s(worker, num_tokens - cached_tokens.get(name, 0))
            if whole:
                decode_s = self._decode_s(view, request, worker, now)
                total = queue_s + own_s + duplicate_s + evict_s + decode_s
                last = ("decode", decode_s)
            else:
                transfer_s = view.transfer_s if name != view.decode_worker else 0.0
                total = queue_s + own_s + duplicate_s + evict_s + transfer_s
                last = ("transfer", transfer_s)
            costs[name] = Cost(total, (("queue", queue_s), ("prefill", own_s), ("duplicate", duplicate_s), ("evict", evict_s), last))
        return costs

    def _decode_cost(self, view: PlacementView, request: Place, worker: WorkerView, now: float) -> Cost:
        missed = request.num_tokens - view.cached_tokens.get(worker.worker_id, 0)
        decode_s = self._decode_s(view, request, worker, now)
        evict_s = self._eviction_s(worker, missed)
        transfer_s = view.transfer_s * missed / max(request.num_tokens, 1)
        return Cost(decode_s + evict_s + transfer_s, (("decode", decode_s), ("evict", evict_s), ("transfer", transfer_s)))

    @staticmethod
    def _decode_s(view: PlacementView, request: Place, worker: WorkerView, now: float) -> float:
        num_sequences = worker.num_sequences(now) + request.num_choices
        return view.predicted_output_tokens * worker.cost.decode_step_s(num_sequences, worker.kv_tokens(now) + view.kv_tokens)

    def _eviction_s(self, worker: WorkerView, missed: int) -> float:
        """Seconds of prefill that cached blocks pushed out by this prompt would have saved: 0 while memory is free."""
        displaced = min(missed - worker.free_kv_tokens, worker.reclaimable_kv_tokens)
        if displaced <= 0 or not self.config.eviction:
            return 0.0
        return worker.hit_rate * displaced * worker.cost.prefill_token_s
