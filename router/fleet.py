"""What the router believes of the workers: their last snapshot with its age, and on top of it what it gave out since.

    load(worker) = what the snapshot says, less what was surely done since     while it is fresh (200 ms)
                   + bookings too young to show in it
                 = all of the worker's bookings                                when it is older

So a booking weighs on the next choice from the moment it is made, and weighs once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import ceil

from protocol.messages import Membership
from protocol.request import AttemptKey
from protocol.worker import Role, WorkerAddress, WorkerId, WorkerSnapshot, WorkerState
from router.bookings import Hold, Phase, Tally
from router.cost_model import CostModel, StepCost, Work

HoldKey = tuple[AttemptKey, Phase]

_HIT_RATE_EWMA = 0.05
_CONTEXT_EWMA = 0.1


@dataclass(slots=True, kw_only=True)
class Worker:
    """One incarnation of a worker whose link is up. Policies see it through the read-only `policies.api.WorkerView`."""

    address: WorkerAddress
    model: CostModel
    tie_hash: int
    stale_s: float
    settle_s: float
    role: Role
    state: WorkerState = WorkerState.STARTING
    snapshot: WorkerSnapshot | None = None
    read_at_s: float = float("-inf")  # when the snapshot's figures were read, on our clock
    last_chosen: int = 0  # number of the choice that chose it last
    hit_rate: float = 0.0  # running share of prompt tokens found cached here
    context_mean: float = 512.0  # running mean context of prompts booked here
    booked: Tally = field(default_factory=Tally)
    fresh: Tally = field(default_factory=Tally)  # booked, and not in the snapshot yet
    holds: dict[HoldKey, Hold] = field(default_factory=dict)
    _settling: OrderedDict[HoldKey, float] = field(default_factory=OrderedDict)  # in `fresh` since, oldest first
    _pending: set[HoldKey] = field(default_factory=set)  # in `fresh` until the prefill elsewhere is done
    _refit_at_s: float = float("-inf")

    # --- identity ---

    @property
    def worker_id(self) -> WorkerId:
        return self.address.worker_id

    @property
    def epoch(self) -> int:
        return self.address.epoch

    @property
    def cost(self) -> StepCost:
        """Seconds of work on this worker, leaning high."""
        return self.model.cost

    # --- load, as policies see it ---

    def signal_age_s(self, now: float) -> float:
        """Age of the snapshot; infinite before the first."""
        return now - self.read_at_s

    def is_fresh(self, now: float) -> bool:
        return now - self.read_at_s <= self.stale_s

    def queued_prefill_tokens(self, now: float) -> int:
        """Prompt tokens given to this worker and not computed yet."""
        snapshot = self.snapshot
        if snapshot is None or now - self.read_at_s > self.stale_s:
            return self.booked.prefill_tokens
        return snapshot.waiting_tokens + self.fresh.prefill_tokens

    def queued_prefill_s(self, now: float) -> float:
        """Seconds until a prompt given to this worker now would start."""
        cost, snapshot = self.model.cost, self.snapshot
        age_s = now - self.read_at_s
        if snapshot is None or age_s > self.stale_s:
            return self._tally_s(self.booked, cost)
        seconds = 0.0
        if snapshot.waiting_tokens:
            per_token = cost.prefill_token_s + cost.prefill_pair_s * self.context_mean
            seconds = max(0.0, cost.step_s + snapshot.waiting_tokens * per_token - age_s)
        return seconds + self._tally_s(self.fresh, cost) if self.fresh.num_prefills else seconds

    def num_sequences(self, now: float) -> int:
        """Sequences that decode here, wait here, or will come here."""
        snapshot = self.snapshot
        if snapshot is None or now - self.read_at_s > self.stale_s:
            return self.booked.num_sequences
        return snapshot.num_running + snapshot.num_waiting + self.fresh.num_sequences

    def kv_tokens(self, now: float) -> int:
        """KV tokens this worker holds for sequences or will hold at the expected end of what was booked."""
        snapshot = self.snapshot
        if snapshot is None or now - self.read_at_s > self.stale_s:
            return self.booked.kv_tokens
        return max(snapshot.running_kv_tokens + self.fresh.kv_tokens, self.booked.kv_tokens)

    @property
    def kv_capacity_tokens(self) -> int:
        return self.address.num_kv_blocks * self.address.block_size_tokens

    @property
    def max_request_tokens(self) -> int:
        """Tokens of the longest request this worker can hold."""
        return min(self.kv_capacity_tokens, self.address.max_model_len)

    @property
    def reclaimable_kv_tokens(self) -> int:
        """KV tokens in blocks that only the prefix cache holds: what a new prompt would evict once none is free."""
        return self.snapshot.num_blocks_cached * self.address.block_size_tokens if self.snapshot is not None else 0

    @property
    def free_kv_tokens(self) -> int:
        """KV tokens in blocks nobody holds, as far as the snapshot and younger bookings say."""
        snapshot = self.snapshot
        free = snapshot.num_blocks_free if snapshot is not None else self.address.num_kv_blocks
        return max(0, free * self.address.block_size_tokens - self.fresh.prefill_tokens)

    # --- room: the bounded inbox ---

    def has_prefill_room(self, now: float, *, num_tokens: int, cached_tokens: int, inbox_steps: float) -> bool:
        """True while about `inbox_steps` of prefill are waiting here and the prompt's blocks can be had.

        A prompt mostly cached here follows its prefix beyond the bound: it adds little work, and elsewhere it would add much.
        """
        num_entries = self.booked.num_prefills
        if self.queued_prefill_tokens(now) >= inbox_steps * self.address.max_num_batched_tokens and (
            2 * cached_tokens < num_tokens or num_entries >= self.address.max_num_seqs
        ):
            return False
        snapshot = self.snapshot
        if snapshot is None or not self.is_fresh(now):
            return True
        held = snapshot.num_blocks_owned + snapshot.num_blocks_leased
        if held == 0 and num_entries == 0:
            return True
        block = self.address.block_size_tokens
        wanted = ceil((num_tokens - cached_tokens + self.fresh.prefill_tokens) / block)
        return held + wanted <= snapshot.num_blocks_total

    def has_decode_room(self, now: float, *, num_choices: int, kv_tokens: int, overcommit: float) -> bool:
        """True when the batch has slots and the expected growth of all that was booked fits the pool; an idle worker takes anything."""
        num_sequences = self.num_sequences(now)
        if num_sequences == 0:
            return True
        return (
            num_sequences + num_choices <= overcommit * self.address.max_num_seqs
            and self.kv_tokens(now) + kv_tokens <= self.kv_capacity_tokens
        )

    # --- bookings ---

    def add_hold(self, hold: Hold, now: float, *, pending: bool) -> None:
        """`pending`: nothing reaches this worker before the prefill elsewhere is done."""
        key = (hold.key, hold.phase)
        assert key not in self.holds, "held twice"
        self.holds[key] = hold
        self.booked.add(hold)
        self.fresh.add(hold)
        if pending:
            self._pending.add(key)
        else:
            self._settling[key] = now

    def remove_hold(self, hold: Hold) -> None:
        key = (hold.key, hold.phase)
        if self.holds.pop(key, None) is None:
            return
        self.booked.add(hold, -1)
        if key in self._pending or key in self._settling:
            self.fresh.add(hold, -1)
            self._pending.discard(key)
            self._settling.pop(key, None)

    def start_settling(self, hold: Hold, now: float) -> None:
        """The prefill elsewhere is done: the request is on its way here and will show in a later snapshot."""
        key = (hold.key, hold.phase)
        if key in self._pending:
            self._pending.remove(key)
            self._settling[key] = now

    def check(self) -> None:
        """Assert that the tallies are the sums of the holds."""
        booked, fresh = Tally(), Tally()
        for key, hold in self.holds.items():
            booked.add(hold)
            if key in self._pending or key in self._settling:
                fresh.add(hold)
        assert booked == self.booked, f"{self.worker_id}: booked {self.booked}, holds sum to {booked}"
        assert fresh == self.fresh, f"{self.worker_id}: fresh {self.fresh}, holds sum to {fresh}"
        assert not self._pending & self._settling.keys() and self._pending | self._settling.keys() <= self.holds.keys()

    # --- what the worker says ---

    def take_snapshot(self, snapshot: WorkerSnapshot, now: float, *, refit_interval_s: float) -> None:
        before, before_read_s = self.snapshot, self.read_at_s
        self.snapshot, self.read_at_s = snapshot, now - snapshot.age_s
        self.role, self.state = snapshot.role, snapshot.state
        while self._settling:
            key, since_s = next(iter(self._settling.items()))
            if since_s + self.settle_s > self.read_at_s:
                break
            del self._settling[key]
            self.fresh.add(self.holds[key], -1)
        if before is not None:
            self.model.observe(work_between(before, snapshot, self.read_at_s - before_read_s, self.context_mean))
            if now - self._refit_at_s >= refit_interval_s:
                self._refit_at_s = now
                self.model.refit()

    def note_booked(self, num_tokens: int, cached_tokens: int) -> None:
        self.hit_rate += _HIT_RATE_EWMA * (cached_tokens / max(num_tokens, 1) - self.hit_rate)
        self.context_mean += _CONTEXT_EWMA * (num_tokens - self.context_mean)

    @staticmethod
    def _tally_s(tally: Tally, cost: StepCost) -> float:
        return tally.num_prefills * cost.step_s + tally.prefill_tokens * cost.prefill_token_s + tally.prefill_pairs * cost.prefill_pair_s


def work_between(before: WorkerSnapshot, after: WorkerSnapshot, elapsed_s: float, context_mean: float) -> Work:
    """What the worker computed between two of its snapshots, as far as its counters tell."""
    num_steps = max(0, after.step_count - before.step_count)
    busy_s = min(num_steps * after.step_time_ewma_s, max(elapsed_s, after.step_time_ewma_s))

    def grown(name: str) -> int:
        return max(0, after.counters.get(name, 0) - before.counters.get(name, 0))

    prefill_tokens = grown("prefill_tokens")
    return Work(
        num_steps=num_steps,
        prefill_tokens=prefill_tokens,
        prefill_pairs=prefill_tokens * context_mean,
        decode_tokens=grown("decode_tokens"),
        decode_kv_token_steps=num_steps * (before.running_kv_tokens + after.running_kv_tokens) / 2,
        busy_s=busy_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Workers of one model that are ready, by role, in the order they joined."""

    prefill: tuple[Worker, ...] = ()
    decode: tuple[Worker, ...] = ()
    both: tuple[Worker, ...] = ()
    least_kv_tokens: int = 0  # of the workers: a longer prompt does not fit each of them

    @property
    def all(self) -> tuple[Worker, ...]:
        return self.prefill + self.decode + self.both

    def fit_for(self, num_tokens: int, excluded: tuple[WorkerId, ...]) -> Pools:
        """Those that can hold `num_tokens` and are not excluded."""
        if not excluded and num_tokens <= self.least_kv_tokens:
            return self
        return pools_of([w for w in self.all if w.worker_id not in excluded and w.max_request_tokens >= num_tokens])


