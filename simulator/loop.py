"""The virtual clock: events in order of time, ties in order of scheduling, so that a seed is a run."""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Timer:
    """A call that will be made, unless cancelled."""

    __slots__ = ("call", "when_s")

    def __init__(self, when_s: float, call: Callable[[], None]) -> None:
        self.when_s = when_s
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        self.call = None


class VirtualLoop:
    """Time moves only from call to call."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, int, Timer]] = []  # tuples: they are compared in C
        self._num_scheduled = 0

    def call_at(self, when_s: float, call: Callable[[], None]) -> Timer:
        assert when_s >= self.now, f"{when_s} lies before {self.now}"
        timer = Timer(when_s, call)
        self._num_scheduled += 1
        heapq.heappush(self._timers, (when_s, self._num_scheduled, timer))
        return timer

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        return self.call_at(self.now + delay_s, call)

    @property
    def next_s(self) -> float:
        """When the next call is due; infinity when none is."""
        timers = self._timers
        while timers and timers[0][2].call is None:
            heapq.heappop(timers)
        return timers[0][0] if timers else float("inf")

    def run(self, until: Callable[[], bool], *, deadline_s: float) -> bool:
        """Make calls until `until()` holds: True. False when nothing is left to call, or not before `deadline_s`."""
        while not until():
            if self.next_s > deadline_s:
                return False
            when_s, _, timer = heapq.heappop(self._timers)
            self.now = when_s
            call, timer.call = timer.call, None
            assert call is not None
            call()
        return True
