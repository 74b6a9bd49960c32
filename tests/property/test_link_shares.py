"""Copies that come and go on shared links end as if every rate were worked out anew at every moment, and no link exceeds its rate."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.links import SharedLinks
from simulator.loop import VirtualLoop

pytestmark = pytest.mark.pure

RATE = 100.0  # bytes a second
COPIES = st.lists(
    st.tuples(st.integers(0, 40).map(lambda n: n / 4), st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 2000)),
    min_size=1,
    max_size=12,
)


@dataclass
class Naive:
    """A copy of the reference: what is left of it."""

    at_s: float
    source: str
    target: str
    left: float
    end_s: float | None = None


def naive_ends(copies: list[tuple[float, str, str, int]]) -> list[float]:
    """From one moment at which something comes or ends to the next, with all rates from nothing but who is there."""
    all_copies = [Naive(*copy) for copy in copies]
    now = 0.0
    while any(copy.end_s is None for copy in all_copies):
        here = [copy for copy in all_copies if copy.end_s is None and copy.at_s <= now]
        rates = [RATE / max(sum(o.source == copy.source for o in here), sum(o.target == copy.target for o in here)) for copy in here]
        for side in "abc":
            assert sum(rate for rate, copy in zip(rates, here, strict=True) if copy.source == side) <= RATE * (1 + 1e-9)
        moments = [now + copy.left / rate for rate, copy in zip(rates, here, strict=True)]
        later = min([*moments, *(copy.at_s for copy in all_copies if copy.at_s > now)])
        for rate, copy, moment in zip(rates, here, moments, strict=True):
            copy.left = max(0.0, copy.left - rate * (later - now))
            if moment <= later + 1e-12:
                copy.end_s = later
        now = later
    return [copy.end_s for copy in all_copies if copy.end_s is not None]


@given(copies=COPIES)
def test_copies_end_when_rates_worked_out_anew_say_so(copies: list[tuple[float, str, str, int]]) -> None:
    """Up to 12 copies among three sources and three targets. Seen to fail with rates that are left as they are when a copy ends."""
    loop = VirtualLoop()
    links = SharedLinks(loop, bytes_per_s=RATE)
    ends: dict[int, float] = {}

    def begin(index: int) -> None:
        _, source, target, size_bytes = copies[index]
        links.start(source, target, size_bytes, lambda: ends.__setitem__(index, loop.now))

    for index, (at_s, _, _, _) in enumerate(copies):
        loop.call_at(at_s, lambda index=index: begin(index))  # type: ignore[misc]
    loop.run(lambda: len(ends) == len(copies), deadline_s=1e6)
    assert [ends[index] for index in range(len(copies))] == pytest.approx(naive_ends(copies), rel=1e-9, abs=1e-9)
    assert links.num_copies == 0
