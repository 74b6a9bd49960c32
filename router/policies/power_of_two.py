"""The less loaded of two workers drawn at random: nearly as even as looking at all, and herds do not form on stale loads.

Mitzenmacher, "The power of two choices in randomized load balancing" (2001); load is the number of requests, as in the routers of
SGLang and vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Stateless
from router.policies.loads import requests_on


class PowerOfTwo(Stateless):
    """Prices the workers drawn and no other. Its "seconds" are requests in flight: they order the workers and mean nothing else."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        choices: int = 2  # workers drawn; 1 is random, many is the fewest requests

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in rng.sample(view.workers, min(max(self.config.choices, 1), len(view.workers))):
            load = float(requests_on(worker, view.pool))
            costs[worker.worker_id] = Cost(load, (("requests", load),))
        return costs
