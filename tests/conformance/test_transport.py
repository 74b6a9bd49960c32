"""One suite for every backend of KVTransport; the sources of shm and tcp are other processes (this file run as a script).

Content of block b at generation g is the byte string `content(b, g)`, so a delivered block says itself whether it is the one
that was offered.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from _pytest.mark import ParameterSet

from kvtransfer import ucx
from kvtransfer.config import TransportConfig
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.cuda_runtime import CudaRuntime
from kvtransfer.device_pool import DevicePool
from kvtransfer.faulty import FaultRates, FaultyTransport
from kvtransfer.local import LocalExchange, LocalTransport
from kvtransfer.region import PoolMemory
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import KVTransport, Ticket, Transfer
from protocol.errors import ConfigError
from protocol.kv import DigestMode, Endpoint, HandoffShard, KVLayout, LayerGroup, LayerKind, Outcome, ShardRectangle, TransferError
from protocol.wire import Identity
from tests.conformance.loopback_runtime import LoopbackRuntime

pytestmark = pytest.mark.conformance

SECRET = b"of this cluster"
NUM_BLOCKS = 256
GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32")
LAYOUT = KVLayout(
    block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=2, first_layer=0, last_layer=2)
)  # 16 KiB a block
BLOCK_BYTES = LAYOUT.block_bytes
Pool = PoolMemory | DevicePool
NO_GPU = "needs an NVIDIA GPU: python -m pytest tests/conformance -m gpu -k cuda_ipc"
NO_TWO_GPUS = "needs two NVIDIA GPUs: python -m pytest tests/conformance -m gpu -k nccl"
CONFIG = TransportConfig(
    copy_slice_bytes=4 * BLOCK_BYTES, max_inflight_bytes=64 * BLOCK_BYTES, socket_buffer_bytes=64 << 10, connect_timeout_s=20
)


def has_gpus(count: int) -> bool:
    try:
        CudaRuntime(count - 1)
    except ConfigError:
        return False
    return True


def content(block_id: int, generation: int) -> bytes:
    words = np.full(BLOCK_BYTES // 8, (block_id << 32) + generation, dtype=np.uint64)
    words[::7] += np.uint64(1 << 60)
    return words.tobytes()


def write_block(pool: Pool, block_id: int, generation: int) -> None:
    """As an engine does: first the generation, then the bytes."""
    pool.raise_generations(array("I", [block_id]), array("Q", [generation]))
    if pool.region.device is not None:
        pool.region.device.write(block_id * BLOCK_BYTES, content(block_id, generation))
    else:
        pool.region.blocks[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES] = content(block_id, generation)


def make_pool(backend: str) -> Pool:
    if backend == "cuda_ipc_loopback":
        return DevicePool(LoopbackRuntime(), LAYOUT, NUM_BLOCKS)
    if backend == "cuda_ipc":
        return DevicePool(CudaRuntime(), LAYOUT, NUM_BLOCKS)
    return PoolMemory.create(LAYOUT, NUM_BLOCKS)


def make_transport(
    name: str, worker_id: str, epoch: int, run_dir: str, exchange: LocalExchange | None, pool: Pool, port: int = 0
) -> KVTransport:
    identity = Identity(name=worker_id, kind="worker", epoch=epoch, fingerprint=b"f" * 16)
    if name in ("local", "faulty"):
        assert exchange is not None
        local = LocalTransport(exchange, worker_id=worker_id, epoch=epoch)
        return local if name == "local" else FaultyTransport(local, FaultRates(), random.Random(0))
    if name == "shm":
        return ShmTransport(identity, SECRET, CONFIG, unix_path=f"{run_dir}/{worker_id}.kv")
    if pool.region.device is not None:
        runtime = pool.region.device.runtime
        return CudaIpcTransport(identity, SECRET, CONFIG, unix_path=f"{run_dir}/{worker_id}.kv", runtime=runtime)
    config = TransportConfig(
        max_inflight_bytes=CONFIG.max_inflight_bytes,
        socket_buffer_bytes=64 << 10,
        channel_bytes=24 * BLOCK_BYTES,
        stall_timeout_s=CONFIG.stall_timeout_s,
        port=port,
        ucx_port=port,
        nccl_port=port,
    )
    if name == "ucx":
        from kvtransfer.ucx import UcxTransport

        return UcxTransport(identity, SECRET, config)
    if name == "nccl":
        import torch

        from kvtransfer.nccl import NcclTransport

        return NcclTransport(identity, SECRET, config, device=torch.device("cpu"))
    if name == "nccl_gpus":
        import torch

        from kvtransfer.nccl import NcclTransport

        return NcclTransport(identity, SECRET, config, device=torch.device("cuda", 0 if worker_id.startswith("decode") else 1))
    assert name == "tcp"
    return TcpTransport(identity, SECRET, config)


class Source:
    """The process (or, for local, the transport) whose blocks are pulled."""

    def __init__(
        self, backend: str, run_dir: str, exchange: LocalExchange, *, worker_id: str = "prefill-0", epoch: int = 1, port: int = 0
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.process: subprocess.Popen[str] | None = None
        if backend in ("local", "faulty"):
            self.pool = make_pool(backend)
            for block_id in range(NUM_BLOCKS):
                write_block(self.pool, block_id, 1)
            self.transport = make_transport(backend, worker_id, epoch, run_dir, exchange, self.pool)
            self.transport.register(self.pool.region)
            self.endpoint = self.transport.endpoint()
            return
        command = [sys.executable, __file__, backend, run_dir, worker_id, str(epoch), str(port)]
        paths = filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))  # `tests` is no package that is installed
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.endpoint = Endpoint(**self._reply())

    def shard(self, block_ids: list[int], generation: int = 1, epoch: int | None = None) -> HandoffShard:
        return HandoffShard(
            worker_id=self.worker_id,
            rank=0,
            epoch=self.epoch if epoch is None else epoch,
            endpoint=self.endpoint,
            region_id=0,
            layout=LAYOUT,
            block_ids=array("I", block_ids),
            generations=array("Q", [generation] * len(block_ids)),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )

    def rewrite(self, block_id: int, generation: int) -> None:
        if self.process is None:
            write_block(self.pool, block_id, generation)
        else:
            self.say("rewrite", block_id, generation)
            self._reply()

    def say(self, *words: object) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is None:
            self.transport.close()
            self.pool.close()
            return
        self.process.kill()  # also ends a stopped process
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _reply(self) -> dict[str, object]:
        assert self.process is not None and self.process.stdout is not None
        reply: dict[str, object] = json.loads(self.process.stdout.readline())
        return reply


class Target:
    """Our side: a zeroed pool and the backend under test."""

    def __init__(self, backend: str, run_dir: str, exchange: LocalExchange) -> None:
        self.pool = make_pool(backend)
        self.transport = make_transport(backend, "decode-0", 7, run_dir, exchange, self.pool)
        self.transport.register(self.pool.region)
        self.seen: dict[Ticket, Outcome] = {}

    def start(self, shard: HandoffShard, target_ids: list[int], *, indices: list[int] | None = None, deadline_s: float = 20.0) -> Ticket:
        places = indices if indices is not None else list(range(len(target_ids)))
        return self.transport.start(
            Transfer(
                source=shard,
                source_indices=array("I", places),
                target_region_id=0,
                target_block_ids=array("I", target_ids),
                deadline_s=deadline_s,
            )
        )

    def outcome(self, ticket: Ticket, timeout_s: float = 25.0) -> Outcome:
        end = time.monotonic() + timeout_s
        while ticket not in self.seen:
            if self.transport.wakeup_fd() >= 0:
                ready, _, _ = select.select([self.transport.wakeup_fd()], [], [], max(0.0, end - time.monotonic()))
                assert ready, f"no outcome in {timeout_s} s"
            for done, outcome in self.transport.poll():
                assert done not in self.seen, "an outcome was told twice"
                self.seen[done] = outcome
        return self.seen[ticket]

    def pull(self, shard: HandoffShard, target_ids: list[int], *, indices: list[int] | None = None, deadline_s: float = 20.0) -> Outcome:
        return self.outcome(self.start(shard, target_ids, indices=indices, deadline_s=deadline_s))

    def block(self, block_id: int) -> bytes:
        if self.pool.region.device is not None:
            (view,) = map(bytes, self.pool.region.device.read(np.array([[block_id * BLOCK_BYTES, BLOCK_BYTES]])))
            return view
        return bytes(self.pool.region.blocks[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES])

    def close(self) -> None:
        self.transport.close()
        self.pool.close()


@pytest.fixture
def run_dir() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="kv-") as path:
        yield path


def _params(*backends: str) -> list[ParameterSet]:
    no_ucx = pytest.mark.skipif(not ucx.is_installed(), reason="the package ucxx is not installed here (extra [ucx])")
    marks = {
        "nccl": (pytest.mark.slow,),  # every source of nccl imports torch, which takes seconds
        "ucx": (no_ucx,),
        "cuda_ipc": (pytest.mark.gpu, pytest.mark.skipif(not has_gpus(1), reason=NO_GPU)),
        "nccl_gpus": (pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(not has_gpus(2), reason=NO_TWO_GPUS)),
    }
    return [pytest.param(backend, marks=marks.get(backend, (pytest.mark.pure,))) for backend in backends]


@pytest.fixture(params=_params("local", "shm", "tcp", "faulty", "ucx", "nccl", "nccl_gpus", "cuda_ipc_loopback", "cuda_ipc"))
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Pair:
    """A source and a target; `close` also ends whatever other sources a test began."""

    def __init__(self, backend: str, run_dir: str) -> None:
        self.backend = backend
        self.run_dir = run_dir
        self.exchange = LocalExchange()
        self.sources: list[Source] = []
        self.source = self.another_source("prefill-0", 1)
        self.target = Target(backend, run_dir, self.exchange)

    def another_source(self, worker_id: str, epoch: int, port: int = 0) -> Source:
        self.sources.append(Source(self.backend, self.run_dir, self.exchange, worker_id=worker_id, epoch=epoch, port=port))
        return self.sources[-1]

    def restart_source(self) -> None:
        """The same address, another incarnation."""
        self.source.stop()
        Path(self.run_dir, "prefill-0.kv").unlink(missing_ok=True)
        said = self.source.endpoint
        self.source = self.another_source("prefill-0", self.source.epoch + 1, said.port or said.ucx_port or said.nccl_port)

    def close(self) -> None:
        self.target.close()
        for source in self.sources:
            source.stop()


@pytest.fixture
def pair(backend: str, run_dir: str) -> Iterator[Pair]:
    made = Pair(backend, run_dir)
    yield made
    made.close()


remote_only = pytest.mark.parametrize(
    "backend", _params("shm", "tcp", "ucx", "nccl", "nccl_gpus", "cuda_ipc_loopback", "cuda_ipc"), indirect=True
)


@pytest.mark.parametrize("num_blocks", [1, 3, NUM_BLOCKS])
def test_delivered_blocks_hold_what_was_offered_and_others_are_untouched(pair: Pair, num_blocks: int) -> None:
    """Fails when block_runs joins runs that are adjacent on the source side only (planted)."""
    rng = random.Random(num_blocks)
    ids = rng.sample(range(NUM_BLOCKS), num_blocks)
    ids.sort(key=lambda b: b // 8)  # some runs are adjacent, some are not
    targets = sorted(rng.sample(range(NUM_BLOCKS), num_blocks), key=lambda b: b // 8)
    outcome = pair.target.pull(pair.source.shard(ids), targets)
    assert outcome.error is None, outcome.detail
    assert (outcome.num_blocks, outcome.size_bytes) == (num_blocks, num_blocks * BLOCK_BYTES)
    assert outcome.path == {"faulty": "local", "cuda_ipc_loopback": "cuda_ipc", "nccl_gpus": "nccl"}.get(pair.backend, pair.backend)
    got = dict(zip(targets, ids, strict=True))
    for block_id in range(NUM_BLOCKS):
        assert pair.target.block(block_id) == (content(got[block_id], 1) if block_id in got else bytes(BLOCK_BYTES)), block_id


def test_only_asked_indices_are_copied(pair: Pair) -> None:
    outcome = pair.target.pull(pair.source.shard([9, 8, 7, 6]), [0, 1], indices=[3, 1])
    assert outcome.error is None
    assert [pair.target.block(b) for b in (0, 1, 2)] == [content(6, 1), content(8, 1), bytes(BLOCK_BYTES)]


def test_block_written_anew_before_the_pull_is_stale(pair: Pair) -> None:
    """Fails when first_stale always answers None (planted: delivered)."""
    pair.source.rewrite(5, 2)
    outcome = pair.target.pull(pair.source.shard([4, 5, 6]), [0, 1, 2])
    assert outcome.error is TransferError.STALE_GENERATION and outcome.num_blocks == 0
    assert pair.target.pull(pair.source.shard([4, 6]), [0, 1]).error is None, "the path goes on"


@remote_only
def test_pulls_after_a_refused_one_are_well(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over shm and tcp on the same connection. A library that has begun to wait for the refused bytes is not asked again.

    Fails when only pulls that ended well leave a conversation in step (seen: tcp dials anew), and when every refused one does (seen: gloo
    ends the process, "Received data size doesn't match expected size").
    """
    transport = type(pair.target.transport)
    connect, connected = transport.connect, []
    monkeypatch.setattr(transport, "connect", lambda *args: connected.append(1) or connect(*args))
    assert pair.target.pull(pair.source.shard([4, 6]), [0, 1]).error is None
    pair.source.rewrite(5, 2)
    for _ in range(3):
        assert pair.target.pull(pair.source.shard([5]), [0]).error is TransferError.STALE_GENERATION
        assert pair.target.pull(pair.source.shard([4, 6, 7]), [2, 3, 4]).error is None
        assert [pair.target.block(b) for b in (2, 3, 4)] == [content(4, 1), content(6, 1), content(7, 1)]
    assert pair.backend not in ("shm", "tcp") or len(connected) == 1


