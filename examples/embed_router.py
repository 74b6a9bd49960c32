"""The router as a library: no Ray, no sockets, no clock. Place requests on an imagined fleet and read why they went where they went.

    python examples/embed_router.py [POLICY]

The same object runs in the live router's process and in the simulator: events in, commands out, time as an argument.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from random import Random

from protocol.block_hash import block_hashes
from protocol.kv import Endpoint
from protocol.messages import Assigned, Assignment, Done, KvEvents, Membership, Place, SnapshotFrame
from protocol.request import token_buffer
from protocol.worker import BlocksStored, Role, WorkerAddress, WorkerSnapshot, WorkerState
from router.config import RouterConfig
from router.core import RouterCore
from router.events import FromGateway, FromWorker, GatewayUp, MembershipChanged, ToGateway, WorkerUp
from router.policies import PlacementPolicy, load

EPOCH = 1
BLOCKS = 4096
GATEWAY = "gateway-0"


def main(spec: str = "prefix_cost") -> None:
    """`spec` is what follows --policy."""
    for user, turns in converse(load(spec)).items():
        for number, turn in enumerate(turns):
            print(f"user {user} turn {number}: {turn.cached_tokens} tokens cached, {turn.reason}")


def converse(policy: PlacementPolicy) -> dict[int, list[Assignment]]:
    """Two conversations of three turns each, on two prefill and two decode workers; assignments by user."""
    core = RouterCore(RouterConfig(), policy=policy, rng=Random(7))
    bring_up(core)
    made: dict[int, list[Assignment]] = {1: [], 2: []}
    now_s = 1.0
    for turn in range(3):
        for user in (1, 2) if turn % 2 == 0 else (2, 1):
            tokens = token_buffer(user * 1000 + k % 97 for k in range(512 * (turn + 1)))
            request = place(f"{user}{turn}".rjust(32, "0"), tokens)
            assignment = next(answers(core, request, now_s))
            made[user].append(assignment)
            finish(core, request, assignment, now_s)
            now_s += 1.0
    assert core.policy.num_failures == 0, core.notes(now_s)
    return made


def answers(core: RouterCore, request: Place, now_s: float) -> Iterator[Assignment]:
    for command in core.on(FromGateway(gateway=GATEWAY, message=request), now_s):
        if isinstance(command, ToGateway) and isinstance(command.message, Assigned):
            yield command.message.assignment


def finish(core: RouterCore, request: Place, assignment: Assignment, now_s: float) -> None:
    """The prefill worker tells which blocks it has cached since, and the gateway that the request is done."""
    worker = assignment.prefill_worker
    known = assignment.cached_tokens // 16
    parent = request.block_hashes[known - 1] if known else bytes(16)
    # A worker numbers its events; each of its turns makes one.
    stored = BlocksStored(number=known // 32 + 1, parent=parent, hashes=request.block_hashes[known:])
    core.on(FromWorker(worker_id=worker, epoch=EPOCH, message=KvEvents(worker_id=worker, epoch=EPOCH, events=(stored,))), now_s)
    core.on(FromGateway(gateway=GATEWAY, message=Done(request_id=request.request_id, attempt=0, num_output_tokens=16)), now_s)


def bring_up(core: RouterCore) -> None:
    """What a live router hears in its first second: who is there, and how they are."""
    fleet = {"prefill-0": Role.PREFILL, "prefill-1": Role.PREFILL, "decode-0": Role.DECODE, "decode-1": Role.DECODE}
    workers = tuple(address(name, role) for name, role in fleet.items())
    core.on(MembershipChanged(membership=Membership(version=1, workers=workers, services=())), 0.0)
    core.on(GatewayUp(gateway=GATEWAY), 0.0)
    for name, role in fleet.items():
        core.on(WorkerUp(worker_id=name, epoch=EPOCH), 0.0)
        core.on(FromWorker(worker_id=name, epoch=EPOCH, message=SnapshotFrame(snapshot=idle(name, role))), 0.0)


def place(request_id: str, tokens: object) -> Place:
    buffer = token_buffer(tokens)
    return Place(
        request_id=request_id,
        attempt=0,
        model_id="demo",
        num_tokens=len(buffer),
        expected_output_tokens=64,
        num_choices=1,
        block_hashes=tuple(block_hashes(bytes(16), buffer)),
        tenant="default",
        priority=0,
        slo_ttft_s=None,
        slo_tpot_s=None,
        excluded=(),
        local_only=False,
    )


def address(name: str, role: Role) -> WorkerAddress:
    return WorkerAddress(
        worker_id=name,
        role=role,
        epoch=EPOCH,
        host="127.0.0.1",
        port=0,
        pid=0,
        hostname="nowhere",
        kv_endpoint=Endpoint(),
        model_id="demo",
        fingerprint=bytes(16),
        block_size_tokens=16,
        num_kv_blocks=BLOCKS,
        max_model_len=8192,
        max_num_seqs=64,
        max_num_batched_tokens=2048,
    )


def idle(name: str, role: Role) -> WorkerSnapshot:
    return WorkerSnapshot(
        worker_id=name,
        epoch=EPOCH,
        role=role,
        state=WorkerState.READY,
        age_s=0.0,
        step_count=0,
        last_event_number=0,
        num_waiting=0,
        num_running=0,
        waiting_tokens=0,
        running_kv_tokens=0,
        num_blocks_total=BLOCKS,
        num_blocks_free=BLOCKS,
        num_blocks_owned=0,
        num_blocks_leased=0,
        num_blocks_cached=0,
        num_preemptions=0,
        step_time_ewma_s=0.0,
        counters={},
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
