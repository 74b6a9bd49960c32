"""Words in a drawing: how wide they get at most, and how they keep off each other."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import east_asian_width

MONOSPACE_EM = 0.61  # of every character: Courier, Menlo, DejaVu Sans Mono, Liberation Mono and SF Mono have 0.6, Consolas 0.55
DIGIT_EM = 0.64  # of a digit in the widest usual typefaces, Verdana and DejaVu Sans; others have 0.56
WIDE_EM = 1.05  # of a Chinese, Japanese or Korean character, and of a picture


def width_of(text: str, size: float, em: float = MONOSPACE_EM) -> float:
    """At most, in the unit of `size`, whichever of a page's typefaces a machine has."""
    return size * sum(WIDE_EM if east_asian_width(character) in "WF" else em for character in text)


def shortened(text: str, size: float, room: float) -> str:
    """Its middle left out where it does not fit: names of policies differ at their ends, in what they are and in their last parameter."""
    if width_of(text, size) <= room:
        return text
    kept = len(text) - 1
    while kept > 2 and width_of(_without_middle(text, kept), size) > room:
        kept -= 1
    return _without_middle(text, kept)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places nearest to the `wanted` ones (in squares), in their order, `gap` apart and between `low` and `high`.

    Less the gaps before each, places only have to rise: that is isotonic regression, solved by pooling neighbours that are out of order.
    Where all of them together do not fit, gaps shrink evenly.
    """
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    pools: list[tuple[float, int]] = []  # mean, size
    for rank, index in enumerate(order):
        mean, size = wanted[index] - gap * rank, 1
        while pools and pools[-1][0] > mean:
            other, others = pools.pop()
            mean, size = (mean * size + other * others) / (size + others), size + others
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    room = high - gap * (len(wanted) - 1)
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = min(max(flat[rank], low), room) + gap * rank
    return places


def _without_middle(text: str, kept: int) -> str:
    ahead = kept - kept // 2
    return f"{text[:ahead]}…{text[len(text) - kept // 2 :]}"


__all__ = ["DIGIT_EM", "shortened", "spread", "width_of"]
