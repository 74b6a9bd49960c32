"""Exact signed ranks, their interval, Holm's correction, and what a ranking says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.verdict import Better, compare_all, holm, ranking, signed_rank_interval, signed_rank_p

pytestmark = pytest.mark.pure


def naive_p(differences: Sequence[float]) -> float:
    """By trying all signs."""
    told = [d for d in differences if d]
    sizes = [abs(d) for d in told]
    ranks = [sum(other < size for other in sizes) + (sum(other == size for other in sizes) + 1) / 2 for size in sizes]
    found = sum(r for r, d in zip(ranks, told, strict=True) if d > 0)
    sums = [sum(r for r, sign in zip(ranks, signs, strict=True) if sign) for signs in product((0, 1), repeat=len(told))]
    return min(1.0, 2 * min(sum(s <= found for s in sums), sum(s >= found for s in sums)) / len(sums))


@given(st.lists(st.integers(-6, 6).map(float), max_size=9))
def test_p_is_that_of_trying_all_signs(differences: list[float]) -> None:
    """Ties and zeros included. Seen to fail with ranks of equal sizes in the order they stand, and with one tail only."""
    assert signed_rank_p(differences) == pytest.approx(naive_p(differences))


def test_known_values() -> None:
    """Five of one sign are not enough, six are; of 20, rank sums up to 52 are below 5 % (Wilcoxon's table)."""
    assert signed_rank_p([1.0, 2, 3, 4, 5]) == 2 / 32 and signed_rank_p([1.0, 2, 3, 4, 5, 6]) == 2 / 64
    with_sum_52, with_sum_53 = ({10, 12, 14, 16}, {10, 13, 14, 16})
    for negative, is_below in ((with_sum_52, True), (with_sum_53, False)):
        p = signed_rank_p([-float(i) if i in negative else float(i) for i in range(1, 21)])
        assert (p <= 0.05) == is_below, p


@given(st.lists(st.floats(-2, 2).filter(lambda d: abs(d) > 1e-6), min_size=6, max_size=14, unique_by=abs))
def test_the_interval_leaves_out_zero_exactly_where_the_test_does(differences: list[float]) -> None:
    """Seen to fail with one mean more left out on either side."""
    estimate, low, high = signed_rank_interval(differences)
    assert low <= estimate <= high
    if signed_rank_p(differences) < 0.05:
        assert low > 0 or high < 0 or min(abs(low), abs(high)) < 1e-9
    else:
        assert low <= 0 <= high


def test_few_replicates_have_their_extremes_for_an_interval() -> None:
    assert signed_rank_interval([1.0, 2.0, 4.0]) == (2.25, 1.0, 4.0)


def test_holm() -> None:
    """The worked example of the paper's procedure. Seen to fail without the running maximum."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_ranking_names_who_is_beaten_and_by_whom() -> None:
    """Seen to fail with lower and higher exchanged."""
    rng = Random(1)
    noise = [rng.uniform(0.8, 1.2) for _ in range(20)]
    figures = {
        "slow": [2.0 * x for x in noise],
        "good": [x * (0.99 + 0.02 * (i % 2)) for i, x in enumerate(noise)],
        "twin": [x * (1.01 - 0.02 * (i % 2)) for i, x in enumerate(noise)],
    }
    comparisons = compare_all(figures)
    rows = ranking(figures, comparisons, Better.LOWER)
    assert {row.policy: row.best_or_tied for row in rows} == {"good": True, "twin": True, "slow": False}
    assert rows[-1].policy == "slow" and set(rows[-1].beaten_by) == {"good", "twin"}
    (slow_good,) = [c for c in comparisons if (c.first, c.second) == ("slow", "good")]
    assert 1.9 < slow_good.low < slow_good.ratio < slow_good.high < 2.1
    assert ranking(figures, comparisons, Better.HIGHER)[0].policy == "slow"
    with pytest.raises(ValueError, match="replicates differ"):
        compare_all({"a": [1.0], "b": [1.0, 2.0]})


def test_one_policy_under_two_names_is_rarely_called_different() -> None:
    """A/A: over 400 pairs of 20 noisy replicates at most 7 %. Seen to fail with p halved."""
    rng = Random(2)
    wrong = 0
    for _ in range(400):
        base = [rng.lognormvariate(0.0, 0.5) for _ in range(20)]
        figures = {name: [x * rng.lognormvariate(0.0, 0.1) for x in base] for name in ("a", "b")}
        wrong += compare_all(figures)[0].is_different
    assert wrong <= 28, wrong
