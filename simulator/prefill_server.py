"""A prefill worker of the fast simulation: steps of at most `chunk_tokens`, prompts first come, first served, as the scheduler plans them.

    leap    all steps that the first prompt fills alone: one event, whatever arrives meanwhile
    step    its rest, and those behind it as far as they fit: one event

Reports of it are worked out when somebody asks: what was true when the last step ended whose report has come by then.
"""

from __future__ import annotations

from collections import deque

from protocol.worker import WorkerId
from simulator.analytic_pace import Pace
from simulator.analytic_worker import Driver, Flight, PromptServer
from simulator.noise import Lognormal

_NEVER = float("-inf")
_FOREVER = float("inf")


class PrefillServer(PromptServer):
    """Computes prompts, each in the order of arrival; its KV stays in the cache when it is done."""

    __slots__ = (
        "_begin_lag_s",
        "_interval_s",
        "_late_s",
        "_noise",
        "_room_tokens",
        "_step",
        "_step_lag_s",
        "before",
        "before_at_s",
        "began_s",
        "is_busy",
        "num_done_steps_max",
        "queue",
        "running",
        "step_s",
        "step_tokens",
        "waiting_at_begin",
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
        room_tokens: int,
        late_s: float,
        interval_s: float,
        noise: Lognormal | None = None,
    ) -> None:
        """room_tokens: below so many that wait, whoever places is told (`Driver.room_at`).
        late_s: how long a report is on its way; interval_s: between two reports at least, so that many a short step tells nothing.
        """
        super().__init__(
            worker_id,
            driver=driver,
            pace=pace,
            num_blocks=num_blocks,
            block_tokens=block_tokens,
            chunk_tokens=chunk_tokens,
            max_num_seqs=max_num_seqs,
        )
        self._room_tokens = room_tokens
        self._noise = noise
        self._late_s = late_s
        self._interval_s = interval_s
        self.queue: deque[Flight] = deque()
        self.running: deque[Flight] = deque()  # begun and not done, in order
        self._step: list[tuple[Flight, int]] = []  # chunks of the step, or steps, under way
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
            found = max(self.cache.match(flight.prompt.segments), flight.pulled_blocks) * self.block_tokens
            found = min(found, flight.prompt.num_tokens - 1)
            steps_s += self._pace.prompt_s(found, flight.prompt.num_tokens - found, self._chunk_tokens)
        return steps_s

    def _turn(self, now: float) -> None:
        """Steps are over: what is done goes, then the next are planned."""
        done = [flight for flight, num_tokens in self._step if self._keep(flight, num_tokens, now)]
        for flight in done:
            self.running.remove(flight)
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
            took_s = self._noisy_s(self._pace.chunks_s(start, num_steps, left), num_steps)
            self._step = [(first, num_steps * left)]
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
            took_s = self._noisy_s(self._pace.step_s(chunks), 1)
            self._step = step
            self._began(now, took_s, 1, num_tokens)
        tally = self.tally
        tally.num_steps += num_steps
        tally.prefill_tokens += num_tokens
        tally.busy_s += took_s
        self._driver.call_at(now + took_s, self._turn)

    def _noisy_s(self, took_s: float, num_steps: int) -> float:
        if self._noise is None:
            return took_s
        first = int(self.tally.num_steps)
        return took_s * sum(self._noise.factor(number) for number in range(first, first + num_steps)) / num_steps

    def _begin(self, now: float) -> Flight | None:
        """The next of the queue; None: there is no room for its blocks while others are under way."""
        flight = self.queue[0]
        if not self._take(flight, now, is_busy=bool(self.running)):
            return None
        self.queue.popleft()
        self.running.append(flight)
        return flight

    def _began(self, at_s: float, step_s: float, num_steps: int, step_tokens: int) -> None:
        """Note what reports will say of these steps, and when they will tell of room."""
        waiting = 0
        for flight in self.running:
            waiting += flight.remaining
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
