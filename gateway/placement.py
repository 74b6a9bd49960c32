"""What a router is asked, what its refusal means, and where an attempt goes when none answers: least_work over the last snapshots. Pure.

`least_work` is a coarse stand-in for router/policies/least_work.py, which knows prefixes, bookings of all gateways and measured times: here
work is counted in tokens, as the workers last told it plus what this gateway has sent since.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from protocol.block_hash import block_hashes
from protocol.errors import BatonError, InvalidRequest, NoWorker, Overloaded, ServiceError
from protocol.messages import Assignment, CandidateScore, Place, Refused
from protocol.request import Attempt
from protocol.worker import WorkerSnapshot, WorkerState

POLICY_NAME = "least_work@gateway"
MAX_SCORES = 8


def place_for(attempt: Attempt, *, excluded: tuple[str, ...], known_as: tuple[str, ...]) -> Place:
    """Counts and hashes of what is left to compute; `excluded`: workers that failed the request."""
    request, live = attempt.request, attempt.live_choices
    texts = {attempt.delivered[c].tobytes() for c in live}
    longest = max((attempt.delivered[c] for c in live), key=len)
    fewest = min(len(attempt.delivered[c]) for c in live)
    # Choices that already differ share only the prompt.
    shared = request.prompt_token_ids + longest if len(texts) == 1 else request.prompt_token_ids
    return Place(
        request_id=request.request_id,
        attempt=attempt.number,
        model_id=request.model_id,
        num_tokens=request.num_prompt_tokens + len(longest),
        expected_output_tokens=request.sampling.max_tokens - fewest,
        num_choices=len(live),
        block_hashes=tuple(block_hashes(request.cache_root, shared)),
        tenant=request.tenant,
        priority=request.priority,
        slo_ttft_s=request.slo.ttft_s,
        slo_tpot_s=request.slo.tpot_s,
        excluded=excluded,
        local_only=len(texts) > 1,
        session=request.session,
        known_as=known_as,
    )


def error_of(refused: Refused) -> BatonError:
    """What the client is told when the router finds no place."""
    if refused.status == 429:
        return Overloaded(refused.message, retry_after_s=refused.retry_after_s or 1.0)
    if refused.status == 503:
        return NoWorker(refused.message, retry_after_s=refused.retry_after_s)
    if 400 <= refused.status < 500:
        return InvalidRequest(refused.message)
    return ServiceError(refused.message, retry_after_s=refused.retry_after_s)


def least_work(place: Place, snapshots: Sequence[WorkerSnapshot], booked_tokens: Mapping[str, int]) -> Assignment | None:
    """The least busy decode worker and the least busy prefill worker; None when nobody ready can decode.

    `snapshots` are of workers that can be reached; `booked_tokens` are of live attempts this gateway sent to each. With no
    prefill worker, or for choices that already differ, the prompt is computed where it decodes.
    """
    ready = [s for s in snapshots if s.state is WorkerState.READY]
    # A worker that failed this request is used again only when there is no other.
    fresh = [s for s in ready if s.worker_id not in place.excluded]
    decoders = [s for s in fresh if s.role.decodes] or [s for s in ready if s.role.decodes]
    if not decoders:
        return None
    decode_order = sorted(decoders, key=lambda s: (_decode_work(s, booked_tokens), s.worker_id))
    decode = decode_order[0]
    prefillers = [] if place.local_only else [s for s in fresh if s.role.prefills]
    # The decode worker itself wins a tie: no hand-off.
    prefill_order = sorted(prefillers or [decode], key=lambda s: (_prefill_work(s, booked_tokens), s is not decode, s.worker_id))
    return Assignment(
        request_id=place.request_id,
        attempt=place.attempt,
        prefill_worker=prefill_order[0].worker_id,
        decode_worker=decode.worker_id,
        cached_tokens=0,
        policy=POLICY_NAME,
        reason="the router did not answer",
        prefill_scores=tuple(_score(s, "waiting", _prefill_work(s, booked_tokens)) for s in prefill_order[:MAX_SCORES]),
        decode_scores=tuple(_score(s, "kv", _decode_work(s, booked_tokens)) for s in decode_order[:MAX_SCORES]),
        waited_s=0.0,
    )


def _prefill_work(snapshot: WorkerSnapshot, booked_tokens: Mapping[str, int]) -> int:
    return snapshot.waiting_tokens + booked_tokens.get(snapshot.worker_id, 0)


def _decode_work(snapshot: WorkerSnapshot, booked_tokens: Mapping[str, int]) -> int:
    return snapshot.running_kv_tokens + booked_tokens.get(snapshot.worker_id, 0)


def _score(snapshot: WorkerSnapshot, term: str, work_tokens: int) -> CandidateScore:
    """Tokens told as seconds by the worker's own step time: an order, not a prediction."""
    seconds = work_tokens * max(snapshot.step_time_ewma_s, 1e-6)
    return CandidateScore(
        worker_id=snapshot.worker_id,
        seconds=seconds,
        cached_tokens=0,
        signal_age_s=snapshot.age_s,
        term_names=(term,),
        term_seconds=(seconds,),
    )
