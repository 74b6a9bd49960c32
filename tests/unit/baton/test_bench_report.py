"""What every benchmark prints, and the one definition of who is ahead."""

from __future__ import annotations

import json
import random
import statistics

import pytest

from baton.bench.report import Row, Target, Verdict, make_document, median_interval, paired_ratio, percentile
from simulator.verdict import Better

pytestmark = pytest.mark.pure


def test_nine_pairs_take_the_second_of_each_end() -> None:
    """Conover's table of order statistics: n = 9 gives ranks 2 and 8 with 96.1 %. Seen to fail with `depth = 1` to begin with."""
    low, high, confidence = median_interval([9, 1, 8, 2, 7, 3, 6, 4, 5])
    assert (low, high) == (2, 8)
    assert confidence == pytest.approx(0.9609, abs=1e-4)


@pytest.mark.parametrize(("n", "depth"), [(6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (25, 7)])
def test_interval_is_the_tightest_with_its_confidence(n: int, depth: int) -> None:
    low, high, confidence = median_interval(list(range(n)))
    assert (low, high) == (depth, n - 1 - depth)
    assert confidence >= 0.95


def test_interval_holds_the_median_as_often_as_it_says() -> None:
    """2,000 draws of 9 from a skewed distribution whose median is known."""
    rng = random.Random(3)
    median = statistics.median(rng.lognormvariate(0, 1) for _ in range(100_000))
    held = 0
    for _ in range(2000):
        low, high, _ = median_interval([rng.lognormvariate(0, 1) for _ in range(9)])
        held += low <= median <= high
    assert 0.94 <= held / 2000 <= 0.98


@pytest.mark.parametrize(
    ("ours", "theirs", "better", "verdict"),
    [
        ([2.0] * 9, [1.0] * 9, Better.HIGHER, Verdict.WINS),
        ([2.0] * 9, [1.0] * 9, Better.LOWER, Verdict.LOSES),
        ([1.0] * 9, [2.0] * 9, Better.LOWER, Verdict.WINS),
        ([1.1, 0.9] * 5, [1.0] * 10, Better.HIGHER, Verdict.TIED),
        ([1.0] * 9, [1.0] * 9, Better.HIGHER, Verdict.TIED),
        ([2.0] * 5, [1.0] * 5, Better.HIGHER, Verdict.UNDECIDED),
    ],
)
def test_verdict_follows_from_the_interval(ours: list[float], theirs: list[float], better: str, verdict: Verdict) -> None:
    """Above 1 is ahead whichever way the unit counts. Seen to fail with the two sides of "lower" exchanged."""
    assert paired_ratio(ours, theirs, better).verdict is verdict  # type: ignore[arg-type]


def test_pairs_stay_pairs() -> None:
    """A round in which the whole machine was slow moves no ratio. Seen to fail with both sides sorted first."""
    paired = paired_ratio([10, 1, 10, 1, 10, 1], [5, 0.5, 5, 0.5, 5, 0.5], Better.HIGHER)
    assert set(paired.ratios) == {2.0}


@pytest.mark.parametrize(("share", "value"), [(0.0, 1.0), (0.5, 3.0), (0.75, 4.0), (0.99, 4.96), (1.0, 5.0)])
def test_percentile_lies_between_neighbours(share: float, value: float) -> None:
    assert percentile([5, 4, 3, 2, 1], share) == pytest.approx(value)


def test_document_says_machine_commit_seed_and_whether_each_target_is_met() -> None:
    """A figure that was demanded and not measured is not well. Seen to fail with `ok` None where the value is None."""
    rows = [
        Row(name="a", value=1.2, unit="ratio", target=Target(relation=">=", bound=1.15)),
        Row(name="b", value=410.0, unit="MB", target=Target(relation="<=", bound=400)),
        Row(name="c", value=None, unit="ms", target=Target(relation="<=", bound=1), details={"reason": "it crashed"}),
        Row(name="d", value=3.0, unit="ms"),
        Row(name="e", value=3.0, unit="ms", target=Target(relation="<=", bound=9), is_decided=False),
    ]
    document = json.loads(json.dumps(make_document("baton.bench.test.v1", seed=7, rows=rows, sections={"rounds": 9})))
    assert list(document)[:5] == ["schema", "machine", "commit", "seed", "rows"]
    assert document["schema"] == "baton.bench.test.v1" and document["seed"] == 7 and document["rounds"] == 9
    assert [row["ok"] for row in document["rows"]] == [True, False, False, None, None]
    assert [row["target"] for row in document["rows"]] == [">= 1.15", "<= 400", "<= 1", None, "<= 9"]
    assert document["rows"][2]["reason"] == "it crashed"
    assert document["machine"]["num_cores"] >= 1 and document["machine"]["cpu"]
