"""When a copy of a prefix counts as of use, and what equal workers cost."""

from __future__ import annotations

import pytest

from protocol.messages import Place
from protocol.worker import BlocksStored
from router import common_cost, policies
from router.cost_model import StepCost, Work
from router.policies.api import Booked, KvChanged, Pool
from router.policies.prefix_heat import MAX_PREFIXES, PrefixHeat
from tests.unit.router.policy_view import scored, seconds, view, workers
from tests.unit.router.router_world import World, chain, place, pools

pytestmark = pytest.mark.pure

PREFIX = chain("hot", 64)
CACHED = [1024]  # of one worker


def request(number: int = 0) -> Place:
    return place(number, num_tokens=1088, block_hashes=PREFIX + chain(number, 4, parent=PREFIX[-1]))


def booked(*, cached_tokens: int = 1024, confirmed_tokens: int = 1024) -> Booked:
    return Booked(
        request=request(), prefill_worker="prefill-0", decode_worker="d", cached_tokens=cached_tokens, confirmed_tokens=confirmed_tokens
    )


def stored() -> KvChanged:
    return KvChanged(worker_id="prefill-0", events=(BlocksStored(number=1, parent=b"", hashes=PREFIX),))


def test_requests_of_late_are_shared_among_holders_and_one_more() -> None:
    """How: six requests at 0 s, half life 10 s: 6 / (1 + 1), of two holders 6 / (2 + 1), after 10 s half of it.

    Seen to fail with `num_holders + 1` without the one, and with the half life left out.
    """
    heat = PrefixHeat(half_life_s=10.0)
    for _ in range(6):
        heat.booked(booked(), 0.0)
    assert heat.uses(request(), CACHED, 0.0) == pytest.approx(3.0)
    assert heat.uses(request(), [1024, 1024, 512], 0.0) == pytest.approx(2.0)
    assert heat.uses(request(), CACHED, 10.0) == pytest.approx(1.5)
    assert heat.uses(place(7, block_hashes=chain("other", 64)), CACHED, 0.0) == 0.0
    assert heat.uses(request(), [0, 0], 0.0) == 0.0


def test_siblings_of_a_burst_do_not_make_their_prefix_hot_before_a_worker_holds_it() -> None:
    """Seen to fail with `is_held` not looked at in `uses`, and with `changed` that forgets to hold."""
    heat = PrefixHeat(half_life_s=10.0)
    for _ in range(7):
        heat.booked(booked(confirmed_tokens=0), 0.0)
    assert heat.uses(request(), CACHED, 0.1) == 0.0
    heat.changed(KvChanged(worker_id="prefill-0", events=(BlocksStored(number=1, parent=b"", hashes=chain("other", 9)),)))
    assert heat.uses(request(), CACHED, 0.1) == 0.0
    heat.changed(stored())
    assert heat.uses(request(), CACHED, 0.1) > 3.0


def test_a_second_moment_makes_a_prefix_hot_before_a_worker_holds_it() -> None:
    """How: siblings 10 ms apart, then one 40 ms after the last of them. Seen to fail with a second moment that is not looked for."""
    heat = PrefixHeat(half_life_s=10.0)
    for at_s in (0.0, 0.01, 0.02, 0.03, 0.04):
        heat.booked(booked(confirmed_tokens=0), at_s)
    assert heat.uses(request(), CACHED, 0.05) == 0.0
    heat.booked(booked(confirmed_tokens=0), 0.08)
    assert heat.uses(request(), CACHED, 0.08) == pytest.approx(3.0, rel=0.01)


def test_decode_workers_share_no_prefix_with_those_that_prefill() -> None:
    """How: one asked, so that of two prefill workers (1 + 1.5 / 2) / (1 + 1 / 2) - 1 = 1 / 6 of the prefix is charged.

    Seen to fail with all workers of `view.cached_tokens` counted.
    """

    def duplicate_s(cached_tokens: dict[str, int]) -> float:
        policy = policies.load("prefix_cost")
        policy.observe(booked(), 100.0)
        seen = view(workers("prefill-0", "prefill-1"), cached_tokens=cached_tokens)
        return dict(scored(policy, seen, request())["prefill-1"].terms)["duplicate"]

    alone = {"prefill-0": 1024}
    assert duplicate_s(alone) == pytest.approx(1.024 / 6)
    assert duplicate_s(alone | {"decode-0": 1024, "decode-1": 1024}) == duplicate_s(alone)


