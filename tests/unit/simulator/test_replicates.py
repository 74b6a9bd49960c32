"""Replicates: nothing shared that the trace does not share, nothing lost that it need not lose, and a seed is a replicate."""

from __future__ import annotations

import itertools
from collections import Counter
from random import Random

import pytest

from simulator.replicates import MIN_PARTS, Method, Replicates, parts_of, redraw
from simulator.traces.source import Source
from simulator.traces.trace import Run, Trace, TraceRequest, reuse_share

pytestmark = pytest.mark.pure

NUM_REQUESTS = 400


def trace(method: Method, *, seed: int = 0) -> Trace:
    """Random requests over a head that all have; `output_tokens` of each is its number. Sessions and families grow as they go on."""
    rng, requests, at_s = Random(f"trace {seed}"), [], 0.0
    turns: Counter[int] = Counter()
    for number in range(NUM_REQUESTS):
        at_s += rng.expovariate(2.0)
        talk = rng.randrange(NUM_REQUESTS // 8)
        turns[talk] += 1
        own = [Run(f"talk {talk} {turn}", 100) for turn in range(turns[talk])]
        runs = [Run("head", 50), Run(f"alone {number}", 100)] if method is Method.BLOCKS else [Run("head", 50), *own]
        session = f"talk {talk}" if method is Method.SESSIONS else ""
        requests.append(TraceRequest(at_s=at_s, runs=tuple(runs), output_tokens=number + 1, session=session))
    return Trace(name=method.name, requests=tuple(requests))


def shared(a: TraceRequest, b: TraceRequest) -> int:
    """Tokens both begin with."""
    return sum(run.num_tokens for run, other in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(a.runs, b.runs, strict=False)))


REDRAWN = [Method.SESSIONS, Method.FAMILIES, Method.BLOCKS]


@pytest.mark.parametrize("method", REDRAWN)
def test_two_requests_share_at_most_what_they_do_in_the_trace(method: Method) -> None:
    """How: every pair of a replicate longer than its trace, so that much is drawn again; a request and its copy share nothing.

    Seen to fail with copies that keep their names, and with a world entered whatever it holds.
    """
    asked = trace(method)
    parts = parts_of(asked)
    assert parts.method is method
    for seed in range(3):
        drawn = redraw(asked, parts, num_requests=NUM_REQUESTS + 50, seed=seed).requests
        numbers = [request.output_tokens - 1 for request in drawn]
        assert max(Counter(numbers).values()) > 1, "nothing was drawn twice"
        for i, j in itertools.combinations(range(len(drawn)), 2):
            most = shared(asked.requests[numbers[i]], asked.requests[numbers[j]]) if numbers[i] != numbers[j] else 0
            assert shared(drawn[i], drawn[j]) <= most
        assert reuse_share(drawn) <= reuse_share(asked.requests) + 0.02  # which requests are drawn is chance


@pytest.mark.parametrize("method", REDRAWN)
def test_what_is_drawn_once_keeps_its_tokens(method: Method) -> None:
    """Two sessions that share a head still share it. Seen to fail with each part in a world of its own."""
    asked = trace(method)
    drawn = redraw(asked, parts_of(asked), num_requests=60, seed=1).requests
    by_number = Counter(request.output_tokens for request in drawn)
    first_met = {request.output_tokens: request for request in reversed(drawn)}
    kept = [request for request in first_met.values() if request.runs == asked.requests[request.output_tokens - 1].runs]
    assert len(kept) > 0.6 * len(by_number) and len({request.runs[0].name for request in kept}) == 1


def test_turns_of_a_conversation_stay_together_and_in_order() -> None:
    """Seen to fail with requests drawn one by one where nobody else has all of their prompt."""
    asked = trace(Method.FAMILIES)
    drawn = redraw(asked, parts_of(asked), num_requests=NUM_REQUESTS, seed=5).requests
    last: dict[str, int] = {}
    for request in drawn:
        talk = request.runs[1].name
        assert len(request.runs) == last.get(talk, 1) + 1, "a turn without the one before it"
        last[talk] = len(request.runs)


@pytest.mark.parametrize("method", REDRAWN)
def test_arrivals_are_like_the_trace_and_in_order(method: Method) -> None:
    """Seen to fail with gaps taken twice, and with requests handed out before earlier ones are drawn."""
    asked = trace(method)
    parts = parts_of(asked)
    rates = []
    for seed in range(8):
        drawn = redraw(asked, parts, num_requests=300, seed=seed)
        moments = [request.at_s for request in drawn.requests]
        assert len(moments) == 300 and moments == sorted(moments)
        rates.append(drawn.rate_per_s)
    share = sum(rates) / len(rates) / asked.rate_per_s
    assert (0.95 if method is Method.BLOCKS else 0.75) < share < 1.05  # sessions begin one after the other, so traffic builds up


@pytest.mark.parametrize("method", REDRAWN)
def test_a_seed_is_a_replicate(method: Method) -> None:
    """Seen to fail with the seed left out."""
    asked = trace(method)
    parts = parts_of(asked)
    assert redraw(asked, parts, num_requests=200, seed=3) == redraw(asked, parts, num_requests=200, seed=3)
    assert redraw(asked, parts, num_requests=200, seed=3) != redraw(asked, parts, num_requests=200, seed=4)


def test_few_sessions_are_not_redrawn_as_sessions() -> None:
    requests = tuple(
        TraceRequest(at_s=float(i), runs=(Run(f"own {i}", 10),), output_tokens=1, session=f"{i % (MIN_PARTS - 1)}") for i in range(100)
    )
    assert parts_of(Trace(name="few", requests=requests)).method is Method.BLOCKS
    with pytest.raises(ValueError, match="0 requests"):
        redraw(Trace(name="few", requests=requests), parts_of(Trace(name="few", requests=requests)), num_requests=0, seed=0)


def test_generated_replicates_are_drawn_anew_at_the_rate_asked_for() -> None:
    """Seen to fail with the same seed for each."""
    replicates = Replicates.of(Source(generator="toolbench", rate_per_s=30.0), num_requests=80, seed=2)
    first, second = replicates.make(0), replicates.make(1)
    assert replicates.parts.method is Method.GENERATED and first == replicates.make(0) and first.requests != second.requests
    assert len(first.requests) == 80 and replicates.rate_per_s == 30.0 and replicates.sha256 is None
    other = Replicates.of(Source(generator="toolbench", rate_per_s=30.0), num_requests=80, seed=3)
    assert {replicates.seed_of(i) for i in range(50)}.isdisjoint(other.seed_of(i) for i in range(50))


def test_replicates_of_a_file_come_at_the_rate_asked_for(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Seen to fail with the rate of the trace left as it is."""
    file = tmp_path / "t.jsonl"
    file.write_text(
        "".join(f'{{"timestamp": {i * 500}, "input_length": 300, "output_length": 3, "hash_ids": [{i}]}}\n' for i in range(200))
    )
    replicates = Replicates.of(Source(path=file, rate_per_s=7.0), num_requests=100, seed=0)
    assert replicates.make(0).rate_per_s == pytest.approx(7.0) and replicates.told.endswith("12 requests each")
    assert replicates.sha256 is not None and len(replicates.sha256) == 64
