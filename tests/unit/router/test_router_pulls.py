"""When a placement names a peer to pull a prefix from, what that costs, and how the price follows what workers report.

How: one router core and a small fleet of tests/unit/router/router_world.py; the property draws fleets, holdings and states at random.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import Assignment, KvSnapshot, Place
from protocol.worker import BlocksStored, Role, Tier, WorkerState
from router.cost_model import StepCost
from router.events import FromWorker
from router.link_cost import LinkCost
from router.policies.api import PlacementView, Pool, Pull
from router.policies.prefix_cost import PrefixCost
from tests.unit.router.router_world import BLOCK, World, address, chain, place, pools, snapshot

pytestmark = pytest.mark.pure

PREFIX = chain("system prompt", 128)  # 2,048 tokens


def long_prompt(number: int = 1, **changes: Any) -> Place:
    return place(number, num_tokens=2100, block_hashes=PREFIX, **changes)


def world_with_holder(**config: Any) -> World:
    """prefill-1 holds the prefix and is so busy that prefill-0 computes the prompt."""
    world = World(pools(2, 1), inbox_steps=100.0, **config)
    world.hold("prefill-1", PREFIX)
    world.report("prefill-1", waiting_tokens=20_000)
    return world


# --- who is named -----------------------------------------------------------------------------------------------------


def test_what_another_worker_holds_is_pulled_where_that_is_cheaper() -> None:
    """The assignment says from whom and why, the booking counts only what is computed. Seen to fail with `pull` left out of Choice."""
    world = world_with_holder()
    found = world.assign(long_prompt())
    assert found.prefill_worker == "prefill-0" and found.cached_tokens == 0
    source = found.prefix_source
    assert source is not None and (source.worker_id, source.num_tokens) == ("prefill-1", 2048)
    assert 0 < source.pull_s < source.compute_s
    terms = dict(zip(found.prefill_scores[0].term_names, found.prefill_scores[0].term_seconds, strict=True))
    assert terms["pull"] == source.pull_s and sum(terms.values()) == pytest.approx(found.prefill_scores[0].seconds)
    target = world.core.fleet.get("prefill-0")
    assert target is not None and target.booked.prefill_tokens == 2100 - 2048
    (told,) = world.core.status(world.now)["assignments"]  # type: ignore[misc]
    assert told["prefix_source"]["worker_id"] == "prefill-1"  # type: ignore[index]


@pytest.mark.parametrize(
    "why",
    [
        "switched off",
        "holds it itself",
        "link too slow",
        "draining",
        "lost",
        "failed this request",
        "other weights",
        "few missing",
        "a guess",
    ],
)
def test_nobody_is_named(why: str) -> None:
    """Each seen to fail with its condition left out of PullCosts; "a guess" with `believed` in place of the confirmed tokens."""
    changes: dict[str, dict[str, Any]] = {
        "switched off": {"prefix_pull": False},
        "link too slow": {"link_bytes_per_s": 1e6},
        "few missing": {"prefix_pull_s_base": 0.0},
    }
    config = changes.get(why, {})
    request = long_prompt(excluded=("prefill-1",) if why == "failed this request" else ())
    if why == "other weights":
        workers = [address("prefill-0", Role.PREFILL), address("prefill-1", Role.PREFILL, fingerprint=b"x" * 16), address("d", Role.DECODE)]
    else:
        workers = [replace(address(w, r), kv_token_bytes=1000) for w, r in pools(2, 1).items()]
    world = World(workers, inbox_steps=100.0, **config)
    if why == "a guess":
        world.core.index.speculate("prefill-1", PREFIX, world.now)
    else:
        world.hold("prefill-0" if why == "holds it itself" else "prefill-1", PREFIX)
    if why == "few missing":
        world.hold("prefill-0", PREFIX[:125])
    world.report("prefill-1", waiting_tokens=20_000, state=WorkerState.DRAINING if why == "draining" else WorkerState.READY)
    if why == "lost":
        world.kill("prefill-1")
    found = world.assign(request)
    assert found.prefill_worker == "prefill-0" and found.prefix_source is None


def test_only_what_is_missing_is_pulled() -> None:
    world = world_with_holder()
    world.hold("prefill-0", PREFIX[:64])
    found = world.assign(long_prompt())
    target = world.core.fleet.get("prefill-0")
    assert found.prefix_source is not None and target is not None
    assert (found.cached_tokens, target.booked.prefill_tokens) == (1024, 2100 - 2048)
    compute_s = 1024 * (target.cost.prefill_token_s + 2100 * target.cost.prefill_pair_s)
    assert found.prefix_source.compute_s == pytest.approx(compute_s)


def test_a_prompt_prefilled_where_it_decodes_is_pulled_too() -> None:
    world = World(pools(0, 0, 2), inbox_steps=100.0)
    world.hold("both-1", PREFIX)
    world.report("both-1", waiting_tokens=40_000)
    found = world.assign(long_prompt())
    assert found.prefill_worker == found.decode_worker == "both-0"
    assert found.prefix_source is not None and found.prefix_source.worker_id == "both-1"


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_named_source_is_live_other_and_cheaper(seed: int) -> None:
    """Whatever the fleet: never the same worker, one that drains, is lost, excluded, of another model or other weights, or that has told
    of fewer tokens; never when computing is cheaper. Seen to fail with each condition of PullCosts left out."""
    rng = Random(seed)
    workers = []
    for n, role in enumerate(rng.choices([Role.PREFILL, Role.DECODE, Role.BOTH], k=rng.randint(2, 6))):
        workers.append(
            address(
                f"{role.value}-{n}",
                role,
                fingerprint=rng.choice([b"f" * 16] * 3 + [b"x" * 16]),
                model_id=rng.choice(["m", "m", "m", "other"]),
                kv_token_bytes=rng.choice([0, 1000, 10**6]),
            )
        )
    world = World(workers, seed=seed, inbox_steps=100.0, link_bytes_per_s=rng.choice([1e8, 2e9]))
    held = {w.worker_id: 0 for w in workers}
    for worker in workers:
        if rng.random() < 0.6:
            held[worker.worker_id] = rng.choice([2, 30, 100, 128])
            world.hold(worker.worker_id, PREFIX[: held[worker.worker_id]])
        state = rng.choice([WorkerState.READY] * 4 + [WorkerState.DRAINING])
        world.report(worker.worker_id, state=state, waiting_tokens=rng.choice([0, 5000, 30_000]))
        if rng.random() < 0.1:
            world.kill(worker.worker_id)
    excluded = tuple(w.worker_id for w in workers if rng.random() < 0.15)
    for number in range(4):
        found = world.place(long_prompt(number, excluded=excluded))
        if not isinstance(found, Assignment) or (source := found.prefix_source) is None:
            continue
        giver, taker = world.core.fleet.get(source.worker_id), world.core.fleet.get(found.prefill_worker)
        assert giver is not None and taker is not None and giver is not taker
        assert giver.state is WorkerState.READY and giver.worker_id not in excluded
        assert giver.address.model_id == taker.address.model_id == "m" and giver.address.fingerprint == taker.address.fingerprint
        assert found.cached_tokens < source.num_tokens <= held[giver.worker_id] * BLOCK
        pulled = source.num_tokens - found.cached_tokens
        compute_s = taker.cost.prefill_s(2100 - found.cached_tokens, 2100) - taker.cost.prefill_s(2100 - found.cached_tokens - pulled, 2100)
        assert source.pull_s < source.compute_s == pytest.approx(compute_s)
        world.core.check()


# --- what it costs ----------------------------------------------------------------------------------------------------


class Idle:
    """As much of a WorkerView as the policy reads."""

    queued_prefill_s, free_kv_tokens = 0.0, 10**6
    cost = StepCost()

    def __init__(self, worker_id: str) -> None:
        self.worker_id = worker_id


def test_the_price_is_the_lesser_of_computing_and_pulling() -> None:
    """Seen to fail with a pull taken that costs more than computing."""

    def price(pull_s: float) -> float:
        compute_s = 1024 * (StepCost().prefill_token_s + 2100 * StepCost().prefill_pair_s)
        view = PlacementView(
            pool=Pool.PREFILL,
            workers=[Idle("a")],  # type: ignore[list-item]
            cached_tokens={},
            device_tokens={},
            predicted_output_tokens=1,
            kv_tokens=1,
            decode_worker=None,
            transfer_s=0.0,
            pulls={"a": Pull("b", 1024, 1024, pull_s, compute_s)},
        )
        return PrefixCost(PrefixCost.Config()).score(view, long_prompt(), 0.0, Random(0))["a"].seconds

    whole = StepCost().prefill_s(2100, 2100)
    assert price(0.01) == pytest.approx(StepCost().prefill_s(2100 - 1024, 2100) + 0.01)
    assert price(5.0) == pytest.approx(whole)


def observed(link: LinkCost, now: float, **counters: int) -> LinkCost:
    before = snapshot("p", Role.PREFILL, counters={})
    link.observe(before, replace(before, counters=counters), now)
    return link


def test_a_link_is_priced_as_it_was_measured() -> None:
    """Ten times as slow as configured: the price comes near in a few reports. Seen to fail with the scale left at 1."""
    link = LinkCost(base_s=0.01, token_s=1e-5)
    for n in range(20):
        observed(link, n * 0.05, prefix_pulls=2, prefix_pull_tokens=2000, prefix_pull_us=400_000)
    assert link.seconds(1000) == pytest.approx(0.2, rel=0.1)


def test_a_link_that_is_down_is_left_alone_for_a_while() -> None:
    """Waits of a second without a token. Seen to fail without the decay: it would never be tried again."""
    link = LinkCost(base_s=0.003, token_s=1e-6)
    for n in range(3):
        observed(link, n * 1.0, prefix_pull_failures=1, prefix_pull_us=1_000_000)
    assert link.seconds(2000) > 0.5
    for n in range(200):
        observed(link, 3.0 + n * 5.0)
    assert link.seconds(2000) < 0.01


def test_a_quick_refusal_makes_no_link_look_fast() -> None:
    link = observed(LinkCost(base_s=0.003, token_s=1e-6), 0.0, prefix_pull_failures=5, prefix_pull_us=500)
    assert link.scale >= 1.0


def test_what_was_pulled_once_is_told_by_events_and_not_pulled_again() -> None:
    """The target's own BlocksStored after the pull makes it a holder."""
    world = world_with_holder()
    assert world.assign(long_prompt()).prefix_source is not None
    world.kv_events("prefill-0", BlocksStored(number=1, parent=b"", hashes=PREFIX))
    second = world.assign(long_prompt(2))
    assert (second.prefill_worker, second.cached_tokens, second.prefix_source) == ("prefill-0", 2048, None)


