"""What a trace's prompts share, whatever the size of a block; when requests come; what is drawn from a seed."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS, block_hashes
from protocol.errors import ConfigError
from simulator.traces.content import Contents, hashes_of
from simulator.traces.generators import GENERATORS, Arrivals, generate
from simulator.traces.source import Source
from simulator.traces.timing import at_rate, begin_sessions, first, spread
from simulator.traces.trace import Run, Trace, TraceRequest, facts_of, reuse_share

pytestmark = pytest.mark.pure

ROOT = b"r" * 16


def request(at_s: float, *runs: tuple[str, int], session: str = "", output_tokens: int = 4) -> TraceRequest:
    return TraceRequest(at_s=at_s, runs=tuple(Run(*run) for run in runs), output_tokens=output_tokens, session=session)


def trace(*requests: TraceRequest) -> Trace:
    return Trace(name="t", requests=requests)


def common(a: list[bytes], b: list[bytes]) -> int:
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


lengths = st.integers(1, 70) | st.sampled_from([8, 16, 32])
runs = st.lists(st.tuples(st.sampled_from("ab"), lengths), min_size=1, max_size=5)


@given(runs, runs)
def test_hashes_agree_as_far_as_tokens_do(first_runs: list[tuple[str, int]], second_runs: list[tuple[str, int]]) -> None:
    """How: chains made of names against chains made of the tokens those names stand for, where both cut their runs alike.

    Seen to fail with the offset in a run left out, and with the room of a block not carried over the end of a run.
    """
    contents = Contents(vocab_size=1 << 30)
    both = [[Run(*r) for r in rs] for rs in (first_runs, second_runs)]
    by_name = [hashes_of(ROOT, rs) for rs in both]
    by_token = [block_hashes(ROOT, contents.tokens(rs)) for rs in both]
    assert [len(h) for h in by_name] == [len(h) for h in by_token]
    assert common(*by_name) <= common(*by_token), "sharing was made up"
    if first_runs == second_runs[: len(first_runs)]:
        assert common(*by_name) == len(by_name[0])


def test_a_longer_run_begins_as_a_shorter_one_of_its_name() -> None:
    """Asked for in either order. Seen to fail with the length in the seed of a run."""
    short, long = [Run("x", 40)], [Run("x", 100), Run("y", 10)]
    for order in ([short, long], [long, short]):
        contents = Contents(vocab_size=1000)
        made = {len(rs): contents.tokens(rs) for rs in order}
        assert made[1] == made[2][:40]
    assert common(hashes_of(ROOT, short), hashes_of(ROOT, long)) == 40 // HASH_BLOCK_SIZE_TOKENS


def test_a_vocabulary_without_ordinary_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="a vocabulary of 10 has no tokens"):
        Contents(vocab_size=10)


def test_reuse_is_what_begins_an_earlier_prompt() -> None:
    """100 + 50 tokens; then all 100 of a and 20 of 50; then nothing, as b does not stand first. Seen to fail with runs counted wherever
    they stand."""
    requests = [
        request(0, ("a", 100), ("b", 50)),
        request(1, ("a", 100), ("b", 20)),
        request(2, ("b", 50)),
        request(3, ("a", 120), ("b", 50)),
    ]
    assert reuse_share(requests) == pytest.approx((120 + 100) / (150 + 120 + 50 + 170))


def test_facts_of_a_trace() -> None:
    facts = facts_of(trace(request(0, ("a", 10)), request(0, ("b", 30)), request(2, ("c", 20), session="s")))
    assert (facts.num_requests, facts.num_sessions, facts.duration_s, facts.rate_per_s) == (3, 1, 2.0, 1.5)
    assert facts.same_moment_share == pytest.approx(2 / 3) and facts.interarrival_cv == pytest.approx(1.0)
    assert facts.input_tokens == (20, 30, 30)
    with pytest.raises(ValueError, match="has no requests"):
        facts_of(trace())


def test_another_rate_keeps_order_bursts_and_prompts() -> None:
    before = trace(request(5, ("a", 1)), request(5, ("b", 1)), request(9, ("c", 1)), request(15, ("d", 1)))
    after = at_rate(before, 2.0)
    assert [r.at_s for r in after.requests] == pytest.approx([0.0, 0.0, 0.8, 2.0]) and after.rate_per_s == pytest.approx(2.0)
    assert [r.runs for r in after.requests] == [r.runs for r in before.requests]
    for bad, why in ((0.0, "a rate of 0.0"), (float("inf"), "a rate of inf")):
        with pytest.raises(ValueError, match=why):
            at_rate(before, bad)
    with pytest.raises(ValueError, match="no duration"):
        at_rate(trace(request(1, ("a", 1))), 1.0)


def test_steps_are_spread_and_stay_in_order() -> None:
    """Seen to fail with offsets that are not sorted."""
    stepped = trace(*(request(3.0 * (i // 10), (str(i), 1)) for i in range(100)))
    smooth = spread(stepped, 3.0, seed=1)
    assert [r.runs for r in smooth.requests] == [r.runs for r in stepped.requests]
    assert all(0.0 <= b.at_s - a.at_s <= 3.0 for a, b in zip(stepped.requests, smooth.requests, strict=True))
    assert len({r.at_s for r in smooth.requests}) == 100 and smooth == spread(stepped, 3.0, seed=1) != spread(stepped, 3.0, seed=2)
    assert first(smooth, 7).requests == smooth.requests[:7]


def test_sessions_begin_apart_and_keep_their_own_times() -> None:
    sessions = trace(*(request(at_s, ("a", 1), session=s) for at_s in (0.0, 10.0) for s in "xyz"))
    begun = begin_sessions(sessions, 0.5, seed=3)
    times = {s: [r.at_s for r in begun.requests if r.session == s] for s in "xyz"}
    assert all(b - a == pytest.approx(10.0) for a, b in times.values()) and len({a for a, _ in times.values()}) == 3
    assert [r.at_s for r in begun.requests] == sorted(r.at_s for r in begun.requests)


@pytest.mark.parametrize(("cv", "burst_size"), [(0.0, 1), (1.0, 1), (3.0, 1), (1.0, 8)])
def test_gaps_have_the_mean_and_the_spread_asked_for(cv: float, burst_size: int) -> None:
    """Of 20,000 moments. Seen to fail with shape and scale of the gamma distribution exchanged."""
    arrivals = Arrivals(rate_per_s=5.0, cv=cv, burst_size=burst_size)
    moments = list(itertools.islice(arrivals.moments_s(random.Random(1)), 20_000 * burst_size))
    gaps = [b - a for a, b in pairwise(moments[::burst_size])]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(burst_size / 5.0, rel=0.05)
    assert (sum((g - mean) ** 2 for g in gaps) / len(gaps)) ** 0.5 / mean == pytest.approx(cv, rel=0.08, abs=1e-9)
    assert all(len(set(moments[i : i + burst_size])) == 1 for i in range(0, len(moments), burst_size))


def test_arrivals_that_are_none_are_refused() -> None:
    for bad in ({"rate_per_s": 0.0}, {"rate_per_s": 1.0, "cv": -1.0}, {"rate_per_s": 1.0, "burst_size": 0}):
        with pytest.raises(ConfigError, match="a rate above 0"):
            Arrivals(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "prompt", "output", "reuse"),
    [
        ("toolbench", 1835, 43, 0.85),
        ("embodied", 2285, 16, 0.97),
        ("programming", 3871, 190, 0.97),
        ("video_qa", 9865, 4, 0.88),
        ("loogle", 23474, 16, 0.91),
    ],
)
def test_prebles_workloads_have_the_lengths_and_the_sharing_of_its_table(name: str, prompt: int, output: int, reuse: float) -> None:
    """Within sampling noise; what a cache finds is a little less than the shared part, as each prefix is new once.

    Seen to fail with the shared part taken of the own tokens.
    """
    made = generate(name, Arrivals(rate_per_s=1.0), num_requests=6000, seed=1).requests
    assert sum(r.num_prompt_tokens for r in made) / len(made) == pytest.approx(prompt, rel=0.12)
    assert sum(r.output_tokens for r in made) / len(made) == pytest.approx(output, rel=0.1)
    assert reuse - 0.16 < reuse_share(made) < reuse + 0.02


def test_prompts_are_drawn_over_as_many_prefixes_as_are_asked_for() -> None:
    """Seen to fail with the number left out of the source."""
    made = Source(generator="toolbench", num_requests=4000, num_prefixes=60).draw(seed=1).requests
    used = Counter(request.runs[1] for request in made)
    assert len(used) == 60 and max(used.values()) < 3 * min(used.values())  # none more often than others, but for chance
    by_zipf = Counter(r.runs[1] for r in Source(generator="toolbench_zipf", num_requests=4000, num_prefixes=60).draw(seed=1).requests)
    assert max(by_zipf.values()) > 20 * min(by_zipf.values())
    with pytest.raises(ConfigError, match="prompts of 'unshared' are not drawn over prefixes; a number of them goes with toolbench"):
        generate("unshared", Arrivals(rate_per_s=1.0), num_requests=5, seed=0, num_prefixes=2)


def test_siblings_of_a_fan_out_share_and_the_unshared_do_not() -> None:
    bursts = generate("fan_out", Arrivals(rate_per_s=8.0, burst_size=8), num_requests=64, seed=1)
    assert reuse_share(bursts.requests) == pytest.approx(7 / 8 * 1024 / 1088) and facts_of(bursts).same_moment_share == 1.0
    assert reuse_share(generate("unshared", Arrivals(rate_per_s=1.0), num_requests=50, seed=1).requests) == 0.0


def test_a_generated_trace_is_its_seed_and_a_rate_leaves_prompts_alone() -> None:
    """Seen to fail with arrivals and prompts drawn from one generator."""
    for name in GENERATORS:
        a, b = (generate(name, Arrivals(rate_per_s=rate, cv=cv), num_requests=30, seed=4) for rate, cv in ((1.0, 1.0), (9.0, 2.0)))
        assert [(r.runs, r.output_tokens) for r in a.requests] == [(r.runs, r.output_tokens) for r in b.requests]
        assert (
            a
            == generate(name, Arrivals(rate_per_s=1.0), num_requests=30, seed=4)
            != generate(name, Arrivals(rate_per_s=1.0), num_requests=30, seed=5)
        )
    with pytest.raises(ConfigError, match="there is no generator 'x'; choose from toolbench"):
        generate("x", Arrivals(rate_per_s=1.0), num_requests=1, seed=0)
    with pytest.raises(ConfigError, match="0 requests are none"):
        generate("fan_out", Arrivals(rate_per_s=1.0), num_requests=0, seed=0)