@remote_only
def test_block_written_anew_during_the_pull_is_never_delivered(pair: Pair) -> None:
    """The source writes blocks anew without pause. Fails when the check after the copy is left out (planted: wrong bytes delivered)."""
    watched = list(range(0, NUM_BLOCKS, 2))
    pair.source.say("churn", 12.0)
    endings: dict[TransferError | None, int] = {}
    generation = 1
    started = time.monotonic()
    while (passed := time.monotonic() - started) < 10.0:
        if min(endings.get(None, 0), endings.get(TransferError.STALE_GENERATION, 0)) > (20 if passed < 2.5 else 0):
            break
        outcome = pair.target.pull(pair.source.shard(watched, generation), watched)
        endings[outcome.error] = endings.get(outcome.error, 0) + 1
        if outcome.error is None:
            for block_id in watched:
                assert pair.target.block(block_id) == content(block_id, generation), f"block {block_id} is not of generation {generation}"
        else:
            assert outcome.error is TransferError.STALE_GENERATION, outcome.detail
            told = outcome.detail.split("has generation ")
            generation = int(told[1].split()[0]) if len(told) > 1 else generation + 1
    assert endings.get(TransferError.STALE_GENERATION), f"the source was not busy enough to test anything: {endings}"


def test_offer_of_an_earlier_incarnation_is_a_stale_epoch(pair: Pair) -> None:
    """Fails when the epoch of the peer is not compared (planted: delivered)."""
    before = pair.source.shard([1, 2])
    assert pair.target.pull(before, [0, 1]).error is None
    pair.restart_source()
    assert pair.target.pull(before, [0, 1]).error is TransferError.STALE_EPOCH
    assert pair.target.pull(pair.source.shard([3]), [2]).error is None, "no restart of the target is needed"
    assert pair.target.block(2) == content(3, 1)


