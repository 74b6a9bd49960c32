"""Closed forms of waiting give the figures worked out by hand from DistServe's section 3.1."""

from __future__ import annotations

import pytest

from simulator.queueing import ttft_replicas_s, ttft_single_s, ttft_two_ranks_s, ttft_two_stages_s

pytestmark = pytest.mark.pure


@pytest.mark.parametrize(
    ("rate_per_s", "single_s", "stages_s", "ranks_s"),
    [
        (2.0, 0.11250, 0.10278, 0.06275),
        (5.0, 0.15000, 0.10833, 0.07108),
        (8.0, 0.30000, 0.11667, 0.08497),
        (9.5, 1.05000, 0.12262, 0.09608),
    ],
)
def test_closed_forms_give_their_golden_figures(rate_per_s: float, single_s: float, stages_s: float, ranks_s: float) -> None:
    """Of 0.1 s, and a speed-up of 1.7. Seen to fail with K for K^2 in the waiting of two ranks."""
    assert ttft_single_s(rate_per_s, 0.1) == pytest.approx(single_s, abs=6e-6)
    assert ttft_two_stages_s(rate_per_s, 0.1) == pytest.approx(stages_s, abs=6e-6)
    assert ttft_two_ranks_s(rate_per_s, 0.1, 1.7) == pytest.approx(ranks_s, abs=6e-6)
    assert ttft_replicas_s(4 * rate_per_s, 0.1, 4) == pytest.approx(single_s, abs=6e-6)


@pytest.mark.parametrize(("speed_up", "load"), [(1.3, 0.61), (1.5, 0.94), (1.7, 1.26), (1.9, 1.63)])
def test_a_pipeline_overtakes_two_ranks_at_the_load_it_should(speed_up: float, load: float) -> None:
    below, above = (10.0 * (load + change) for change in (-0.01, 0.01))
    assert ttft_two_stages_s(below, 0.1) > ttft_two_ranks_s(below, 0.1, speed_up)
    assert ttft_two_stages_s(above, 0.1) < ttft_two_ranks_s(above, 0.1, speed_up)


def test_a_load_that_is_never_served_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a load of 1, the limit is 1; lower the rate"):
        ttft_single_s(10.0, 0.1)
    assert ttft_two_stages_s(10.0, 0.1) == pytest.approx(0.125)
