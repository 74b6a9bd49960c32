"""Pieces through a library that nobody can stop, stood for by two threads of ours that carry when the test says so."""

from __future__ import annotations

import queue
import select
import threading
import time
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from kvtransfer.config import TransportConfig
from kvtransfer.pieces import Channel, PiecewiseTransport
from kvtransfer.region import PoolMemory
from kvtransfer.session import Session
from kvtransfer.staging import Done, Finish, StagedChannel, Staging
from kvtransfer.transport import Transfer
from protocol.kv import DigestMode, Endpoint, HandoffShard, KVLayout, LayerGroup, LayerKind, Outcome, ShardRectangle, TransferError
from protocol.wire import Identity

pytestmark = pytest.mark.pure

SECRET = b"of this cluster"
NUM_BLOCKS = 32
GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=16, dtype="float32")
LAYOUT = KVLayout(block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1))
SIZE = LAYOUT.block_bytes
SCATTERED = list(range(0, NUM_BLOCKS, 2))  # no two are neighbours, so each piece is gathered
PIECE_BLOCKS = 2
NUM_PIECES = len(SCATTERED) // PIECE_BLOCKS


class Library:
    """Carries one buffer at a time, in order, whenever `gate` is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.ways: dict[str, queue.Queue[tuple[Staging, Done] | None]] = {"out": queue.Queue(), "in": queue.Queue()}
        self.num_begun = 0  # at the source
        self.tells_source = True  # False: what it still reads at the source, it never says
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def begin(self, way: str, staging: Staging, done: Done) -> Finish:
        self.num_begun += way == "out"
        self.ways[way].put((staging, done))
        return lambda: None

    def end(self) -> None:
        self.gate.set()
        for way in self.ways.values():
            way.put(None)
        self._thread.join()

    def _carry(self) -> None:
        while (source := self.ways["out"].get()) is not None and (target := self.ways["in"].get()) is not None:
            self.gate.wait()
            target[0][:] = source[0]
            target[1]()
            if self.tells_source:
                source[1]()


class LibraryTransport(PiecewiseTransport):
    name = "library"

    def __init__(self, identity: Identity, library: Library) -> None:
        self.library = library
        super().__init__(identity, SECRET, TransportConfig(channel_bytes=PIECE_BLOCKS * SIZE), port=0)

    def endpoint(self) -> Endpoint:
        return Endpoint(host="127.0.0.1", port=self.port)

    def port_of(self, endpoint: Endpoint) -> int:
        return endpoint.port

    def open_channel(self, session: Session, *, dialed: bool) -> Channel:
        return _LibraryChannel(session, self.library)


class _LibraryChannel(StagedChannel):
    def __init__(self, session: Session, library: Library) -> None:
        super().__init__(session, piece_bytes_max=PIECE_BLOCKS * SIZE)
        self._library = library

    def carry_out(self, staging: Staging, done: Done) -> Finish:
        return self._library.begin("out", staging, done)

    def carry_in(self, staging: Staging, done: Done) -> Finish:
        return self._library.begin("in", staging, done)

    def give_up(self) -> None:
        """It cannot be stopped."""


class Pair:
    def __init__(self) -> None:
        self.library = Library()
        self.pools = [PoolMemory.create(LAYOUT, NUM_BLOCKS) for _ in range(2)]
        np.frombuffer(self.pools[0].region.blocks, dtype=np.uint64)[:] = np.arange(NUM_BLOCKS * SIZE // 8)
        names = ("prefill-0", "decode-0")
        self.source, self.target = (LibraryTransport(Identity(name=n, kind="worker", epoch=1), self.library) for n in names)
        for transport, pool in zip((self.source, self.target), self.pools, strict=True):
            transport.register(pool.region)

    def start(self, *, deadline_s: float = 10.0) -> None:
        shard = HandoffShard(
            worker_id="prefill-0",
            rank=0,
            epoch=1,
            endpoint=self.source.endpoint(),
            region_id=0,
            layout=LAYOUT,
            block_ids=array("I", SCATTERED),
            generations=array("Q", [0] * len(SCATTERED)),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )
        indices = array("I", range(len(SCATTERED)))
        targets = array("I", SCATTERED)
        self.target.start(
            Transfer(source=shard, source_indices=indices, target_region_id=0, target_block_ids=targets, deadline_s=deadline_s)
        )

    def outcome(self) -> Outcome:
        while not (done := self.target.poll()):
            assert select.select([self.target.wakeup_fd()], [], [], 10)[0], "no outcome in 10 s"
        return done[0][1]

    def until_begun(self, num_pieces: int) -> None:
        give_up = time.monotonic() + 5
        while self.library.num_begun < num_pieces:
            assert time.monotonic() < give_up, f"{self.library.num_begun} of {num_pieces} pieces were begun"
            time.sleep(0.002)

    def close(self) -> None:
        self.target.close()
        self.source.close()
        self.library.end()
        for pool in self.pools:
            pool.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


def test_pieces_are_gathered_while_the_first_is_carried(pair: Pair) -> None:
    """Nothing arrives while the gate is closed. Fails when the source settles each piece before it takes up the next (planted)."""
    pair.start()
    pair.until_begun(3)
    time.sleep(0.05)
    assert pair.library.num_begun == 3, "no more than the credit"
    pair.library.gate.set()
    outcome = pair.outcome()
    assert outcome.error is None, outcome.detail
    assert pair.library.num_begun == NUM_PIECES
    theirs, ours = (np.frombuffer(pool.region.blocks, dtype=np.uint8).reshape(NUM_BLOCKS, SIZE) for pool in pair.pools)
    assert np.array_equal(ours[SCATTERED], theirs[SCATTERED])
    assert not ours[1::2].any()


def test_a_piece_counts_only_once_its_source_needs_no_memory_for_it(pair: Pair) -> None:
    """The library has filled the target's staging and may still be reading the source's, which a source that leaves gives to others.
    Fails when a trailer goes out before `flush` (planted: delivered)."""
    pair.library.tells_source = False
    pair.library.gate.set()
    pair.start()
    time.sleep(0.1)
    assert not pair.target.poll()
    pair.source.close()
    assert pair.outcome().error is TransferError.PEER_LOST


def test_a_block_written_anew_while_it_is_carried_is_stale(pair: Pair) -> None:
    """Fails when the trailer repeats the words that were asked for (planted: delivered)."""
    pair.start()
    pair.until_begun(3)
    pair.pools[0].raise_generations(array("I", [SCATTERED[1]]), array("Q", [1]))
    pair.library.gate.set()
    assert pair.outcome().error is TransferError.STALE_GENERATION


@pytest.mark.parametrize("why", ["deadline", "cancelled"])
def test_a_library_that_hangs_costs_the_deadline_and_writes_no_block_later(pair: Pair, why: str) -> None:
    """Fails when `receive` waits without the session's pause (planted: for ever)."""
    pair.start(deadline_s=0.3 if why == "deadline" else 10)
    pair.until_begun(3)
    started = time.monotonic()
    if why == "cancelled":
        pair.target.cancel(1)
    assert pair.outcome().error is TransferError(why)
    assert time.monotonic() - started < 1.0
    pair.library.gate.set()
    time.sleep(0.05)
    assert not np.frombuffer(pair.pools[1].region.blocks, dtype=np.uint8).any()