def test_a_source_that_is_gone_is_a_lost_peer(pair: Pair) -> None:
    shard = pair.source.shard([1])
    assert pair.target.pull(shard, [0]).error is None
    if pair.source.process is None:
        pair.source.transport.close()
    else:
        pair.source.signal(signal.SIGKILL)
        pair.source.process.wait()
    start = time.monotonic()
    assert pair.target.pull(shard, [0]).error is TransferError.PEER_LOST
    assert time.monotonic() - start < 1.0


def test_a_deadline_of_nothing_is_missed(pair: Pair) -> None:
    assert pair.target.pull(pair.source.shard([1]), [0], deadline_s=0.0).error is TransferError.DEADLINE


def test_an_offer_that_contradicts_itself_is_refused(pair: Pair) -> None:
    assert pair.target.pull(pair.source.shard([NUM_BLOCKS]), [0]).error is TransferError.REFUSED
    assert pair.target.pull(pair.source.shard([1]), [NUM_BLOCKS]).error is TransferError.REFUSED
    assert pair.target.pull(pair.source.shard([1]), [0], indices=[1]).error is TransferError.REFUSED
    assert pair.target.pull(pair.source.shard([1, 2]), [0], indices=[0, 1]).error is TransferError.REFUSED
    assert pair.target.pull(pair.source.shard([1]), [0]).error is None


