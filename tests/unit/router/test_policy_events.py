"""What a policy is told of the bookings that are made, moved and ended."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.worker import WorkerState
from router.config import Disaggregate
from router.policies.api import Booked, Finished, Moved, PolicyEvent
from tests.unit.router.router_world import World, place, pools
from tests.unit.router.test_router_policies import Constant, ConstantConfig

pytestmark = pytest.mark.pure


class Listening(Constant):
    """Keeps what it hears of bookings."""

    def __init__(self) -> None:
        super().__init__(ConstantConfig())
        self.heard: list[PolicyEvent] = []

    def observe(self, event: PolicyEvent, now: float) -> None:
        if isinstance(event, (Booked, Moved, Finished)):
            self.heard.append(event)

    def ends(self) -> list[tuple[int, int | None]]:
        """(request, output tokens) of what has finished."""
        return [(int(e.key.request_id, 16), e.num_output_tokens) for e in self.heard if isinstance(e, Finished)]


def test_every_booking_is_finished_once_for_the_policy_however_it_ends() -> None:
    """How: a Done, a newer attempt, a gateway lost, the TTL, both workers lost; a Done that comes after tells nothing more.

    Seen to fail with `_over` not told of, with the key left in `_untold` by a Done, and with `_untold` not emptied.
    """
    policy = Listening()
    world = World(pools(1, 1), policy=policy, booking_ttl_s=5.0, gateway_grace_s=1.0)
    world.assign(place(1))
    world.done(place(1), num_output_tokens=7)
    assert policy.ends() == [(1, 7)]
    world.assign(place(2))
    world.assign(replace(place(2), attempt=1))
    assert policy.ends()[1:] == [(2, None)]
    world.done(replace(place(2), attempt=1), num_output_tokens=3)
    world.assign(place(3))
    world.tick(6.0)
    world.report_all()
    assert policy.ends()[2:] == [(2, 3), (3, None)]
    world.done(place(3))
    world.assign(place(4))
    for worker in list(world.addresses):
        world.kill(worker)
    assert policy.ends()[4:] == [(4, None)]
    world.done(place(4))
    assert len(policy.ends()) == sum(isinstance(e, Booked) for e in policy.heard) == 5


def test_a_policy_hears_who_decodes_after_a_move() -> None:
    """Seen to fail with Moved not told in `_moved` (draining), and not in `_end_prefill` (the gateway kept the first)."""
    policy = Listening()
    world = World(pools(1, 3), policy=policy, disaggregate=Disaggregate.ALWAYS)
    first = world.assign(place(1)).decode_worker
    world.report(first, state=WorkerState.DRAINING)
    (moved,) = [e for e in policy.heard if isinstance(e, Moved)]
    assert moved.decode_worker not in ("", first) and int(moved.key.request_id, 16) == 1
    world.prefill_done(place(1), decode_worker=first)
    assert [e.decode_worker for e in policy.heard if isinstance(e, Moved)] == [moved.decode_worker, first]
