"""Axes: where a value lies, and at which round numbers the ticks are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, floor, isfinite, log, log10

STEPS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # each divides 1, so that 1 is among the ticks
MANTISSAS = ((1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0), (1.0, 3.0), (1.0,))
MAX_TICKS = 40  # more than any axis shows


@dataclass(frozen=True, slots=True, kw_only=True)
class LogScale:
    """From `low` to `high`, both above 0."""

    low: float
    high: float

    def __post_init__(self) -> None:
        assert 0 < self.low < self.high, (self.low, self.high)

    @classmethod
    def around(cls, values: Iterable[float], *, widest: float, margin: float = 0.06) -> LogScale:
        """Holds all values that can be drawn, but never reaches further than `widest` times 1 either way, and leaves a margin."""
        told = [min(max(value, 1 / widest), widest) for value in values if isfinite(value) and value > 0]
        low, high = log(min(told, default=1.0)), log(max(told, default=1.0))
        span = max(high - low, log(1.05))
        return cls.of(low - margin * span, high + margin * span)

    @classmethod
    def of(cls, low: float, high: float) -> LogScale:
        """Between two logarithms."""
        return cls(low=2.718281828459045**low, high=2.718281828459045**high)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high end."""
        return (log(value) - log(self.low)) / (log(self.high) - log(self.low))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def ticks(self, gap: float) -> list[float]:
        """As many round numbers as stand at least `gap` of the axis apart."""
        best: list[float] = []
        for ticks in self._families():
            if len(ticks) > len(best) and all(self.place(b) - self.place(a) >= gap for a, b in pairwise(ticks)):
                best = ticks
        return best

    def _families(self) -> Iterator[list[float]]:
        for step in STEPS:
            first, last = ceil(self.low / step), floor(self.high / step)
            if last - first < MAX_TICKS:
                yield [round(k * step, 6) for k in range(first, last + 1)]
        decades = range(floor(log10(self.low)), ceil(log10(self.high)) + 1)
        for mantissas in MANTISSAS:
            told = [float(f"{mantissa}e{decade}") for decade in decades for mantissa in mantissas]
            yield [tick for tick in told if self.holds(tick)]


def linear_ticks(high: float, most: int) -> list[float]:
    """Round numbers from 0 up to `high`, at most so many and more than half of that."""
    rough = high / max(1, most - 1)
    decade = 10.0 ** floor(log10(rough))
    step = next(mantissa * decade for mantissa in (1, 2, 2.5, 5, 10) if mantissa * decade >= rough * (1 - 1e-9))
    return [round(k * step, 9) for k in range(floor(high / step * (1 + 1e-9)) + 1)]


__all__ = ["LogScale", "linear_ticks"]
