"""A decode worker of the fast simulation: a clock of steps. Each sequence knows at which step it ends, so an answer is an event or two.

the clock's speed is that of the batch half way to the next end; it changes when a sequence joins or ends
a prompt that is computed here rides on steps of the batch: the clock stands still for what they take longer
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from math import ceil

from protocol.worker import WorkerId
from simulator.analytic_pace import Pace
from simulator.analytic_worker import Driver, Flight, Tally
from simulator.segment_cache import SegmentCache


class DecodeServer:
    """Decodes sequences in one batch; also computes short prompts, whose steps hold up everybody else there."""

    __slots__ = (
        "_chunk_tokens",
        "_driver",
        "_ends",
        "_is_planned",
        "_last_s",
        "_max_num_seqs",
        "_num_joined",
        "_pace",
        "_step_s",
        "_version",
        "_waiting",
        "block_tokens",
        "cache",
        "kv_tokens",
        "num_running",
        "step",
        "tally",
        "worker_id",
    )

    def __init__(
        self,
        worker_id: WorkerId,
        *,
        driver: Driver,
        pace: Pace,
        num_blocks: int,
        block_tokens: int,
        chunk_tokens: int,
        max_num_seqs: int,
    ) -> None:
        self.worker_id = worker_id
        self.block_tokens = block_tokens
        self.cache = SegmentCache(num_blocks)
        self.tally = Tally()
        self._driver = driver
        self._pace = pace
        self._chunk_tokens = chunk_tokens
        self._max_num_seqs = max_num_seqs
        self.num_running = 0
        self.kv_tokens = 0.0  # of the batch, at `step`
        self.step = 0.0  # of the clock
        self._step_s = 1.0
        self._last_s = 0.0  # when that was the step; later than now while a prompt is computed
        self._ends: list[tuple[int, int, Flight]] = []
        self._waiting: deque[Flight] = deque()  # for a slot or blocks
        self._num_joined = 0
        self._version = 0

    # --- the clock ---

    def _advance(self, now: float) -> None:
        gone_s = now - self._last_s
        if gone_s <= 0.0:
            return
        if self.num_running:
            steps = gone_s / self._step_s
            tally, batch = self.tally, self.num_running
            tally.num_steps += steps
            tally.decode_tokens += batch * steps
            tally.decode_kv_token_steps += steps * (self.kv_tokens + batch * steps / 2)
            tally.busy_s += gone_s
            self.step += steps
            self.kv_tokens += batch * steps
        self._last_s = now

    def _plan(self, now: float) -> None:
        """The next end, at the speed of the batch as it is on the way there."""
        self._version += 1
        if not self._ends:
            return
        left = self._ends[0][0] - self.step
        batch = self.num_running
        self._step_s = self._pace.decode_step_s(batch, self.kv_tokens + batch * (1.0 + left / 2))
        version = self._version
        self._driver.call_at(max(now, self._last_s) + max(0.0, left) * self._step_s, lambda now: self._end(now, version))

    def _end(self, now: float, version: int) -> None:
        if version != self._version:
            return  # somebody joined or ended since: another end is planned
        self._advance(now)
        ends, ended = self._ends, []
        last = ends[0][0]
        self.step = float(last)  # which it is but for rounding
        while ends and ends[0][0] <= last:
            _, _, flight = heappop(ends)
            ended.append(flight)
            self.num_running -= 1
            self.kv_tokens -= flight.prompt.num_tokens + flight.prompt.output_tokens
            self._let_go(flight)
        if not self.num_running:
            self.kv_tokens = 0.0
        while self._waiting and self._admit(self._waiting[0], now):
            self._waiting.popleft()
        self._plan(now)
        for flight in ended:
            self._driver.decoded(flight, now)

    # --- who decodes ---

    def join(self, flight: Flight, now: float) -> None:
        """Its KV has come."""
        self._advance(now)
        if self._waiting or not self._admit(flight, now):
            self._waiting.append(flight)
            return
        self._plan(now)

    def _admit(self, flight: Flight, now: float) -> bool:
        cache, prompt = self.cache, flight.prompt
        num_blocks = -(-prompt.num_tokens // self.block_tokens)
        found = cache.match(prompt.segments)
        if self.num_running:
            left = cache.num_blocks - cache.num_reserved - cache.num_pinned - (num_blocks - found)
            if self.num_running >= self._max_num_seqs or left < max(0.01 * cache.num_blocks, 0.5 * self.num_running):
                return False
        else:
            self.step = float(ceil(self.step))
        self._hold(flight, now, found)
        self.num_running += 1
        self.kv_tokens += prompt.num_tokens + 1
        flight.end_step = ceil(self.step - 1e-9) + prompt.output_tokens - 1
        self._num_joined += 1
        heappush(self._ends, (flight.end_step, self._num_joined, flight))
        return True

    def _hold(self, flight: Flight, now: float, found: int) -> None:
        """Blocks of the prompt, named at once, and of the whole answer."""
        cache, prompt = self.cache, flight.prompt
        num_named = prompt.num_tokens // self.block_tokens
        num_blocks = -(-(prompt.num_tokens + prompt.output_tokens) // self.block_tokens)
        flight.num_reserved = num_blocks - num_named
        cache.pin(prompt.segments)
        evicted = cache.reserve(flight.num_reserved)
        stored, more = cache.store(prompt.segments)
        evicted += more
        self._driver.cache_changed(self.worker_id, stored, evicted, now)

    def _let_go(self, flight: Flight) -> None:
        self.cache.release(flight.num_reserved)
        self.cache.unpin(flight.prompt.segments)

    # --- prompts that are computed here ---

    def busy_s(self, now: float) -> float:
        """Seconds until a prompt that came now would be begun."""
        return max(0.0, self._last_s - now)

    def submit(self, flight: Flight) -> None:
        """Compute the prompt, then decode; it arrives at flight.ready_s."""
        self._driver.call_at(flight.ready_s, lambda now: self._compute(flight, now))

    def _compute(self, flight: Flight, now: float) -> None:
        """Its chunks ride on steps of the batch, which take that much longer: the clock stands still for the difference."""
        self._advance(now)
        prompt, cache = flight.prompt, self.cache
        found = max(cache.match(prompt.segments), flight.pulled_blocks)
        flight.cached_tokens = min(found * self.block_tokens, prompt.num_tokens - 1)
        missed = prompt.num_tokens - flight.cached_tokens
        took_s = self._pace.prompt_s(flight.cached_tokens, missed, self._chunk_tokens)
        self._last_s = max(self._last_s, now) + took_s
        self.tally.busy_s += took_s
        self.tally.prefill_tokens += missed
        if self.num_running:
            done_s = self._last_s + -(-missed // self._chunk_tokens) * self._step_s
        else:
            done_s = self._last_s
            self.tally.num_steps += -(-missed // self._chunk_tokens)
        self._plan(now)
        self._driver.call_at(done_s, lambda now: self._driver.prefilled(flight, now))
