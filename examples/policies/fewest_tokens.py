"""A whole placement policy in one file: first where fewest prompt tokens are still to be computed, this prompt's missing ones included.

    baton compare --policies fewest_tokens:FewestTokens,prefix_cost,round_robin --generate toolbench --rate 60
    baton serve --policy fewest_tokens:FewestTokens:sequence_tokens=40

Both with this file in the working directory, and the file as it is: what was tried is what serves.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies import Cost, PlacementView, Pool, Stateless


class FewestTokens(Stateless):
    """Its "seconds" are tokens; a sequence that decodes counts as `sequence_tokens`."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        sequence_tokens: float = 20.0

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            missing = float(request.num_tokens - view.cached_tokens.get(worker.worker_id, 0))
            waiting = 0.0 if view.pool is Pool.DECODE else float(worker.queued_prefill_tokens)
            decoding = 0.0 if view.pool is Pool.PREFILL else self.config.sequence_tokens * worker.num_sequences
            terms = (("missing", missing), ("waiting", waiting), ("decoding", decoding))
            costs[worker.worker_id] = Cost(missing + waiting + decoding, terms)
        return costs
