"""What a policy sees, made by hand: for tests whose arithmetic is written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from protocol.messages import Place
from protocol.worker import Role
from router.cost_model import StepCost
from router.policies import Cost, PlacementPolicy, PlacementView, Pool

# A token of prefill takes 1 ms and nothing else takes anything, so that seconds of prefill are tokens / 1000.
PER_TOKEN = StepCost(step_s=0.0, prefill_token_s=1e-3, prefill_pair_s=0.0, decode_sequence_s=0.0, decode_kv_token_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A worker as it is seen; idle and empty where nothing else is said."""

    worker_id: str
    epoch: int = 1
    role: Role = Role.PREFILL
    cost: StepCost = PER_TOKEN
    last_chosen: int = 0
    hit_rate: float = 0.0
    queued_prefill_tokens: int = 0
    queued_prefill_s: float = 0.0
    num_prefills: int = 0
    num_sequences: int = 0
    kv_tokens: int = 0
    kv_capacity_tokens: int = 65536
    free_kv_tokens: int = 65536
    reclaimable_kv_tokens: int = 0

    def signal_age_s(self, now: float) -> float:
        return 0.0


def workers(*names: str, **common: Any) -> list[Seen]:
    return [Seen(worker_id=name, **common) for name in names]


def view(seen: Sequence[Seen], pool: Pool = Pool.PREFILL, **changes: Any) -> PlacementView:
    cached: Mapping[str, int] = changes.pop("cached_tokens", {})
    fields: dict[str, Any] = {
        "device_tokens": cached,
        "predicted_output_tokens": 10,
        "kv_tokens": 0,
        "decode_worker": None,
        "transfer_s": 0.0,
    }
    return PlacementView(pool=pool, workers=seen, cached_tokens=cached, **(fields | changes))


def scored(policy: PlacementPolicy, seen: PlacementView, request: Place, *, now: float = 100.0, seed: int = 1) -> dict[str, Cost]:
    """Its prices, twice the same."""
    costs = policy.score(seen, request, now, Random(seed))
    assert policy.score(seen, request, now, Random(seed)) == costs, "score changed something"
    return costs


def seconds(policy: PlacementPolicy, seen: PlacementView, request: Place, **when: Any) -> dict[str, float]:
    return {name: cost.seconds for name, cost in scored(policy, seen, request, **when).items()}


def cheapest(policy: PlacementPolicy, seen: PlacementView, request: Place, **when: Any) -> str:
    found = seconds(policy, seen, request, **when)
    return min(found, key=lambda name: (found[name], name))
