"""A decode worker is chosen anew while the prompt is computed: when, to whom, and what the bookings say meanwhile."""

from __future__ import annotations

from typing import Any

import pytest

from protocol.messages import Reassigned
from protocol.worker import Role, WorkerState
from router.config import Disaggregate
from router.events import Command, ToGateway, WorkerDown
from router.reassignment import MAX_MOVES
from tests.unit.router.router_world import World, address, place, pools

pytestmark = pytest.mark.pure


def moves(commands: list[Command]) -> list[Reassigned]:
    return [c.message for c in commands if isinstance(c, ToGateway) and isinstance(c.message, Reassigned)]


def held(world: World) -> dict[str, tuple[int, int]]:
    """Sequences and KV tokens booked, by decode worker."""
    world.core.check()
    return {w.worker_id: (w.booked.num_sequences, w.booked.kv_tokens) for w in world.core.fleet if w.role is Role.DECODE}


def split_world(num_decode: int = 2, **config: Any) -> World:
    return World(pools(1, num_decode), disaggregate=Disaggregate.ALWAYS, **config)


def fit_decode(world: World, worker_id: str, *, step_s: float, **changes: int) -> None:
    """Reports after which time per token there is known to be about `step_s`, whatever the batch."""
    for step in range(1, 12):
        world.now += 0.05
        counters = {"generated_tokens": 8 * step, "busy_us": int(4e6 * step_s) * step}
        world.report(worker_id, step_count=4 * step, counters=counters, **(changes if step == 11 else {}))


@pytest.mark.parametrize("how", ["lost", "draining"])
def test_requests_under_way_to_a_worker_that_leaves_go_to_another(how: str) -> None:
    """Those that decode already, and those of others, stay. Seen to fail with `recheck` not called on a report (draining)."""
    world = split_world(3)
    found = {n: world.assign(place(n)) for n in range(6)}
    mine = [n for n, a in found.items() if a.decode_worker == "decode-0"]
    assert len(mine) == 2
    world.prefill_done(place(mine[0]), decode_worker="decode-0")
    left = WorkerDown(worker_id="decode-0", epoch=1)
    commands = world.report("decode-0", state=WorkerState.DRAINING) if how == "draining" else world.on(left)
    (moved,) = moves(commands)
    assert int(moved.request_id, 16) == mine[1] and moved.attempt == 0 and moved.decode_worker in ("decode-1", "decode-2")
    assert f"instead of decode-0 (decode-0 {'is draining' if how == 'draining' else 'was lost'})" in moved.reason
    assert held(world)[moved.decode_worker][0] == 3
    (record,) = world.core.explain(moved.request_id)
    assert record.assignment is not None and record.assignment.decode_worker == moved.decode_worker
    assert record.assignment.reason == moved.reason and moved.reason.startswith("prefilled on prefill-0, handed to decode-0; ")
    assert world.core.status(world.now)["counters"]["reassigned"] == 1  # type: ignore[index]
    assert moves(world.report("decode-1")) == [] and moves(world.tick()) == [], "once"
    for n in found:
        world.done(place(n))
    assert world.is_empty


def test_the_hold_moves_once_and_follows_who_really_decodes() -> None:
    """The gateway had submitted to decode-0 already: its PrefillDone brings the hold back, twice told or not.

    Seen to fail with `move_decode` not removing the earlier hold, and with `end_prefill` not looking at `decode_worker`.
    """
    world = split_world()
    found = world.assign(place(1))
    first, other = found.decode_worker, {"decode-0": "decode-1", "decode-1": "decode-0"}[found.decode_worker]
    booked = held(world)[first]
    (moved,) = moves(world.report(first, state=WorkerState.DRAINING))
    assert moved.decode_worker == other and held(world) == {first: (0, 0), other: booked}
    world.prefill_done(place(1), decode_worker=first)
    assert held(world) == {first: booked, other: (0, 0)}
    world.prefill_done(place(1), decode_worker=first)
    assert held(world) == {first: booked, other: (0, 0)}
    assert moves(world.report(first, state=WorkerState.DRAINING)) == [], "its prefill is over"
    world.done(place(1))
    assert world.is_empty


