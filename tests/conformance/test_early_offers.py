"""Offers that precede the end of their prefill, through whole endpoints: layers are copied as they are computed, never before.

The source "computes" by hand: it writes a layer of its blocks, then moves the region's clock.
"""

from __future__ import annotations

import asyncio
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import replace
from random import Random

import numpy as np
import pytest

from kvtransfer import digest
from kvtransfer.config import TransportConfig
from kvtransfer.faulty import FaultRates, FaultyTransport
from kvtransfer.handoff import complete, step_begin
from kvtransfer.lanes import Lane
from kvtransfer.layer_clock import LayerClock
from kvtransfer.layers import layer_spans
from kvtransfer.transport import KVTransport
from protocol.kv import DigestMode, FirstToken, HandoffCompletion, KVHandoff, Outcome, TransferError
from tests.conformance.test_transport_endpoint import Make, Worker, make, offer, run_dir

__all__ = ["make", "run_dir"]  # fixtures

STEP = 3
POLICIES = ["shm", "tcp", "nccl"]
IDS, TARGETS = [5, 6, 9, 2], [0, 1, 40, 30]


class Computing:
    """A source whose step `STEP` computes the last blocks of an offer, layer by layer, on call."""

    def __init__(self, worker: Worker, num_whole_blocks: int = 1) -> None:
        self.worker = worker
        self.layout = worker.pool.region.layout
        self.num_whole_blocks = num_whole_blocks
        self.clock = LayerClock(worker.pool.region)
        self.clock.step_done(STEP - 1)
        self._rng = np.random.default_rng(11)
        complete_offer = offer(worker, IDS)
        shard = replace(
            complete_offer.shards[0],
            digests=b"",
            layer_clock=step_begin(STEP, self.layout.num_layers),
            num_whole_blocks=num_whole_blocks,
        )
        self.handoff = replace(complete_offer, layer_watermark=0, first_tokens=(), shards=(shard,))

    def layer(self, layer: int) -> None:
        """Overwrite what lies there with the layer's bytes, then tell."""
        blocks = np.frombuffer(self.worker.pool.region.blocks, dtype=np.uint8)
        offset, size = layer_spans(self.layout)[layer]
        for block_id in IDS[self.num_whole_blocks :]:
            start = block_id * self.layout.block_bytes + offset
            blocks[start : start + size] = self._rng.integers(0, 256, size, dtype=np.uint8)
        self.clock.layer_done(STEP, layer)

    def rest(self, first: int = 0) -> None:
        for layer in range(first, self.layout.num_layers):
            self.layer(layer)
        self.clock.step_done(STEP)

    def completed(self, **changes: object) -> KVHandoff:
        digests = (self.worker.kv.digests_of(self.handoff),)
        told = HandoffCompletion(handoff_id=self.handoff.handoff_id, first_tokens=(FirstToken(choice=0, token_id=7),), digests=digests)
        return complete(self.handoff, replace(told, **changes))  # type: ignore[arg-type]


def begin(target: Worker, handoff: KVHandoff, deadline_s: float = 30.0) -> asyncio.Future[Outcome]:
    done: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
    target.kv.start_pull(handoff, array("I", range(len(IDS))), array("I", TARGETS), deadline_s, done.set_result)
    return done


def layer_of(worker: Worker, block_id: int, layer: int) -> bytes:
    offset, size = layer_spans(worker.pool.region.layout)[layer]
    return worker.block(block_id)[offset : offset + size]


async def until(condition: Callable[[], bool], limit_s: float = 5.0) -> None:
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.001)


async def pair(make: Make, policy: str, **settings: object) -> tuple[Computing, Worker]:
    config = TransportConfig(kv_transport=policy, digest_mode=DigestMode.FULL, **settings)  # type: ignore[arg-type]
    source, target = make("prefill-0", config=config), make("decode-0", config=config)
    await source.kv.start()
    await target.kv.start()
    source.fill(1)
    return Computing(source), target


