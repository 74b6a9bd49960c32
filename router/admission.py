"""Who is turned away at the door, and when to come back: a refusal now is better than a timeout later.

    413  the prompt fits no worker          never will
    429  the queue is full, or no worker can meet the request's SLO     Retry-After: when the queue has drained
    503  no worker                          Retry-After: about a respawn

Only first attempts are refused for load: somebody is already reading the answer of the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from protocol.messages import Place, Refused
from protocol.worker import WorkerId
from router.fleet import Pools, Worker

RETRY_AFTER_MAX_S = 60.0


def refusal_by_size(place: Place, pools: Pools) -> Refused | None:
    """No worker could hold the prompt and one more token, even alone."""
    most = pools.most_tokens
    if not pools.all or place.num_tokens + 1 <= most:
        return None
    return _refused(
        place, 413, f"prompt of {place.num_tokens:,} tokens leaves no room in the {most:,} tokens a worker can hold; shorten it"
    )


def refusal_by_queue(place: Place, *, num_waiting: int, max_queue: int, drain_s: float) -> Refused | None:
    """The queue is at its bound."""
    if num_waiting < max_queue:
        return None
    return _refused(place, 429, f"{num_waiting} requests are waiting, the limit is {max_queue}; retry later", drain_s)


def refusal_by_slo(place: Place, pools: Pools, cached_tokens: Mapping[WorkerId, int], *, queue_s: float, kv_tokens: int) -> Refused | None:
    """Every worker's prediction breaks the request's SLO. Nobody is refused on an estimate that no report has confirmed.

    The loads of `pools` must be fresh.
    """
    if place.attempt > 0:
        return None
    if place.slo_ttft_s is not None:
        workers = pools.prefill + pools.both or pools.decode
        if workers and all(w.is_predictable for w in workers):
            least_s = queue_s + min(_ttft_s(w, place, cached_tokens) for w in workers)
            if least_s > place.slo_ttft_s:
                text = f"predicted time to first token {least_s:.3f} s exceeds the objective {place.slo_ttft_s:.3f} s on every worker"
                return _refused(place, 429, text + "; retry later", least_s - place.slo_ttft_s)
    if place.slo_tpot_s is not None:
        workers = pools.decode + pools.both or pools.prefill
        if workers and all(w.is_predictable for w in workers):
            least_s = min(_tpot_s(w, place, kv_tokens) for w in workers)
            if least_s > place.slo_tpot_s:
                text = f"predicted time per token {least_s:.4f} s exceeds the objective {place.slo_tpot_s:.4f} s on every worker"
                return _refused(place, 429, text + "; retry later", 1.0)
    return None


def refusal_after_wait(place: Place, waited_s: float, drain_s: float) -> Refused:
    return _refused(place, 429, f"no worker had room in {waited_s:.1f} s; retry later", drain_s)


def refusal_without_worker(place: Place, waited_s: float) -> Refused:
    besides = f" besides the {len(place.excluded)} this request failed on" if place.excluded else ""
    return _refused(place, 503, f"no worker for {place.model_id!r}{besides} in {waited_s:.1f} s", 5.0)


def drain_s(num_waiting_tokens: int, pools: Pools) -> float:
    """Seconds until the prompts waiting now have started, with all prefill workers at work."""
    workers = pools.prefill + pools.both or pools.decode
    if not workers:
        return RETRY_AFTER_MAX_S
    speed = sum(1.0 / w.model.fitted.prefill_token_s for w in workers)
    return num_waiting_tokens / speed


def _ttft_s(worker: Worker, place: Place, cached_tokens: Mapping[WorkerId, int]) -> float:
    missed = place.num_tokens - cached_tokens.get(worker.worker_id, 0)
    return worker.queued_prefill_s + worker.model.fitted.prefill_s(missed, place.num_tokens)


def _tpot_s(worker: Worker, place: Place, kv_tokens: int) -> float:
    return worker.model.fitted.decode_step_s(worker.num_sequences + place.num_choices, worker.kv_tokens + kv_tokens)


def _refused(place: Place, status: int, message: str, retry_after_s: float | None = None) -> Refused:
    if retry_after_s is not None:
        retry_after_s = float(min(max(1, ceil(retry_after_s)), RETRY_AFTER_MAX_S))
    return Refused(request_id=place.request_id, attempt=place.attempt, status=status, message=message, retry_after_s=retry_after_s)
