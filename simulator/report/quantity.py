"""Figures as they are read: a unit that suits a whole column, as many decimals for all of it, and the exact value behind what is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import floor, inf, isfinite, isnan, log10

from simulator.report.markup import Markup, element

NOTHING, BOUNDLESS = "–", "∞"
DECIMALS_MAX = 3
SECONDS = (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6))


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """How the figures of one column are written: value / `size` with `decimals`, then `unit`."""

    unit: str
    size: float
    decimals: int

    @classmethod
    def of(cls, unit: str, values: Iterable[float]) -> Column:
        """Seconds become milliseconds where all are below one, shares become percent; the smallest keeps three digits where it can."""
        told = [abs(value) for value in values if isfinite(value) and value]
        largest, smallest = max(told, default=1.0), min(told, default=1.0)
        if unit == "s":
            name, size = next((pair for pair in SECONDS if largest >= pair[1]), SECONDS[-1])
        elif unit == "share":
            return cls(unit="%", size=0.01, decimals=1)
        else:
            name, size = unit, 1.0
        return cls(unit=name, size=size, decimals=max(0, min(DECIMALS_MAX, 2 - floor(log10(smallest / size)))))

    def text(self, value: float) -> str:
        """Without the unit."""
        return _written(value / self.size, self.decimals)

    def said(self, value: float) -> str:
        return f"{self.text(value)} {self.unit}" if isfinite(value) else self.text(value)

    def shown(self, value: float, *, with_unit: bool = False) -> Markup:
        return exact(value, self.said(value) if with_unit else self.text(value))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratios:
    """How ratios of one column are written."""

    decimals: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Ratios:
        """A third decimal where all of them lie within a tenth of 1."""
        return cls(decimals=3 if all(0.9 <= value <= 1.1 for value in values if isfinite(value)) else 2)

    def text(self, value: float) -> str:
        return _written(value, self.decimals if abs(value) < 10 else 1)

    def shown(self, value: float) -> Markup:
        return exact(value, self.text(value))


def exact(value: float, text: str) -> Markup:
    """`text` with the value it was rounded from behind it, for a program that reads the page."""
    return element("data", text, value=repr(value))


def count(value: int) -> Markup:
    return element("data", f"{value:,}", value=str(value))


def short(value: float) -> Markup:
    return exact(value, short_text(value))


def short_text(value: float) -> str:
    """Two digits that count."""
    return f"{value:.2g}" if isfinite(value) else _written(value, 0)


def _written(value: float, decimals: int) -> str:
    if isnan(value):
        return NOTHING
    if not isfinite(value):
        return BOUNDLESS if value == inf else f"-{BOUNDLESS}"
    return f"{value:,.{decimals}f}"


__all__ = ["Column", "Ratios", "count", "exact", "short", "short_text"]
