"""One price for workers that are alike: their fitted models differ by chance, and a choice between two idle ones should not follow that.

A model is fitted to what its worker happened to do, so equal machines are told apart by some per cent: the same ones are chosen again and
again, and those that are not never learn better. Here the worker in the middle of a pool lends its price to all whose own is near it or
not known yet, and ties go to whoever was chosen least recently.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.cost_model import StepCost
from router.fleet import Worker

NEAR = 0.25  # of the middle one: a worker whose pace differs by more is another machine, or sick
_PROBE_TOKENS = 1024
_PROBE_SEQUENCES = 16


def share_cost(pool: Iterable[Worker]) -> None:
    """Called with the workers of one model and role when one of them was fitted anew."""
    workers = list(pool)
    known = [w for w in workers if w.model.is_fitted] or [w for w in workers if w.model.num_samples]
    if not known:
        return
    cost = sorted(known, key=lambda w: (_probe_s(w.model.cost), w.worker_id))[(len(known) - 1) // 2].model.cost
    for worker in workers:
        is_alike = not worker.model.is_fitted or abs(_probe_s(worker.model.cost) / _probe_s(cost) - 1.0) <= NEAR
        worker.take_common_cost(cost if is_alike else None)


def _probe_s(cost: StepCost) -> float:
    """A prompt and a step of decoding: what workers are compared by."""
    prefill_s = cost.prefill_s(_PROBE_TOKENS, _PROBE_TOKENS)
    return prefill_s + cost.decode_step_s(_PROBE_SEQUENCES, _PROBE_SEQUENCES * _PROBE_TOKENS)
