"""The knee of a cluster under a workload: the highest rate at which a policy still serves most requests in time.

Beyond it queues grow without end and every policy is late; far below it none is. Where policies are compared is near it.
"""

from __future__ import annotations

from collections.abc import Callable

TARGET = 0.9  # of requests in time
PRECISION = 0.05  # of the rate
MAX_DOUBLINGS = 30


def find_knee(attainment: Callable[[float], float], *, guess_per_s: float, target: float = TARGET, precision: float = PRECISION) -> float:
    """Requests a second, rounded down to within `precision`; `attainment(rate)`: the share served in time, falling with the rate.

    By doubling from a guess, then halving the logarithm of the interval (bisection as in DistServe's search, OSDI'24, section 4).

    Raises:
        ValueError: no rate within 2 ** MAX_DOUBLINGS of the guess has it on both sides.
    """
    is_met = attainment(guess_per_s) >= target
    low = high = guess_per_s
    for _ in range(MAX_DOUBLINGS):
        if is_met:
            low, high = high, high * 2
        else:
            low, high = low / 2, low
        if (attainment(high if is_met else low) >= target) != is_met:
            break
    else:
        raise ValueError(
            f"an attainment of {target:g} lies nowhere near {guess_per_s:g} requests/s; the last looked at was {low:g} to {high:g}"
        )
    while high > low * (1 + precision):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if attainment(middle) >= target else (low, middle)
    return low


__all__ = ["PRECISION", "TARGET", "find_knee"]
