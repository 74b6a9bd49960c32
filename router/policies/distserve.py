"""DistServe's dispatch: the prefill worker with the shortest queue, then the least loaded decode worker (section 4.3, OSDI'24).

Queue and load are counted in requests, as in the released code (in flight + waiting); the paper names no unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Stateless
from router.policies.loads import requests_on


class DistServe(Stateless):
    """Blind to prefixes and to lengths. Its "seconds" are requests: they order the workers and mean nothing else."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            load = float(requests_on(worker, view.pool))
            costs[worker.worker_id] = Cost(load, (("requests", load),))
        return costs
