"""Mooncake's algorithm 1: the prefill worker with the least time to first token, its prefix computed or pulled, whichever is closer.

    len(w)   leading tokens cached on w          best   the most that any worker has and could send
    best / len(w) <  threshold:   TTFT(w) = Tload + Tqueue + Tprefill(prompt, len(w))
    best / len(w) >= threshold:   TTFT(w) = Ttransfer + Tqueue + Tprefill(prompt, best)

Decode goes where the time between tokens (TBT) will be least. Where TTFT or TBT breaks the request's SLO the router refuses it with
429 before any policy is asked (router/admission.py), and a prefix that is pulled is then held in two places, which is how hot ones
spread in the paper. Mooncake, FAST'25, section 6.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Pool, Pull, Stateless, WorkerView
from router.policies.loads import token_s


class MooncakeTtft(Stateless):
    """Seconds to the first token; of a decode pool seconds between tokens; prefilled where it decodes, both for the whole output."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        # The paper tunes it and gives no value: here a peer has to hold twice as much before it is asked for it.
        balancing_threshold: float = 2.0

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            terms = [] if view.pool is Pool.DECODE else self._first_token(view, request, worker)
            if view.pool is Pool.DECODE:
                terms.append(("decode", token_s(view, request, worker)))
            elif view.pool is Pool.WHOLE:
                terms.append(("decode", view.predicted_output_tokens * token_s(view, request, worker)))
            costs[worker.worker_id] = Cost(sum(seconds for _, seconds in terms), tuple(terms))
        return costs

    def _first_token(self, view: PlacementView, request: Place, worker: WorkerView) -> list[tuple[str, float]]:
        local_tokens = view.cached_tokens.get(worker.worker_id, 0)
        pull = view.pulls.get(worker.worker_id)
        if pull is not None and self._is_far_behind(local_tokens, pull):
            cached, moved = pull.num_tokens, ("transfer", pull.pull_s)
        else:
            cached, moved = local_tokens, ("load", view.loads_s.get(worker.worker_id, 0.0))
        return [
            moved,
            ("queue", worker.queued_prefill_s),
            ("prefill", worker.cost.prefill_s(request.num_tokens - cached, request.num_tokens)),
        ]

    def _is_far_behind(self, local_tokens: int, pull: Pull) -> bool:
        return pull.num_tokens >= self.config.balancing_threshold * local_tokens
