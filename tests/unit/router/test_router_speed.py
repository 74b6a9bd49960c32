"""What one decision costs, in thread CPU time and against hashing the same prompt: a busy machine slows both sides.

Seen on two cores shared by nine builds (load average 7): place and book p50 216 us where hashing took 38 us; `-rP` prints today's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random
from statistics import median

import pytest

from protocol.block_hash import block_hashes
from protocol.messages import Place
from protocol.request import token_buffer
from tests.unit.router.router_world import World, chain, place, pools

pytestmark = pytest.mark.pure

NUM_TOKENS = 4096


def prompts(count: int, *, first: int = 0) -> list[Place]:
    """Half of each prompt is one of 64 shared prefixes."""
    shared = [chain(("shared", i), NUM_TOKENS // 32) for i in range(64)]
    rng = Random(3)
    found = []
    for number in range(first, first + count):
        prefix = shared[rng.randrange(64)]
        tail = chain(("tail", number), NUM_TOKENS // 32, parent=prefix[-1])
        found.append(place(number, num_tokens=NUM_TOKENS, block_hashes=prefix + tail, expected_output_tokens=16))
    return found


def times_us(act: Callable[[Place], object], requests: list[Place]) -> list[float]:
    taken = []
    for request in requests:
        start = time.thread_time()
        act(request)
        taken.append((time.thread_time() - start) * 1e6)
    return taken


def decide(world: World, requests: list[Place], *, num_live: int) -> list[float]:
    """Microseconds of each Place, with `num_live` requests booked all the while."""
    taken = []
    for number, request in enumerate(requests):
        world.now += 0.01
        taken += times_us(world.place, [request])
        world.core.catch_up()
        world.prefill_done(request)
        if number >= num_live:
            world.done(requests[number - num_live])
        if number % 10 == 0:
            world.tick(0.0)
            world.report_all()
    return taken[len(taken) // 2 :]


def test_a_decision_over_64_workers_costs_a_few_times_the_hashing_of_its_prompt() -> None:
    """p50 of place-and-book, 4k tokens, 64 workers, in the dearest case (prefix_cost over split pools)."""
    tokens = token_buffer(range(NUM_TOKENS))
    world = World(pools(32, 32))
    requests = prompts(300)
    taken = decide(world, requests, num_live=50)
    hashing = times_us(lambda _: block_hashes(b"root", tokens), requests)
    print(f"decision p50 {median(taken):.0f} us, p99 {sorted(taken)[len(taken) * 99 // 100]:.0f} us; hashing p50 {median(hashing):.0f} us")
    assert median(taken) < 15 * median(hashing)


def test_the_cost_of_a_decision_does_not_grow_with_what_is_booked() -> None:
    """Preble's grows two to four times. Here 1000 live requests against 20, in one run so that the machine is the same."""
    requests = prompts(1200)
    few = median(decide(World(pools(32, 32)), requests[:400], num_live=20))
    many = median(decide(World(pools(32, 32)), requests, num_live=1000))
    print(f"decision p50 {few:.0f} us with 20 live requests, {many:.0f} us with 1000")
    assert many < 2.0 * few
