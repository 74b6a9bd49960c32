"""The worker that would be free first, counting seconds of outstanding work rather than requests."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Pool, Stateless
from router.policies.loads import token_s


class LeastWork(Stateless):
    """Outstanding prefill seconds, or the decode time of the output in the batch as it would be; blind to prefixes.

    Also what the router falls back to when another policy fails.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        prefills, decodes = view.pool is not Pool.DECODE, view.pool is not Pool.PREFILL
        for worker in view.workers:
            queue_s = worker.queued_prefill_s if prefills else 0.0
            decode_s = 0.0
            if decodes:
                decode_s = view.predicted_output_tokens * token_s(view, request, worker)
            costs[worker.worker_id] = Cost(queue_s + decode_s, (("queue", queue_s), ("decode", decode_s)))
        return costs
