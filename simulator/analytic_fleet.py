"""What the router believes of the workers of the fast simulation: the router's own fleet and workers, their sheets written from sums.

`router.fleet.Worker` adds up a record for each hold and reads a snapshot for each report. Here a report is worked out when somebody is
about to choose, from what the worker did since, and holds are a few running sums. The sheet a policy reads is the same (a test holds it to
`Worker`), and so is everything that reads it: views, placement, policies.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import xxhash

from protocol.request import AttemptKey
from protocol.worker import WorkerAddress, WorkerId, WorkerState
from router.common_cost import share_cost
from router.config import RouterConfig
from router.cost_model import CostModel, StepCost, Work
from router.decode_outlook import BatchLoad, DecodeOutlook
from router.estimate_trust import EstimateTrust
from router.fleet import Fleet, Pools, RequestPrice, Worker
from router.holds import Hold, Phase
from router.link_cost import link_to
from simulator.analytic_worker import Flight
from simulator.decode_server import DecodeServer
from simulator.noise import Lognormal
from simulator.prefill_server import PrefillServer
from simulator.segment_cache import SegmentCache

LEARN_S = 0.5  # between two reports the pace is learned from, at first
LEARN_S_MAX = 60.0  # and later: each time this much longer, up to that
LEARN_GROWTH = 1.4
_NEVER = float("-inf")
_FOREVER = float("inf")


@dataclass(slots=True, kw_only=True)
class ReportedPace:
    """What one worker says of its times, in place of what they were; one draw a report (estimate_error.py)."""

    factor: float
    noise: Lognormal
    num_reports: int = 0

    def told_s(self, took_s: float) -> float:
        self.num_reports += 1
        return took_s * self.factor * self.noise.factor(self.num_reports - 1)


class AnalyticWorker(Worker):
    """A worker as the router sees it, over the one that serves (`server`)."""

    __slots__ = (
        "_done",
        "_learn_s",
        "_seen_at_s",
        "decoding",
        "drains_at_s",
        "fresh_flights",
        "fresh_s",
        "has_changed",
        "late_tokens",
        "learn_at_s",
        "news_at_s",
        "pending",
        "price",
        "reported",
        "server",
    )

    def __init__(
        self,
        address: WorkerAddress,
        server: PrefillServer | DecodeServer,
        *,
        config: RouterConfig,
        tie_hash: int,
        reported: ReportedPace,
    ) -> None:
        super().__init__(
            address,
            model=CostModel(StepCost(), bias=config.estimate_bias),
            link=link_to(address, config),
            tie_hash=tie_hash,
            stale_s=config.snapshot_stale_s,
            settle_s=config.booking_settle_s,
        )
        self.state = WorkerState.READY
        self.server = server
        self.has_changed = True
        self.news_at_s = _FOREVER  # when the next report comes
        self.drains_at_s = _NEVER  # when what reports show waiting is computed, as believed
        self.fresh_s = 0.0  # prefill seconds that come on top
        # Bookings, beside the sums in `booked` and `fresh`
        self.fresh_flights: deque[Flight] = deque()  # prompts booked here that no report shows yet
        self.late_tokens = 0  # of prompts that came since the steps under way began
        self.pending: dict[Flight, None] = {}  # decode here later: their prompts are under way
        self.decoding: dict[Flight, int] = {}  # at which step each began
        # What the pace was last learned from
        self._done = (0.0, 0, 0.0, 0.0, 0.0)
        self.reported = reported
        self.price: RequestPrice | None = None  # None: estimates are believed
        self._learn_s = LEARN_S
        self.learn_at_s = 0.0
        self._seen_at_s = _NEVER

    # --- the sheet ---

    def refresh(self, now: float) -> None:
        """Make the sheet true at `now`."""
        if self.has_changed or now >= self.news_at_s:
            self.write(now)
        left_s = self.drains_at_s - now
        self.queued_prefill_s = self.fresh_s + left_s if left_s > 0.0 else self.fresh_s

    def write(self, now: float) -> None:
        """All of the sheet but what follows from the time alone."""
        server = self.server
        if isinstance(server, PrefillServer):
            self._write_prefill(server, now)
        else:
            self._write_decode(server, now)
        self.has_changed = False
        if self.price is not None:
            self.drains_at_s, self.fresh_s = _NEVER, self.booked.num_prefills * self.price.prefill_s

    def _write_prefill(self, server: PrefillServer, now: float) -> None:
        waiting, read_at_s, self.news_at_s = server.waiting(now)
        if server.began_s != self._seen_at_s and read_at_s >= server.began_s:
            self._seen_at_s, self.late_tokens = server.began_s, 0
        flights, fresh, booked = self.fresh_flights, self.fresh, self.booked
        while flights and flights[0].ready_s <= read_at_s:
            flight = flights.popleft()
            self._show(flight)
            if flight.ready_s > server.began_s:
                self.late_tokens += flight.prompt.num_tokens
        self.read_at_s = read_at_s
        self.num_sequences = len(server.running) + len(server.queue)
        self.drains_at_s = _NEVER
        if now > read_at_s + self._stale_s:  # not believed: bookings alone
            self.fresh_s = self._prefill_s(booked)
            self.queued_prefill_tokens = booked.prefill_tokens
            self.free_kv_tokens = max(0, self.kv_capacity_tokens - booked.prefill_tokens)
            self.reclaimable_kv_tokens = 0
            self.prompt_room_tokens = self.max_request_tokens
            return
        self.news_at_s = min(self.news_at_s, read_at_s + self._stale_s + 1e-9) if server.is_busy else self.news_at_s
        waiting += self.late_tokens
        if waiting:
            cost = self.cost
            self.drains_at_s = read_at_s + cost.step_s + waiting * (cost.prefill_token_s + cost.prefill_pair_s * self.context_mean)
        self.fresh_s = self._prefill_s(fresh) if flights else 0.0
        self.queued_prefill_tokens = waiting + fresh.prefill_tokens
        self._write_room(server.cache, server.block_tokens)

    def _write_decode(self, server: DecodeServer, now: float) -> None:
        booked, fresh, cost = self.booked, self.fresh, self.cost
        self.read_at_s = now
        while self.fresh_flights and self.fresh_flights[0].ready_s <= now:
            self._show(self.fresh_flights.popleft())
        waiting = server.waiting_tokens if server.is_mixing else 0
        self.drains_at_s = _NEVER
        if waiting:
            self.drains_at_s = now + cost.step_s + waiting * (cost.prefill_token_s + cost.prefill_pair_s * self.context_mean)
        self.num_sequences = booked.num_sequences
        self.kv_tokens = max(booked.kv_tokens, round(server.kv_tokens) + fresh.kv_tokens)
        held = (server.cache.num_pinned + server.cache.num_reserved) * server.block_tokens
        self.held_kv_tokens = min(self.kv_tokens, held + waiting + booked.output_tokens + fresh.kv_tokens)
        self.fresh_s = self._prefill_s(fresh) if fresh.num_prefills else 0.0
        self.queued_prefill_tokens = waiting + fresh.prefill_tokens
        self.news_at_s = now if server.is_mixing or self.fresh_flights else _FOREVER
        self._write_room(server.cache, server.block_tokens)

    def _show(self, flight: Flight) -> None:
        """A report shows its prompt."""
        fresh = self.fresh
        fresh.num_prefills -= 1
        fresh.prefill_tokens -= flight.booked_tokens
        fresh.prefill_pairs -= flight.booked_pairs

    def _write_room(self, cache: SegmentCache, block_tokens: int) -> None:
        named, pinned, reserved, tokens = cache.num_named, cache.num_pinned, cache.num_reserved, self.fresh.prefill_tokens
        free_tokens = (cache.num_blocks - named - reserved) * block_tokens - tokens
        self.free_kv_tokens = free_tokens if free_tokens > 0 else 0
        self.reclaimable_kv_tokens = (named - pinned) * block_tokens
        if not pinned + reserved and not self.booked.num_prefills:
            self.prompt_room_tokens = self.max_request_tokens
        else:
            room_tokens = (cache.num_blocks - pinned - reserved) * block_tokens - tokens
            self.prompt_room_tokens = room_tokens if room_tokens > 0 else 0

    # --- bookings ---

    def book_prefill(self, flight: Flight) -> None:
        for tally in (self.booked, self.fresh):
            tally.num_prefills += 1
            tally.prefill_tokens += flight.booked_tokens
            tally.prefill_pairs += flight.booked_pairs
        self.fresh_flights.append(flight)
        self.has_changed = True

    def end_prefill(self, flight: Flight) -> None:
        self.booked.num_prefills -= 1
        self.booked.prefill_tokens -= flight.booked_tokens
        self.booked.prefill_pairs -= flight.booked_pairs
        self.has_changed = True

    def book_decode(self, flight: Flight) -> None:
        for tally in (self.booked, self.fresh):
            tally.num_sequences += 1
            tally.kv_tokens += flight.booked_kv_tokens
        self.booked.output_tokens += flight.predicted_output_tokens
        self.pending[flight] = None
        self.has_changed = True

    def begin_decode(self, flight: Flight) -> None:
        """It shows in reports from now on."""
        self.fresh.num_sequences -= 1
        self.fresh.kv_tokens -= flight.booked_kv_tokens
        del self.pending[flight]
        self.decoding[flight] = int(self.server.step) if isinstance(self.server, DecodeServer) else 0
        self.has_changed = True

    def end_decode(self, flight: Flight) -> None:
        self.booked.num_sequences -= 1
        self.booked.kv_tokens -= flight.booked_kv_tokens
        self.booked.output_tokens -= flight.predicted_output_tokens
        del self.decoding[flight]
        self.has_changed = True

    # --- what the batch will be ---

    def decode_load_met(self, at_s: float, output_tokens: int) -> BatchLoad:
        """As of `Worker`, from the same outlook. Asked only where nobody has room now."""
        server = self.server
        step = int(server.step) if isinstance(server, DecodeServer) else 0
        step_s = self.cost.decode_step_s(self.num_sequences, self.kv_tokens)
        decoding = [(_decode_hold(flight, self.worker_id), began) for flight, began in self.decoding.items()]
        outlook = DecodeOutlook(decoding, [_decode_hold(flight, self.worker_id) for flight in self.pending])
        load = BatchLoad(self.num_sequences, self.kv_tokens)
        num_steps = max(0, int((at_s - self.read_at_s) / step_s))
        return load.less(outlook.ending(step, step + num_steps)).less(outlook.landing_outside(at_s, at_s + output_tokens * step_s, step_s))

    # --- what its pace is ---

    def learn(self, now: float) -> bool:
        """Fit the pace to what was done since the last time, if it is time for that; True: the price of work here is another."""
        if now < self.learn_at_s:
            return False
        tally, before = self.server.tally, self._done
        done = (tally.num_steps, tally.prefill_tokens, tally.decode_tokens, tally.decode_kv_token_steps, tally.busy_s)
        if done[4] <= before[4]:
            self.learn_at_s = now + LEARN_S  # idle
            return False
        self._done, self.learn_at_s = done, now + self._learn_s
        self._learn_s = min(LEARN_S_MAX, LEARN_GROWTH * self._learn_s)
        tokens = int(done[1] - before[1])
        self.model.observe(
            Work(
                num_steps=max(1, round(done[0] - before[0])),
                prefill_tokens=tokens,
                prefill_pairs=tokens * self.context_mean,
                decode_tokens=round(done[2] - before[2]),
                decode_kv_token_steps=done[3] - before[3],
                busy_s=self.reported.told_s(done[4] - before[4]),
            )
        )
        self.model.refit()
        return True

    def take_common_cost(self, cost: StepCost | None) -> None:
        super().take_common_cost(cost)
        self.take_cost()

    def count_requests(self, price: RequestPrice | None) -> None:
        super().count_requests(price)
        self.price = price
        self.take_cost()

    def take_cost(self) -> None:
        """Of work here, from the pool or its own, or where neither is believed that of any request."""
        own = self.common_cost if self.common_cost is not None else self.model.cost
        self.cost = own if self.price is None else self.price.cost
        self.has_changed = True


class AnalyticFleet(Fleet):
    """Workers of one model, ready from the start."""

    def __init__(self, config: RouterConfig) -> None:
        super().__init__()
        self.workers: tuple[AnalyticWorker, ...] = ()
        self._trust = EstimateTrust(error_max=config.estimate_error_max)
        self._learn_at_s = 0.0  # when somebody's pace is learned from next

    def join(self, worker: AnalyticWorker) -> None:
        self.add(worker)
        self.workers += (worker,)

    def refresh(self, pools: Pools, now: float) -> None:  # type: ignore[override]
        if now >= self._learn_at_s:
            for worker in self.workers:
                if worker.learn(now):
                    self._lend(worker)
            self._learn_at_s = min([worker.learn_at_s for worker in self.workers])
        for worker in self.workers:  # `refresh` of each, whose call would take longer than what it mostly does
            if worker.has_changed or now >= worker.news_at_s:
                worker.write(now)
            left_s = worker.drains_at_s - now
            worker.queued_prefill_s = worker.fresh_s + left_s if left_s > 0.0 else worker.fresh_s

    def _lend(self, worker: AnalyticWorker) -> None:
        """As `WorkerReports` does after a fit."""
        worker.take_cost()
        self.lend_cost(worker)
        alike = self.alike(worker)
        share_cost(alike)
        self._trust.judge(alike)
        for other in self.workers:
            other.take_cost()


def tie_hash(worker_id: WorkerId, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(worker_id.encode(), seed=seed)


def _decode_hold(flight: Flight, worker_id: WorkerId) -> Hold:
    return Hold(
        key=AttemptKey(request_id=flight.served.request_id, attempt=0),
        phase=Phase.DECODE,
        worker_id=worker_id,
        num_sequences=1,
        kv_tokens=flight.booked_kv_tokens,
        output_tokens=flight.predicted_output_tokens,
        lands_s=flight.lands_s,
    )
