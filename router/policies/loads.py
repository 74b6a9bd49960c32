"""What several policies read from a worker: how many requests it has, and what a request would take to decode there."""

from __future__ import annotations

from protocol.messages import Place
from router.policies.api import PlacementView, Pool, WorkerView


def requests_on(worker: WorkerView, pool: Pool) -> int:
    """Requests in flight, as routers that count requests see them: prompts not computed yet, or sequences, or both where one does both."""
    if pool is Pool.PREFILL:
        return worker.num_prefills
    return worker.num_sequences if pool is Pool.DECODE else worker.num_prefills + worker.num_sequences


def token_s(view: PlacementView, request: Place, worker: WorkerView) -> float:
    """Time between two tokens once the request is in the batch, with all its KV at its expected end."""
    return worker.cost.decode_step_s(worker.num_sequences + request.num_choices, worker.kv_tokens + view.kv_tokens)
