"""When a router says that it is ready, and why not. One core, driven by hand; the words are those that gateways get."""

from __future__ import annotations

import pytest

from protocol.messages import Membership, ServiceAddress
from protocol.peering import BookingNews, RouterReadiness
from protocol.worker import BlocksStored
from router.events import Command, GatewayUp, MembershipChanged, ToGateway, WorkerUp
from tests.unit.router.router_ring import Ring
from tests.unit.router.router_world import World, address, place, pools

pytestmark = pytest.mark.pure


def words(commands: list[Command]) -> list[RouterReadiness]:
    return [c.message for c in commands if isinstance(c, ToGateway) and isinstance(c.message, RouterReadiness)]


def empty(**config: object) -> World:
    """A router that has just started, with one gateway."""
    world = World({}, **config)
    (word,) = words(world.on(GatewayUp(gateway="gateway-0")))
    assert not word.is_ready and word.reason == "has not heard from the directory"
    return world


def membership(world: World, *services: ServiceAddress, workers: dict[str, object] | None = None) -> list[Command]:
    found = tuple(address(w, r) for w, r in (workers or pools(1, 1)).items())  # type: ignore[arg-type]
    world.addresses = {a.worker_id: a for a in found}
    return world.on(MembershipChanged(membership=Membership(version=1, workers=found, services=services)))


def other(name: str) -> ServiceAddress:
    return ServiceAddress(name=name, kind="router", epoch=1, host="127.0.0.1", port=1, pid=1)


def test_a_router_that_starts_waits_for_every_worker_and_says_so() -> None:
    """Directory, link, cache and snapshot of each. Seen to fail with `has_heard` of the index not asked."""
    world = empty()
    assert not words(membership(world))
    assert world.core.readiness.reason == "starting: has not heard from prefill-0, decode-0"
    for worker_id in ("prefill-0", "decode-0"):
        world.on(WorkerUp(worker_id=worker_id, epoch=1))
        world.report(worker_id)
        assert not world.core.readiness.is_ready
    world.hold("prefill-0", ())
    assert world.core.readiness.reason == "starting: has not heard from decode-0"
    assert words(world.hold("decode-0", ())) == [RouterReadiness(is_ready=True, reason="")]


def test_a_sick_worker_holds_it_up_for_a_bounded_time() -> None:
    """Seen to fail with `ready_wait_s` not asked."""
    world = empty(ready_wait_s=2.0)
    membership(world, workers=pools(4, 4))
    for worker_id in [w for w in world.addresses if w != "decode-3"]:
        world.on(WorkerUp(worker_id=worker_id, epoch=1))
        world.report(worker_id)
        world.hold(worker_id, ())
    world.tick(1.9)
    assert world.core.readiness.reason == "starting: has not heard from decode-3"
    said: list[RouterReadiness] = []
    for _ in range(4):
        for worker_id in [w for w in world.addresses if w != "decode-3"]:
            world.report(worker_id)
        said += words(world.tick(0.05))
    assert said == [RouterReadiness(is_ready=True, reason="")]


def test_it_waits_for_the_bookings_of_every_router_of_the_directory() -> None:
    """Seen to fail with `missing` not asked."""
    routers = Ring(2, pools(1, 1))
    readiness = [world.core.readiness for world in routers.worlds.values()]
    assert [r.reason for r in readiness] == [f"starting: does not know the bookings of router-{i}" for i in (1, 0)]
    routers.settle()
    assert [r.is_ready for r in readiness] == [True, True]


def test_a_router_whose_loop_stood_still_says_so_until_it_ticks_in_time_again() -> None:
    """Seen to fail with `_stood_still_s` not asked."""
    world = World(pools(1, 1))
    world.on(GatewayUp(gateway="gateway-0"))
    assert not words(world.tick(0.05))
    world.now += 1.0
    world.report_all()
    (word,) = words(world.tick(0.0))
    assert not word.is_ready and word.reason == "its event loop stood still for 1.0 s, the limit is 0.8 s"
    assert words(world.tick(0.05)) == [RouterReadiness(is_ready=True, reason="")]


def test_a_router_that_hears_nothing_of_most_workers_is_not_ready() -> None:
    """Half of four may be silent, three may not. Seen to fail with `>=` for `>`, and with the unlinked ones not counted."""
    world = World(pools(2, 2))
    world.on(GatewayUp(gateway="gateway-0"))
    world.kill("decode-1")
    said: list[RouterReadiness] = []
    for _ in range(20):
        world.report("prefill-0")
        world.report("decode-0")
        said += words(world.tick(0.05))
    assert not said
    for _ in range(20):
        world.report("prefill-0")
        said += words(world.tick(0.05))
    assert [w.reason for w in said] == ["knows nothing newer than 0.8 s of most workers: prefill-1, decode-0, decode-1"]
    world.report("decode-0")
    assert world.core.readiness.is_ready


def test_a_router_that_waits_for_many_kv_events_is_not_ready() -> None:
    """A worker has told of 10 events more than came, the bound is 9. Seen to fail with `num_missed_events` always 0."""
    world = World(pools(1, 1), max_missed_events=9)
    world.hold("prefill-0", (), next_event_number=1)
    world.report("prefill-0", last_event_number=9)
    world.tick()
    assert world.core.readiness.is_ready
    world.report("prefill-0", last_event_number=10)
    world.tick()
    assert world.core.readiness.reason == "waits for 10 KV events of workers, the limit is 9"
    world.kv_events("prefill-0", *(BlocksStored(number=n, parent=b"", hashes=()) for n in range(1, 11)))
    assert world.core.readiness.is_ready


def test_a_router_that_cannot_follow_another_is_not_ready() -> None:
    """A message of router-1 was lost and the set asked for does not come. Seen to fail with `behind` always empty."""
    routers = Ring(2, pools(1, 1))
    routers.settle()
    routers.place("router-1", place(1))
    routers.flush()
    routers.flights.clear()
    for _ in range(20):
        routers.tick(0.05)
        for world in routers.worlds.values():
            world.report_all()
        for flight in [f for f in routers.flights if f.receiver == "router-0" and isinstance(f.message, BookingNews)]:
            routers.deliver(flight)
        routers.flights.clear()
    world = routers.worlds["router-0"]
    assert world.core.readiness.reason == "could not follow the bookings of router-1 for 0.8 s"
    routers.tick(0.3)  # it asks again
    world.report_all()
    routers.settle()
    assert world.core.readiness.is_ready


def test_the_silence_of_one_other_router_is_not_our_fault_and_that_of_all_is() -> None:
    """Seen to fail with `num_others > 1` left out."""
    reasons = []
    for num_routers in (2, 4):
        routers = Ring(num_routers, pools(1, 1))
        routers.settle()
        world = routers.worlds["router-0"]
        routers.worlds = {"router-0": world}
        for _ in range(20):
            routers.tick(0.05)
            world.report_all()
        world.core.readiness.judge(routers.now)
        reasons.append(world.core.readiness.reason)
    assert reasons == ["", "has heard nothing from 3 of 3 other routers for 0.8 s"]
