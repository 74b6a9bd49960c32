"""The knee lies where attainment crosses the target, and is told within its precision from below."""

from __future__ import annotations

import pytest

from simulator.knee import find_knee

pytestmark = pytest.mark.pure


@pytest.mark.parametrize("guess", [0.01, 6.9, 7.0, 7.1, 500.0])
def test_it_is_found_from_any_guess(guess: float) -> None:
    """Of a cluster that is late beyond 7 requests/s. Seen to fail with the interval kept on the wrong side."""
    asked: list[float] = []

    def attainment(rate: float) -> float:
        asked.append(rate)
        return 1.0 if rate <= 7.0 else 0.2

    found = find_knee(attainment, guess_per_s=guess)
    assert 7.0 / 1.05 <= found <= 7.0 and found in asked
    assert len(asked) < 25


def test_one_that_is_never_met_is_said_so() -> None:
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="lies nowhere near"):
            find_knee(lambda _, share=share: share, guess_per_s=1.0)  # type: ignore[misc]
