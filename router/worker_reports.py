"""What workers say, turned into what the router believes: who is there, how busy, and which prefixes lie where.

link up ──► join, Subscribe ──► snapshots ──► load, cost model, link cost
                           └──► KV events ──► index      a gap ──► Subscribe from the first missing number, again each second
link down, another epoch, out of the directory ──► holds and prefixes go
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import xxhash

from protocol.messages import KvEvents, KvSnapshot, Membership, SnapshotFrame, Subscribe
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, KvEvent, Tier, WorkerId, WorkerState
from router.bookings import Booking, Bookings
from router.common_cost import share_cost
from router.config import RouterConfig
from router.cost_model import CostModel, StepCost
from router.estimate_trust import EstimateTrust
from router.events import Command, FromWorker, ToWorker, WorkerDown, WorkerUp
from router.eviction_regret import EvictionRegret
from router.fleet import Fleet, Worker
from router.guarded_policy import PoolPolicies
from router.link_cost import link_to
from router.peers import Peers
from router.policies.api import KvChanged, WorkerJoined, WorkerLeft
from router.prefix_index import PrefixIndex
from router.reassignment import Reassignments


class WorkerReports:
    """Keeps fleet, index and bookings in step with the workers, and tells the policies."""

    def __init__(
        self,
        config: RouterConfig,
        *,
        fleet: Fleet,
        index: PrefixIndex,
        bookings: Bookings[Booking],
        peers: Peers,
        policies: PoolPolicies,
        regret: EvictionRegret,
        rng: Random,
        prior: StepCost,
        reassignments: Reassignments,
        say: Callable[[Command], None],
        on_ready: Callable[[str, float], None],
    ) -> None:
        """prior: seconds of work before anything was measured. on_ready(model_id, now): a worker of the model may take requests."""
        self._config = config
        self._fleet = fleet
        self._index = index
        self._bookings = bookings
        self._peers = peers
        self._policies = policies
        self._regret = regret
        self._tie_seed = rng.getrandbits(64)
        self._prior = prior
        self._reassignments = reassignments
        self._say = say
        self._on_ready = on_ready
        self.trust = EstimateTrust(error_max=config.estimate_error_max)
        self._resync_asked_s: dict[WorkerId, float] = {}
        self.num_left = 0
        self.num_resyncs = 0

    def take_membership(self, membership: Membership, now: float) -> None:
        for worker_id in self._fleet.take_membership(membership):
            self._lose(worker_id, now)

    def up(self, event: WorkerUp, now: float) -> None:
        address = self._fleet.known.get(event.worker_id)
        if address is None or address.epoch != event.epoch:
            return
        self._lose(event.worker_id, now)
        worker = Worker(
            address,
            model=self._unlearned(),
            link=link_to(address, self._config),
            tie_hash=xxhash.xxh3_64_intdigest(event.worker_id.encode(), seed=self._tie_seed),
            stale_s=self._config.snapshot_stale_s,
            settle_s=self._config.booking_settle_s,
        )
        if (lender := self._fleet.lender_for(address)) is not None:
            worker.borrow_cost(lender.model.fitted)
        self._fleet.add(worker)
        self._index.join(event.worker_id, event.epoch)
        self._peers.worker_joined(worker)
        self._subscribe(event.worker_id, 0)
        self._policies.observe(WorkerJoined(worker_id=event.worker_id, role=address.role, model_id=address.model_id), now)

    def down(self, event: WorkerDown, now: float) -> None:
        worker = self._fleet.get(event.worker_id)
        if worker is not None and worker.epoch == event.epoch:
            self._lose(event.worker_id, now)

    def receive(self, event: FromWorker, now: float) -> None:
        worker = self._fleet.get(event.worker_id)
        if worker is None or worker.epoch != event.epoch:
            return
        message = event.message
        if isinstance(message, SnapshotFrame):
            self._take_snapshot(worker, message, now)
        elif isinstance(message, KvEvents):
            taken, complete = self._index.apply(message)
            if taken:
                if worker.role.prefills:
                    self._count_evicted(taken)
                self._policies.observe(KvChanged(worker_id=worker.worker_id, events=taken), now)
            if complete:
                self._resync_asked_s.pop(worker.worker_id, None)
            else:
                self._ask_resync(worker.worker_id, now)
        elif self._index.replace(message):
            self._resync_asked_s.pop(worker.worker_id, None)
            self._policies.observe(_all_of(message), now)

    def introduce(self, now: float) -> None:
        """Tell a policy that is new here who is there and what each holds."""
        for worker in self._fleet:
            self._policies.observe(WorkerJoined(worker_id=worker.worker_id, role=worker.role, model_id=worker.address.model_id), now)
            told = self._index.told_by(worker.worker_id)
            if told is not None and (told.hashes or told.host_hashes):
                self._policies.observe(_all_of(told), now)

    def forget(self) -> None:
        """What was learned of workers and links, and guesses at caches; what workers said last stays."""
        self._index.forget_guesses()
        self._regret.forget()
        self.trust = EstimateTrust(error_max=self._config.estimate_error_max)
        for worker in self._fleet:
            worker.forget(self._unlearned(), link_to(worker.address, self._config))

    def _count_evicted(self, events: tuple[KvEvent, ...]) -> None:
        for event in events:
            if isinstance(event, BlocksRemoved) and event.tier is Tier.DEVICE:
                self._regret.evicted(event.hashes)

    def tick(self, now: float) -> None:
        """Ask again where an answer is owed, and find workers for those that lost theirs."""
        self._reassignments.tick(now)
        for worker_id in list(self._resync_asked_s):
            self._ask_resync(worker_id, now)

    def _unlearned(self) -> CostModel:
        return CostModel(self._prior, bias=self._config.estimate_bias)

    @property
    def num_missed_events(self) -> int:
        """KV events that workers have told of and that have not come."""
        asked = [w for name in self._resync_asked_s if (w := self._fleet.get(name)) is not None and w.snapshot is not None]
        return sum(max(0, w.snapshot.last_event_number + 1 - self._index.next_number(w.worker_id)) for w in asked if w.snapshot is not None)

    def _take_snapshot(self, worker: Worker, frame: SnapshotFrame, now: float) -> None:
        snapshot = frame.snapshot
        if snapshot.worker_id != worker.worker_id or snapshot.epoch != worker.epoch:
            return
        before = (worker.role, worker.state)
        if worker.take_snapshot(snapshot, now, refit_interval_s=self._config.refit_interval_s):
            self._fleet.lend_cost(worker)
            alike = self._fleet.alike(worker)
            share_cost(alike)
            self.trust.judge(alike)
        if (worker.role, worker.state) != before:
            self._fleet.changed()
        if self._index.missed_tail(worker.worker_id, snapshot.last_event_number):
            self._ask_resync(worker.worker_id, now)
        self._reassignments.recheck(worker, now)
        if worker.state is WorkerState.READY:
            self._on_ready(worker.address.model_id, now)

    def _ask_resync(self, worker_id: WorkerId, now: float) -> None:
        """Ask for the events from the first missing one; the worker answers with them or with everything it holds."""
        asked_s = self._resync_asked_s.get(worker_id)
        if asked_s is not None and now - asked_s < self._config.resync_interval_s:
            return
        self._resync_asked_s[worker_id] = now
        self.num_resyncs += 1
        self._subscribe(worker_id, self._index.next_number(worker_id))

    def _subscribe(self, worker_id: WorkerId, next_event_number: int) -> None:
        message = Subscribe(snapshots=True, kv_events=True, next_event_number=next_event_number)
        self._say(ToWorker(worker_id=worker_id, message=message))

    def _lose(self, worker_id: WorkerId, now: float) -> None:
        """The worker leaves the fleet with its holds and its prefixes."""
        worker = self._fleet.remove(worker_id)
        if worker is None:
            return
        if not self._fleet.alike(worker):
            self.trust.forget(worker.address.model_id, worker.role)
        orphans = self._bookings.drop_worker(worker)
        self._peers.bookings.drop_worker(worker)
        self._index.leave(worker_id)
        self._resync_asked_s.pop(worker_id, None)
        self.num_left += 1
        self._policies.observe(WorkerLeft(worker_id=worker_id), now)
        if orphans:
            self._reassignments.lost(orphans, now)


def _all_of(told: KvSnapshot) -> KvChanged:
    """Everything a worker holds, as events."""
    number = told.next_event_number - 1
    cleared, stored = AllBlocksCleared(number=number), BlocksStored(number=number, parent=b"", hashes=told.hashes)
    in_host = BlocksStored(number=number, parent=b"", hashes=told.host_hashes, tier=Tier.HOST)
    return KvChanged(worker_id=told.worker_id, events=(cleared, stored, in_host) if told.host_hashes else (cleared, stored))
