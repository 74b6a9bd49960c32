"""Laws of the router under any order of events: nothing leaks, service is fair, runs repeat."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.messages import Assigned, Assignment, Place, Reassigned, Refused
from protocol.request import AttemptKey
from protocol.worker import Role, WorkerState
from router import policies
from router.events import Command, GatewayDown, GatewayUp, ToGateway
from router.queue import FairQueue, Waiting
from router.reassignment import MAX_MOVES
from tests.unit.router.router_world import World, address, chain, place

pytestmark = pytest.mark.pure

ROLES = {
    "prefill-0": Role.PREFILL,
    "prefill-1": Role.PREFILL,
    "decode-0": Role.DECODE,
    "decode-1": Role.DECODE,
    "both-0": Role.BOTH,
}
WORKERS = tuple(ROLES)
POLICIES = tuple(policies.BUILT_IN)

small = st.integers(0, 4)
operations = st.lists(
    st.tuples(
        st.sampled_from(
            (
                "place",
                "place",
                "place",
                "prefill_done",
                "done",
                "done",
                "kill",
                "join",
                "report",
                "report",
                "drain",
                "gateway",
                "tick",
                "silence",
            )
        ),
        small,
        small,
        st.integers(1, 5000),
    ),
    min_size=5,
    max_size=60,
)


def request(number: int, attempt: int, num_tokens: int) -> Place:
    return place(
        number,
        num_tokens=num_tokens,
        attempt=attempt,
        block_hashes=chain(("family", number % 3), num_tokens // 16),
        tenant=f"tenant-{number % 2}",
        priority=number % 2,
        num_choices=1 + number % 3,
        local_only=number == 4,
        excluded=(WORKERS[number % 5],) if attempt else (),
    )


def play(world: World, steps: list[tuple[str, int, int, int]]) -> list[list[Command]]:
    """Perform the steps; what the core answered to each."""
    answers = []
    for operation, a, b, size in steps:
        world.now += 0.01
        before = len(world.said)
        worker, mentioned = WORKERS[a % len(WORKERS)], request(a, b % 2, size)
        match operation:
            case "place":
                world.place(mentioned, gateway=f"gateway-{b % 2}")
            case "prefill_done":
                decode_worker = (*WORKERS, None)[b + size % 2]  # as assigned, as moved, or neither
                world.prefill_done(mentioned, decode_worker=decode_worker)
            case "done":
                world.done(mentioned, num_output_tokens=size)
            case "kill":
                world.kill(worker)
            case "join":
                world.join(address(worker, ROLES[worker], epoch=1 + b, max_num_seqs=8, num_kv_blocks=512))
            case "report":
                state = WorkerState.DRAINING if b == 4 else WorkerState.READY
                world.report(worker, waiting_tokens=size if b % 2 else 0, num_running=b, running_kv_tokens=100 * b, state=state)
            case "drain":
                world.report(worker, state=WorkerState.DRAINING)
            case "gateway":
                name = f"gateway-{a % 2}"
                world.on(GatewayDown(gateway=name) if b % 2 else GatewayUp(gateway=name, epoch=b))
            case "tick":
                world.tick(0.05 * size)
            case "silence":
                world.now += 0.3
        world.core.check()
        answers.append(world.said[before:])
    return answers


@settings(max_examples=300, deadline=None)
@given(operations, st.sampled_from(POLICIES))
def test_bookings_never_leak(steps: list[tuple[str, int, int, int]], policy: str) -> None:
    """Whatever comes twice, late or never, Done of everything leaves no hold, booking or queue entry; sums are checked at each step.

    Decode workers are named anew by the router, and otherwise by gateways. Seen to fail with `remove_hold` left out of `_release`, and
    out of `move_decode`.
    """
    world = World(ROLES, policy=policies.load(policy), max_queue=5, booking_ttl_s=20.0)
    play(world, steps)
    for number in range(5):
        for attempt in range(2):
            world.done(request(number, attempt, 16))
    world.core.check()
    assert world.is_empty


moves = st.lists(
    st.tuples(
        st.sampled_from(("place", "place", "prefill_done", "drain", "drain", "report", "kill", "join")), small, small, st.integers(500, 900)
    ),
    min_size=30,
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(moves, st.sampled_from(POLICIES))
def test_decode_workers_are_named_anew_while_prefill_is_under_way(steps: list[tuple[str, int, int, int]], policy: str) -> None:
    """To a worker that is ready, other than both it had, at most MAX_MOVES times; the bookings agree (`check`).

    Seen to fail with `start_settling` left out of `end_prefill`: one whose prefill was done moved.
    """
    world = World(ROLES, policy=policies.load(policy), max_queue=5)
    placed: dict[AttemptKey, Assignment] = {}
    num_moves: Counter[AttemptKey] = Counter()
    prefilled: set[AttemptKey] = set()
    for step, commands in zip(steps, play(world, steps), strict=True):
        mentioned = request(step[1], step[2] % 2, 1)
        key = AttemptKey(request_id=mentioned.request_id, attempt=mentioned.attempt)
        if step[0] in ("prefill_done", "done"):
            prefilled.add(key)
        for command in commands:
            message = command.message
            if isinstance(message, Assigned):
                assignment = message.assignment
                key = AttemptKey(request_id=assignment.request_id, attempt=assignment.attempt)
                placed[key] = assignment
                prefilled.discard(key)
                num_moves[key] = 0
            elif isinstance(message, Reassigned):
                key = AttemptKey(request_id=message.request_id, attempt=message.attempt)
                before = placed[key]
                assert message.decode_worker not in (before.prefill_worker, before.decode_worker) and message.decode_worker in WORKERS
                assert key not in prefilled, "its prefill is done"
                placed[key] = replace(before, decode_worker=message.decode_worker)
                num_moves[key] += 1
                assert num_moves[key] <= MAX_MOVES


@settings(max_examples=60, deadline=None)
@given(operations, st.sampled_from(POLICIES))
def test_every_assignment_is_to_ready_workers_and_each_place_is_answered_once(steps: list[tuple[str, int, int, int]], policy: str) -> None:
    """An attempt gets one answer, Assigned or Refused, unless it is asked for again; excluded workers are a last resort."""
    world = World(ROLES, policy=policies.load(policy), max_queue=5)
    asked: Counter[AttemptKey] = Counter()
    answered: Counter[AttemptKey] = Counter()
    for step, commands in zip(steps, play(world, steps), strict=True):
        if step[0] == "place":
            mentioned = request(step[1], step[2] % 2, 1)
            asked[AttemptKey(request_id=mentioned.request_id, attempt=mentioned.attempt)] += 1
        for command in commands:
            if not isinstance(command, ToGateway):
                continue
            message = command.message
            if isinstance(message, Assigned):
                found = message.assignment
                answered[AttemptKey(request_id=found.request_id, attempt=found.attempt)] += 1
                assert found.prefill_worker in WORKERS and found.decode_worker in WORKERS
                if int(found.request_id, 16) == 4:
                    assert found.prefill_worker == found.decode_worker, "local_only"
            elif isinstance(message, Refused):
                answered[AttemptKey(request_id=message.request_id, attempt=message.attempt)] += 1
    assert all(answered[key] <= asked[key] for key in answered)


@settings(max_examples=40, deadline=None)
@given(operations, st.sampled_from(POLICIES), st.integers(0, 2**32))
def test_the_same_events_and_seed_give_the_same_commands(steps: list[tuple[str, int, int, int]], policy: str, seed: int) -> None:
    """Seen to fail with `tie_hash` taken from the interpreter's `id`."""
    first, second = (play(World(ROLES, policy=policies.load(policy), seed=seed), steps) for _ in range(2))
    assert first == second


