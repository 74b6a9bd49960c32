"""Workers of the fast simulation: a prompt is a few events, an answer one or two, whatever their lengths.

    prefill   steps of at most `chunk_tokens`, prompts first come, first served, as the scheduler plans them; the steps that one long
              prompt fills alone are one event
    decode    a clock of steps: each sequence knows at which step it ends, and the clock's speed changes when one joins or ends

What the token-accurate workers do and these do not: docs/simulation.md.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from math import ceil

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.worker import WorkerId
from simulator.analytic_pace import Pace
from simulator.prompt_tree import Prompt
from simulator.routed_gateway import Served
from simulator.segment_cache import Piece, SegmentCache

_NEVER = float("-inf")
_FOREVER = float("inf")


class Flight:
    """One request from its booking to its end."""

    __slots__ = (
        "booked_kv_tokens",
        "booked_pairs",
        "booked_s",
        "booked_tokens",
        "cached_tokens",
        "confirmed_tokens",
        "decode",
        "end_step",
        "lands_s",
        "num_reserved",
        "pinned",
        "predicted_output_tokens",
        "prefill",
        "prompt",
        "pulled_blocks",
        "ready_s",
        "remaining",
        "served",
        "step_s",
    )

    def __init__(self, prompt: Prompt, served: Served) -> None:
        self.prompt = prompt
        self.served = served
        self.prefill: PrefillServer | DecodeServer
        self.decode: DecodeServer
        self.ready_s = 0.0  # at the worker that computes it
        self.booked_s = 0.0
        self.booked_tokens = 0  # of the prompt that its worker was believed to lack
        self.booked_pairs = 0
        self.booked_kv_tokens = 0
        self.predicted_output_tokens = 0
        self.lands_s = 0.0  # when its prompt was expected to be computed
        self.pulled_blocks = 0  # leading blocks that come from another worker
        self.remaining = 0  # tokens of the prompt not computed yet
        self.cached_tokens = 0
        self.num_reserved = 0
        self.pinned = 0
        self.end_step = 0  # of the clock of its decode worker
        self.step_s = 0.0  # of the step in which its prompt was done


class Tally:
    """What a worker has done, for the router to learn its pace from; grows."""

    __slots__ = ("busy_s", "decode_kv_token_steps", "decode_tokens", "num_steps", "prefill_tokens")

    def __init__(self) -> None:
        self.num_steps = 0.0
        self.prefill_tokens = 0
        self.decode_tokens = 0.0
        self.decode_kv_token_steps = 0.0
        self.busy_s = 0.0


class Driver:
    """What workers need of the run they are in."""

    __slots__ = ("cache_changed", "call_at", "decoded", "prefilled", "room_at")

    def __init__(self) -> None:
        self.call_at: Callable[[float, Callable[[float], None]], None]
        self.prefilled: Callable[[Flight, float], None]  # its prompt is computed
        self.decoded: Callable[[Flight, float], None]  # its last token is out
        self.cache_changed: Callable[[WorkerId, list[Piece], list[Piece], float], None]  # (who, stored, evicted, when)
        self.room_at: Callable[[float], None]  # from then on fewer tokens than the inbox holds wait somewhere


class PrefillServer:
    """Computes prompts, each in the order of arrival; its KV stays in the cache when it is done."""

    __slots__ = (
        "_begin_lag_s",
        "_chunk_tokens",
        "_driver",
        "_interval_s",
        "_late_s",
        "_max_num_seqs",
        "_pace",
        "_room_tokens",
        "_step",
        "_step_lag_s",
        "before",
        "before_at_s",
        "began_s",
        "cache",
        "is_busy",
        "num_done_steps_max",
        "num_pinned",
        "queue",
        "running",
        "step_s",
        "step_tokens",
        "tally",
        "waiting_at_begin",
        "worker_id",
    )

    def __init__(
        self,
        worker_id: WorkerId,
        *,
        driver: Driver,
        pace: Pace,
        num_blocks: int,
        chunk_tokens: int,
        max_num_seqs: int,
        room_tokens: int,
        late_s: float,
        interval_s: float,
    ) -> None:
        """chunk_tokens: most of one step. room_tokens: below so many that wait, whoever places is told (`Driver.room_at`).
        late_s: how long a report is on its way; interval_s: between two reports at least, so that many a short step tells nothing.
        """
        self.worker_id = worker_id
        self.cache = SegmentCache(num_blocks)
        self.tally = Tally()
        self._driver = driver
        self._pace = pace
        self._chunk_tokens = chunk_tokens
        self._max_num_seqs = max_num_seqs
        self._room_tokens = room_tokens
        self._late_s = late_s
        self._interval_s = interval_s
        self.queue: deque[Flight] = deque()
        self.running: deque[Flight] = deque()  # begun and not done, in order
        self._step: list[tuple[Flight, int]] = []  # chunks of the step, or steps, under way
        self.num_pinned = 0  # named blocks that prompts under way read
        # What a report says: (tokens that wait, when that was), of the steps under way and before them.
        self.is_busy = False
        self.began_s = 0.0
        self.step_s = 1.0
        self.step_tokens = 0
        self.num_done_steps_max = 0
        self.waiting_at_begin = 0
        self.before, self.before_at_s = 0, _NEVER
        self._begin_lag_s = self._step_lag_s = late_s

    def submit(self, flight: Flight) -> None:
        """It arrives at flight.ready_s, which is not before now."""
        self.queue.append(flight)
        if not self.is_busy:
            self.is_busy = True
            self.before, self.before_at_s = 0, flight.booked_s  # before it came
            self.began_s, self.waiting_at_begin, self.num_done_steps_max = flight.ready_s, 0, 0
            self._begin_lag_s = self._step_lag_s = self._late_s
            self._driver.call_at(flight.ready_s, self._turn)

    def waiting(self, now: float) -> tuple[int, float, float]:
        """(tokens not computed yet, when that was true, when there will be later news) as reports that have come by `now` have it."""
        began_s = self.began_s
        if now < began_s + self._begin_lag_s:
            return self.before, self.before_at_s, began_s + self._begin_lag_s
        if not self.is_busy:
            return 0, now, _FOREVER
        step_s, last = self.step_s, self.num_done_steps_max
        num_done = int((now - began_s - self._step_lag_s) / step_s)
        if num_done <= 0:
            return self.waiting_at_begin, began_s, began_s + self._step_lag_s + step_s if last else _FOREVER
        if num_done >= last:
            return self.waiting_at_begin - last * self.step_tokens, began_s + last * step_s, _FOREVER
        at_s = began_s + num_done * step_s
        return self.waiting_at_begin - num_done * self.step_tokens, at_s, at_s + step_s + self._step_lag_s

    def busy_s(self, now: float) -> float:
        """Seconds until a prompt that came now would be begun, as will be: what nobody outside can know."""
        steps_s = max(0.0, self.began_s + (self.num_done_steps_max + 1) * self.step_s - now) if self._step else 0.0
        planned = {flight: num_tokens for flight, num_tokens in self._step}
        for flight in self.running:
            left = flight.remaining - planned.get(flight, 0)
            if left:
                steps_s += self._pace.prompt_s(flight.prompt.num_tokens - left, left, self._chunk_tokens)
        for flight in self.queue:
            found = max(self.cache.match(flight.prompt.segments), flight.pulled_blocks) * HASH_BLOCK_SIZE_TOKENS
            found = min(found, flight.prompt.num_tokens - 1)
            steps_s += self._pace.prompt_s(found, flight.prompt.num_tokens - found, self._chunk_tokens)
        return steps_s

    def _turn(self, now: float) -> None:
        """Steps are over: what is done goes, then the next are planned."""
        done: list[Flight] = []
        for flight, num_tokens in self._step:
            flight.remaining -= num_tokens
            if flight.remaining == 0:
                done.append(flight)
        for flight in done:
            self.running.remove(flight)
            self._store(flight, now)
        self._plan(now)
        for flight in done:
            self._driver.prefilled(flight, now)

    def _plan(self, now: float) -> None:
        self.before = self.waiting_at_begin - self.num_done_steps_max * self.step_tokens  # what the last report before these steps says
        self.before_at_s = self.began_s + self.num_done_steps_max * self.step_s
        left = self._chunk_tokens
        running, first = self.running, self.running[0] if self.running else None
        if first is None and self.queue and self.queue[0].ready_s <= now:
            first = self._begin(now)
        if first is None:
            self._step = []
            if self.queue:  # on its way
                self._began(self.queue[0].ready_s, 0.0, 1, 0)
                self._driver.call_at(self.queue[0].ready_s, self._turn)
            else:
                self._began(now, 0.0, 1, 0)
                self.is_busy = False
            return
        start = first.prompt.num_tokens - first.remaining
        if first.remaining >= left:
            num_steps = first.remaining // left
            took_s = self._pace.chunks_s(start, num_steps, left)
            self._step = [(first, num_steps * left)]
            first.step_s = took_s / num_steps
            self._began(now, took_s / num_steps, num_steps, left)
            num_tokens = num_steps * left
        else:
            num_steps, num_tokens, step, chunks = 1, 0, [], []
            for flight in running:
                size = min(flight.remaining, left)
                step.append((flight, size))
                chunks.append((flight.prompt.num_tokens - flight.remaining, size))
                left -= size
                num_tokens += size
            while left and self.queue and self.queue[0].ready_s <= now and len(running) < self._max_num_seqs:
                begun = self._begin(now)
                if begun is None:
                    break
                size = min(begun.remaining, left)
                step.append((begun, size))
                chunks.append((begun.prompt.num_tokens - begun.remaining, size))
                left -= size
                num_tokens += size
            took_s = self._pace.step_s(chunks)
            self._step = step
            for flight, _ in step:
                flight.step_s = took_s
            self._began(now, took_s, 1, num_tokens)
        tally = self.tally
        tally.num_steps += num_steps
        tally.prefill_tokens += num_tokens
        tally.busy_s += took_s
        self._driver.call_at(now + took_s, self._turn)

    def _begin(self, now: float) -> Flight | None:
        """The next of the queue, with what the cache has of it; None: there is no room for its blocks while others are under way."""
        flight, cache = self.queue[0], self.cache
        segments, num_tokens = flight.prompt.segments, flight.prompt.num_tokens
        num_blocks = -(-num_tokens // HASH_BLOCK_SIZE_TOKENS)
        found = max(cache.match(segments), flight.pulled_blocks)
        if self.running and num_blocks - found > cache.num_blocks - cache.num_reserved - self.num_pinned:
            return None
        self.queue.popleft()
        self.running.append(flight)
        cache.touch(segments)
        stored: list[Piece] = []
        evicted: list[Piece] = []
        if flight.pulled_blocks:
            stored, evicted = cache.store(segments, flight.pulled_blocks)
        flight.cached_tokens = min(found * HASH_BLOCK_SIZE_TOKENS, num_tokens - 1)
        flight.remaining = num_tokens - flight.cached_tokens
        flight.pinned, flight.num_reserved = found, num_blocks - found
        self.num_pinned += found
        evicted += cache.reserve(flight.num_reserved)
        if stored or evicted:
            self._driver.cache_changed(self.worker_id, stored, evicted, now)
        return flight

    def _store(self, flight: Flight, now: float) -> None:
        cache = self.cache
        cache.release(flight.num_reserved)
        self.num_pinned -= flight.pinned
        stored, evicted = cache.store(flight.prompt.segments)
        if stored or evicted:
            self._driver.cache_changed(self.worker_id, stored, evicted, now)

    def _began(self, at_s: float, step_s: float, num_steps: int, step_tokens: int) -> None:
        """Note what reports will say of these steps, and when they will tell of room."""
        waiting = sum([flight.remaining for flight in self.running])
        for flight in self.queue:
            if flight.ready_s <= at_s:
                waiting += flight.prompt.num_tokens
        self._begin_lag_s = self._step_lag_s
        self._step_lag_s = self._late_s if step_s >= self._interval_s else self._late_s + self._interval_s / 2
        self.began_s, self.step_s, self.step_tokens, self.num_done_steps_max = at_s, step_s or 1.0, step_tokens, num_steps - 1
        self.waiting_at_begin = waiting
        room = self._room_tokens
        if waiting < room:
            self._driver.room_at(at_s + self._begin_lag_s)
        elif step_tokens:
            num_until = (waiting - room) // step_tokens + 1
            if num_until < num_steps:
                self._driver.room_at(at_s + num_until * step_s + self._step_lag_s)


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
        "cache",
        "kv_tokens",
        "num_pinned",
        "num_running",
        "step",
        "tally",
        "worker_id",
    )

    def __init__(self, worker_id: WorkerId, *, driver: Driver, pace: Pace, num_blocks: int, chunk_tokens: int, max_num_seqs: int) -> None:
        self.worker_id = worker_id
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
        self.num_pinned = 0

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
        num_blocks = -(-prompt.num_tokens // HASH_BLOCK_SIZE_TOKENS)
        found = cache.match(prompt.segments)
        if self.num_running:
            left = cache.num_blocks - cache.num_reserved - self.num_pinned - (num_blocks - found)
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
        num_named = prompt.num_tokens // HASH_BLOCK_SIZE_TOKENS
        num_blocks = -(-(prompt.num_tokens + prompt.output_tokens) // HASH_BLOCK_SIZE_TOKENS)
        flight.num_reserved, flight.pinned = num_blocks - num_named, num_named
        self.num_pinned += num_named
        if evicted := cache.reserve(flight.num_reserved):  # perhaps of what is stored next: told before that
            self._driver.cache_changed(self.worker_id, [], evicted, now)
        stored, evicted = cache.store(prompt.segments)
        if stored or evicted:
            self._driver.cache_changed(self.worker_id, stored, evicted, now)

    def _let_go(self, flight: Flight) -> None:
        self.cache.release(flight.num_reserved)
        self.cache.touch(flight.prompt.segments)
        self.num_pinned -= flight.pinned

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
        flight.cached_tokens = min(found * HASH_BLOCK_SIZE_TOKENS, prompt.num_tokens - 1)
        missed = prompt.num_tokens - flight.cached_tokens
        cache.touch(prompt.segments)
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