@remote_only
def test_a_hung_source_costs_the_deadline_and_no_more(pair: Pair) -> None:
    """Fails when the lane waits for its socket without looking at the clock (planted)."""
    pair.source.signal(signal.SIGSTOP)
    start = time.monotonic()
    tickets = [pair.target.start(pair.source.shard([1]), [b], deadline_s=0.2 + 0.1 * b) for b in range(3)]
    assert [pair.target.outcome(t).error for t in tickets] == [TransferError.DEADLINE] * 3
    assert 0.35 < time.monotonic() - start < 1.5
    pair.source.signal(signal.SIGCONT)
    assert pair.target.pull(pair.source.shard([1]), [0]).error is None


@remote_only
def test_a_hung_source_does_not_hold_up_another(pair: Pair) -> None:
    other = pair.another_source("prefill-1", 3)
    pair.source.signal(signal.SIGSTOP)
    stuck = pair.target.start(pair.source.shard([1]), [0], deadline_s=20)
    assert pair.target.pull(other.shard([2]), [1], deadline_s=5).error is None
    pair.source.signal(signal.SIGCONT)
    assert pair.target.outcome(stuck).error is None


@remote_only
def test_a_cancelled_pull_ends_soon_and_writes_nothing_after_its_outcome(pair: Pair) -> None:
    pair.source.signal(signal.SIGSTOP)
    first, second = (pair.target.start(pair.source.shard([b]), [b]) for b in (1, 2))
    start = time.monotonic()
    pair.target.transport.cancel(second)
    assert pair.target.outcome(second).error is TransferError.CANCELLED, "cancelled while it waited its turn"
    pair.target.transport.cancel(first)
    assert pair.target.outcome(first).error is TransferError.CANCELLED
    assert time.monotonic() - start < 1.0
    pair.source.signal(signal.SIGCONT)
    assert pair.target.pull(pair.source.shard([3]), [3]).error is None
    assert [pair.target.block(b) for b in (1, 2)] == [bytes(BLOCK_BYTES)] * 2