# --- fairness ---------------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 500)), min_size=20, max_size=60),
    st.lists(st.tuples(st.integers(1, 2000), st.integers(1, 500)), min_size=20, max_size=60),
    st.integers(0, 5),
)
def test_service_gap_of_backlogged_tenants_is_bounded(
    first: list[tuple[int, int]], second: list[tuple[int, int]], num_running: int
) -> None:
    """While both tenants wait, their service differs by at most twice the dearest request, plus what runs unsettled (theorem 4.4 of VTC).

    Seen to fail with the output left out of the charge.
    """
    queue = FairQueue(output_weight=2.0, max_tenants=10)
    outputs: dict[AttemptKey, int] = {}
    for tenant, requests in (("a", first), ("b", second)):
        for number, (num_tokens, num_output) in enumerate(requests):
            wanted = place(number + 1000 * (tenant == "b"), num_tokens=num_tokens, expected_output_tokens=500, tenant=tenant)
            key = AttemptKey(request_id=wanted.request_id, attempt=0)
            outputs[key] = num_output
            queue.push(Waiting(key=key, gateway="g", place=wanted, since_s=0.0))
    dearest = 2000 + 2.0 * 500
    service = {"a": 0.0, "b": 0.0}
    running: list[tuple[Waiting, int]] = []
    while {w.place.tenant for w in queue} == {"a", "b"}:
        head = next(queue.heads())
        running.append((head, queue.serve(head.key)))
        if len(running) > num_running:
            ended, predicted = running.pop(0)
            queue.settle(ended.place.tenant, predicted_output_tokens=predicted, num_output_tokens=outputs[ended.key], num_choices=1)
            service[ended.place.tenant] += ended.place.num_tokens + 2.0 * outputs[ended.key]
        assert abs(service["a"] - service["b"]) <= (2 + num_running) * dearest
