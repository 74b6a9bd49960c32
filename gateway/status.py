"""The live state of the cluster as one JSON document, schema `baton.status.v1`: what `GET /status` and `baton status` show."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gateway.metrics import kv_blocks
from gateway.workers import WorkerRow
from protocol.messages import ServiceAddress
from protocol.wire import Identity

STATUS_SCHEMA = "baton.status.v1"


def worker_status(row: WorkerRow, now: float, *, linked: bool, trouble: str | None) -> dict[str, object]:
    """One worker: who, where, how it is, what it holds. Figures are None before its first snapshot."""
    address, snapshot = row.address, row.snapshot
    return {
        "worker_id": address.worker_id,
        "role": row.role.value,
        "pid": address.pid,
        "host": address.hostname,
        "address": f"{address.host}:{address.port}",
        "state": row.state.value if linked else "unreachable",
        "trouble": trouble,
        "epoch": address.epoch,
        "model": address.model_id,
        "block_size_tokens": address.block_size_tokens,
        "max_model_len": address.max_model_len,
        "age_s": None if snapshot is None else round(now - row.received_s + snapshot.age_s, 3),
        "step_count": None if snapshot is None else snapshot.step_count,
        "step_time_s": None if snapshot is None else snapshot.step_time_ewma_s,
        "queue": None
        if snapshot is None
        else {
            "waiting": snapshot.num_waiting,
            "pulling": snapshot.num_pulling,
            "running": snapshot.num_running,
            "waiting_tokens": snapshot.waiting_tokens,
            "running_kv_tokens": snapshot.running_kv_tokens,
        },
        "kv_blocks": None if snapshot is None else kv_blocks(snapshot),
        "num_preemptions": None if snapshot is None else snapshot.num_preemptions,
        "counters": {} if snapshot is None else dict(sorted(snapshot.counters.items())),
        "notes": [] if snapshot is None else list(snapshot.notes),
    }


def router_status(service: ServiceAddress | None, *, linked: bool, reply: str | None) -> dict[str, object]:
    """The router: where it is and its own words about itself; `detail` is None when it did not answer."""
    detail: object = None
    if reply is not None:
        try:
            detail = json.loads(reply)
        except ValueError:
            detail = None
    return {
        "state": "absent" if service is None else "up" if linked else "unreachable",
        "pid": None if service is None else service.pid,
        "address": None if service is None else f"{service.host}:{service.port}",
        "epoch": None if service is None else service.epoch,
        "detail": detail,
    }


def status_document(
    *,
    identity: Identity,
    pid: int,
    model_names: tuple[str, ...],
    max_model_len: int | None,
    reasons_not_ready: list[str],
    workers: list[dict[str, object]],
    router: dict[str, object],
    gateways: list[ServiceAddress],
    requests: Mapping[str, float],
    fallbacks: Mapping[str, float],
    membership_version: int,
) -> dict[str, object]:
    return {
        "schema": STATUS_SCHEMA,
        "model": model_names[0],
        "model_names": list(model_names),
        "max_model_len": max_model_len,
        "ready": not reasons_not_ready,
        "reasons_not_ready": reasons_not_ready,
        "workers": workers,
        "router": router,
        "gateway": {"name": identity.name, "pid": pid, "epoch": identity.epoch, "requests": dict(requests)},
        "gateways": [{"name": g.name, "pid": g.pid, "epoch": g.epoch} for g in gateways],
        "fallbacks": dict(fallbacks),
        "membership_version": membership_version,
    }
