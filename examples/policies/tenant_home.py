"""A placement policy in one file: each tenant has a home worker and leaves it only when the way home is too long.

    baton serve --policy tenant_home:TenantHome:patience_s=0.5        (with examples/policies on the Python path)

Rendezvous hashing keeps homes where they are when a worker joins or leaves: only that worker's tenants move.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies import Cost, PlacementView, Pool, Stateless


class TenantHome(Stateless):
    """Seconds of queue before the request, plus `patience_s` on every worker that is not the tenant's home."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        patience_s: float = 0.25  # a home that would take this much longer is left

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        home = max((worker.worker_id for worker in view.workers), key=lambda name: affinity(request.tenant, name), default=None)
        costs = {}
        for worker in view.workers:
            if view.pool is Pool.DECODE:
                queue_s = worker.cost.decode_step_s(worker.num_sequences + request.num_choices, worker.kv_tokens + view.kv_tokens)
            else:
                queue_s = worker.queued_prefill_s
            away_s = 0.0 if worker.worker_id == home else self.config.patience_s
            costs[worker.worker_id] = Cost(queue_s + away_s, (("queue", queue_s), ("away", away_s)))
        return costs


def affinity(tenant: str, worker_id: WorkerId) -> bytes:
    """Comparable; the same in every process."""
    return hashlib.blake2b(f"{tenant} {worker_id}".encode(), digest_size=8).digest()