@pytest.mark.parametrize("policy", POLICIES)
async def test_each_layer_arrives_before_the_next_is_computed(make: Make, policy: str) -> None:
    """Whole blocks at once, each layer once the clock says so, an outcome only after the completion.

    Seen to fail with `follow` waiting for the last layer, with a piece's clock one too low (old bytes arrive), and with `_arrived` checking
    an incomplete hand-off.
    """
    computing, target = await pair(make, policy)
    source = computing.worker
    done = begin(target, computing.handoff)
    await until(lambda: target.block(TARGETS[0]) == source.block(IDS[0]))
    for layer in range(computing.layout.num_layers):
        await asyncio.sleep(0.02)
        assert not any(layer_of(target, TARGETS[1], layer)), "copied before it was computed"
        computing.layer(layer)
        await until(lambda at=layer: layer_of(target, TARGETS[3], at) == layer_of(source, IDS[3], at))  # type: ignore[misc]
    await asyncio.sleep(0.05)
    assert not done.done()
    target.kv.complete_pull(computing.completed(), 5.0)
    outcome = await asyncio.wait_for(done, 5)
    assert outcome.error is None and outcome.num_blocks == len(IDS), outcome
    assert [target.block(b) for b in TARGETS] == [source.block(b) for b in IDS]


@pytest.mark.parametrize("policy", [*POLICIES, "auto", "local"])
@pytest.mark.parametrize("is_completed_first", [False, True])
async def test_a_completion_may_overtake_the_copy(make: Make, policy: str, is_completed_first: bool) -> None:
    computing, target = await pair(make, policy)
    done = begin(target, computing.handoff)
    if is_completed_first:
        computing.rest()
        target.kv.complete_pull(computing.completed(), 5.0)
    else:
        await asyncio.sleep(0.02)
        computing.rest()
        await asyncio.sleep(0.1)
        target.kv.complete_pull(computing.completed(), 5.0)
    assert (await asyncio.wait_for(done, 5)).error is None
    assert [target.block(b) for b in TARGETS] == [computing.worker.block(b) for b in IDS]


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_pull_that_waits_for_layers_can_be_cancelled_and_followed_by_another(make: Make, policy: str) -> None:
    computing, target = await pair(make, policy)
    done = begin(target, computing.handoff)
    await asyncio.sleep(0.05)
    began = time.monotonic()
    target.kv.cancel(computing.handoff.handoff_id)
    assert (await asyncio.wait_for(done, 5)).error is TransferError.CANCELLED
    assert time.monotonic() - began < 1.0
    computing.rest()
    second = begin(target, replace(computing.completed(), handoff_id="ef" * 16, layer_watermark=0, shards=computing.handoff.shards))
    target.kv.complete_pull(replace(offer(computing.worker, IDS, handoff_id="ef" * 16)), 5.0)
    assert (await asyncio.wait_for(second, 5)).error is None


@pytest.mark.parametrize("policy", [*POLICIES, "local"])
async def test_a_copy_that_waits_for_its_completion_can_be_cancelled(make: Make, policy: str) -> None:
    """Nothing is under way that could end it. Seen to hang with `_stop` asking only the backend."""
    computing, target = await pair(make, policy)
    done = begin(target, computing.handoff)
    computing.rest()
    await asyncio.sleep(0.1)
    assert not done.done()
    target.kv.cancel(computing.handoff.handoff_id)
    assert (await asyncio.wait_for(done, 5)).error is TransferError.CANCELLED


@pytest.mark.parametrize("policy", ["shm", "tcp", "local"])
async def test_a_completion_that_never_comes_is_waited_for_until_the_deadline(make: Make, policy: str) -> None:
    """Every layer is there, nothing says what they must be. Seen to fail without `_expire_at_deadline` at the start: nothing ends it."""
    computing, target = await pair(make, policy)
    began = time.monotonic()
    done = begin(target, computing.handoff, deadline_s=0.3)
    computing.rest()
    outcome = await asyncio.wait_for(done, 5.0)
    assert outcome.error is TransferError.DEADLINE and "not completed in 0.3 s" in outcome.detail
    assert 0.3 <= time.monotonic() - began < 1.3


