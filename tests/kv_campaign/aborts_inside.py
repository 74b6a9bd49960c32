"""Hand-offs given up at every state, many at once, between two whole workers in this process: what is left must be nothing.

Two WorkerHosts (core, paced executor, KVEndpoint, real sockets and shared memory) and a gateway share one event loop, so the state of
both sides can be seen when something is done to a hand-off. Everything else about them is as it is served; they are only slower
(tests.kv_campaign.watch).
"""

from __future__ import annotations

import asyncio
import gc
import os
import tempfile
import threading
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from random import Random

from cluster.directory import Directory
from cluster.worker_build import WorkerSpec, build_worker
from cluster.worker_host import WorkerHost
from engine.core.events import Command, Event
from protocol.lifecycle import HandoffState
from protocol.request import first_attempt
from protocol.worker import Role, WorkerAddress
from tests.kv_campaign.abort_gateway import DEADLINE_S, DECODE, MODEL_DIR, PREFILL, CampaignGateway, Trace, config, undisturbed
from tests.kv_campaign.watch import NUM_GOOD, NUM_WRONG, SLOWEST_MS, Slowness, watch
from tests.sim_cluster import Checker

CONCURRENCY = 8
REACH_TIMEOUT_S = 1.0  # for a state to come; then it is done in whatever state there is
END_TIMEOUT_S = 15.0  # of an attempt that nobody gave up: a pull to its deadline, computed again, on a busy machine
NUM_FILLERS = 3
REST_TIMEOUT_S = DEADLINE_S + 8.0
SLACK_S = 1.0  # of a deadline: two long pauses of the campaign's own (tests.kv_campaign.watch), and a busy machine


class Act(Enum):
    NOTHING = "nothing"
    CANCEL = "cancel"  # the user goes away: both workers are told
    CANCEL_AT_SOURCE = "cancel_at_source"  # withdrawn; its blocks may be written anew at once
    CANCEL_AT_TARGET = "cancel_at_target"
    ABANDON = "abandon"  # nobody says anything any more: only the lease ends it
    GATEWAY_LOST = "gateway_lost"
    STALL = "stall"  # the source sends nothing for longer than the deadline (tcp)


class Phase(Enum):
    """State of a hand-off as both sides see it."""

    PREFILLING = "prefilling"
    OFFERED = "offered"  # the gateway has the offer and has told nobody
    WAITING = "waiting_for_room"
    FOLLOWING = "following"  # pulling behind a source that still computes
    PULLING = "pulling"
    RESERVED = "reserved"  # pulling, and the source has heard of it
    VERIFIED = "verified"  # copied; the check is under way and nothing acknowledged
    ACKED = "acked"  # the target has it, its acknowledgement is on the way
    RELEASED = "released"
    PARKED = "parked"  # a pull behind the source failed; its first token is waited for. Too rare to be asked for


@dataclass(slots=True)
class Report:
    """Of any number of rounds."""

    rounds: Counter[tuple[Act, Phase]] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)  # of transfers, as told to the gateway
    completed: int = 0  # attempts that came to their end, each with the right tokens
    good_pulls: int = 0
    wrong_blocks: int = 0
    held_blocks: int = 0  # at rest: owned, leased, or on no list
    slowest_pull_ms: int = 0
    leases_expired: int = 0
    left_over: list[str] = field(default_factory=list)


