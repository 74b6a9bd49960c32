"""The live state of the cluster as one JSON document, schema `baton.status.v1`: what `GET /status` and `baton status` show."""

from __future__ import annotations

import json
from collections.abc import Mapping

from gateway.metrics import kv_blocks
from gateway.routers import Router, Routers
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


def router_status(routers: Routers, replies: Mapping[str, str | None], tenant: str | None = None) -> dict[str, object]:
    """The router this gateway asks: where it is and its own words about itself; `detail` is None when it did not answer.

    tenant: whose eyes it is for, which see nothing of others' requests; None: everybody's.
    """
    row = routers.current or next(iter(routers.rows.values()), None)
    if row is None:
        return {"name": None, "state": "absent", "pid": None, "address": None, "epoch": None, "ready": False, "reason": "", "detail": None}
    detail = _detail(replies.get(row.service.name))
    if tenant is not None and isinstance(detail, dict):
        queues = {
            model_id: queue | {"tenants": {name: count for name, count in queue["tenants"].items() if name == tenant}}
            for model_id, queue in detail.get("queues", {}).items()
        }
        detail |= {"queues": queues, "assignments": []}  # of its own requests GET /explain tells
    return _router(row, routers) | {"detail": detail}


def router_rows(routers: Routers, replies: Mapping[str, str | None]) -> list[dict[str, object]]:
    """Every router: whether it is ready, how far behind it is with the others, and whether this gateway asks it."""
    rows = []
    for name, row in sorted(routers.rows.items()):
        detail = _detail(replies.get(name))
        said = {key: detail.get(key) for key in ("bookings", "peers")} if isinstance(detail, dict) else {"bookings": None, "peers": None}
        rows.append(_router(row, routers) | {"is_current": row is routers.current} | said)
    return rows


def _router(row: Router, routers: Routers) -> dict[str, object]:
    service = row.service
    return {
        "name": service.name,
        "state": "up" if routers.is_linked(service.name) else "unreachable",
        "pid": service.pid,
        "address": f"{service.host}:{service.port}",
        "epoch": service.epoch,
        "ready": row.is_ready,
        "reason": "" if row.readiness is None else row.readiness.reason,
    }


def _detail(reply: str | None) -> object:
    try:
        return None if reply is None else json.loads(reply)
    except ValueError:
        return None


def status_document(
    *,
    identity: Identity,
    pid: int,
    model_names: tuple[str, ...],
    max_model_len: int | None,
    reasons_not_ready: list[str],
    workers: list[dict[str, object]],
    routers: Routers,
    router_replies: Mapping[str, str | None],
    gateways: list[ServiceAddress],
    requests: Mapping[str, float],
    fallbacks: Mapping[str, float],
    membership_version: int,
    tenant: str | None,
) -> dict[str, object]:
    """`tenant`: as in `router_status`."""
    return {
        "schema": STATUS_SCHEMA,
        "model": model_names[0],
        "model_names": list(model_names),
        "max_model_len": max_model_len,
        "ready": not reasons_not_ready,
        "reasons_not_ready": reasons_not_ready,
        "workers": workers,
        "router": router_status(routers, router_replies, tenant),
        "routers": router_rows(routers, router_replies),
        "gateway": {"name": identity.name, "pid": pid, "epoch": identity.epoch, "requests": dict(requests)},
        "gateways": [{"name": g.name, "pid": g.pid, "epoch": g.epoch} for g in gateways],
        "fallbacks": dict(fallbacks),
        "membership_version": membership_version,
    }
