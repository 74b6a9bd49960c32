"""The workers as this gateway knows them: links, last snapshots, and whether they make progress.

Health is progress, not existence: a worker with work queued whose step counter stands still is stuck, whatever its process does.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gateway.config import GatewayConfig
from gateway.events import WorkerSaid
from protocol.kv import KVPeer
from protocol.links import Link, Links, MakeLinks, Target
from protocol.messages import (
    AttemptFailed,
    Cancel,
    HandoffDone,
    Membership,
    OfferCompleted,
    Offered,
    PrefixPull,
    PrefixSource,
    SnapshotFrame,
    StepOutput,
    Submit,
    Subscribe,
    TransferFailed,
)
from protocol.wire import Identity
from protocol.worker import Role, WorkerAddress, WorkerSnapshot, WorkerState

log = logging.getLogger("baton.gateway")

_ToWorker = Submit | OfferCompleted | Cancel

MAX_REMEMBERED_LOST = 1024


@dataclass(slots=True, kw_only=True)
class WorkerRow:
    """What is known of one worker. `address` is None while only its link was heard of."""

    address: WorkerAddress
    snapshot: WorkerSnapshot | None = None
    received_s: float = 0.0  # when the snapshot came
    progressed_s: float = 0.0  # when it last had nothing to do, or made a step

    def take(self, snapshot: WorkerSnapshot, now: float) -> None:
        before = self.snapshot
        idle = snapshot.num_waiting + snapshot.num_running == 0
        if before is None or idle or snapshot.step_count != before.step_count:
            self.progressed_s = now
        self.snapshot = snapshot
        self.received_s = now

    @property
    def role(self) -> Role:
        return self.address.role if self.snapshot is None else self.snapshot.role

    @property
    def state(self) -> WorkerState:
        return WorkerState.STARTING if self.snapshot is None else self.snapshot.state

    def trouble(self, now: float, config: GatewayConfig) -> str | None:
        """Why no work should be expected of it; None when all is well."""
        if self.snapshot is None:
            return "has not reported yet"
        if self.state is not WorkerState.READY:
            return f"is {self.state.value}"
        silent_s = now - self.received_s + self.snapshot.age_s
        if silent_s > config.stale_after_s:
            return f"has not reported for {silent_s:.1f} s (limit {config.stale_after_s:g} s)"
        stuck_s = now - self.progressed_s
        if stuck_s > config.stuck_after_s:
            return f"has work queued and made no step for {stuck_s:.1f} s (limit {config.stuck_after_s:g} s)"
        return None


class Workers:
    """Dials every worker of the membership, subscribes to snapshots, carries submits and cancels.

    on_fact(event) for each fact about an attempt; on_lost(worker_id) when a link ended or a worker cannot be reached.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        config: GatewayConfig,
        *,
        clock: Callable[[], float],
        on_fact: Callable[[WorkerSaid], None],
        on_lost: Callable[[str], None],
        links: MakeLinks = Links,
    ) -> None:
        self.rows: dict[str, WorkerRow] = {}
        self._config = config
        self._clock = clock
        self._on_fact = on_fact
        self._on_lost = on_lost
        self._links = links(identity, secret, on_up=self._up, on_down=self._down, on_message=self._receive)
        self._pending: dict[
            str, deque[tuple[float, Submit | OfferCompleted | Cancel]]
        ] = {}  # for a worker still being dialed: (until, message)
        self._lost: deque[str] = deque(maxlen=MAX_REMEMBERED_LOST)

    def follow(self, membership: Membership) -> None:
        """Dial who joined, forget who left."""
        known = {w.worker_id: w for w in membership.workers}
        for worker_id in [w for w in self.rows if w not in known]:
            del self.rows[worker_id]
        for worker_id, address in known.items():
            row = self.rows.get(worker_id)
            if row is None or row.address.epoch != address.epoch:
                self.rows[worker_id] = WorkerRow(address=address)
            else:
                row.address = address
        self._links.set_targets([Target(name=w.worker_id, epoch=w.epoch, host=w.host, port=w.port) for w in membership.workers])

    async def close(self) -> None:
        await self._links.close()

    def is_up(self, worker_id: str) -> bool:
        return self._links.get(worker_id) is not None

    def prefix_pull(self, source: PrefixSource) -> PrefixPull | None:
        """Where that worker's prefix can be had; None when it is not linked any more, or drains."""
        row = self.rows.get(source.worker_id)
        if row is None or row.state is not WorkerState.READY or not self.is_up(source.worker_id):
            return None
        address = row.address
        return PrefixPull(
            peer=KVPeer(worker_id=address.worker_id, epoch=address.epoch, endpoint=address.kv_endpoint), num_tokens=source.num_tokens
        )

    def send(self, worker_id: str, message: _ToWorker) -> None:
        """Now, or when the link is up within link_wait_s; else on_lost for a submit."""
        if self._links.send(worker_id, message):
            return
        queue = self._pending.setdefault(worker_id, deque())
        if (isinstance(message, Submit) and worker_id in self._lost) or len(queue) >= self._config.max_pending_messages:
            self._on_lost(worker_id)
            return
        queue.append((self._clock() + self._config.link_wait_s, message))

    def tick(self, now: float) -> None:
        """Give up on workers that could not be reached in time."""
        for worker_id, queue in list(self._pending.items()):
            expired = []
            while queue and queue[0][0] <= now:
                expired.append(queue.popleft()[1])
            if not queue:
                del self._pending[worker_id]
            if any(isinstance(message, Submit) for message in expired):
                log.warning("worker cannot be reached", extra={"worker_id": worker_id, "waited_s": self._config.link_wait_s})
                self._on_lost(worker_id)

    def reachable(self, now: float) -> list[WorkerSnapshot]:
        """Last snapshots of the workers that are linked and well, by id."""
        rows = sorted(self.rows.items())
        return [r.snapshot for w, r in rows if r.snapshot is not None and self.is_up(w) and r.trouble(now, self._config) is None]

    def why_not_ready(self, now: float) -> list[str]:
        """Empty: a prompt can be computed and decoded here. Else what is missing, a sentence each."""
        troubles = {}
        for worker_id, row in sorted(self.rows.items()):
            trouble = row.trouble(now, self._config) if self.is_up(worker_id) else "is not connected"
            if trouble is not None:
                troubles[worker_id] = f"{worker_id} ({row.role.value}) {trouble}"
        well = [row.role for worker_id, row in self.rows.items() if worker_id not in troubles]
        missing = []
        if not any(role.prefills for role in well):
            missing.append("no prefill worker is ready")
        if not any(role.decodes for role in well):
            missing.append("no decode worker is ready")
        return [*missing, *troubles.values()] if missing else []

    # --- links ---

    def _up(self, worker_id: str, connection: Link) -> None:
        log.info("worker up", extra={"worker_id": worker_id, "epoch": connection.peer.epoch})
        if worker_id in self._lost:
            self._lost.remove(worker_id)
        connection.send(Subscribe(snapshots=True, kv_events=False, next_event_number=0))
        for _, message in self._pending.pop(worker_id, ()):
            connection.send(message)

    def _down(self, worker_id: str, epoch: int) -> None:
        log.info("worker down", extra={"worker_id": worker_id, "epoch": epoch})
        self._lost.append(worker_id)
        row = self.rows.get(worker_id)
        if row is not None and row.address.epoch == epoch:
            row.snapshot = None
        self._on_lost(worker_id)

    def _receive(self, worker_id: str, message: Any) -> None:
        if isinstance(message, StepOutput):
            for run in message.each():
                self._on_fact(WorkerSaid(worker_id=worker_id, fact=run))
        elif isinstance(message, SnapshotFrame):
            row = self.rows.get(worker_id)
            if row is not None and row.address.epoch == message.snapshot.epoch:
                row.take(message.snapshot, self._clock())
        elif isinstance(message, (Offered, OfferCompleted, HandoffDone, TransferFailed, AttemptFailed)):
            self._on_fact(WorkerSaid(worker_id=worker_id, fact=message))
