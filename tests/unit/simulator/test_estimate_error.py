"""Reports that are wrong: times off by a factor and noise, everything else as it is."""

from __future__ import annotations

import itertools
import statistics

import pytest

from protocol.errors import ConfigError
from protocol.worker import Role, WorkerSnapshot
from simulator.estimate_error import ERROR_GRID, EXACT, EstimateError, ReportedTimes
from tests.unit.router.router_world import snapshot as router_snapshot

pytestmark = pytest.mark.pure


def snapshot(busy_us: int, pull_us: int = 0) -> WorkerSnapshot:
    return router_snapshot("w", Role.PREFILL, counters={"busy_us": busy_us, "prefix_pull_us": pull_us, "steps": 7})


def test_counters_of_time_grow_by_so_much_more_and_others_are_left() -> None:
    """Seen to fail with steps doubled too."""
    times = ReportedTimes(EstimateError(factor=2.0), seed=0, worker_id="w")
    for true in (100, 250, 250, 1000):
        told = times.told(snapshot(true, 3 * true))
        assert told.counters == {"busy_us": 2 * true, "prefix_pull_us": 6 * true, "steps": 7}
        assert told.step_time_ewma_s == 2 * snapshot(true).step_time_ewma_s


def test_noise_is_on_what_was_added_since_the_last_report() -> None:
    """1,000 reports of 10 ms each: they never fall, scatter as asked, and keep the mean. Seen to fail with the whole counter multiplied."""
    times = ReportedTimes(EstimateError(sigma=0.3), seed=0, worker_id="w")
    told = [0] + [times.told(snapshot(10_000 * n)).counters["busy_us"] for n in range(1, 1001)]
    grown = [b - a for a, b in itertools.pairwise(told)]
    assert min(grown) > 0
    assert statistics.fmean(grown) == pytest.approx(10_000, rel=4 * 0.31 / 1000**0.5)
    assert statistics.stdev(grown) == pytest.approx(3069, rel=0.15)  # 10,000 * sqrt(exp(0.3^2) - 1)


def test_exact_reports_are_the_snapshots_themselves() -> None:
    one = snapshot(5)
    assert ReportedTimes(EXACT, seed=0, worker_id="w").told(one) is one
    assert EXACT in ERROR_GRID and len(set(ERROR_GRID)) == 9


@pytest.mark.parametrize("wrong", [{"factor": 0.0}, {"factor": float("nan")}, {"sigma": -0.1}])
def test_an_error_that_is_none_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        EstimateError(**wrong)