def test_cancelling_what_has_ended_or_never_was_is_harmless(pair: Pair) -> None:
    ticket = pair.target.start(pair.source.shard([1]), [0])
    assert pair.target.outcome(ticket).error is None
    pair.target.transport.cancel(ticket)
    pair.target.transport.cancel(10**6)
    assert pair.target.pull(pair.source.shard([1]), [0]).error is None


@remote_only
@pytest.mark.parametrize("seed", range(3))
def test_killed_owner_means_a_prompt_end_and_no_wrong_bytes(pair: Pair, seed: int) -> None:
    """kill -9 at a random moment of a stream of pulls. Fails when has_ended() always says False (planted, shm: delivered long after)."""
    rng = random.Random(seed)
    everything = list(range(NUM_BLOCKS))
    assert pair.target.pull(pair.source.shard([0]), [0]).error is None
    killer = threading.Timer(rng.uniform(0.0, 0.05), pair.source.signal, (signal.SIGKILL,))
    killer.start()
    killed_by = time.monotonic() + 1.05
    while True:
        outcome = pair.target.pull(pair.source.shard(everything), everything)
        if outcome.error is not None:
            break
        assert all(pair.target.block(b) == content(b, 1) for b in rng.sample(everything, 8))
        assert time.monotonic() < killed_by, "pulls go on from a dead process"
    killer.join()
    assert outcome.error is TransferError.PEER_LOST, outcome.detail


