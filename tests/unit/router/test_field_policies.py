"""The field's simpler policies, each against its own formula worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from router import policies
from router.cost_model import StepCost
from router.policies.api import Pool, Pull
from tests.unit.router.policy_view import PER_TOKEN, Seen, cheapest, scored, seconds, view, workers
from tests.unit.router.router_world import World, chain, place, pools

pytestmark = pytest.mark.pure


# --- random and power of two ------------------------------------------------------------------------------------------


def test_random_is_even_and_follows_the_seed() -> None:
    """900 choices over three workers: each 300, give or take 5 standard deviations. Seen to fail with `rng.random() * len(costs)`."""
    policy, seen = policies.load("random"), view(workers("a", "b", "c"))
    chosen = Counter(cheapest(policy, seen, place(1), seed=seed) for seed in range(900))
    assert all(abs(count - 300) < 5 * 14.2 for count in chosen.values()) and len(chosen) == 3


def test_power_of_two_prices_two_workers_and_takes_the_less_loaded() -> None:
    """Loads 3, 2, 1, 0: the worst of four is never taken, the best in half of all pairs. Seen to fail with `choices` 1 and with 4."""
    policy = policies.load("power_of_two")
    seen = view([Seen(worker_id=name, num_prefills=load) for name, load in (("a", 3), ("b", 2), ("c", 1), ("d", 0))])
    chosen: Counter[str] = Counter()
    for seed in range(600):
        costs = scored(policy, seen, place(1), seed=seed)
        assert len(costs) == 2
        chosen[min(costs, key=lambda name: costs[name].seconds)] += 1
    assert chosen["a"] == 0 and chosen["b"] < chosen["c"] < chosen["d"]
    assert abs(chosen["d"] - 300) < 5 * 12.3 and abs(chosen["b"] - 100) < 5 * 9.2, "3/6, 2/6 and 1/6 of 600"


def test_power_of_two_counts_requests_of_the_pool_it_chooses_for() -> None:
    """Seen to fail with prompts counted in the decode pool."""
    policy = policies.load("power_of_two:choices=9")
    seen = [Seen(worker_id="a", num_prefills=5, num_sequences=1), Seen(worker_id="b", num_prefills=1, num_sequences=3)]
    assert seconds(policy, view(seen, Pool.PREFILL), place(1)) == {"a": 5.0, "b": 1.0}
    assert seconds(policy, view(seen, Pool.DECODE), place(1)) == {"a": 1.0, "b": 3.0}
    assert seconds(policy, view(seen, Pool.WHOLE), place(1)) == {"a": 6.0, "b": 4.0}


# --- DistServe --------------------------------------------------------------------------------------------------------


def test_distserve_takes_the_shortest_queue_and_the_least_loaded_decoder() -> None:
    """Prompts in the queue count, not their tokens; decode counts sequences. Seen to fail with `queued_prefill_tokens`."""
    policy = policies.load("distserve")
    queues = [
        Seen(worker_id="a", num_prefills=3, queued_prefill_tokens=30),
        Seen(worker_id="b", num_prefills=2, queued_prefill_tokens=9000),
    ]
    assert cheapest(policy, view(queues), place(1)) == "b"
    batches = [Seen(worker_id="a", num_sequences=4, kv_tokens=100), Seen(worker_id="b", num_sequences=3, kv_tokens=9000)]
    assert cheapest(policy, view(batches, Pool.DECODE), place(1)) == "b"


# --- Mooncake ---------------------------------------------------------------------------------------------------------


def test_mooncake_prices_the_first_token_with_a_prefix_computed_or_transferred() -> None:
    """A prompt of 1000 tokens at 1 ms each; c holds 800 of them.

    a  holds 500, queue 0.10 s: 800/500 = 1.6 < 2: computed.     0.10 + (1000 - 500) / 1000      = 0.60
    b  holds 200, queue 0.05 s: 800/200 = 4 >= 2: transferred.   0.04 + 0.05 + (1000 - 800)/1000 = 0.29
    c  holds 800, queue 0.15 s: nothing to transfer.             0.15 + (1000 - 800) / 1000      = 0.35
    d  holds nothing and no transfer is on offer, 0.02 s of it in host memory to load:  0.02 + 1.0
    Seen to fail with `>` turned in the comparison with the threshold.
    """
    queues = {"a": 0.10, "b": 0.05, "c": 0.15, "d": 0.0}
    seen = view(
        [Seen(worker_id=name, queued_prefill_s=queue_s) for name, queue_s in queues.items()],
        cached_tokens={"a": 500, "b": 200, "c": 800},
        pulls={"a": Pull("c", 800, 300, 0.01, 0.3), "b": Pull("c", 800, 600, 0.04, 0.6)},
        loads_s={"d": 0.02},
    )
    found = seconds(policies.load("mooncake_ttft"), seen, place(1, num_tokens=1000))
    assert found == pytest.approx({"a": 0.60, "b": 0.29, "c": 0.35, "d": 1.02})
    patient = seconds(policies.load("mooncake_ttft:balancing_threshold=5"), seen, place(1, num_tokens=1000))
    assert patient["b"] == pytest.approx(0.05 + 0.8), "a threshold of 5: computed"


def test_mooncake_chooses_decode_by_the_time_between_tokens() -> None:
    """TBT = 2 ms + 1 ms * sequences + 1 us * KV tokens, this request in the batch: with 500 tokens of KV and one choice

    a: 2 + (3 + 1) + (1000 + 500)/1000 = 7.5 ms     b: 2 + (5 + 1) + (100 + 500)/1000 = 8.6 ms
    """
    cost = StepCost(step_s=2e-3, prefill_token_s=0.0, prefill_pair_s=0.0, decode_sequence_s=1e-3, decode_kv_token_s=1e-6)
    batches = [
        Seen(worker_id="a", cost=cost, num_sequences=3, kv_tokens=1000),
        Seen(worker_id="b", cost=cost, num_sequences=5, kv_tokens=100),
    ]
    found = seconds(policies.load("mooncake_ttft"), view(batches, Pool.DECODE, kv_tokens=500), place(1))
    assert found == pytest.approx({"a": 7.5e-3, "b": 8.6e-3})
    whole = seconds(policies.load("mooncake_ttft"), view(batches, Pool.WHOLE, kv_tokens=500), place(1, num_tokens=0))
    assert whole == pytest.approx({"a": 2e-3 + 10 * 7.5e-3, "b": 2e-3 + 10 * 8.6e-3}), "one step of prefill and ten tokens"


# --- session affinity -------------------------------------------------------------------------------------------------


def test_a_session_stays_on_its_worker_and_sessions_spread() -> None:
    """Through the router; prompts of one session have nothing in common. Seen to fail with the request id for a key."""
    world = World(pools(4, 3), policy=policies.load("session_affinity"))
    homes: dict[str, set[tuple[str, str]]] = {}
    for number in range(120):
        request = place(number, session=f"s{number % 24}")
        found = world.assign(request)
        homes.setdefault(request.session, set()).add((found.prefill_worker, found.decode_worker))
        world.done(request)
    assert all(len(places) == 1 for places in homes.values())
    prefills = Counter(prefill for places in homes.values() for prefill, _ in places)
    assert len(prefills) == 4 and max(prefills.values()) <= 12, "24 sessions over four workers"


def test_only_sessions_of_a_worker_that_left_move() -> None:
    """Rendezvous hashing. Seen to fail with `hash % number of workers`."""
    policy, names = policies.load("session_affinity"), ["a", "b", "c", "d"]
    requests = [place(n, session=f"s{n}") for n in range(60)]
    before = [cheapest(policy, view(workers(*names)), request) for request in requests]
    after = [cheapest(policy, view(workers("a", "b", "d")), request) for request in requests]
    moved = [b for b, a in zip(before, after, strict=True) if a != b]
    assert moved and set(moved) == {"c"}


def test_a_home_over_its_bound_is_left_for_the_next_in_the_sessions_order() -> None:
    """Load factor 1.25, no free requests, 12 in flight on three workers: the bound is ceil(1.25 * 13 / 3) = 6.

    Seen to fail with the bound left out, and with `<=` for `<`.
    """
    policy, request = policies.load("session_affinity:free_requests=0"), place(1, session="s")
    home, second, third = sorted("abc", key=lambda name: seconds(policy, view(workers("a", "b", "c", num_prefills=1)), request)[name])

    def chosen(at_home: int) -> str:
        loads = {home: at_home, second: 12 - at_home, third: 0}
        return cheapest(policy, view([Seen(worker_id=n, num_prefills=load) for n, load in loads.items()]), request)

    assert [chosen(n) for n in (5, 6, 7)] == [home, third, second], "with 6 at home the second has 6 too"
    patient = policies.load("session_affinity:free_requests=8")
    assert cheapest(patient, view([Seen(worker_id=home, num_prefills=7), Seen(worker_id=second)]), request) == home


def test_without_a_session_prompts_that_begin_alike_stay_together() -> None:
    """Seen to fail with the last block for a key."""
    policy, seen = policies.load("session_affinity"), view(workers("a", "b", "c", "d"))
    for family in range(8):
        prefix = chain(("family", family), 4)
        prompts = [place(n, block_hashes=prefix + chain(("tail", n), 4, parent=prefix[-1])) for n in range(6)]
        assert len({cheapest(policy, seen, prompt) for prompt in prompts}) == 1
    short = [replace(place(n), block_hashes=()) for n in range(40)]
    assert len({cheapest(policy, seen, prompt) for prompt in short}) == 4, "too short for a block: anywhere"


def test_unit_of_the_hand_made_cost_is_a_millisecond_a_token() -> None:
    assert PER_TOKEN.prefill_s(250, 1000) == pytest.approx(0.25)
