"""429 at the door for a request whose objective no worker is expected to meet, judged by the load it would find (Mooncake, FAST'25).

    time to first token    the least of any worker the prompt may be given to, by the very prices a choice would use, without their lean
    time per token         on the decode batch as it is expected *when the prompt is computed*: less those that end by then, less those
                           whose own prompts are not computed by then

Judged by the decode load of the moment, requests are refused while decode is busy and let in while prefill is full of what will be decoded
next, and the load swings. A refusal now is better than a prompt computed for nothing. Nobody is refused on an estimate that no report has
confirmed, or that is not believed (`estimate_trust.py`), nor after the first attempt: somebody is already reading the answer.
"""

from __future__ import annotations

from protocol.messages import Place, Refused
from router.admission import RETRY_AFTER_MAX_S, refused
from router.decode_outlook import BatchLoad
from router.fleet import Fleet, Pools, Worker
from router.placement import Placement


class EarlyRejection:
    """Asked only for requests that state an objective."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    def refusal(self, place: Place, pools: Pools, now: float, *, queue_s: float, predicted_output_tokens: int) -> Refused | None:
        """None: it may be met, or nobody can say. `queue_s`: until the requests that wait before it are placed."""
        if place.attempt > 0 or not pools.all:
            return None
        Fleet.refresh(pools, now)
        first = self._placement.first_token(place, now, predicted_output_tokens=predicted_output_tokens)
        if first is None:
            return None
        ttft_s = queue_s + first.least_s
        if place.slo_ttft_s is not None and ttft_s > place.slo_ttft_s:
            text = f"predicted time to first token {ttft_s:.3f} s exceeds the objective {place.slo_ttft_s:.3f} s on every worker"
            if first.least_idle_s > place.slo_ttft_s:
                return refused(place, 429, f"{text}, idle ones too; state a longer one", RETRY_AFTER_MAX_S)
            return refused(place, 429, f"{text}; retry later", ttft_s - place.slo_ttft_s)
        if place.slo_tpot_s is not None:
            added = BatchLoad(place.num_choices, place.num_tokens + place.num_choices * predicted_output_tokens)
            return self._by_time_per_token(place, pools, now, ttft_s, added, place.slo_tpot_s)
        return None

    def _by_time_per_token(
        self, place: Place, pools: Pools, now: float, ttft_s: float, added: BatchLoad, slo_tpot_s: float
    ) -> Refused | None:
        workers = pools.decode + pools.both or pools.prefill
        if not all(w.is_predictable for w in workers):
            return None
        least_s = min(_tpot_s(w, w.decode_load_at(now + ttft_s), added) for w in workers)
        if least_s <= slo_tpot_s:
            return None
        text = (
            f"predicted time per token {least_s:.4f} s, once the prompt is computed in {ttft_s:.2f} s, "
            f"exceeds the objective {slo_tpot_s:.4f} s on every worker"
        )
        if all(_tpot_s(w, BatchLoad(0, 0), added) > slo_tpot_s for w in workers):
            return refused(place, 429, f"{text}, idle ones too; state a longer one", RETRY_AFTER_MAX_S)
        fits_in_s = [s for w in workers if (s := _fits_in_s(w, now, added, slo_tpot_s)) is not None]
        return refused(place, 429, f"{text}; retry later", min(fits_in_s, default=ttft_s) - ttft_s)


def _tpot_s(worker: Worker, load: BatchLoad, added: BatchLoad) -> float:
    return worker.model.fitted.decode_step_s(load.num_sequences + added.num_sequences, load.kv_tokens + added.kv_tokens)


def _fits_in_s(worker: Worker, now: float, added: BatchLoad, slo_tpot_s: float) -> float | None:
    """Until enough of what decodes there has ended, with all that is booked come; None: nobody can say."""
    load = BatchLoad(worker.num_sequences, worker.kv_tokens)
    return worker.time_until(now, lambda ended: _tpot_s(worker, load.less(ended), added) <= slo_tpot_s)
