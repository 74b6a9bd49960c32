"""Any worker, each as likely as the next: what a policy must beat to be worth its cost."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Stateless


class RandomWorker(Stateless):
    """Its "seconds" are draws from [0, 1) of the router's generator: they order the workers and mean nothing else."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            draw = rng.random()
            costs[worker.worker_id] = Cost(draw, (("draw", draw),))
        return costs
