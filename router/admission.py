"""Who is turned away at the door, and when to come back: a refusal now is better than a timeout later.

    413  the prompt fits no worker          never will
    429  the queue is full                  Retry-After: when the queue has drained
    429  no worker is expected to meet the request's objective (early_rejection.py)     Retry-After: when one is
    503  no worker                          Retry-After: about a respawn

Only first attempts are refused for load: somebody is already reading the answer of the others.
"""

from __future__ import annotations

from math import ceil

from protocol.messages import Place, Refused
from router.fleet import Pools

RETRY_AFTER_MAX_S = 60.0


def refusal_by_size(place: Place, pools: Pools) -> Refused | None:
    """No worker could hold the prompt and one more token, even alone."""
    most = pools.most_tokens
    if not pools.all or place.num_tokens + 1 <= most:
        return None
    return refused(place, 413, f"prompt of {place.num_tokens:,} tokens leaves no room in the {most:,} tokens a worker can hold; shorten it")


def refusal_by_queue(place: Place, *, num_waiting: int, max_queue: int, drain_s: float) -> Refused | None:
    """The queue is at its bound."""
    if num_waiting < max_queue:
        return None
    return refused(place, 429, f"{num_waiting} requests are waiting, the limit is {max_queue}; retry later", drain_s)


def refusal_after_wait(place: Place, waited_s: float, drain_s: float) -> Refused:
    return refused(place, 429, f"no worker had room in {waited_s:.1f} s; retry later", drain_s)


def refusal_without_worker(place: Place, waited_s: float) -> Refused:
    besides = f" besides the {len(place.excluded)} this request failed on" if place.excluded else ""
    return refused(place, 503, f"no worker for {place.model_id!r}{besides} in {waited_s:.1f} s", 5.0)


def drain_s(num_waiting_tokens: int, pools: Pools) -> float:
    """Seconds until the prompts waiting now have started, with all prefill workers at work."""
    workers = pools.prefill + pools.both or pools.decode
    if not workers:
        return RETRY_AFTER_MAX_S
    speed = sum(1.0 / w.model.fitted.prefill_token_s for w in workers)
    return num_waiting_tokens / speed


def refused(place: Place, status: int, message: str, retry_after_s: float | None = None) -> Refused:
    """`retry_after_s` in whole seconds, from 1 to RETRY_AFTER_MAX_S; None: never."""
    if retry_after_s is not None:
        retry_after_s = float(min(max(1, ceil(retry_after_s)), RETRY_AFTER_MAX_S))
    return Refused(request_id=place.request_id, attempt=place.attempt, status=status, message=message, retry_after_s=retry_after_s)
