"""Sums over the last minutes whose cost does not grow with what was summed.

The window moves in steps: what falls into one step is one entry, so a sum over 100,000 requests and one over ten take the same
memory and time. Values are integers, so that taking out what was put in comes back to exactly zero.

    steps    17     18     20     21             (19: nothing came)
            [3,a]  [1,b]  [7,c]  [2,d]           totals [13, a + b + c + d]
             └ leaves as a whole when the window has passed it
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

NUM_STEPS = 32  # of a window: what is summed is between 31/32 of it and all of it old

State = list[tuple[int, list[int]]]


class SlidingSums:
    """Sums of vectors of one width. `step` is the time in steps and never goes back."""

    __slots__ = ("_steps", "_totals")

    def __init__(self, width: int) -> None:
        self._steps: deque[tuple[int, list[int]]] = deque()
        self._totals = [0] * width

    def add(self, step: int, *values: int) -> None:
        self.expire(step)
        if not self._steps or self._steps[-1][0] != step:
            self._steps.append((step, [0] * len(self._totals)))
        sums, totals = self._steps[-1][1], self._totals
        for i, value in enumerate(values):
            sums[i] += value
            totals[i] += value

    def at(self, step: int) -> Sequence[int]:
        """Sums of the window that ends with `step`; changes nothing."""
        oldest = step - NUM_STEPS + 1
        if not self._steps or self._steps[0][0] >= oldest:
            return self._totals
        return self.between(oldest, step)

    def between(self, first: int, last: int) -> Sequence[int]:
        """Sums of the steps from `first` to `last`, both included."""
        totals = [0] * len(self._totals)
        for step, sums in self._steps:
            if first <= step <= last:
                totals = [t + s for t, s in zip(totals, sums, strict=True)]
        return totals

    def expire(self, step: int) -> None:
        """Forget what the window that ends with `step` does not hold."""
        while self._steps and self._steps[0][0] <= step - NUM_STEPS:
            _, sums = self._steps.popleft()
            self._totals = [t - s for t, s in zip(self._totals, sums, strict=True)]

    def absorb(self, other: SlidingSums, sign: int = 1) -> None:
        """Add all that `other` holds, or take it out again; both expired to the same step."""
        mine = dict(self._steps)
        for step, sums in other._steps:
            mine[step] = [m + sign * s for m, s in zip(mine.get(step, [0] * len(sums)), sums, strict=True)]
        self._restore(sorted(mine.items()))

    def copy(self) -> SlidingSums:
        return SlidingSums.of_state(len(self._totals), self.state())

    @property
    def is_empty(self) -> bool:
        return not self._steps

    def state(self) -> State:
        """As JSON can hold it; `of_state` makes the same sums of it."""
        return [(step, list(sums)) for step, sums in self._steps]

    @classmethod
    def of_state(cls, width: int, state: State) -> SlidingSums:
        made = cls(width)
        made._restore((step, list(sums)) for step, sums in state)
        return made

    def _restore(self, steps: Iterable[tuple[int, list[int]]]) -> None:
        self._steps = deque((step, sums) for step, sums in steps if any(sums))
        width = len(self._totals)
        self._totals = [sum(sums[i] for _, sums in self._steps) for i in range(width)]