@pytest.mark.parametrize("policy", POLICIES)
async def test_layers_that_never_come_end_at_the_deadline(make: Make, policy: str) -> None:
    """The deadline counts from the completion. Seen to hang without the timer of `complete_pull`."""
    computing, target = await pair(make, policy)
    done = begin(target, computing.handoff)
    await asyncio.sleep(0.05)
    began = time.monotonic()
    target.kv.complete_pull(computing.completed(), 0.3)
    assert (await asyncio.wait_for(done, 5)).error is TransferError.DEADLINE
    assert 0.25 < time.monotonic() - began < 1.5


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_source_that_goes_away_while_it_computes_is_noticed(make: Make, policy: str) -> None:
    computing, target = await pair(make, policy)
    done = begin(target, computing.handoff)
    await asyncio.sleep(0.05)
    began = time.monotonic()
    await computing.worker.kv.close()
    assert (await asyncio.wait_for(done, 5)).error is TransferError.PEER_LOST
    assert time.monotonic() - began < 2.0


@pytest.mark.parametrize("policy", POLICIES)
async def test_blocks_given_to_others_while_their_layers_are_awaited_are_refused(make: Make, policy: str) -> None:
    computing, target = await pair(make, policy)
    done = begin(target, computing.handoff)
    await asyncio.sleep(0.05)
    computing.worker.kv.raise_generations(array("I", [IDS[2]]), array("Q", [1]))
    computing.rest()
    assert (await asyncio.wait_for(done, 5)).error is TransferError.STALE_GENERATION


@pytest.mark.parametrize(
    ("digests", "error"),
    [((), TransferError.LEASE_EXPIRED), ((b"\0" * 32,), TransferError.DIGEST_MISMATCH), ((b"\0" * 8,), TransferError.LEASE_EXPIRED)],
)
async def test_nothing_is_verified_without_the_right_digests(make: Make, digests: tuple[bytes, ...], error: TransferError) -> None:
    """Of blocks the source did not keep there are none. Seen to fail with `check_shard` not called at the completion."""
    computing, target = await pair(make, "shm")
    done = begin(target, computing.handoff)
    computing.rest()
    target.kv.complete_pull(computing.completed(digests=digests), 5.0)
    assert (await asyncio.wait_for(done, 5)).error is error


async def test_a_failed_path_is_followed_by_another_also_while_layers_come(make: Make, run_dir: str) -> None:
    """`auto` falls back from shared memory to TCP in the middle of a prefill."""
    computing, target = await pair(make, "auto")
    shard = computing.handoff.shards[0]
    broken = replace(shard, endpoint=replace(shard.endpoint, unix_path=f"{run_dir}/nobody"))
    computing.handoff = replace(computing.handoff, shards=(broken,))
    done = begin(target, computing.handoff)
    await asyncio.sleep(0.1)
    computing.rest()
    target.kv.complete_pull(computing.completed(), 5.0)
    outcome = await asyncio.wait_for(done, 5)
    assert outcome.error is None and outcome.path == "tcp"


