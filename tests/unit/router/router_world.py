"""A router core with a small fleet around it: records with sensible defaults, and the events that bring them in."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import xxhash

from protocol.kv import Endpoint
from protocol.messages import (
    Assigned,
    Assignment,
    Done,
    KvEvents,
    KvSnapshot,
    Membership,
    Place,
    PrefillDone,
    Refused,
    ServiceAddress,
    SnapshotFrame,
)
from protocol.worker import KvEvent, Role, WorkerAddress, WorkerSnapshot, WorkerState
from router import policies
from router.config import RouterConfig
from router.core import RouterCore
from router.events import Command, Event, FromGateway, FromWorker, MembershipChanged, Tick, ToGateway, WorkerDown, WorkerUp
from router.policies import PlacementPolicy

MODEL = "m"
BLOCK = 16


def address(worker_id: str, role: Role, *, epoch: int = 1, **changes: Any) -> WorkerAddress:
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "role": role,
        "epoch": epoch,
        "host": "127.0.0.1",
        "port": 1,
        "pid": 1,
        "hostname": "host",
        "kv_endpoint": Endpoint(),
        "model_id": MODEL,
        "fingerprint": b"f" * 16,
        "block_size_tokens": BLOCK,
        "num_kv_blocks": 4096,
        "max_model_len": 65536,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
    }
    return WorkerAddress(**(fields | changes))


def snapshot(worker_id: str, role: Role, *, epoch: int = 1, **changes: Any) -> WorkerSnapshot:
    """Running sequences share no block, unless `num_blocks_owned` says so."""
    fields: dict[str, Any] = {
        "worker_id": worker_id,
        "epoch": epoch,
        "role": role,
        "state": WorkerState.READY,
        "age_s": 0.0,
        "step_count": 0,
        "last_event_number": 0,
        "num_waiting": 0,
        "num_running": 0,
        "waiting_tokens": 0,
        "running_kv_tokens": 0,
        "num_blocks_total": 4096,
        "num_blocks_free": 4096,
        "num_blocks_owned": -(-changes.get("running_kv_tokens", 0) // BLOCK),
        "num_blocks_leased": 0,
        "num_blocks_cached": 0,
        "num_preemptions": 0,
        "step_time_ewma_s": 0.01,
        "counters": {},
    }
    return WorkerSnapshot(**(fields | changes))


def chain(seed: object, num_blocks: int, *, parent: bytes = b"") -> tuple[bytes, ...]:
    """Hashes of `num_blocks` blocks that follow `parent`."""
    hashes = []
    for _ in range(num_blocks):
        parent = xxhash.xxh3_128_digest(parent + repr(seed).encode())
        hashes.append(parent)
    return tuple(hashes)


def place(number: int, num_tokens: int = 512, **changes: Any) -> Place:
    fields: dict[str, Any] = {
        "request_id": f"{number:032x}",
        "attempt": 0,
        "model_id": MODEL,
        "num_tokens": num_tokens,
        "expected_output_tokens": 64,
        "num_choices": 1,
        "block_hashes": chain(("prompt", number), num_tokens // BLOCK),
        "tenant": "default",
        "priority": 0,
        "slo_ttft_s": None,
        "slo_tpot_s": None,
        "excluded": (),
        "local_only": False,
    }
    return Place(**(fields | changes))


class World:
    """Drives one core; `now` moves only when told."""

    def __init__(
        self,
        workers: dict[str, Role] | Iterable[WorkerAddress],
        *,
        policy: PlacementPolicy | None = None,
        seed: int = 1,
        name: str = "router-0",
        services: tuple[ServiceAddress, ...] = (),
        now: float = 100.0,
        **config: Any,
    ) -> None:
        self.config = RouterConfig(**config)
        of_decode = policies.load(self.config.decode_policy) if self.config.decode_policy else None
        policy = policy or policies.load(self.config.policy)
        self.core = RouterCore(self.config, policy=policy, decode_policy=of_decode, rng=Random(seed), name=name)
        self.services = services
        self.now = now
        self.said: list[Command] = []
        addresses = [address(w, r) for w, r in workers.items()] if isinstance(workers, dict) else list(workers)
        self.addresses = {a.worker_id: a for a in addresses}
        for a in addresses:
            self.join(a)

    def on(self, event: Event) -> list[Command]:
        commands = self.core.on(event, self.now)
        self.said += commands
        return commands

    # --- workers ---

    def join(self, worker: WorkerAddress) -> None:
        self.addresses[worker.worker_id] = worker
        self.tell_membership()
        self.on(WorkerUp(worker_id=worker.worker_id, epoch=worker.epoch))
        self.hold(worker.worker_id, ())
        self.report(worker.worker_id)

    def tell_membership(self) -> None:
        self.on(MembershipChanged(membership=Membership(version=1, workers=tuple(self.addresses.values()), services=self.services)))

    def report(self, worker_id: str, **changes: Any) -> list[Command]:
        """A snapshot of a worker, idle but for `changes`."""
        a = self.addresses[worker_id]
        frame = SnapshotFrame(snapshot=snapshot(worker_id, changes.pop("role", a.role), epoch=a.epoch, **changes))
        return self.on(FromWorker(worker_id=worker_id, epoch=a.epoch, message=frame))

    def report_all(self) -> None:
        for worker_id in list(self.addresses):
            self.report(worker_id)

    def hold(self, worker_id: str, hashes: tuple[bytes, ...], *, next_event_number: int = 1) -> list[Command]:
        """A worker says it holds exactly these."""
        a = self.addresses[worker_id]
        frame = KvSnapshot(
            worker_id=worker_id, epoch=a.epoch, next_event_number=next_event_number, hashes=hashes, parents=(b"",) * len(hashes)
        )
        return self.on(FromWorker(worker_id=worker_id, epoch=a.epoch, message=frame))

    def kv_events(self, worker_id: str, *events: KvEvent) -> list[Command]:
        a = self.addresses[worker_id]
        return self.on(FromWorker(worker_id=worker_id, epoch=a.epoch, message=KvEvents(worker_id=worker_id, epoch=a.epoch, events=events)))

    def kill(self, worker_id: str) -> None:
        self.on(WorkerDown(worker_id=worker_id, epoch=self.addresses[worker_id].epoch))

    # --- gateway ---

    def place(self, request: Place, gateway: str = "gateway-0") -> Assignment | Refused | None:
        """The answer that came at once; None: it waits."""
        return answer(self.on(FromGateway(gateway=gateway, message=request)), request)

    def assign(self, request: Place) -> Assignment:
        """As it is explained: with the scores, for which the answer does not wait."""
        found = self.place(request)
        assert isinstance(found, Assignment), found
        self.core.catch_up()
        kept = self.core.explain(request.request_id)
        if not kept:
            return found
        explained = kept[-1].assignment
        assert explained is not None and replace(explained, prefill_scores=(), decode_scores=()) == found
        return explained

    def prefill_done(self, request: Place, *, found_tokens: int | None = 0, decode_worker: str | None = None) -> list[Command]:
        message = PrefillDone(
            request_id=request.request_id, attempt=request.attempt, num_cached_tokens=found_tokens, decode_worker=decode_worker
        )
        return self.on(FromGateway(gateway="gateway-0", message=message))

    def done(self, request: Place, num_output_tokens: int = 64) -> list[Command]:
        message = Done(request_id=request.request_id, attempt=request.attempt, num_output_tokens=num_output_tokens)
        return self.on(FromGateway(gateway="gateway-0", message=message))

    def tick(self, seconds: float = 0.05) -> list[Command]:
        self.now += seconds
        return self.on(Tick())

    @property
    def is_empty(self) -> bool:
        """Nothing booked, nothing waiting."""
        tallies = [t for w in self.core.fleet for t in (w.booked, w.fresh)]
        waiting = sum(len(q) for q in self.core.waiting_room.queues.values()) + len(self.core.waiting_room.stranded)
        return len(self.core.bookings) == 0 and waiting == 0 and all(t.is_zero for t in tallies)


def answer(commands: list[Command], request: Place) -> Assignment | Refused | None:
    for command in commands:
        if not isinstance(command, ToGateway):
            continue
        message = command.message
        if isinstance(message, Assigned) and message.assignment.request_id == request.request_id:
            return message.assignment
        if isinstance(message, Refused) and message.request_id == request.request_id:
            return message
    return None


def assignments(commands: list[Command]) -> list[Assignment]:
    return [c.message.assignment for c in commands if isinstance(c, ToGateway) and isinstance(c.message, Assigned)]


def pools(num_prefill: int, num_decode: int, num_both: int = 0) -> dict[str, Role]:
    return (
        {f"prefill-{i}": Role.PREFILL for i in range(num_prefill)}
        | {f"decode-{i}": Role.DECODE for i in range(num_decode)}
        | {f"both-{i}": Role.BOTH for i in range(num_both)}
    )
