"""Whether one policy waits less than another: over replicates that both met, exact and without a distribution assumed.

    a pair of policies   the ratio of their figures in each replicate, its logarithm taken: Wilcoxon's signed ranks, exactly (no tables)
    the size of it       Hodges and Lehmann's estimate, the median of all means of two, with the interval that the same test gives
    many pairs           Holm's correction: at most 5 % that any pair is called different where none is

The unit is the replicate, never the request: requests of one run wait for each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from itertools import accumulate, combinations
from math import exp, log
from statistics import median

CONFIDENCE = 0.95
MIN_REPLICATES = 20  # for a verdict; fewer explore


class Better(Enum):
    LOWER = "lower"
    HIGHER = "higher"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """`first` over `second`: below 1 the first has the smaller figure."""

    first: str
    second: str
    ratio: float
    low: float  # of the interval, 95 % or more; the extremes where replicates are too few for one
    high: float
    p_value: float
    p_adjusted: float  # for all pairs compared

    @property
    def is_different(self) -> bool:
        return self.p_adjusted < 1 - CONFIDENCE

    @property
    def inverse(self) -> Comparison:
        """`second` over `first`."""
        return replace(self, first=self.second, second=self.first, ratio=1 / self.ratio, low=1 / self.high, high=1 / self.low)


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One line of a ranking."""

    policy: str
    figure: float  # median over replicates
    best_or_tied: bool  # nobody is better for certain
    beaten_by: tuple[str, ...]


def compare_all(figures: Mapping[str, Sequence[float]]) -> list[Comparison]:
    """Every pair once, in the order of `figures`: a policy's figure in each replicate, above 0.

    Raises:
        ValueError: policies that did not meet the same replicates.
    """
    if len({len(values) for values in figures.values()}) > 1:
        raise ValueError(f"replicates differ: { ({name: len(values) for name, values in figures.items()}) }")
    found = [compare_pair(a, figures[a], b, figures[b]) for a, b in combinations(figures, 2)]
    adjusted = holm([c.p_value for c in found])
    return [replace(c, p_adjusted=p) for c, p in zip(found, adjusted, strict=True)]


def compare_pair(first: str, mine: Sequence[float], second: str, theirs: Sequence[float]) -> Comparison:
    """As if no other pair were compared."""
    differences = [log(a / b) for a, b in zip(mine, theirs, strict=True)]
    estimate, low, high = signed_rank_interval(differences)
    p = signed_rank_p(differences)
    return Comparison(first=first, second=second, ratio=exp(estimate), low=exp(low), high=exp(high), p_value=p, p_adjusted=p)


def ranking(figures: Mapping[str, Sequence[float]], comparisons: Sequence[Comparison], better: Better) -> list[Standing]:
    """The best first."""
    beaten: dict[str, list[str]] = {name: [] for name in figures}
    for c in comparisons:
        if c.is_different:
            first_wins = (c.ratio < 1.0) == (better is Better.LOWER)
            loser, winner = (c.second, c.first) if first_wins else (c.first, c.second)
            beaten[loser].append(winner)
    rows = [
        Standing(policy=name, figure=median(values), best_or_tied=not beaten[name], beaten_by=tuple(beaten[name]))
        for name, values in figures.items()
    ]
    return sorted(rows, key=lambda row: row.figure, reverse=better is Better.HIGHER)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted for all of them together (Holm, 1979)."""
    count = len(p_values)
    order = sorted(range(count), key=p_values.__getitem__)
    steps = accumulate((min(1.0, (count - rank) * p_values[i]) for rank, i in enumerate(order)), max)
    adjusted = dict(zip(order, steps, strict=True))
    return [adjusted[i] for i in range(count)]


def signed_rank_p(differences: Sequence[float]) -> float:
    """Two-sided, exact: the chance of rank sums as uneven as these where each sign is a coin's. Zeros say nothing and are left out."""
    told = [d for d in differences if d]
    if not told:
        return 1.0
    ranks = _double_ranks([abs(d) for d in told])
    positive = sum(rank for rank, d in zip(ranks, told, strict=True) if d > 0)
    counts = _sum_counts(tuple(sorted(ranks)))
    total = 1 << len(told)
    at_most, at_least = sum(counts[: positive + 1]), sum(counts[positive:])
    return min(1.0, 2 * min(at_most, at_least) / total)


def signed_rank_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """(estimate, low, high) of the middle of the differences; low and high their extremes where there are too few for 95 %."""
    n = len(differences)
    means = sorted((differences[i] + differences[j]) / 2 for i in range(n) for j in range(i, n))
    tail, left_out = 0, 0  # of 2 ** n
    counts = _sum_counts(tuple(range(1, n + 1)))
    while left_out < len(means) // 2 and 2 * (tail + counts[left_out]) <= (1 - CONFIDENCE) * 2**n:
        tail += counts[left_out]
        left_out += 1
    return median(means), means[max(0, left_out - 1)], means[len(means) - max(1, left_out)]


def _double_ranks(sizes: Sequence[float]) -> list[int]:
    """Twice the rank of each, so that the mean rank of those that are equal is a whole number."""
    ordered = sorted(sizes)
    first = {size: i for i, size in reversed(list(enumerate(ordered)))}
    last = {size: i for i, size in enumerate(ordered)}
    return [first[size] + last[size] + 2 for size in sizes]


@lru_cache(maxsize=64)
def _sum_counts(ranks: tuple[int, ...]) -> list[int]:
    """counts[s]: of all choices among the ranks, how many sum to s."""
    counts = [1] + [0] * sum(ranks)
    reach = 0
    for rank in ranks:
        reach += rank
        for total in range(reach, rank - 1, -1):
            counts[total] += counts[total - rank]
    return counts
