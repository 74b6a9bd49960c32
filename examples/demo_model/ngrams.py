"""Five-gram models the network has to beat: interpolated, modified Kneser-Ney, over bytes or over the network's own tokens.

Chen & Goodman, "An Empirical Study of Smoothing Techniques for Language Modeling" (1999), Sec. 3: raw counts for the longest
n-grams, continuation counts for shorter ones, three discounts a length. An n-gram is one uint64, so symbols are below 2**12.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ORDER = 5
SYMBOL_BITS = 12  # 5 x 12 fit into 64

Keys = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Level:
    """The n-grams of one length: sorted keys with what each takes of its context's mass, and what the contexts leave."""

    keys: Keys
    shares: npt.NDArray[np.float64]  # (count - discount) / count of the context
    contexts: Keys
    left: npt.NDArray[np.float64]  # for the next shorter length


class KneserNey:
    """A 5-gram model of symbols in [0, vocab_size)."""

    def __init__(self, row: npt.NDArray[np.int64], vocab_size: int) -> None:
        """row: the training symbols, documents behind one another with a symbol of its own after each."""
        assert vocab_size <= 1 << SYMBOL_BITS, vocab_size
        self._vocab_size = vocab_size
        keys, counts = np.unique(_ngrams(row), return_counts=True)
        levels = [_level(keys, counts)]
        for length in range(ORDER - 1, 0, -1):
            keys, counts = np.unique(_last(keys, length), return_counts=True)  # behind how many different symbols each was seen
            levels.append(_level(keys, counts))
        self._shortest_first = levels[::-1]

    def bits(self, row: npt.NDArray[np.int64]) -> float:
        """-log2 of the probability of row[ORDER - 1:], each symbol after the ORDER - 1 before it."""
        ngrams = _ngrams(row)
        probabilities = np.full(len(ngrams), 1.0 / self._vocab_size)
        for length, level in enumerate(self._shortest_first, start=1):
            keys = _last(ngrams, length)
            share = _look_up(level.keys, level.shares, keys, absent=0.0)
            probabilities = share + probabilities * _look_up(level.contexts, level.left, _contexts(keys), absent=1.0)
        return float(-np.log2(probabilities).sum())


def _ngrams(row: npt.NDArray[np.int64]) -> Keys:
    """Every ORDER neighbours as one key, the newest symbol in the lowest bits."""
    symbols = row.astype(np.uint64)
    keys = np.zeros(len(row) - ORDER + 1, dtype=np.uint64)
    for at in range(ORDER):
        keys = (keys << np.uint64(SYMBOL_BITS)) | symbols[at : at + len(keys)]
    return keys


def _last(keys: Keys, length: int) -> Keys:
    return keys & np.uint64((1 << (SYMBOL_BITS * length)) - 1)


def _contexts(keys: Keys) -> Keys:
    return keys >> np.uint64(SYMBOL_BITS)


def _level(keys: Keys, counts: npt.NDArray[np.int64]) -> _Level:
    taken = _discounts(counts)[np.minimum(counts, 3)]
    contexts, at = np.unique(_contexts(keys), return_inverse=True)
    totals = np.bincount(at, weights=counts)
    return _Level(keys=keys, shares=(counts - taken) / totals[at], contexts=contexts, left=np.bincount(at, weights=taken) / totals)


def _discounts(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """What is taken off a count of 0, 1, 2, and 3 or more (Chen & Goodman, Eq. 17)."""
    n1, n2, n3, n4 = (max(1, int((counts == c).sum())) for c in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2)
    raw = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    return np.asarray(np.clip(raw, [0.0, 0.1, 0.1, 0.1], [0.0, 0.99, 1.99, 2.99]), dtype=np.float64)  # little data says odd things


def _look_up(keys: Keys, values: npt.NDArray[np.float64], wanted: Keys, *, absent: float) -> npt.NDArray[np.float64]:
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    found: npt.NDArray[np.float64] = np.where(keys[at] == wanted, values[at], absent)
    return found