def pools_of(workers: list[Worker]) -> Pools:
    return Pools(
        prefill=tuple(w for w in workers if w.role is Role.PREFILL),
        decode=tuple(w for w in workers if w.role is Role.DECODE),
        both=tuple(w for w in workers if w.role is Role.BOTH),
        least_kv_tokens=min((w.max_request_tokens for w in workers), default=0),
    )


class Fleet:
    """Workers by id. A worker is in it from the moment its link is up until the link ends or the directory forgets it."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, Worker] = {}
        self._pools: dict[str, Pools] = {}
        self.known: dict[WorkerId, WorkerAddress] = {}  # what the directory says, linked or not

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def __len__(self) -> int:
        return len(self._workers)

    def get(self, worker_id: WorkerId) -> Worker | None:
        return self._workers.get(worker_id)

    def take_membership(self, membership: Membership) -> list[WorkerId]:
        """Note the addresses; returns workers of the fleet that are not among them any more, or came back as another epoch."""
        self.known = {a.worker_id: a for a in membership.workers}
        gone = []
        for worker in self._workers.values():
            address = self.known.get(worker.worker_id)
            if address is None or address.epoch != worker.epoch:
                gone.append(worker.worker_id)
        return gone

    def add(self, worker: Worker) -> None:
        assert worker.worker_id not in self._workers, "joined twice"
        self._workers[worker.worker_id] = worker
        self.changed()

    def remove(self, worker_id: WorkerId) -> Worker | None:
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self.changed()
        return worker

    def changed(self) -> None:
        """A worker came, went, or changed role or state."""
        self._pools.clear()

    def pools(self, model_id: str) -> Pools:
        """Ready workers of a model."""
        pools = self._pools.get(model_id)
        if pools is None:
            ready = [w for w in self._workers.values() if w.state is WorkerState.READY and w.address.model_id == model_id]
            pools = pools_of(ready)
            if ready:  # an unknown model id must not leave an entry behind
                self._pools[model_id] = pools
        return pools