async def test_what_has_arrived_is_digested_before_its_digests_come(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read again at the completion. Seen to fail without `_read_ahead`."""
    computing, target = await pair(make, "shm")
    done = begin(target, computing.handoff)
    computing.rest()
    completed = computing.completed()
    pull = target.kv._pulls[computing.handoff.handoff_id]
    await until(lambda: all(part.ours is not None for part in pull.parts) and not pull.checking)
    monkeypatch.setattr(digest, "of_copies", None)
    target.kv.complete_pull(completed, 5.0)
    assert (await asyncio.wait_for(done, 5)).error is None


async def test_a_pull_over_another_path_is_digested_anew(make: Make) -> None:
    """The first path delivers damage that its digests tell; what the second delivers must not be judged by them.

    Seen to fail with `ours` kept over a relaunch: the good copy is refused.
    """
    config = TransportConfig(kv_transport="auto", digest_mode=DigestMode.FULL)

    def wrap(transport: KVTransport) -> KVTransport:
        return FaultyTransport(transport, FaultRates(corrupt=1.0), Random(1)) if transport.name == "shm" else transport

    source, target = make("prefill-0", config=config), make("decode-0", config=config, wrap=wrap)
    await source.kv.start()
    await target.kv.start()
    source.fill(1)
    computing = Computing(source)
    done = begin(target, computing.handoff)
    computing.rest()
    await asyncio.sleep(0.2)
    target.kv.complete_pull(computing.completed(), 5.0)
    outcome = await asyncio.wait_for(done, 5)
    assert outcome.error is None and outcome.path == "tcp" and target.kv.counters["pull_retries"] == 1
    assert [target.block(b) for b in TARGETS] == [source.block(b) for b in IDS]


async def test_a_source_reads_whole_blocks_while_it_computes_the_rest(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digests are those of a reading at the end, and fewer blocks are read then. Seen to fail with a head start of one block more."""
    computing, _ = await pair(make, "shm")
    source, handoff = computing.worker, computing.handoff
    source.kv.digest_ahead(handoff)
    await until(lambda: source.kv._digests._read[handoff.handoff_id].done())
    computing.rest()
    read: list[int] = []
    compute = digest.compute
    monkeypatch.setattr(digest, "compute", lambda *args: read.append(len(args[5])) or compute(*args))
    ahead = source.kv.digests_of(handoff)
    assert read == [len(IDS) - computing.num_whole_blocks] and source.kv.digests_of(handoff) == ahead
    assert read[1:] == [len(IDS)]
    assert len(ahead) == 8 * len(IDS)


async def test_a_small_pull_is_done_when_start_returns_and_one_that_would_wait_is_not_begun_there(make: Make) -> None:
    """Without a thread's wake-up, on the link that is open. Seen to fail with `carry_here` never taken, and with early offers taken by it:
    the loop stands still until the source has computed."""
    computing, target = await pair(make, "shm")
    whole = offer(computing.worker, IDS, handoff_id="ef" * 16)
    first = begin(target, whole)
    assert (await asyncio.wait_for(first, 5)).error is None  # the lane has opened its link
    await until(lambda: lane_of(target)._idle_link is not None)
    second = begin(target, replace(whole, handoff_id="ee" * 16))
    assert len(target.kv._transports["shm"]._outcomes) == 1  # type: ignore[attr-defined]
    assert (await asyncio.wait_for(second, 5)).error is None
    began = time.monotonic()
    third = begin(target, computing.handoff)
    assert time.monotonic() - began < 1.0 and not third.done()
    computing.rest()
    target.kv.complete_pull(computing.completed(), 5.0)
    assert (await asyncio.wait_for(third, 5)).error is None


def lane_of(target: Worker) -> Lane:
    (lane,) = target.kv._transports["shm"]._lanes.values()  # type: ignore[attr-defined]
    assert isinstance(lane, Lane)
    return lane


@pytest.mark.parametrize("here_bytes", [1 << 30, -1])
async def test_a_check_that_breaks_down_ends_its_pull(make: Make, monkeypatch: pytest.MonkeyPatch, here_bytes: int) -> None:
    """On the loop and on its thread. Seen to hang ("on the loop") with the check called bare."""
    computing, target = await pair(make, "shm")
    monkeypatch.setattr("kvtransfer.endpoint._CHECK_HERE_BYTES", here_bytes)
    monkeypatch.setattr(digest, "verify", lambda *args: 1 // 0)
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    outcome = await asyncio.wait_for(begin(target, offer(computing.worker, IDS, handoff_id="ef" * 16)), 5)
    assert outcome.error is TransferError.REFUSED and "broke down" in outcome.detail


async def test_a_reading_ahead_that_breaks_down_is_made_up_for(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its completion came while it read. Seen to end at the deadline with the failure passed over whatever came meanwhile."""
    computing, target = await pair(make, "shm")
    is_completed = threading.Event()

    def broken(*_: object) -> bytes:
        is_completed.wait(5)
        monkeypatch.undo()
        raise OSError("the device is gone")

    monkeypatch.setattr(digest, "of_copies", broken)
    done = begin(target, computing.handoff)
    computing.rest()
    pull = target.kv._pulls[computing.handoff.handoff_id]
    await until(lambda: pull.checking)
    target.kv.complete_pull(computing.completed(), 5.0)
    is_completed.set()
    assert (await asyncio.wait_for(done, 2)).error is None
