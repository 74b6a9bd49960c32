"""E2 of Preble as one cost without a mode switch: reuse a prefix until its queue costs more than computing it again.

    J(w) = Q(w) + P(w) + beta * (P(w) - min P) + M(w) + N(w)          prefill
    J(w) = out * TBT(w) + M(w) + N(w)                                 decode
    J(w) = both, each term once                                       prefilled where it decodes

Q outstanding seconds; P prefill of what is missed, or pulling a part of it from a peer and the prefill of the rest, whichever is less,
and loading what lies in host memory; beta the price of duplicating a prefix; M what would be lost by eviction; N moving KV.
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
        return self._score_decode(view, request) if view.pool is Pool.DECODE else self._score_prefill(view, request)

    def _score_prefill(self, view: PlacementView, request: Place) -> dict[WorkerId, Cost]:
        num_tokens, cached, whole = request.num_tokens, view.cached_tokens.get, view.pool is Pool.WHOLE
        pulls, loads_s = view.pulls, view.loads_s
        priced = []
        for worker in view.workers:
            missed = num_tokens - cached(worker.worker_id, 0)
            compute_s, pull_s = worker.cost.prefill_s(missed, num_tokens), 0.0
            if pulls and (pull := pulls.get(worker.worker_id)) is not None and pull.pull_s < pull.compute_s:
                compute_s, pull_s = compute_s - pull.compute_s, pull.pull_s
            load_s = loads_s.get(worker.worker_id, 0.0) if loads_s else 0.0
            priced.append((compute_s + pull_s + load_s, pull_s, load_s, missed, worker))
        least_s = min(priced, key=_seconds)[0]
        beta, last_name = self.config.beta, "decode" if whole else "transfer"
        output, kv_tokens, num_choices = view.predicted_output_tokens, view.kv_tokens, request.num_choices
        costs = {}
        for own_s, pull_s, load_s, missed, worker in priced:
            queue_s = worker.queued_prefill_s
            duplicate_s = beta * (own_s - least_s)
            evict_s = self._eviction_s(worker, missed) if missed > worker.free_kv_tokens else 0.0
            if whole:
                last = worker.cost.decode_step_s(worker.num_sequences + num_choices, worker.kv_tokens + kv_tokens) * output
            else:
                last = view.transfer_s
            rest = (("duplicate", duplicate_s), ("evict", evict_s), (last_name, last))
            moved = (("pull", pull_s), ("load", load_s)) if pull_s or load_s else ()
            terms = (("queue", queue_s), ("prefill", own_s - pull_s - load_s), *moved, *rest)
            costs[worker.worker_id] = Cost(queue_s + own_s + duplicate_s + evict_s + last, terms)
        return costs

    def _score_decode(self, view: PlacementView, request: Place) -> dict[WorkerId, Cost]:
        num_tokens, cached = request.num_tokens, view.cached_tokens.get
        transfer_token_s = view.transfer_s / max(num_tokens, 1)
        output, kv_tokens, num_choices = view.predicted_output_tokens, view.kv_tokens, request.num_choices
        costs = {}
        for worker in view.workers:
            missed = num_tokens - cached(worker.worker_id, 0)
            decode_s = output * worker.cost.decode_step_s(worker.num_sequences + num_choices, worker.kv_tokens + kv_tokens)
            evict_s = self._eviction_s(worker, missed) if missed > worker.free_kv_tokens else 0.0
            transfer_s = transfer_token_s * missed
            terms = (("decode", decode_s), ("evict", evict_s), ("transfer", transfer_s))
            costs[worker.worker_id] = Cost(decode_s + evict_s + transfer_s, terms)
        return costs

    def _eviction_s(self, worker: WorkerView, missed: int) -> float:
        """Seconds of prefill that the cached blocks pushed out by this prompt would have saved."""
        displaced = min(missed - worker.free_kv_tokens, worker.reclaimable_kv_tokens)
        return worker.hit_rate * displaced * worker.cost.prefill_token_s if self.config.eviction else 0.0


def _seconds(priced: tuple[float, float, float, int, WorkerView]) -> float:
    return priced[0]