def test_many_transfers_at_once_do_not_mix(pair: Pair) -> None:
    rng = random.Random(5)
    targets = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
    tickets = {}
    for k in range(32):
        mine = targets[8 * k : 8 * k + 8]
        ids = [rng.randrange(NUM_BLOCKS) for _ in mine]
        tickets[pair.target.start(pair.source.shard(ids), mine)] = (ids, mine)
    for ticket, (ids, mine) in tickets.items():
        assert pair.target.outcome(ticket).error is None
        assert [pair.target.block(b) for b in mine] == [content(b, 1) for b in ids]


def test_close_leaves_nothing_and_ends_what_was_under_way(backend: str, run_dir: str) -> None:
    """Fails when a lane's link is not closed at its end (planted)."""
    make_pool(backend).close()  # what a device's runtime opens for good
    before = _belongings()
    pair = Pair(backend, run_dir)
    assert pair.target.pull(pair.source.shard([1, 2]), [0, 1]).error is None
    if pair.source.process is not None:
        pair.source.signal(signal.SIGSTOP)
        other = pair.another_source("prefill-1", 3)
        other.signal(signal.SIGSTOP)
        ticket = pair.target.start(other.shard([1]), [0])
        start = time.monotonic()
        pair.target.transport.close()
        assert time.monotonic() - start < 1.0
        assert [(t, o.error) for t, o in pair.target.transport.poll()] == [(ticket, TransferError.CANCELLED)]
    pair.close()
    if pair.source.process is not None:
        Path(run_dir, "prefill-0.kv").unlink(missing_ok=True)  # kill -9 leaves the name of its socket in the run directory
        Path(run_dir, "prefill-1.kv").unlink(missing_ok=True)
    assert os.listdir(run_dir) == []
    assert _belongings() == before


def _belongings() -> tuple[list[str], list[str], int]:
    """Descriptors, threads, and mapped pools of this process."""
    fds = sorted(os.listdir("/proc/self/fd"))[:-1]
    threads = sorted(t.name for t in threading.enumerate() if t.name.startswith("kv-"))
    with open("/proc/self/maps") as maps:
        return [str(len(fds))], threads, sum("baton-kv" in line for line in maps)


def _be_a_source(backend: str, run_dir: str, worker_id: str, epoch: str, port: str) -> None:
    pool = make_pool(backend)
    for block_id in range(NUM_BLOCKS):
        write_block(pool, block_id, 1)
    transport = make_transport(backend, worker_id, int(epoch), run_dir, None, pool, int(port))
    transport.register(pool.region)
    at = transport.endpoint()
    print(json.dumps(asdict(at)), flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case ["rewrite", block_id, generation]:
                write_block(pool, block_id, generation)
                print("{}", flush=True)
            case ["churn", seconds]:
                _churn(pool, seconds)


def _churn(pool: Pool, seconds: float) -> None:
    """Write all blocks anew, one after another, with a pause between two rounds in which they can be pulled."""
    end = time.monotonic() + seconds
    generation = 1
    while time.monotonic() < end:
        generation += 1
        for block_id in range(NUM_BLOCKS):
            write_block(pool, block_id, generation)
        time.sleep(0.02)


if __name__ == "__main__":
    _be_a_source(*sys.argv[1:])
