"""Decisions made otherwise than the policy would, to see what would have come of it (regret.py)."""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from types import MappingProxyType

from protocol.messages import Place
from protocol.worker import WorkerId
from router.guarded_policy import GuardedPolicy
from router.policies.api import PlacementView, Pool, PoolPrices


class ForcingGuard(GuardedPolicy):
    """Asks the policy as ever, so that its draws are the same, and overrules it where `forced` names a worker that has room."""

    forced: Mapping[int, WorkerId] = MappingProxyType({})  # by number of the request

    def price(self, view: PlacementView, request: Place, now: float) -> tuple[str, PoolPrices]:
        name, prices = super().price(view, request, now)
        if self.forced and view.pool is Pool.PREFILL:
            worker_id = self.forced.get(int(request.request_id, 16))
            if any(worker.worker_id == worker_id for worker in view.workers):
                return name, _Forced(prices, [0.0 if worker.worker_id == worker_id else inf for worker in view.workers])
        return name, prices


class _Forced:
    """One worker alone is taken; what the policy thought of it stays."""

    def __init__(self, prices: PoolPrices, seconds: list[float]) -> None:
        self.seconds = seconds
        self.parts = prices.parts