def test_a_prefill_that_ends_on_a_worker_the_router_does_not_know_holds_nothing_there() -> None:
    world = split_world()
    world.assign(place(1))
    world.prefill_done(place(1), decode_worker="decode-9")
    world.core.check()
    assert world.is_empty
    world.done(place(1))
    assert world.is_empty


def test_a_worker_booked_beyond_its_pool_gives_its_oldest_away_until_it_is_not() -> None:
    """decode-0 holds 3 requests of 592 tokens each when a report shows 3,000 tokens more in a pool of 4,096.

    Seen to fail with the sheet not refreshed between two moves: all three went.
    """
    small = [address("prefill-0", Role.PREFILL), *(address(f"decode-{i}", Role.DECODE, num_kv_blocks=256) for i in range(2))]
    world = World(small, disaggregate=Disaggregate.ALWAYS)
    world.report("decode-1", state=WorkerState.DRAINING)
    for n in range(3):
        assert world.assign(place(n)).decode_worker == "decode-0"
    assert held(world)["decode-0"] == (3, 3 * 592)
    world.report("decode-1")
    commands = world.report("decode-0", num_running=9, running_kv_tokens=3000)
    assert [(int(m.request_id, 16), m.decode_worker) for m in moves(commands)] == [(0, "decode-1"), (1, "decode-1")]
    assert "booked for 4,776 of 4,096 KV tokens" in moves(commands)[0].reason
    assert held(world) == {"decode-0": (1, 592), "decode-1": (2, 1184)}


def test_nobody_moves_where_there_is_no_more_room() -> None:
    """Seen to fail with `_with_room` left out of `another_decoder`."""
    small = [address("prefill-0", Role.PREFILL), *(address(f"decode-{i}", Role.DECODE, num_kv_blocks=256) for i in range(2))]
    world = World(small, disaggregate=Disaggregate.ALWAYS)
    for n in range(2):
        world.assign(place(n))
    world.report("decode-1", num_running=9, running_kv_tokens=3600)
    assert moves(world.report("decode-0", num_running=9, running_kv_tokens=4000)) == []


def test_a_request_leaves_a_worker_that_would_break_its_objective_for_one_that_would_not() -> None:
    """Both are fitted: 50 ms a token on decode-0, 5 ms on decode-1. Only the request with an objective of 20 ms moves.

    Seen to fail with `slo_tpot_s` compared the wrong way round.
    """
    world = split_world(refuse_by_slo=False)
    fit_decode(world, "decode-0", step_s=0.05)
    fit_decode(world, "decode-1", step_s=0.005)
    world.report("decode-1", state=WorkerState.DRAINING)
    for n, slo_tpot_s in enumerate((0.02, None, 0.5)):
        assert world.assign(place(n, slo_tpot_s=slo_tpot_s)).decode_worker == "decode-0"
    assert moves(world.report("decode-0", step_count=50)) == [], "there is no other"
    world.report("decode-1", step_count=50)
    commands = world.report("decode-0", step_count=50)
    assert [(int(m.request_id, 16), m.decode_worker) for m in moves(commands)] == [(0, "decode-1")]
    assert "longer a token than the objective, 0.02 s" in moves(commands)[0].reason


def test_a_request_that_finds_no_other_worker_waits_for_one_to_join() -> None:
    """The only decode worker is lost; another comes while the prompt is still computed."""
    world = split_world(1)
    world.assign(place(1))
    world.kill("decode-0")
    assert moves(world.tick()) == []
    world.join(address("decode-1", Role.DECODE))
    (moved,) = moves(world.tick())
    assert moved.decode_worker == "decode-1"
    world.done(place(1))
    assert world.is_empty


def test_a_request_moves_only_so_often() -> None:
    """Two workers drain in turn for ever. Seen to fail with `num_moves` not counted."""
    world = split_world()
    world.assign(place(1))
    world.said.clear()
    for _ in range(4):
        for worker_id, other in (("decode-0", "decode-1"), ("decode-1", "decode-0")):
            world.report(other)
            world.report(worker_id, state=WorkerState.DRAINING)
    assert len(moves(world.said)) == MAX_MOVES


def test_what_is_prefilled_where_it_decodes_never_moves() -> None:
    world = World(pools(1, 2))
    found = world.assign(place(1, num_tokens=20))
    assert found.prefill_worker == found.decode_worker
    assert moves(world.report(found.decode_worker, state=WorkerState.DRAINING)) == []
