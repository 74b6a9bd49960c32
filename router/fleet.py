"""What the router believes of the workers: their last snapshot with its age, and on top of it what it gave out since.

    load(worker) = what the snapshot says, less what was surely done since     while it is fresh (200 ms)
                   + bookings too young to show in it
                 = all of the worker's bookings                                when it is older

So a booking weighs on the next choice from the moment it is made, and weighs once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from protocol.messages import Membership
from protocol.request import AttemptKey
from protocol.worker import Role, WorkerAddress, WorkerId, WorkerSnapshot, WorkerState
from router.cost_model import CostModel, StepCost, work_between
from router.decode_outlook import BatchLoad, DecodeOutlook
from router.holds import Hold, Phase, Tally
from router.link_cost import LinkCost

HoldKey = tuple[AttemptKey, Phase]

_HIT_RATE_EWMA = 0.05
_CONTEXT_EWMA = 0.1
CONTEXT_TOKENS = 512.0  # of a prompt, before any was seen
_NEVER = float("-inf")
_FOREVER = float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPrice:
    """What any request is worth in a pool whose estimates are not believed (estimate_trust.py)."""

    prefill_s: float  # of one prompt that waits
    cost: StepCost  # one for the whole pool


class Worker:
    """One incarnation of a worker whose link is up. Policies see it through the read-only `policies.api.WorkerView`.

    The load is a sheet of plain attributes, written anew by `refresh` when something changed, so that scoring 64 workers reads and
    adds and nothing else. It is true at the last `refresh`, which `Fleet.refresh` does for all before each choice.
    """

    __slots__ = (
        "_changed",
        "_decoding_from",
        "_drained_at_s",
        "_outlook",
        "_pending",
        "_price",
        "_refit_at_s",
        "_settle_s",
        "_settling",
        "_stale_at_s",
        "_stale_s",
        "_young_s",
        "address",
        "booked",
        "booking_scale",
        "common_cost",
        "context_mean",
        "cost",
        "epoch",
        "free_kv_tokens",
        "fresh",
        "held_kv_tokens",
        "hit_rate",
        "holds",
        "kv_capacity_tokens",
        "kv_tokens",
        "last_chosen",
        "link",
        "max_num_batched_tokens",
        "max_num_seqs",
        "max_request_tokens",
        "model",
        "num_sequences",
        "prompt_room_tokens",
        "queued_prefill_s",
        "queued_prefill_tokens",
        "read_at_s",
        "reclaimable_kv_tokens",
        "role",
        "snapshot",
        "state",
        "tie_hash",
        "worker_id",
    )

    def __init__(self, address: WorkerAddress, *, model: CostModel, link: LinkCost, tie_hash: int, stale_s: float, settle_s: float) -> None:
        self.address = address
        self.worker_id: WorkerId = address.worker_id
        self.epoch = address.epoch
        self.model = model
        self.link = link  # of pulls from other workers to this one
        self.common_cost: StepCost | None = None  # of the pool, which this worker is taken to be like; None: it has a pace of its own
        self.cost: StepCost = model.cost  # seconds of work here, leaning high
        self.tie_hash = tie_hash
        self.role: Role = address.role
        self.state = WorkerState.STARTING
        self.snapshot: WorkerSnapshot | None = None
        self.read_at_s = _NEVER  # when the snapshot's figures were read, on our clock
        self.last_chosen = 0  # number of the choice that chose it last
        self.hit_rate = 0.0  # running share of prompt tokens found cached here
        self.context_mean = CONTEXT_TOKENS  # running mean of the prompts booked here
        self.kv_capacity_tokens = address.num_kv_blocks * address.block_size_tokens
        self.max_num_seqs = address.max_num_seqs
        self.max_num_batched_tokens = address.max_num_batched_tokens
        self.max_request_tokens = min(self.kv_capacity_tokens, address.max_model_len)

        # Bookings
        self.booked = Tally()
        self.fresh = Tally()  # booked, and not in the snapshot yet
        self.booking_scale = 1.0  # bookings of all routers for one that is known here; above 1 while routers are not heard
        self.holds: dict[HoldKey, Hold] = {}
        self._decoding_from: dict[HoldKey, int] = {}  # step at which its prompt was computed
        self._outlook: DecodeOutlook | None = None  # of these holds; None: they are others than when it was made
        self._settling: OrderedDict[HoldKey, float] = OrderedDict()  # in `fresh` since, oldest first
        self._pending: OrderedDict[HoldKey, None] = OrderedDict()  # in `fresh` until the prefill elsewhere is done, oldest first

        # The sheet
        self.queued_prefill_tokens = 0  # given to this worker and not computed yet
        self.queued_prefill_s = 0.0  # until a prompt given to it now would start
        self.num_sequences = 0  # that decode here, wait here, or will come here
        self.kv_tokens = 0  # held for sequences now, or at the expected end of what was booked
        self.held_kv_tokens = 0  # the memory this takes, where sequences share blocks
        self.free_kv_tokens = self.kv_capacity_tokens  # in blocks nobody holds
        self.reclaimable_kv_tokens = 0  # in blocks only the prefix cache holds: a prompt evicts them once none is free
        self.prompt_room_tokens = self.max_request_tokens  # of a new prompt's blocks; an idle worker takes anything
        self._stale_s = stale_s
        self._settle_s = settle_s
        self._changed = True
        self._stale_at_s = _NEVER
        self._drained_at_s = _NEVER  # when what the snapshot saw waiting is computed
        self._young_s = 0.0  # prefill seconds that come on top
        self._price: RequestPrice | None = None  # None: estimates are believed
        self._refit_at_s = _NEVER

    def signal_age_s(self, now: float) -> float:
        """Age of the snapshot; infinite before the first."""
        return now - self.read_at_s

    @property
    def num_prefills(self) -> int:
        """Prompts booked here and not computed yet."""
        return self.booked.num_prefills

    # --- the sheet ---

    def refresh(self, now: float) -> None:
        """Make the sheet true at `now`."""
        if self._changed or now > self._stale_at_s:
            self._write_sheet(now)
        left_s = self._drained_at_s - now
        self.queued_prefill_s = self._young_s + left_s if left_s > 0.0 else self._young_s

    def _write_sheet(self, now: float) -> None:
        self._write_work(now)
        if self._price is not None:
            self.cost = self._price.cost
            self._drained_at_s = _NEVER
            self._young_s = self.booking_scale * self.booked.num_prefills * self._price.prefill_s

    def _write_work(self, now: float) -> None:
        snapshot, booked, fresh, scale = self.snapshot, self.booked, self.fresh, self.booking_scale
        self._changed = False
        self.cost = cost = self.common_cost if self.common_cost is not None else self.model.cost
        if snapshot is None or now > self.read_at_s + self._stale_s:
            self._stale_at_s = _FOREVER
            self._drained_at_s = _NEVER
            self._young_s = scale * self._prefill_s(booked)
            self.queued_prefill_tokens = int(scale * booked.prefill_tokens)
            self.num_sequences = int(scale * booked.num_sequences)
            self.kv_tokens = self.held_kv_tokens = booked.kv_tokens
            self.free_kv_tokens = max(0, self.kv_capacity_tokens - booked.kv_tokens - booked.prefill_tokens)
            self.reclaimable_kv_tokens = 0
            self.prompt_room_tokens = self.max_request_tokens
            return
        block = self.address.block_size_tokens
        held = snapshot.num_blocks_owned + snapshot.num_blocks_leased
        self._stale_at_s = self.read_at_s + self._stale_s
        self._drained_at_s = _NEVER
        if snapshot.waiting_tokens:
            token_s = cost.prefill_token_s + cost.prefill_pair_s * self.context_mean
            self._drained_at_s = self.read_at_s + cost.step_s + snapshot.waiting_tokens * token_s
        self._young_s = scale * self._prefill_s(fresh)
        self.queued_prefill_tokens = snapshot.waiting_tokens + int(scale * fresh.prefill_tokens)
        self.num_sequences = snapshot.num_running + snapshot.num_waiting + int(scale * fresh.num_sequences)
        self.kv_tokens = max(snapshot.running_kv_tokens + fresh.kv_tokens, booked.kv_tokens)
        shared_once = held * block + snapshot.waiting_tokens + booked.output_tokens + fresh.kv_tokens
        self.held_kv_tokens = min(self.kv_tokens, shared_once)
        self.free_kv_tokens = max(0, snapshot.num_blocks_free * block - fresh.prefill_tokens)
        self.reclaimable_kv_tokens = snapshot.num_blocks_cached * block
        if held == 0 and booked.num_prefills == 0:
            self.prompt_room_tokens = self.max_request_tokens
        else:
            self.prompt_room_tokens = max(0, (snapshot.num_blocks_total - held) * block - fresh.prefill_tokens)

    def _prefill_s(self, tally: Tally) -> float:
        """To compute what is held: prompts that wait together share steps."""
        cost, num_steps = self.cost, min(tally.num_prefills, 1 + tally.prefill_tokens // self.max_num_batched_tokens)
        return num_steps * cost.step_s + tally.prefill_tokens * cost.prefill_token_s + tally.prefill_pairs * cost.prefill_pair_s

    # --- bookings ---

    def add_hold(self, hold: Hold, now: float, *, pending: bool) -> None:
        """`pending`: nothing reaches this worker before the prefill elsewhere is done."""
        key = (hold.key, hold.phase)
        assert key not in self.holds, "held twice"
        self.holds[key] = hold
        self.booked.add(hold)
        self.fresh.add(hold)
        self._changed, self._outlook = True, None
        if pending:
            self._pending[key] = None
        else:
            self._settling[key] = now

    def scale_bookings(self, scale: float) -> None:
        """Count each booking as `scale` of them: what is known here stands for what routers that are not heard gave out meanwhile."""
        if scale != self.booking_scale:
            self.booking_scale = scale
            self._changed = True

    def has_hold(self, hold: Hold) -> bool:
        return (hold.key, hold.phase) in self.holds

    def remove_hold(self, hold: Hold) -> None:
        key = (hold.key, hold.phase)
        if self.holds.pop(key, None) is None:
            return
        self.booked.add(hold, -1)
        self._changed, self._outlook = True, None
        self._decoding_from.pop(key, None)
        if key in self._pending or key in self._settling:
            self.fresh.add(hold, -1)
            self._pending.pop(key, None)
            self._settling.pop(key, None)

    def start_settling(self, hold: Hold, now: float) -> None:
        """Its prompt is computed: here, or elsewhere, and then it is on its way and will show in a later snapshot."""
        key = (hold.key, hold.phase)
        if key in self.holds and key not in self._decoding_from:
            self._decoding_from[key] = self.snapshot.step_count if self.snapshot is not None else 0
            self._outlook = None
        if key in self._pending:
            del self._pending[key]
            self._settling[key] = now

    def pending_holds(self, most: int) -> list[Hold]:
        """The oldest of those whose prefill is under way elsewhere."""
        return [self.holds[key] for key in islice(self._pending, most)] if self._pending else []

    # --- what the batch will be ---

    def decode_load_at(self, at_s: float) -> BatchLoad:
        """What is left of the load of the sheet, less what will not have come."""
        return self._decode_load_left(at_s).less(self.outlook.landing_after(at_s))

    def decode_load_met(self, at_s: float, output_tokens: int) -> BatchLoad:
        """What a sequence meets that comes then and decodes so many tokens: what is left, with those that come before it ends, less
        those that will have come and gone. All that it meets at any time, so it leans high.
        """
        step_s = self._step_s
        return self._decode_load_left(at_s).less(self.outlook.landing_outside(at_s, at_s + output_tokens * step_s, step_s))

    def _decode_load_left(self, at_s: float) -> BatchLoad:
        """The load of the sheet, less what is expected to have ended by then. Leans high: with no report that is fresh, nothing ends."""
        load = BatchLoad(self.num_sequences, self.kv_tokens)
        if self.snapshot is None or self._stale_at_s == _FOREVER:
            return load
        num_steps = int((at_s - self.read_at_s) / self._step_s)
        return load.less(self.outlook.ending(self.snapshot.step_count, self.snapshot.step_count + num_steps))

    def time_until(self, now: float, suffices: Callable[[BatchLoad], bool]) -> float | None:
        """Seconds until what has ended suffices; None: it will not, as far as is known."""
        if self.snapshot is None:
            return None
        end_step = self.outlook.first_end(self.snapshot.step_count, suffices)
        return None if end_step is None else max(0.0, self.read_at_s + (end_step - self.snapshot.step_count) * self._step_s - now)

    @property
    def outlook(self) -> DecodeOutlook:
        """Made when it is asked for: only a request with an objective does."""
        if self._outlook is None:
            decoding = ((self.holds[key], step) for key, step in self._decoding_from.items())
            self._outlook = DecodeOutlook(decoding, (self.holds[key] for key in self._pending))
        return self._outlook

    @property
    def _step_s(self) -> float:
        """Of the batch as it is, leaning high."""
        return self.cost.decode_step_s(self.num_sequences, self.kv_tokens)

    def note_booked(self, num_tokens: int, cached_tokens: int) -> None:
        self.hit_rate += _HIT_RATE_EWMA * (cached_tokens / max(num_tokens, 1) - self.hit_rate)
        self.context_mean += _CONTEXT_EWMA * (num_tokens - self.context_mean)

    def forget(self, model: CostModel, link: LinkCost) -> None:
        """What was learned here and whose turn it was; load, bookings and last word stay."""
        self.model, self.link, self._price, self.common_cost = model, link, None, None
        self.hit_rate, self.context_mean, self.last_chosen = 0.0, CONTEXT_TOKENS, 0
        self._refit_at_s = _NEVER
        self._changed = True

    def check(self) -> None:
        """Assert that the tallies are the sums of the holds."""
        booked, fresh = Tally(), Tally()
        for key, hold in self.holds.items():
            booked.add(hold)
            if key in self._pending or key in self._settling:
                fresh.add(hold)
        assert booked == self.booked, f"{self.worker_id}: booked {self.booked}, holds sum to {booked}"
        assert fresh == self.fresh, f"{self.worker_id}: fresh {self.fresh}, holds sum to {fresh}"
        pending, settling = self._pending.keys(), self._settling.keys()
        assert self._decoding_from.keys() <= self.holds.keys()
        assert not pending & settling and pending | settling <= self.holds.keys()

    # --- what the worker says ---

    def borrow_cost(self, cost: StepCost) -> None:
        self.model.borrow(cost)
        self._changed = True

    def take_common_cost(self, cost: StepCost | None) -> None:
        self._changed = self._changed or cost is not self.common_cost
        self.common_cost = cost

    def count_requests(self, price: RequestPrice | None) -> None:
        """Price queue and batch by how many requests there are, not by the work in them; None: by the work again."""
        self._changed = self._changed or price is not self._price
        self._price = price

    @property
    def is_predictable(self) -> bool:
        """Reports have confirmed the estimates, so that a promise may be made, or refused, on them."""
        return self.model.is_fitted and self._price is None

    def take_snapshot(self, snapshot: WorkerSnapshot, now: float, *, refit_interval_s: float) -> bool:
        """True when the cost model was fitted anew."""
        before = self.snapshot
        self.snapshot, self.read_at_s = snapshot, now - snapshot.age_s
        self.role, self.state = snapshot.role, snapshot.state
        self._changed = True
        self._settle(snapshot)
        if before is not None:
            self.link.observe(before, snapshot, now)
            self.model.observe(work_between(before, snapshot, self.context_mean))
            if now - self._refit_at_s >= refit_interval_s:
                self._refit_at_s = now
                self.model.refit()
                return self.model.num_samples > 0
        return False

    def _settle(self, snapshot: WorkerSnapshot) -> None:
        """Bookings that show in it leave `fresh`: those made long enough before, and of a prefill worker as many of the oldest others as
        it shows prompts more than were known to be there. Counted twice, half a burst would look like work enough to send the rest away.
        """
        num_arrived = 0
        if snapshot.role is Role.PREFILL and self.booking_scale == 1.0:
            num_arrived = snapshot.num_waiting + snapshot.num_running - (self.booked.num_prefills - self.fresh.num_prefills)
        while self._settling:
            key, since_s = next(iter(self._settling.items()))
            if since_s + self._settle_s > self.read_at_s and (since_s > self.read_at_s or num_arrived <= 0):
                break
            del self._settling[key]
            self.fresh.add(self.holds[key], -1)
            num_arrived -= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Pools:
    """Workers of one model that are ready, by role, in the order they joined."""

    prefill: tuple[Worker, ...] = ()
    decode: tuple[Worker, ...] = ()
    both: tuple[Worker, ...] = ()
    all: tuple[Worker, ...] = ()
    least_tokens: int = 0  # a request up to this length fits every worker
    most_tokens: int = 0  # a longer one fits none

    def fit_for(self, num_tokens: int, excluded: tuple[WorkerId, ...]) -> Pools:
        """Those that can hold `num_tokens` and are not excluded; the excluded ones after all where there is no other."""
        if not excluded and num_tokens <= self.least_tokens:
            return self
        fitting = [w for w in self.all if w.max_request_tokens >= num_tokens]
        return pools_of([w for w in fitting if w.worker_id not in excluded] or fitting)


def pools_of(workers: list[Worker]) -> Pools:
    lengths = [w.max_request_tokens for w in workers]
    return Pools(
        prefill=tuple(w for w in workers if w.role is Role.PREFILL),
        decode=tuple(w for w in workers if w.role is Role.DECODE),
        both=tuple(w for w in workers if w.role is Role.BOTH),
        all=tuple(workers),
        least_tokens=min(lengths, default=0),
        most_tokens=max(lengths, default=0),
    )


class Fleet:
    """Workers by id. A worker is in it from the moment its link is up until the link ends or the directory forgets it."""

    def __init__(self) -> None:
        self._workers: dict[WorkerId, Worker] = {}
        self._pools: dict[str, Pools] = {}
        self._num_choices = 0
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

    def lend_cost(self, lender: Worker) -> None:
        """What was learned of one worker, to those of its role that have not worked yet; to other roles where nobody has."""
        of_model = [w for w in self._workers.values() if w.address.model_id == lender.address.model_id]
        known_roles = {w.role for w in of_model if w.model.num_samples}
        for worker in of_model:
            if worker.model.num_samples == 0 and (worker.role is lender.role or worker.role not in known_roles):
                worker.borrow_cost(lender.model.fitted)

    def lender_for(self, newcomer: WorkerAddress) -> Worker | None:
        """Who is known best of the newcomer's role, else of its model; None: nobody is known."""
        known = [w for w in self._workers.values() if w.address.model_id == newcomer.model_id and w.model.num_samples]
        return max(known, key=lambda w: (w.role is newcomer.role, w.model.num_samples), default=None)

    def note_chosen(self, *workers: Worker) -> None:
        """These were just chosen: among equals they are the last to be chosen again."""
        self._num_choices += 1
        for worker in workers:
            worker.last_chosen = self._num_choices

    def remove(self, worker_id: WorkerId) -> Worker | None:
        worker = self._workers.pop(worker_id, None)
        if worker is not None:
            self.changed()
        return worker

    def alike(self, worker: Worker) -> list[Worker]:
        """The workers of its model and role, itself included."""
        model_id, role = worker.address.model_id, worker.role
        return [w for w in self._workers.values() if w.role is role and w.address.model_id == model_id]

    @staticmethod
    def refresh(pools: Pools, now: float) -> None:
        for worker in pools.all:  # `refresh` of each, whose call would take longer than what it mostly does
            if worker._changed or now > worker._stale_at_s:
                worker._write_sheet(now)
            left_s = worker._drained_at_s - now
            worker.queued_prefill_s = worker._young_s + left_s if left_s > 0.0 else worker._young_s

    def changed(self) -> None:
        """A worker came, went, or changed role or state."""
        self._pools.clear()

    def pools(self, model_id: str) -> Pools:
        """Ready workers of a model; their loads as of the last `refresh`."""
        pools = self._pools.get(model_id)
        if pools is None:
            ready = [w for w in self._workers.values() if w.state is WorkerState.READY and w.address.model_id == model_id]
            pools = pools_of(ready)
            if ready:  # an unknown model id must not leave an entry behind
                self._pools[model_id] = pools
        return pools
