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
from simulator.analytic_worker import Driver, Flight, PromptServer


class DecodeServer(PromptServer):
    """Decodes sequences in one batch; also computes short prompts, whose steps hold up everybody else there."""

    __slots__ = (
        "_chunk_tokens_beside",
        "_chunks",
        "_computing",
        "_ends",
        "_last_s",
        "_late_s",
        "_num_joined",
        "_prompts",
        "_room_tokens",
        "_step_s",
        "_version",
        "_waiting",
        "is_mixing",
        "kv_tokens",
        "num_running",
        "step",
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
        chunk_tokens_beside: int,
        max_num_seqs: int,
        room_tokens: int,
        late_s: float,
    ) -> None:
        """chunk_tokens_beside: of one step, most of prompts where a batch decodes. Others as of PrefillServer."""
        super().__init__(
            worker_id,
            driver=driver,
            pace=pace,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            chunk_tokens=chunk_tokens,
            max_num_seqs=max_num_seqs,
        )
        self._chunk_tokens_beside = chunk_tokens_beside
        self._room_tokens = room_tokens
        self._late_s = late_s
        self.num_running = 0
        self.kv_tokens = 0.0  # of the batch, at `step`
        self.step = 0.0  # of the clock
        self._step_s = 1.0
        self._last_s = 0.0  # when that was the step
        self._ends: list[tuple[int, int, Flight]] = []
        self._waiting: deque[Flight] = deque()  # for a slot or blocks
        self._num_joined = 0
        self._version = 0
        self._prompts: deque[Flight] = deque()  # that have come and are not begun
        self._computing: deque[Flight] = deque()
        self._chunks: list[tuple[Flight, int]] | None = None  # of the step under way; None: no step of prompts is
        self.is_mixing = False  # prompts are computed here

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
        self._driver.call_at(now + max(0.0, left) * self._step_s, lambda now: self._end(now, version))

    def _end(self, now: float, version: int) -> None:
        if version != self._version:
            return  # somebody joined or ended since: another end is planned
        self._advance(now)
        self.step = float(self._ends[0][0])  # which it is but for rounding
        ended = self._take_ended()
        self._admit_waiting(now)
        self._plan(now)
        for flight in ended:
            self._driver.decoded(flight, now)

    def _take_ended(self) -> list[Flight]:
        ends, ended = self._ends, []
        while ends and ends[0][0] <= self.step:
            _, _, flight = heappop(ends)
            ended.append(flight)
            self.num_running -= 1
            self.kv_tokens -= flight.prompt.num_tokens + flight.prompt.output_tokens
            self._let_go(flight)
        if not self.num_running:
            self.kv_tokens = 0.0
        return ended

    def _admit_waiting(self, now: float) -> None:
        while self._waiting and self._admit(self._waiting[0], now):
            self._waiting.popleft()

    # --- who decodes ---

    def join(self, flight: Flight, now: float) -> None:
        """Its KV has come."""
        if self.is_mixing and now > self._last_s:
            self._waiting.append(flight)  # until the step is over
            return
        if self.is_mixing:
            if self._waiting or not self._admit(flight, now):
                self._waiting.append(flight)
            return
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

    @property
    def waiting_tokens(self) -> int:
        """Of prompts that have come and are not computed."""
        return sum([f.remaining for f in self._computing]) + sum([f.prompt.num_tokens for f in self._prompts])

    def busy_s(self, now: float) -> float:
        """Seconds until a prompt that came now would be begun."""
        return self._pace.prompt_s(0, self.waiting_tokens, self._chunk_tokens) if self.is_mixing else 0.0

    def submit(self, flight: Flight) -> None:
        """Compute the prompt, then decode; it arrives at flight.ready_s."""
        self._driver.call_at(flight.ready_s, lambda now: self._arrive(flight, now))

    def _arrive(self, flight: Flight, now: float) -> None:
        self._prompts.append(flight)
        if self.is_mixing:
            return
        self.is_mixing = True
        self._version += 1  # ends come with the steps now
        self._advance(now)
        left = ceil(self.step - 1e-9) - self.step if self.num_running else 0.0  # of the step under way
        self._driver.call_at(now + max(0.0, left) * self._step_s, self._mix)

    def _mix(self, now: float) -> None:
        """A step is over: ends and room first, then the next, with what it takes of prompts."""
        done: list[Flight] = []
        if self._chunks is None:
            self._advance(now)
            self.step = float(round(self.step))
        else:
            self.step += 1.0
            self.kv_tokens += self.num_running
            self._last_s = now
            done = [flight for flight, num_tokens in self._chunks if self._keep(flight, num_tokens, now)]
            for flight in done:
                self._computing.remove(flight)
        ended = self._take_ended()
        self._admit_waiting(now)
        for flight in done:
            self._driver.prefilled(flight, now)  # and it joins
        for flight in ended:
            self._driver.decoded(flight, now)
        self._next_mixed(now)
        if self.waiting_tokens < self._room_tokens:
            self._driver.room_at(now + self._late_s)

    def _next_mixed(self, now: float) -> None:
        batch, left = self.num_running, self._chunk_tokens - self.num_running
        if batch:
            left = min(left, self._chunk_tokens_beside)
        while len(self._prompts) and sum([f.remaining for f in self._computing]) < left and self._begin(now):
            pass
        step: list[tuple[Flight, int]] = []
        for flight in self._computing:
            size = min(flight.remaining, left)
            if size <= 0:
                break
            step.append((flight, size))
            left -= size
        if not step and not self._prompts:
            self.is_mixing, self._chunks = False, None
            self._plan(now)
            return
        self._chunks = step
        chunks = [(flight.prompt.num_tokens - flight.remaining, size) for flight, size in step]
        took_s = self._pace.mixed_step_s(chunks, batch, self.kv_tokens + batch)
        tally = self.tally
        tally.num_steps += 1
        tally.prefill_tokens += sum([size for _, size in step])
        tally.decode_tokens += batch
        tally.decode_kv_token_steps += self.kv_tokens + batch
        tally.busy_s += took_s
        self._driver.call_at(now + took_s, self._mix)

    def _begin(self, now: float) -> bool:
        """The next prompt; False: there is no slot or no room for its blocks."""
        num_busy = self.num_running + len(self._computing)
        if num_busy >= self._max_num_seqs or not self._take(self._prompts[0], now, is_busy=num_busy > 0):
            return False
        self._computing.append(self._prompts.popleft())
        return True
