"""Chats come in the lengths that are stated: deciles where deciles are, moments where moments are, nothing above the context."""

from __future__ import annotations

from random import Random
from statistics import fmean, quantiles, stdev

import pytest

from simulator.traces.generators import Arrivals, generate
from simulator.traces.lengths import Deciles, Lengths

pytestmark = pytest.mark.pure


def lengths(name: str, seed: int = 0) -> list[tuple[int, int]]:
    trace = generate(name, Arrivals(rate_per_s=1.0), num_requests=10_000, seed=seed)
    return [(request.num_prompt_tokens, request.output_tokens) for request in trace.requests]


def test_deciles_come_out_as_they_went_in() -> None:
    """Seen to fail with a place drawn among the first nine of ten intervals."""
    stated = (1, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120)
    source = Lengths(prompt=Deciles(stated), output=Deciles((1,) * 11), most_tokens=10_000)
    drawn = [runs[0].num_tokens for (runs, _), _ in zip(source.prompts(Random(1), 1), range(20_000), strict=False)]
    assert quantiles(drawn, n=10) == pytest.approx(stated[1:-1], rel=0.06)
    assert min(drawn) == 1 and 5000 < max(drawn) <= 5120


@pytest.mark.parametrize(("name", "prompt", "output"), [("sharegpt", 739, 177), ("sharegpt_lognormal", 715, 168)])
def test_chats_have_the_stated_means_less_what_is_too_long(name: str, prompt: float, output: float) -> None:
    """780 and 176 before pairs above 2,048 tokens are drawn again. Seen to fail with the deviation taken for the variance."""
    pairs = lengths(name)
    assert fmean(p for p, _ in pairs) == pytest.approx(prompt, rel=0.03) and fmean(o for _, o in pairs) == pytest.approx(output, rel=0.03)
    assert max(p + o for p, o in pairs) <= 2048 and min(min(pair) for pair in pairs) >= 1
    assert 150 < stdev(o for _, o in pairs) < 240 and lengths(name, 1) != pairs


def test_chats_share_nothing() -> None:
    trace = generate("sharegpt", Arrivals(rate_per_s=1.0), num_requests=50, seed=0)
    assert len({run.name for request in trace.requests for run in request.runs}) == 50