# --- host memory ------------------------------------------------------------------------------------------------------


def world_with_tiers() -> World:
    """Both hold the prefix: prefill-0 in host memory, prefill-1 in its pool."""
    world = World([replace(address(w, r), kv_token_bytes=50_000) for w, r in pools(2, 1).items()], inbox_steps=100.0)
    world.kv_events("prefill-0", BlocksStored(number=1, parent=b"", hashes=PREFIX, tier=Tier.HOST))
    world.hold("prefill-1", PREFIX)
    return world


def test_what_lies_in_host_memory_costs_its_loading() -> None:
    """2,048 tokens of 50 kB at 5 GB/s are 20 ms: dearer than the pool, far cheaper than computing. Seen to fail with the term left out."""
    world = world_with_tiers()
    found = world.assign(long_prompt())
    assert found.prefill_worker == "prefill-1"
    scores = {s.worker_id: s for s in found.prefill_scores}
    terms = {w: dict(zip(s.term_names, s.term_seconds, strict=True)) for w, s in scores.items()}
    assert scores["prefill-0"].cached_tokens == scores["prefill-1"].cached_tokens == 2048
    assert terms["prefill-0"]["load"] == pytest.approx(2048 * 50_000 / 5e9) and "load" not in terms["prefill-1"]
    assert all(sum(t.values()) == pytest.approx(scores[w].seconds) for w, t in terms.items())


