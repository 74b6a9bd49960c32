"""Noise that is a function of its place: the factor of the n-th draw under a key, however many were asked for before and in which order.

So a simulation that takes several steps at once, or sends a report less, meets the same noise as one that does not.
"""

from __future__ import annotations

from math import exp
from statistics import NormalDist

import xxhash

_STANDARD = NormalDist()


class Lognormal:
    """Factors with mean 1 whose logarithms have the deviation `sigma`."""

    def __init__(self, *key: str | int, sigma: float) -> None:
        """key: whose factors they are, the seed first."""
        assert sigma >= 0.0
        self._seed = xxhash.xxh3_64_intdigest("/".join(map(str, key)).encode())
        self._sigma = sigma
        self._shift = -sigma * sigma / 2  # exp(sigma * z) alone has the mean exp(sigma^2 / 2)

    def factor(self, number: int) -> float:
        if not self._sigma:
            return 1.0
        digest = xxhash.xxh3_64_intdigest(number.to_bytes(8, "little"), seed=self._seed)
        uniform = ((digest >> 12) + 0.5) / (1 << 52)  # 52 bits: neither 0 nor 1 after rounding
        return exp(self._sigma * _STANDARD.inv_cdf(uniform) + self._shift)
