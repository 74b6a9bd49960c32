"""Where reuse is lost: parts that add up, each shown by a case where nothing else can be the reason."""

from __future__ import annotations

from random import Random

import pytest

from control.config import ClusterConfig, load_config
from simulator.policy_only import Lateness, run_policy_only
from simulator.traces.generators import Arrivals, generate
from simulator.traces.trace import Run, Trace, TraceRequest
from simulator.waterfall import Seen, Waterfall, WaterfallWatcher, fall, waterfall_of, waterfall_section

pytestmark = pytest.mark.pure

PREFIX = 1024


def config(num_kv_blocks: int = 4096, **router: object) -> ClusterConfig:
    workers = {"executor": "paced", "prefill_workers": 2, "decode_workers": 2, "num_kv_blocks": num_kv_blocks}
    workers |= {"max_num_batched_tokens": 2048, "max_waiting": 4096}
    return load_config({"workers": workers, "router": {"prefix_pull": False, "disaggregate": "always"} | router})


def asks(*asked: tuple[float, str]) -> Trace:
    """(when, which prefix), each with some tokens of its own."""
    requests = tuple(
        TraceRequest(at_s=at_s, runs=(Run(name, PREFIX), Run(f"own {i}", 16)), output_tokens=2) for i, (at_s, name) in enumerate(asked)
    )
    return Trace(name="asks", requests=requests)


def lost(trace: Trace, asked: ClusterConfig, policy: str, lateness: Lateness | None = None) -> Waterfall:
    watcher = WaterfallWatcher()
    run_policy_only(trace, asked, policy=policy, seed=0, watcher=watcher, lateness=lateness)
    assert watcher.total.available == watcher.total.lost + watcher.total.found
    return watcher.total


def test_the_parts_of_any_prompt_add_up_to_what_was_available() -> None:
    """Seen to fail with a surplus that is given back twice."""
    rng = Random(0)
    for _ in range(5000):
        names = ("available", "begun", "anywhere", "believed_anywhere", "believed_there", "there", "held_there")
        levels = {name: rng.randrange(0, 100, 16) for name in names}
        found = rng.randrange(0, 100, 16)
        part = fall(Seen(num_tokens=100, **levels), found)
        parts = (part.in_flight, part.staleness, part.load_trade, part.eviction, part.found)
        assert min(parts) >= 0 and sum(parts) == part.available == levels["available"]
        assert part.found == min(found, levels["available"])


@pytest.mark.parametrize("policy", ["round_robin", "prefix_cost", "e2"])
def test_a_run_adds_up_and_what_is_found_is_what_was_served(policy: str) -> None:
    """Seen to fail with what was believed taken for what was found."""
    trace = generate("toolbench", Arrivals(rate_per_s=30.0), num_requests=200, seed=2)
    served, total = waterfall_of(trace, config(512), policy=policy, seed=0)
    assert total.num_tokens == sum(one.num_prompt_tokens for one in served)
    assert total.available == total.lost + total.found
    assert 0.95 * sum(one.num_cached_tokens for one in served) <= total.found <= sum(one.num_cached_tokens for one in served)
    section = waterfall_section({"a": [total, total]})["a"]
    assert section["available"] == pytest.approx(sum(section[name] for name in ("staleness", "load_trade", "eviction", "found")))


def test_a_policy_that_knows_and_sends_elsewhere_trades_for_load() -> None:
    """Seen to fail with `believed_there` taken from the worker that has most."""
    total = lost(asks((0.0, "p"), (10.0, "p")), config(), "round_robin")
    assert (total.load_trade, total.lost) == (PREFIX, PREFIX)


def test_what_the_router_was_not_told_in_time_is_stale() -> None:
    """How: KV events an hour late, guesses that last 2 s. Seen to fail with beliefs read after the booking."""
    total = lost(asks((0.0, "p"), (10.0, "p"), (20.0, "p")), config(), "least_work", Lateness(kv_events_s=3600.0))
    assert total.staleness > 0 and total.load_trade == total.eviction == 0


def test_what_was_pushed_out_is_evicted() -> None:
    """How: other prefixes between, more than fit. Seen to fail with a cache that is not told how small it is."""
    others = [(10.0 * i, f"q{i}") for i in range(1, 9)]
    total = lost(asks((0.0, "p"), *others, (100.0, "p")), config(num_kv_blocks=160), "prefix_cost")
    assert (total.available, total.eviction) == (PREFIX, PREFIX)


def test_a_sibling_that_comes_while_the_first_is_computed_is_in_flight() -> None:
    """How: two at once, to one worker, in one step. Seen to fail with what is under way taken for what is held."""
    trace = Trace(
        name="siblings",
        requests=tuple(TraceRequest(at_s=0.0, runs=(Run("p", 512), Run(f"own {i}", 16)), output_tokens=2) for i in range(2)),
    )
    one = load_config(
        {
            "workers": {"executor": "paced", "prefill_workers": 1, "num_kv_blocks": 512, "max_num_batched_tokens": 2048},
            "router": {"prefix_pull": False, "disaggregate": "always"},
        }
    )
    total = lost(trace, one, "prefix_cost")
    assert (total.in_flight, total.lost) == (512, 512)