def test_host_memory_is_chosen_where_the_pool_is_busy() -> None:
    world = world_with_tiers()
    world.report("prefill-1", waiting_tokens=20_000)
    found = world.assign(long_prompt())
    assert (found.prefill_worker, found.cached_tokens, found.prefix_source) == ("prefill-0", 2048, None)


def test_nobody_pulls_from_host_memory() -> None:
    """A source offers blocks of its pool. Seen to fail with the index taking every tier for the pool."""
    world = World(pools(2, 1), inbox_steps=100.0)
    world.kv_events("prefill-1", BlocksStored(number=1, parent=b"", hashes=PREFIX, tier=Tier.HOST))
    world.report("prefill-1", waiting_tokens=40_000)
    found = world.assign(long_prompt())
    assert found.prefill_worker == "prefill-0" and found.prefix_source is None


def test_a_snapshot_of_both_tiers_replaces_both() -> None:
    """Seen to fail with `host_hashes` not taken."""
    world = World(pools(1, 1))
    world.kv_events("prefill-0", BlocksStored(number=1, parent=b"", hashes=PREFIX[:4], tier=Tier.HOST))
    a = world.addresses["prefill-0"]
    message = KvSnapshot(
        worker_id="prefill-0", epoch=a.epoch, next_event_number=9, hashes=PREFIX[:2], parents=(b"",) * 2, host_hashes=PREFIX[2:7]
    )
    world.on(FromWorker(worker_id="prefill-0", epoch=a.epoch, message=message))
    match = world.core.index.match(PREFIX)
    assert (match.device_tokens["prefill-0"], match.total_tokens["prefill-0"]) == (32, 112)
