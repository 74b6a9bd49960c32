"""Whether a pool's estimates are believed: counting requests beats seconds of work that are wrong by half.

    pooled error > estimate_error_max        ──► counted: every request of the pool is worth the same, one common price
    pooled error < half of estimate_error_max ──► believed again

The pooled error is the mean, over the fitted workers of one model and role, of how far each one's next report was from its prediction.
A queue that is twice as long as believed does more harm than one whose length is merely counted, so placement gives the estimates up for
a while; the models go on learning meanwhile, which is how they come back. One worker that changed its pace does not tip its pool: it is
fitted anew within some dozens of reports (`cost_model.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean, median

from protocol.worker import Role
from router.cost_model import StepCost
from router.fleet import RequestPrice, Worker

_LEAVE_RATIO = 0.5  # of the bound: between the two nothing changes


@dataclass(frozen=True, slots=True, kw_only=True)
class Distrust:
    """A pool that is counted, since its error was above the bound."""

    model_id: str
    role: Role
    relative_error: float


class EstimateTrust:
    """One verdict for each pool, kept until it turns; there are no more pools than models times roles."""

    def __init__(self, *, error_max: float) -> None:
        self._error_max = error_max
        self._counted: dict[tuple[str, Role], Distrust] = {}

    def judge(self, pool: Iterable[Worker]) -> None:
        """Believe or count all workers of one pool: those of one model and role. Called when one of them was fitted anew."""
        workers = list(pool)
        errors = [w.model.relative_error for w in workers if w.model.is_fitted]
        if not errors:
            return
        key = (workers[0].address.model_id, workers[0].role)
        error = fmean(errors)
        price = None
        if error > (self._error_max * _LEAVE_RATIO if key in self._counted else self._error_max):
            self._counted[key] = Distrust(model_id=key[0], role=key[1], relative_error=error)
            price = price_of(workers)
        else:
            self._counted.pop(key, None)
        for worker in workers:
            worker.count_requests(price)

    def forget(self, model_id: str, role: Role) -> None:
        """The pool has no worker any more."""
        self._counted.pop((model_id, role), None)

    @property
    def counted(self) -> tuple[Distrust, ...]:
        return tuple(self._counted.values())


def price_of(workers: list[Worker]) -> RequestPrice:
    """The same for all: the median of each coefficient, and a prompt of mean length; KV is part of a sequence's price."""
    step_s, token_s, pair_s, sequence_s, kv_token_s = (median(c) for c in zip(*(w.model.cost.coefficients for w in workers), strict=True))
    num_tokens = round(fmean(w.context_mean for w in workers))
    cost = StepCost(
        step_s=step_s,
        prefill_token_s=token_s,
        prefill_pair_s=pair_s,
        decode_sequence_s=sequence_s + num_tokens * kv_token_s,
        decode_kv_token_s=0.0,
    )
    return RequestPrice(prefill_s=cost.prefill_s(num_tokens, num_tokens), cost=cost)
