"""Laws of several routers under any order of events: bookings never leak, whatever happens to messages and routers."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import Place
from protocol.worker import WorkerState
from router.events import GatewayDown, GatewayUp
from tests.property.test_router_laws import ROLES, WORKERS
from tests.unit.router.router_ring import Ring
from tests.unit.router.router_world import address, chain, place

pytestmark = pytest.mark.pure

NUM_REQUESTS = 5

OPERATIONS = (
    "place", "place", "place", "prefill_done", "done", "done",
    "flush", "flush", "deliver", "deliver", "deliver", "deliver_any", "lose", "twice", "settle",
    "kill", "revive", "cut", "kill_worker", "join_worker", "report", "gateway", "tick", "silence",
)  # fmt: skip
small = st.integers(0, 5)
operations = st.lists(st.tuples(st.sampled_from(OPERATIONS), small, small, st.integers(1, 3000)), min_size=8, max_size=80)


def request(number: int, attempt: int, num_tokens: int) -> Place:
    return place(
        number,
        num_tokens=num_tokens,
        attempt=attempt,
        block_hashes=chain(("family", number % 2), num_tokens // 16),
        num_choices=1 + number % 2,
        local_only=number == 4,
    )


def play(routers: Ring, steps: list[tuple[str, int, int, int]]) -> None:
    """Perform the steps; sums over workers are checked after each."""
    names = sorted(routers.epochs)
    for operation, a, b, size in steps:
        routers.now += 0.003
        name = names[b % len(names)]
        other = names[(b + 1) % len(names)]
        worker, mentioned, flights = WORKERS[a % len(WORKERS)], request(a % NUM_REQUESTS, size % 2, size), routers.flights
        is_alive = name in routers.worlds
        match operation:
            case "place" if is_alive:
                routers.place(name, mentioned, gateway=f"gateway-{a % 2}")
            case "prefill_done" if is_alive:
                routers.prefill_done(name, mentioned)
            case "done" if is_alive:
                routers.done(name, mentioned)
            case "flush":
                routers.flush()
            case "deliver" if flights:
                routers.deliver(flights.pop(0))
            case "deliver_any" if flights:
                routers.deliver(flights.pop(size % len(flights)))
            case "lose" if flights:
                flights.pop(size % len(flights))
            case "twice" if flights:
                routers.deliver(flights[size % len(flights)])
            case "settle":
                routers.settle()
            case "kill" if is_alive and len(routers.worlds) > 1:
                routers.kill(name)
            case "revive" if not is_alive:
                routers.revive(name)
            case "cut" if is_alive and other in routers.worlds:
                routers.cut(name, other)
            case "kill_worker" if is_alive:
                routers.worlds[name].kill(worker)
            case "join_worker" if is_alive:
                routers.worlds[name].now = routers.now
                routers.worlds[name].join(address(worker, ROLES[worker], epoch=1 + size % 2, max_num_seqs=8, num_kv_blocks=512))
            case "report" if is_alive:
                routers.worlds[name].now = routers.now
                routers.worlds[name].report(worker, num_running=a, running_kv_tokens=100 * a, state=WorkerState.READY)
            case "gateway" if is_alive:
                gateway = f"gateway-{a % 2}"
                routers.on(name, GatewayDown(gateway=gateway) if size % 2 else GatewayUp(gateway=gateway, epoch=size % 3))
            case "tick":
                routers.tick(0.001 * size)
            case "silence":
                routers.now += 0.3
        routers.check()


@settings(max_examples=400, deadline=None)
@given(operations, st.integers(2, 3))
def test_bookings_never_leak_between_routers(steps: list[tuple[str, int, int, int]], num_routers: int) -> None:
    """Messages are delayed, lost, doubled and reordered, routers die and come back, gateways say things to any of them.

    Once every attempt is over at some router, messages arrive again, and a lost message has shown by the number of the next, nothing is
    held on any worker in any router's belief. Seen to fail with `_book` not asking `has_ended`, with `pass_on` not telling, and with
    `on_over` not called.
    """
    routers = Ring(num_routers, ROLES, max_queue=20, gateway_grace_s=2.0, booking_ttl_s=1000.0)
    play(routers, steps)
    for number in range(NUM_REQUESTS):
        for attempt in range(2):
            routers.done(sorted(routers.worlds)[number % len(routers.worlds)], request(number, attempt, 16))
    for _ in range(120):  # signs of life show gaps, sets are asked for again each second, lost routers' grace ends
        routers.settle()
        routers.tick(0.05)
        routers.check()
    routers.settle()
    assert routers.is_empty, {name: routers.booked(name) for name in routers.worlds}
    assert all(not world.core.peers.missing() or len(routers.worlds) < num_routers for world in routers.worlds.values())
