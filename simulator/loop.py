"""The virtual clock: events in order of time, ties in order of scheduling, so that a seed is a run."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True, order=True)
class Timer:
    """A call that will be made, unless cancelled."""

    when_s: float
    number: int
    call: Callable[[], None] | None = field(compare=False)

    def cancel(self) -> None:
        self.call = None


class VirtualLoop:
    """Time moves only from call to call."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[Timer] = []
        self._num_scheduled = 0

    def call_at(self, when_s: float, call: Callable[[], None]) -> Timer:
        assert when_s >= self.now, f"{when_s} lies before {self.now}"
        timer = Timer(when_s, self._num_scheduled, call)
        self._num_scheduled += 1
        heapq.heappush(self._timers, timer)
        return timer

    def call_later(self, delay_s: float, call: Callable[[], None]) -> Timer:
        return self.call_at(self.now + delay_s, call)

    @property
    def next_s(self) -> float:
        """When the next call is due; infinity when none is."""
        while self._timers and self._timers[0].call is None:
            heapq.heappop(self._timers)
        return self._timers[0].when_s if self._timers else float("inf")

    def run(self, until: Callable[[], bool], *, deadline_s: float) -> bool:
        """Make calls until `until()` holds: True. False when nothing is left to call, or not before `deadline_s`."""
        while not until():
            if self.next_s > deadline_s:
                return False
            timer = heapq.heappop(self._timers)
            self.now = timer.when_s
            call, timer.call = timer.call, None
            assert call is not None
            call()
        return True
