"""Workers in processes of their own that are killed with kill -9, or stopped for longer than every deadline, in the middle of hand-offs.

An episode: six requests on their way, the signal at some moment, and then what must hold: who was not lost answers rightly, nothing stays
held, the other process needs no restart, and what the dead one offered is refused.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random

from cluster.directory import Directory
from cluster.worker_build import WorkerSpec, build_worker
from protocol.kv import TransferError
from protocol.request import SamplingParams, first_attempt
from protocol.worker import Role, WorkerAddress, WorkerSnapshot
from tests.kv_campaign.abort_gateway import DEADLINE_S, DECODE, MODEL_DIR, PREFILL, VOCAB_SIZE, CampaignGateway, Trace, config, undisturbed
from tests.kv_campaign.watch import NUM_GOOD, NUM_WRONG, NUM_WRONG_READS, SLOWEST_MS, Slowness, watch

NUM_REQUESTS = 6
GREEDY = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
STOPPED_S = DEADLINE_S + 1.0
MOMENT_S_MAX = 0.5
START_TIMEOUT_S = 60.0
END_TIMEOUT_S = 20.0
REST_TIMEOUT_S = DEADLINE_S + 10.0
_ROLES = {PREFILL: Role.PREFILL, DECODE: Role.DECODE}


class Blow(Enum):
    KILL_SOURCE = "kill_source"
    KILL_TARGET = "kill_target"
    STOP_SOURCE = "stop_source"
    STOP_TARGET = "stop_target"

    @property
    def victim(self) -> str:
        return PREFILL if self in (Blow.KILL_SOURCE, Blow.STOP_SOURCE) else DECODE

    @property
    def kills(self) -> bool:
        return self in (Blow.KILL_SOURCE, Blow.KILL_TARGET)


@dataclass(slots=True)
class ProcessReport:
    episodes: Counter[Blow] = field(default_factory=Counter)
    struck: Counter[tuple[Blow, str]] = field(default_factory=Counter)  # hand-offs by their state when it struck, as the gateway sees it
    errors: Counter[str] = field(default_factory=Counter)
    old_offers: Counter[str] = field(default_factory=Counter)  # how offers of dead processes were refused
    completed: int = 0
    good_pulls: int = 0
    wrong_blocks: int = 0
    held_blocks: int = 0  # at rest: owned, leased, or on no list
    fresh_handoffs: Counter[bool] = field(default_factory=Counter)  # the first ones after a blow; True: by the path that is configured
    slowest_pull_ms: int = 0  # of targets that were never stopped
    slowest_recovery_s: float = 0.0  # from the restart to the first hand-off with the new process
    left_over: list[str] = field(default_factory=list)


class Processes:
    """A directory here, and two workers that can be killed and begun anew under their old names."""

    def __init__(self, kv_transport: str, run_dir: Path, seed: int, *, offer_early: bool) -> None:
        self.secret = b"s" * 32
        self.directory = Directory(secret=self.secret, epoch=time.time_ns())
        self.processes: dict[str, BaseProcess] = {}
        self._kv_transport = kv_transport
        self._run_dir = run_dir
        self._offer_early = offer_early
        self._seed = seed
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])

    @property
    def addresses(self) -> dict[str, WorkerAddress]:
        return {a.worker_id: a for a in self.directory.membership.workers}

    async def start(self) -> None:
        await self.directory.start()
        for worker_id in _ROLES:
            self.begin(worker_id)
        await self.until_registered()

    def begin(self, worker_id: str) -> None:
        self._seed += 1
        spec = WorkerSpec(
            config=config(self._kv_transport, _ROLES[worker_id], offer_early=self._offer_early),
            model_dir=MODEL_DIR,
            worker_id=worker_id,
            role=_ROLES[worker_id],
            directory_host=self.directory.host,
            directory_port=self.directory.port,
            secret=self.secret,
            run_dir=self._run_dir,
        )
        process = self._context.Process(target=serve_worker, args=(spec, self._seed), daemon=True)
        process.start()
        self.processes[worker_id] = process

    async def until_registered(self) -> None:
        async with asyncio.timeout(START_TIMEOUT_S):
            while {a.pid for a in self.addresses.values()} != {p.pid for p in self.processes.values()}:
                await asyncio.sleep(0.01)

    def send(self, worker_id: str, number: int) -> None:
        pid = self.processes[worker_id].pid
        assert pid is not None
        os.kill(pid, number)

    async def kill(self, worker_id: str) -> None:
        self.send(worker_id, signal.SIGKILL)
        await asyncio.to_thread(self.processes[worker_id].join, 10)
        async with asyncio.timeout(10):
            while worker_id in self.addresses:
                await asyncio.sleep(0.005)

    def belongings(self, worker_id: str) -> tuple[int, int]:
        """(descriptors, threads) of a worker's process."""
        pid = self.processes[worker_id].pid
        return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))

    async def close(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for worker_id, process in self.processes.items():
            await asyncio.to_thread(process.join, 10)
            assert process.exitcode == 0, f"{worker_id} ended with {process.exitcode}"
        self.directory.close()
        await asyncio.sleep(0)


def serve_worker(spec: WorkerSpec, seed: int) -> None:
    """Entry of a worker's process."""
    logging.disable(logging.CRITICAL)

    async def main() -> None:
        host = build_worker(spec)
        watch(host, host._endpoint._pool.region, Random(seed))
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await host.start()
        await stop.wait()
        await host.close()

    with Slowness(Random(seed)).installed():
        asyncio.run(main())


def run_processes(
    num_episodes: int, seed: int, kv_transport: str, report: ProcessReport, *, offer_early: bool, blows: tuple[Blow, ...] = tuple(Blow)
) -> None:
    """Episodes one after the other, the blows in turn: a kill is ten times as often as a stop, which takes seconds."""
    with tempfile.TemporaryDirectory(prefix="kv-") as path:
        asyncio.run(_run(num_episodes, seed, kv_transport, Path(path), report, blows, offer_early))


async def _run(
    num_episodes: int, seed: int, kv_transport: str, run_dir: Path, report: ProcessReport, blows: tuple[Blow, ...], offer_early: bool
) -> None:
    kills, stops = [b for b in blows if b.kills], [b for b in blows if not b.kills]
    order = [b for b in kills for _ in range(10 if stops else 1)] + stops
    Random(seed).shuffle(order)
    cluster = Processes(kv_transport, run_dir, seed * 1000, offer_early=offer_early)
    await cluster.start()
    try:
        async with CampaignGateway(cluster) as gateway:
            episode = _Episodes(cluster, gateway, kv_transport, report)
            for number in range(num_episodes):
                await episode.run(order[number % len(order)], Random(seed << 40 | number))
    finally:
        await cluster.close()
    left = [name for name in os.listdir(run_dir) if any(name.startswith(f"{a.worker_id}-{a.epoch:x}") for a in cluster.addresses.values())]
    report.left_over += [f"file {name}" for name in left]


class _Episodes:
    def __init__(self, cluster: Processes, gateway: CampaignGateway, kv_transport: str, report: ProcessReport) -> None:
        self._cluster = cluster
        self._gateway = gateway
        self._kv_transport = kv_transport
        self._report = report
        self._shared = [Random(7).randrange(3, 4096) for _ in range(40)]
        self._at_rest: dict[int, tuple[int, int]] = {}  # belongings by process id
        self._counted: dict[int, tuple[int, int]] = {}  # by epoch: good pulls and wrong blocks that are in the report
        self._was_stopped: set[int] = set()  # epochs

    async def run(self, blow: Blow, rng: Random) -> None:
        cluster, gateway, report = self._cluster, self._gateway, self._report
        requests = [gateway.draw_request(rng, self._shared) for _ in range(NUM_REQUESTS - 1)]
        # The first one's offer is kept back, to be shown when its source is dead: of a prompt that no cache holds to its last block.
        requests.insert(0, gateway.request([rng.randrange(3, VOCAB_SIZE) for _ in range(37)], GREEDY))
        traces = [Trace(first_attempt(request)) for request in requests]
        kept = traces[0]
        kept.is_held_back = True
        tasks = {trace: asyncio.create_task(gateway.drive(trace)) for trace in traces}
        await self._moment(traces, rng)
        report.episodes[blow] += 1
        report.struck.update((blow, _state(trace)) for trace in traces)
        following = {trace for trace in traces if _state(trace) == "following"}
        if blow.kills:
            await cluster.kill(blow.victim)
        else:
            self._was_stopped.add(cluster.addresses[blow.victim].epoch)
            cluster.send(blow.victim, signal.SIGSTOP)
            await asyncio.sleep(STOPPED_S)
            cluster.send(blow.victim, signal.SIGCONT)

        # Who needed nobody that died answers, and rightly; the others are lost, and only leases speak for them.
        given_back = following if blow is Blow.STOP_SOURCE else set()  # no first token came in time
        lost = {t for t in traces if blow.kills and (blow is Blow.KILL_TARGET or not (t.is_sent_on and t.has_complete_offer))}
        for trace in traces:
            if trace in lost or trace is kept:
                tasks[trace].cancel()
        for trace, task in tasks.items():
            try:
                await asyncio.wait_for(task, END_TIMEOUT_S)
            except asyncio.CancelledError:
                continue
            right = undisturbed(trace.attempt.request)
            if trace.refused or len(trace.tokens) < len(right):  # it was told that a worker is down before we gave it up
                assert trace in lost | given_back, (blow, trace)
            assert trace.tokens == right[: len(trace.tokens)], (blow, trace)
            report.completed += trace.tokens == right
            report.errors.update(trace.errors)
        if not blow.kills and kept.handoff is None:
            gateway.cancel(kept.request_id)

        began = time.monotonic()
        if blow.kills:
            cluster.begin(blow.victim)
            await cluster.until_registered()
            began = time.monotonic()
            await gateway.meet_all()
        await self._fresh_handoff(rng)
        if blow.kills:
            report.slowest_recovery_s = max(report.slowest_recovery_s, time.monotonic() - began)
        if blow is Blow.KILL_SOURCE and kept.has_complete_offer:
            await self._show_old_offer(kept)
        await self._rest(survivor=DECODE if blow.victim == PREFILL else PREFILL)

    async def _moment(self, traces: list[Trace], rng: Random) -> None:
        """Any; or, every other time, when five are being pulled."""
        until = time.monotonic() + rng.uniform(0, MOMENT_S_MAX)
        waits_for_pulls = rng.random() < 0.5
        while time.monotonic() < until or waits_for_pulls:
            states = Counter(_state(trace) for trace in traces)
            if waits_for_pulls and (states["pulling"] + states["following"] == NUM_REQUESTS - 1 or states["released"]):
                return
            await asyncio.sleep(0.0005)

    async def _fresh_handoff(self, rng: Random) -> None:
        """Nobody else was restarted, and a new request's KV moves at once."""
        for _ in range(2):
            trace = Trace(first_attempt(self._gateway.draw_request(rng, [])))
            await asyncio.wait_for(self._gateway.drive(trace), END_TIMEOUT_S)
            self._report.fresh_handoffs[trace.path == self._kv_transport and not trace.errors and not trace.refused] += 1
            assert trace.tokens == undisturbed(trace.attempt.request)

    async def _show_old_offer(self, kept: Trace) -> None:
        """As it was made, and as if the new process had the old one's address."""
        handoff = kept.complete_offer()
        (shard,) = handoff.shards
        here = self._cluster.addresses[PREFILL].kv_endpoint
        for number, offer in enumerate((handoff, replace(handoff, shards=(replace(shard, endpoint=here),))), 1):
            trace = Trace(replace(kept.attempt, number=number))
            await asyncio.wait_for(self._gateway.drive(trace, handoff=offer), END_TIMEOUT_S)
            (error,) = trace.errors
            wanted = (TransferError.PEER_LOST, TransferError.STALE_EPOCH)[number - 1 :]
            assert error in [w.value for w in wanted], (number, trace)
            assert trace.tokens == undisturbed(kept.attempt.request)
            self._report.old_offers[error] += 1

    async def _rest(self, *, survivor: str) -> None:
        """No block held on either side, and the survivor has what it had: descriptors, threads."""
        try:
            async with asyncio.timeout(REST_TIMEOUT_S):
                snapshots = await self._fresh_snapshots()
                while any(s.num_running or s.num_waiting or s.num_blocks_owned or s.num_blocks_leased for s in snapshots.values()):
                    snapshots = await self._fresh_snapshots()
        except TimeoutError:
            raise AssertionError(f"not at rest after {REST_TIMEOUT_S} s: {self._gateway.snapshots}") from None
        report = self._report
        for worker_id, snapshot in snapshots.items():
            report.held_blocks += snapshot.num_blocks_total - snapshot.num_blocks_free - snapshot.num_blocks_cached
            seen = snapshot.counters
            good, wrong = seen[NUM_GOOD], seen[NUM_WRONG] + seen[NUM_WRONG_READS]
            before = self._counted.get(snapshot.epoch, (0, 0))
            self._counted[snapshot.epoch] = (good, wrong)
            report.good_pulls += good - before[0]
            report.wrong_blocks += wrong - before[1]
            if worker_id == DECODE and snapshot.epoch not in self._was_stopped:
                report.slowest_pull_ms = max(report.slowest_pull_ms, seen[SLOWEST_MS])
        pid = self._cluster.processes[survivor].pid
        assert pid is not None
        until = time.monotonic() + 5.0
        while (now := self._cluster.belongings(survivor)) != self._at_rest.get(pid) and time.monotonic() < until:
            if pid not in self._at_rest and time.monotonic() > until - 4.0:  # a second of idleness: lanes have ended
                self._at_rest[pid] = now
            await asyncio.sleep(0.05)
        if now[0] > self._at_rest[pid][0] or now[1] > self._at_rest[pid][1]:
            report.left_over.append(f"{survivor} has {now} descriptors and threads, it had {self._at_rest[pid]}")

    async def _fresh_snapshots(self) -> dict[str, WorkerSnapshot]:
        self._gateway.snapshots.clear()
        while set(self._gateway.snapshots) != set(_ROLES):
            await asyncio.sleep(0.02)
        for snapshot in self._gateway.snapshots.values():
            assert snapshot.num_blocks_unaccounted == 0, snapshot
        return dict(self._gateway.snapshots)


def _state(trace: Trace) -> str:
    if trace.handoff is None:
        return "prefilling"
    if not trace.is_sent_on:
        return "offered"
    if not trace.has_complete_offer:
        return "following"
    return "released" if trace.path or trace.errors else "pulling"
