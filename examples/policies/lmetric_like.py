"""LMetric as a policy of ours: what is new to compute, times how busy the worker is (sgl-model-gateway, src/policies/lmetric.rs).

    baton serve --policy examples.policies.lmetric_like:LMetricLike

    (tokens of the prompt not cached there) * (requests there + 1); ties by requests

No weight to tune: a product of two factors orders workers alike in whatever unit each is measured. Reproduced: the score and its tie-break.
Not reproduced: their tree of characters, which learns from the gateway's choices alone; here what is cached is our index's word.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies import Cost, PlacementView, Stateless
from router.policies.loads import requests_on

_TIE = 1e-4  # of a token for each request: orders equal scores of less than 10,000 requests and no others


class LMetricLike(Stateless):
    """Its "seconds" are tokens times requests."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            new_tokens, load = request.num_tokens - view.cached_tokens.get(worker.worker_id, 0), requests_on(worker, view.pool)
            work, busy, tie = float(new_tokens), float(new_tokens * load), _TIE * load
            costs[worker.worker_id] = Cost(work + busy + tie, (("new", work), ("busy", busy), ("tie", tie)))
        return costs
