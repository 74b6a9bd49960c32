"""A counter-based random number: a function of its name, with no state. Torch-free.

Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11).
"""

from __future__ import annotations

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_MASK = 0xFFFFFFFF


def uniform(*, seed: int, choice: int, position: int) -> float:
    """The number in [0, 1) that draws output token `position` of `choice`, with 53 random bits.

    Equal arguments give equal numbers on every worker and every try; `seed` counts modulo 2**64.
    """
    word0, word1, _, _ = philox4x32((position & _MASK, choice & _MASK, 0, 0), (seed & _MASK, seed >> 32 & _MASK))
    return float(((word0 << 32 | word1) >> 11) * 2.0**-53)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words of `counter` under `key`."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        product0, product1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (product1 >> 32) ^ c1 ^ k0, product1 & _MASK, (product0 >> 32) ^ c3 ^ k1, product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3