class World:
    """Directory, two workers and a gateway on this loop."""

    def __init__(self, kv_transport: str, run_dir: Path, seed: int, *, offer_early: bool) -> None:
        self.secret = b"s" * 32
        self.directory = Directory(secret=self.secret, epoch=time.time_ns())
        self._kv_transport = kv_transport
        self._run_dir = run_dir
        self._offer_early = offer_early
        self._rng = Random(seed)
        self.hosts: dict[str, WorkerHost] = {}
        self.broken_laws: list[Exception] = []

    @property
    def addresses(self) -> dict[str, WorkerAddress]:
        return {a.worker_id: a for a in self.directory.membership.workers}

    async def start(self) -> None:
        await self.directory.start()
        for worker_id, role in ((PREFILL, Role.PREFILL), (DECODE, Role.DECODE)):
            spec = WorkerSpec(
                config=config(self._kv_transport, role, offer_early=self._offer_early),
                model_dir=MODEL_DIR,
                worker_id=worker_id,
                role=role,
                directory_host=self.directory.host,
                directory_port=self.directory.port,
                secret=self.secret,
                run_dir=self._run_dir,
            )
            host = self.hosts[worker_id] = build_worker(spec)
            watch(host, host._endpoint._pool.region, self._rng)
            _check_every_turn(host, self.broken_laws)
            await host.start()
        while len(self.addresses) < len(self.hosts):
            await asyncio.sleep(0.005)

    async def close(self) -> None:
        for host in self.hosts.values():
            await host.close()
            host._endpoint._pool.close()
        self.directory.close()
        await asyncio.sleep(0)

    def phase(self, trace: Trace) -> Phase:
        source, target = self.hosts[PREFILL], self.hosts[DECODE]
        if trace.handoff is None:
            return Phase.PREFILLING
        offer = source._core._offers._open.get(trace.handoff.handoff_id)
        if not trace.is_sent_on:
            return Phase.OFFERED
        if any(s.attempt.key.request_id == trace.request_id for s in target._core._scheduler.parked.values()):
            return Phase.PARKED
        live = target._core._intake._open.get(trace.handoff.handoff_id)
        if live is None or live.handoff is None:
            return Phase.RELEASED if offer is None else Phase.ACKED if trace.path else Phase.WAITING
        if not live.handoff.is_pulling:
            return Phase.WAITING
        if not live.handoff.handoff.is_complete:
            return Phase.FOLLOWING
        pull = target._endpoint._pulls.get(trace.handoff.handoff_id)
        if pull is not None and pull.checking:
            return Phase.VERIFIED
        is_reserved = offer is not None and offer[0].state is HandoffState.RESERVED
        return Phase.RESERVED if is_reserved else Phase.PULLING


def run_inside(num_rounds: int, seed: int, kv_transport: str, report: Report, *, offer_early: bool) -> None:
    """Adds to `report`. Every law that can be broken at once is an assertion; what is left over is reported."""
    before = _belongings()
    with tempfile.TemporaryDirectory(prefix="kv-") as path:
        slowness = Slowness(Random(seed))
        with slowness.installed():
            asyncio.run(_run(num_rounds, seed, kv_transport, Path(path), slowness, report, offer_early))
        left = sorted(name for name in os.listdir(path))
    after = _belongings()
    report.left_over += [f"file {name}" for name in left]
    report.left_over += [f"{after[0] - before[0]} descriptors"] * (after[0] != before[0])
    report.left_over += [f"thread {name}" for name in sorted(after[1] - before[1])]


async def _run(num_rounds: int, seed: int, kv_transport: str, run_dir: Path, slowness: Slowness, report: Report, offer_early: bool) -> None:
    world = World(kv_transport, run_dir, seed, offer_early=offer_early)
    await world.start()
    shared = [Random(seed).randrange(3, 4096) for _ in range(40)]
    try:
        async with CampaignGateway(world) as gateway:
            gate = asyncio.Semaphore(CONCURRENCY)

            async def one(number: int) -> None:
                async with gate:
                    await _round(world, gateway, number, seed, shared, slowness if kv_transport == "tcp" else None, report)

            await asyncio.gather(*(one(number) for number in range(num_rounds)))
            await _rest(world, report)
        for host in world.hosts.values():
            seen = host._counters
            report.good_pulls += seen[NUM_GOOD]
            report.wrong_blocks += seen[NUM_WRONG] + host._executor.num_wrong_reads  # type: ignore[attr-defined]
            report.slowest_pull_ms = max(report.slowest_pull_ms, seen[SLOWEST_MS])
            report.leases_expired += host._core._counters["leases_expired"]
    except (AssertionError, TimeoutError):
        for broken in world.broken_laws:
            raise broken from None  # what came later came of it
        raise
    finally:
        await world.close()