def test_siblings_are_decoded_where_their_prefix_will_be() -> None:
    """How: one was booked to decode on `d`, which has nothing yet; a token moves in a microsecond. Two seconds later nobody knows.

    Seen to fail with prices of what workers have now, and with a time that never ends.
    """
    policy = policies.load("prefix_cost")
    policy.observe(booked(), 100.0)
    seen = view(workers("c", "d"), Pool.DECODE, cached_tokens={"prefill-0": 1024}, transfer_s=1.088e-3)
    soon, later = (seconds(policy, seen, request(), now=now) for now in (100.1, 103.0))
    assert soon["c"] - soon["d"] == pytest.approx(1024e-6)
    assert later["c"] == later["d"]


def test_no_half_life_keeps_nothing_and_memory_is_bounded() -> None:
    """Seen to fail with the bound left out, and with the newest dropped."""
    heat = PrefixHeat(half_life_s=0.0)
    heat.booked(booked(), 0.0)
    assert heat.uses(request(), CACHED, 0.0) == 0.0
    heat = PrefixHeat(half_life_s=10.0)
    for number in range(MAX_PREFIXES + 1):
        names = chain(number, 1)
        asked = Booked(
            request=place(number, block_hashes=names), prefill_worker="p", decode_worker="d", cached_tokens=16, confirmed_tokens=16
        )
        heat.booked(asked, 0.0)
    first, last = place(0, block_hashes=chain(0, 1)), place(1, block_hashes=chain(MAX_PREFIXES, 1))
    assert heat.uses(first, [16], 0.0) == 0.0 and heat.uses(last, [16], 0.0) > 0.0


def test_a_hot_prefix_spreads_to_an_idle_worker_long_before_a_cold_one() -> None:
    """How: the queue at the holder is worth what the prefix saves; one asked for thirty times goes to the idle one, a new one stays.

    Seen to fail with `heat_s=0` for the first (it stays).
    """

    def chosen(num_before: int) -> str:
        world = World(pools(2, 1), policy=policies.load("prefix_cost"), inbox_steps=100.0, prefix_pull=False)
        world.hold("prefill-0", PREFIX)
        for number in range(num_before):
            world.assign(request(number))
            world.done(request(number))
        world.report("prefill-0", waiting_tokens=1500)
        return world.assign(request(99)).prefill_worker

    assert (chosen(0), chosen(30)) == ("prefill-0", "prefill-1")


@pytest.mark.parametrize(("slow", "alike"), [(1.1, True), (2.0, False)])
def test_workers_that_are_nearly_alike_or_new_cost_the_same(slow: float, alike: bool) -> None:
    """How: three learn, one of them `slow` times slower, and one has not worked.

    Seen to fail with unfitted workers left with their own price, and with NEAR at 10.
    """
    world = World(pools(4, 1))
    workers = [w for w in world.core.fleet if w.role.prefills]
    for index, worker in enumerate(workers[:3]):
        for n in range(1, 40):
            tokens = 100 * (n % 7 + 1)
            pace = slow if index == 2 else 1.0 + index / 1000
            busy_s = pace * (0.01 + tokens * 1e-4)
            work = Work(
                num_steps=1, prefill_tokens=tokens, prefill_pairs=tokens * 512, decode_tokens=0, decode_kv_token_steps=0, busy_s=busy_s
            )
            worker.model.observe(work)
        worker.model.refit()
    common_cost.share_cost(workers)
    world.core.fleet.refresh(world.core.fleet.pools(place(1).model_id), world.now)
    costs: list[StepCost] = [w.cost for w in workers]
    assert costs[0] == costs[1] == costs[3]
    assert (costs[2] == costs[0]) is alike
