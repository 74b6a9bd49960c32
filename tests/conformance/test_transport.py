"""One suite for every backend of KVTransport, over the pairs of tests/conformance/pairs.py."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet

from kvtransfer import ucx
from protocol.kv import TransferError
from tests.conformance.pairs import (
    BLOCK_BYTES,
    NO_GPU,
    NO_TWO_GPUS,
    NUM_BLOCKS,
    Pair,
    content,
    has_gpus,
    make_pool,
)

pytestmark = pytest.mark.conformance


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
