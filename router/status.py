"""What an operator may ask of the router, as plain JSON values: `baton status` reads this document."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from router.explanations import assignment_document

if TYPE_CHECKING:
    from router.core import RouterCore
    from router.fleet import Worker
    from router.guarded_policy import GuardedPolicy

SCHEMA = "baton.router.v1"
COUNTERS = (
    "places",
    "stale_places",
    "splits",
    "locals",
    "prefix_pulls",
    "reassigned",
    "refused_413",
    "refused_429",
    "refused_503",
    "bookings_expired",
)
NUM_ASSIGNMENTS_SHOWN = 64


def document(core: RouterCore, now: float) -> dict[str, object]:
    """The live state at `now`."""
    index = core.index
    return {
        "schema": SCHEMA,
        "policy": _policy(core.policies.prefill, core.config.policy),
        "decode_policy": _policy(core.policies.decode, core.config.decode_policy or core.config.policy),
        "ready": core.readiness.is_ready,
        "reason_not_ready": core.readiness.reason,
        "peers": core.peers.status(now),
        "queues": {
            model_id: {"waiting": len(queue), "waiting_tokens": queue.num_tokens, "tenants": queue.counters()}
            for model_id, queue in core.waiting_room.queues.items()
        },
        "stranded": len(core.waiting_room.stranded),
        "bookings": len(core.bookings),
        "index": {
            "entries": index.num_entries,
            "size_bytes": index.size_bytes,
            "dropped": index.num_dropped,
            "gaps": index.num_gaps,
        },
        "counters": core.counters
        | {"workers_left": core.reports.num_left, "resyncs": core.reports.num_resyncs}
        | {"lags": core.readiness.num_lags, "peer_gaps": core.peers.num_gaps, "peers_lost": core.peers.num_lost},
        "ttft_prediction": core.prediction_errors.document(),
        "overlap": core.overlap.document(),
        "explanations": {"kept": len(core.explanations), "limit": core.explanations.max_count},
        "notes": notes(core, now),
        "workers": [_worker(worker, now) for worker in core.fleet],
        "assignments": [assignment_document(a) for record in core.explanations.newest(NUM_ASSIGNMENTS_SHOWN) if (a := record.assignment)],
    }


def notes(core: RouterCore, now: float) -> list[str]:
    """What is not as it should be, one line each: fallbacks in force, an index that is full or untrue."""
    lines = core.policies.notes
    for pool in core.reports.trust.counted:
        limit = core.config.estimate_error_max
        lines.append(
            f"counting requests on {pool.role.value} workers of {pool.model_id}: their estimates are off by {pool.relative_error:.0%}, "
            f"more than router.estimate_error_max ({limit:.0%}) bears"
        )
    if core.peers.num_silent:
        silent, others = core.peers.num_silent, core.peers.num_routers - 1
        lines.append(f"peers: {silent} of {others} other routers are not heard; each booking counts {core.peers.booking_scale:.2g} times")
    if core.index.num_dropped:
        limit = core.config.index_max_bytes
        lines.append(f"prefix index is full: {core.index.num_dropped} entries not taken; raise router.index_max_bytes ({limit})")
    overlap_note = core.overlap.note(now)
    if overlap_note is not None:
        lines.append(overlap_note)
    return lines


def _policy(policy: GuardedPolicy, spec: str) -> dict[str, object]:
    return {
        "name": policy.name,
        "spec": spec,
        "decisions": policy.num_decisions,
        "fallbacks": policy.num_fallbacks,
        "failures": policy.num_failures,
        "overruns": policy.num_overruns,
    }


def _worker(worker: Worker, now: float) -> dict[str, object]:
    worker.refresh(now)
    fitted = worker.model.fitted
    return {
        "worker_id": worker.worker_id,
        "epoch": worker.epoch,
        "role": worker.role.value,
        "state": worker.state.value,
        "snapshot_age_s": round(now - worker.read_at_s, 4) if worker.snapshot is not None else None,
        "queued_prefill_s": round(worker.queued_prefill_s, 6),
        "queued_prefill_tokens": worker.queued_prefill_tokens,
        "sequences": worker.num_sequences,
        "kv_tokens": worker.kv_tokens,
        "held_kv_tokens": worker.held_kv_tokens,  # of kv_capacity_tokens; less than kv_tokens where sequences share blocks
        "kv_capacity_tokens": worker.kv_capacity_tokens,
        "booked_prefills": worker.booked.num_prefills,
        "booked_sequences": worker.booked.num_sequences,
        "hit_rate": round(worker.hit_rate, 4),
        "cost": {name: float(f"{seconds:.3g}") for name, seconds in asdict(fitted).items()},
        "link_scale": round(worker.link.scale, 3),
        "cost_samples": worker.model.num_samples,
        "cost_relative_error": round(worker.model.relative_error, 4),
    }
