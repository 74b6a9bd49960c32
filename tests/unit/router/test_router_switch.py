"""The policy of a running router is replaced between two turns: nothing that is booked or waits is lost, and forgetting is complete."""

from __future__ import annotations

import time
from dataclasses import dataclass

import pytest

from protocol.control import PolicyInUse, UsePolicy
from protocol.messages import Assigned, Done, Place
from protocol.worker import AllBlocksCleared, BlocksStored, Role, WorkerId
from router import policies
from router.policies import Cost, PlacementView, Stateless
from router.policies.api import KvChanged, PolicyEvent, WorkerJoined
from tests.unit.router.router_world import World, answer, chain, place, pools
from tests.unit.router.test_router_service import SmallWorker, cluster

pytestmark = pytest.mark.pure


class Noted(Stateless):
    """Prices everybody alike and notes what it is told."""

    def __init__(self) -> None:
        self.told: list[PolicyEvent] = []

    def score(self, view: PlacementView, request: Place, now: float, rng: object) -> dict[WorkerId, Cost]:
        return {w.worker_id: Cost(1.0, ()) for w in view.workers}

    def observe(self, event: PolicyEvent, now: float) -> None:
        self.told.append(event)


def switch(world: World, spec: str, *, forget: bool = False) -> None:
    world.core.use_policy(policies.load(spec), spec, world.now, forget=forget)


def test_a_switch_leaves_bookings_and_the_queue_as_they_are() -> None:
    """How: one request is booked and one waits for room while the policy changes; both end under the new one.

    Seen to fail with `use_policy` that frees what is booked.
    """
    world = World({"w": Role.BOTH}, inbox_steps=0.1)
    first, second = place(1, 2048), place(2, 2048)
    world.assign(first)
    assert world.place(second) is None
    switch(world, "round_robin", forget=True)
    world.core.check()
    assert len(world.core.bookings) == 1 and sum(len(q) for q in world.core.waiting_room.queues.values()) == 1
    world.prefill_done(first)
    assert answer(world.done(first) + world.report("w"), second) or answer(world.said, second)
    world.done(second)
    assert world.is_empty
    assert (world.core.policy.name, world.core.config.policy) == ("round_robin", "round_robin")


def test_a_new_policy_is_told_who_is_there_and_what_each_holds() -> None:
    """Seen to fail with a switch that introduces nobody, and with one that leaves what is held out."""
    world, held = World(pools(1, 1)), chain("held", 3)
    world.hold("prefill-0", held, next_event_number=8)
    noted = Noted()
    world.core.use_policy(noted, "m:Noted", world.now, forget=False)
    joined = [(e.worker_id, e.role) for e in noted.told if isinstance(e, WorkerJoined)]
    assert joined == [("prefill-0", Role.PREFILL), ("decode-0", Role.DECODE)]
    (changed,) = [e for e in noted.told if isinstance(e, KvChanged)]
    cleared, stored = changed.events
    assert isinstance(cleared, AllBlocksCleared) and isinstance(stored, BlocksStored)
    assert changed.worker_id == "prefill-0" and set(stored.hashes) == set(held)


def test_forgetting_makes_the_next_choices_those_of_a_fresh_router() -> None:
    """How: a router that learned costs, hit rates, guesses and turns, beside one of the same seed that has seen nothing.

    Seen to fail, each, with guesses, cost models, hit rates and `last_chosen` left.
    """
    old, fresh = World(pools(3, 2)), World(pools(3, 2))
    for number in range(8):
        request = place(number, block_hashes=chain("shared", 32))
        old.assign(request)
        old.prefill_done(request)
        old.done(request)
    for steps in (10, 30):
        old.now += 2.0
        counters = {"busy_us": steps * 400_000, "prompt_tokens_computed": steps * 3000, "generated_tokens": steps}
        old.report("prefill-0", step_count=steps, counters=counters)
    switch(old, "least_work", forget=True)
    switch(fresh, "least_work")
    old.report_all()
    fresh.now = old.now
    fresh.report_all()
    assert [w.cost for w in old.core.fleet] == [w.cost for w in fresh.core.fleet]
    assert [w.hit_rate for w in old.core.fleet] == [0.0] * 5
    assert old.core.index.num_entries == 0 and old.core.index.size_bytes == 0
    for number in range(100, 106):
        request = place(number, block_hashes=chain("shared", 32))
        ours, theirs = old.assign(request), fresh.assign(request)
        assert (ours.prefill_worker, ours.decode_worker, ours.prefill_scores) == (
            theirs.prefill_worker,
            theirs.decode_worker,
            theirs.prefill_scores,
        )


def test_without_forgetting_what_was_learned_stays() -> None:
    """Seen to fail with `use_policy` that always forgets."""
    world = World(pools(2, 1))
    world.assign(place(1))
    world.core.catch_up()
    entries = world.core.index.num_entries
    switch(world, "round_robin")
    assert world.core.index.num_entries == entries > 0


async def test_an_operator_switches_over_the_socket_and_a_wrong_name_changes_nothing() -> None:
    """How: a policy by name, by module:Class, and two that cannot be loaded, while a request is booked.

    Seen to fail with the timed policy of the service not replaced, and with an error that closes the connection.
    """
    workers = [SmallWorker("prefill-0", Role.PREFILL), SmallWorker("decode-0", Role.DECODE)]
    async with cluster(workers) as (_, gateway):
        request = place(1)
        await gateway.assign(request)

        async def use(policy: str) -> PolicyInUse:
            gateway.connection.send(UsePolicy(reply_id=3, policy=policy, forget=True))
            found: PolicyInUse = await gateway.next(PolicyInUse)
            return found

        own = "tests.unit.router.test_router_switch:Dear"
        assert await use("round_robin") == PolicyInUse(reply_id=3, policy="round_robin", error="")
        assert (await use(own)).error == ""
        wrong = await use("round_robbin")
        assert wrong.policy == own and "did you mean 'round_robin'" in wrong.error
        assert "no module" in (await use("no_such_module_of_ours:P")).error.lower()
        assert "cannot be made" in (await use("tests.unit.router.test_router_switch:Broken")).error
        document = await gateway.status()
        assert document["policy"]["spec"] == own and document["bookings"] == 1
        gateway.connection.send(place(2))
        found = await gateway.next(Assigned)
        assert found.assignment.policy == own
        assert (await gateway.status())["assignments"][-1]["prefill_scores"][0]["seconds"] == 42.0
        await use("tests.unit.router.test_router_switch:Slow")
        await gateway.assign(place(3))
        assert (await gateway.status())["policy"]["overruns"] == 1
        for number in (1, 2, 3):
            gateway.connection.send(Done(request_id=place(number).request_id, attempt=0, num_output_tokens=1))
        assert (await gateway.status())["bookings"] == 0


class Dear(Stateless):
    """A user's own."""

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config: Config) -> None:
        pass

    def score(self, view: PlacementView, request: Place, now: float, rng: object) -> dict[WorkerId, Cost]:
        return {w.worker_id: Cost(42.0, ()) for w in view.workers}


class Slow(Dear):
    """Beyond router.policy_time_limit_s."""

    def score(self, view: PlacementView, request: Place, now: float, rng: object) -> dict[WorkerId, Cost]:
        time.sleep(0.06)
        return super().score(view, request, now, rng)


class Broken(Dear):
    def __init__(self, config: Dear.Config) -> None:
        raise RuntimeError("cannot be made")