async def _round(
    world: World, gateway: CampaignGateway, number: int, seed: int, shared: list[int], slowness: Slowness | None, report: Report
) -> None:
    rng = Random(seed << 40 | number)
    act, wanted = rng.choice([*Act, Act.CANCEL_AT_SOURCE]), rng.choice([*(p for p in Phase if p is not Phase.PARKED), Phase.PULLING])
    if act is Act.STALL and (slowness is None or rng.random() < 0.7):  # each holds up a connection for its length
        act = Act.CANCEL
    trace = Trace(first_attempt(gateway.draw_request(rng, shared)))
    trace.is_held_back = wanted is Phase.OFFERED
    own = CampaignGateway(world) if act is Act.GATEWAY_LOST else None
    speaker = own or gateway
    if own is not None:
        await own.meet_all()
    if act is Act.STALL and slowness is not None:
        slowness.stall_s = DEADLINE_S + 0.5
    task = asyncio.create_task(speaker.drive(trace))
    until = time.monotonic() + REACH_TIMEOUT_S
    while not task.done() and time.monotonic() < until and world.phase(trace) is not wanted:
        await asyncio.sleep(0.0005)
    report.rounds[act, world.phase(trace)] += 1
    goes_on = act in (Act.NOTHING, Act.STALL) or (act is Act.CANCEL_AT_SOURCE and trace.has_complete_offer)
    if act is Act.CANCEL:
        gateway.cancel(trace.request_id)
    elif act is Act.CANCEL_AT_SOURCE:
        gateway.cancel_at(PREFILL, trace.request_id)
    elif act is Act.CANCEL_AT_TARGET:
        gateway.cancel_at(DECODE, trace.request_id)
    elif own is not None:
        own.hang_up()
    fillers = [Trace(first_attempt(gateway.long_request(rng))) for _ in range(NUM_FILLERS if act is Act.CANCEL_AT_SOURCE else 0)]
    for filler in fillers:
        filler.is_held_back = True
    filling = [asyncio.create_task(gateway.drive(filler)) for filler in fillers]  # so that withdrawn blocks are written anew at once
    if goes_on:
        speaker.send_on(trace)
    else:
        task.cancel()
    try:
        await asyncio.wait_for(task, END_TIMEOUT_S)
    except asyncio.CancelledError:
        assert not goes_on
    if goes_on:
        assert not trace.refused, trace.refused
        assert trace.tokens == undisturbed(trace.attempt.request), (number, act, trace)
        report.completed += 1
    report.errors.update(trace.errors)
    for filler, its_task in zip(fillers, filling, strict=True):
        gateway.cancel(filler.request_id)
        its_task.cancel()
    await asyncio.gather(*filling, return_exceptions=True)
    if own is not None:
        await own._links.close()


def _check_every_turn(host: WorkerHost, broken_laws: list[Exception]) -> None:
    """The conservation law, and that nobody writes anew what a step, a lease or a copy still needs (tests.sim_cluster)."""
    core, decide = host._core, host._core.on
    checker = Checker(host)  # type: ignore[arg-type]
    host.core = core  # type: ignore[attr-defined]

    def checked(event: Event, now: float) -> list[Command]:
        try:
            commands = decide(event, now)
            checker(event, commands)
        except Exception as broken:  # the loop would only log it
            if not broken_laws:
                traceback.print_exception(broken)
            broken_laws.append(broken)
            raise
        return commands

    core.on = checked  # type: ignore[method-assign]


async def _rest(world: World, report: Report) -> None:
    """Nothing waits, runs, is pulled or offered, on either side: at the latest when the last lease has run out."""
    cores = [host._core for host in world.hosts.values()]
    try:
        async with asyncio.timeout(REST_TIMEOUT_S):
            while not all(core.is_at_rest for core in cores):
                await asyncio.sleep(0.01)
    except TimeoutError:
        held = [(list(core._attempts), len(core._offers), len(core._intake)) for core in cores]
        raise AssertionError(f"after {REST_TIMEOUT_S} s there are still {held}") from None
    for core in cores:
        core.check()
        snapshot = core.snapshot(0.0)
        report.held_blocks += snapshot.num_blocks_total - snapshot.num_blocks_free - snapshot.num_blocks_cached


def _belongings() -> tuple[int, set[str]]:
    gc.collect()  # what only waits to be collected is no leak
    return len(os.listdir("/proc/self/fd")), {thread.name for thread in threading.enumerate()}
