"""Copies that end later than they begin: what a pull on a device does at a deadline, a cancellation, and the death of its source.

The device is tests/conformance/loopback_runtime.py; its gate holds copies that were begun. What the suite of all backends asks is in
tests/conformance/test_transport.py.
"""

from __future__ import annotations

import select
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvtransfer import digest
from kvtransfer.config import TransportConfig
from kvtransfer.cuda_ipc import CudaIpcTransport, OpenHandles
from kvtransfer.cuda_runtime import CudaRuntime, DeviceError
from kvtransfer.device_pool import DevicePool
from kvtransfer.region import PoolMemory
from kvtransfer.transport import Transfer
from protocol.errors import ConfigError
from protocol.kv import DigestMode, HandoffShard, KVLayout, LayerGroup, LayerKind, Outcome, ShardRectangle, TransferError
from protocol.wire import Identity
from tests.conformance.loopback_runtime import LoopbackRuntime

pytestmark = pytest.mark.pure

SECRET = b"of this cluster"
NUM_BLOCKS = 32
GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=4, num_kv_heads=1, head_dim=16, dtype="float32")
LAYOUT = KVLayout(block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=4))
SIZE = LAYOUT.block_bytes
EVERYTHING = list(range(NUM_BLOCKS))
CONFIG = TransportConfig(copy_slice_bytes=4 * SIZE)


def blocks_of(pool: DevicePool | PoolMemory) -> bytes:
    if pool.region.device is None:
        return bytes(pool.region.blocks)
    return b"".join(bytes(view) for view in pool.region.device.read(np.array([[0, NUM_BLOCKS * SIZE]])))


class Worker:
    def __init__(self, name: str, run_dir: str, device_id: str) -> None:
        self.name = name
        self.runtime = LoopbackRuntime(device_id)
        self.pool = DevicePool(self.runtime, LAYOUT, NUM_BLOCKS)
        identity = Identity(name=name, kind="worker", epoch=1)
        self.kv = CudaIpcTransport(identity, SECRET, CONFIG, unix_path=f"{run_dir}/{name}.kv", runtime=self.runtime)
        self.kv.register(self.pool.region)

    def offer(self, block_ids: list[int]) -> HandoffShard:
        return HandoffShard(
            worker_id=self.name,
            rank=0,
            epoch=1,
            endpoint=self.kv.endpoint(),
            region_id=0,
            layout=LAYOUT,
            block_ids=array("I", block_ids),
            generations=array("Q", [0] * len(block_ids)),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )

    def start(self, shard: HandoffShard, *, deadline_s: float = 10.0) -> int:
        ids = array("I", EVERYTHING[: len(shard.block_ids)])
        return self.kv.start(Transfer(source=shard, source_indices=ids, target_region_id=0, target_block_ids=ids, deadline_s=deadline_s))

    def outcome(self) -> Outcome:
        assert select.select([self.kv.wakeup_fd()], [], [], 10)[0], "no outcome in 10 s"
        ((_, outcome),) = self.kv.poll()
        return outcome

    def pull(self, shard: HandoffShard) -> Outcome:
        self.start(shard)
        return self.outcome()

    def until_begun(self, num_copies: int) -> None:
        give_up = time.monotonic() + 5
        while self.runtime.num_copies_begun < num_copies:
            assert time.monotonic() < give_up, f"{self.runtime.num_copies_begun} of {num_copies} copies were begun"
            time.sleep(0.002)

    def close(self) -> None:
        self.runtime.gate.set()
        self.runtime.failing.clear()
        self.kv.close()
        self.pool.close()


Make = Callable[..., Worker]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="kv-") as run_dir:

        def build(name: str, device_id: str = "loopback:0") -> Worker:
            made.append(Worker(name, run_dir, device_id))
            return made[-1]

        yield build
        for worker in made:
            worker.close()


@pytest.fixture
def pair(make: Make) -> tuple[Worker, Worker]:
    source, target = make("prefill-0"), make("decode-0")
    content = np.random.default_rng(1).integers(1, 256, NUM_BLOCKS * SIZE, dtype=np.uint8).tobytes()
    assert source.pool.region.device is not None
    source.pool.region.device.write(0, content)
    return source, target


ends = pytest.mark.parametrize("why", [TransferError.DEADLINE, TransferError.CANCELLED, TransferError.PEER_LOST])


@ends
def test_a_pull_given_up_in_the_middle_of_a_copy_writes_nothing_after_its_outcome(pair: tuple[Worker, Worker], why: TransferError) -> None:
    """The outcome has to wait for the copies that were begun. Fails when the stream is not drained first (planted: outcome while held)."""
    source, target = pair
    target.runtime.gate.clear()
    ticket = target.start(source.offer(EVERYTHING), deadline_s=0.2 if why is TransferError.DEADLINE else 10)
    target.until_begun(3)
    if why is TransferError.CANCELLED:
        target.kv.cancel(ticket)
    if why is TransferError.PEER_LOST:
        source.kv.close()
    time.sleep(0.4)
    assert target.kv.poll() == [], "copies were under way, and an outcome was told"
    target.runtime.gate.set()
    assert target.outcome().error is why
    assert target.runtime.is_idle
    seen = blocks_of(target.pool)
    time.sleep(0.05)
    assert blocks_of(target.pool) == seen
    assert seen.count(b"\0") >= (NUM_BLOCKS - 3 * 4) * SIZE, "no more than three slices of four blocks were begun"


def test_a_few_slices_are_under_way_and_no_more(pair: tuple[Worker, Worker]) -> None:
    """Fails when all slices are begun at once (planted): a pull given up would wait for all of them."""
    source, target = pair
    target.runtime.gate.clear()
    target.start(source.offer([2 * b for b in range(NUM_BLOCKS // 2)]))
    target.until_begun(3)
    time.sleep(0.1)
    assert target.runtime.num_copies_begun == 3 * 4, "three slices of four scattered blocks"
    target.runtime.gate.set()
    assert target.outcome().error is None


def test_a_block_written_anew_before_its_copy_has_ended_is_stale(pair: tuple[Worker, Worker]) -> None:
    """Fails when the words are looked at after the last copy was begun instead of after it has ended (planted: delivered)."""
    source, target = pair
    target.runtime.gate.clear()
    target.start(source.offer(EVERYTHING[:8]))
    target.until_begun(2)
    time.sleep(0.05)
    source.pool.raise_generations(array("I", [7]), array("Q", [1]))
    target.runtime.gate.set()
    outcome = target.outcome()
    assert outcome.error is TransferError.STALE_GENERATION and "after the copy" in outcome.detail
    assert target.pull(source.offer([1])).error is None, "the path goes on"


def test_a_handle_is_opened_once_a_peer_and_closed_with_the_link(pair: tuple[Worker, Worker]) -> None:
    """Fails when each pull opens it anew (the loopback device refuses, as CUDA may), and when the link does not close it (planted)."""
    source, target = pair
    for _ in range(5):
        assert target.pull(source.offer(EVERYTHING)).error is None
    assert blocks_of(target.pool) == blocks_of(source.pool)
    assert (target.runtime.num_opened, target.runtime.num_open) == (1, 1)
    target.kv.close()
    assert target.runtime.num_open == 0


def test_two_links_share_what_is_open() -> None:
    """Fails when the first to close closes for both (planted)."""
    owner, reader = LoopbackRuntime(), LoopbackRuntime()
    owner.enter()
    reader.enter()
    address = owner.allocate(4096)
    handles = OpenHandles(reader)
    handle = owner.export(address)
    assert handles.open(handle) == handles.open(handle)
    handles.close(handle)
    assert reader.num_open == 1
    handles.close(handle)
    assert reader.num_open == 0
    owner.free(address)


def test_memory_of_another_device_is_refused(make: Make) -> None:
    source, target = make("prefill-0", "loopback:1"), make("decode-0")
    outcome = target.pull(source.offer([1]))
    assert outcome.error is TransferError.REFUSED
    assert "blocks of loopback:1" in outcome.detail and "one device is needed" in outcome.detail
    assert target.runtime.num_opened == 0


@pytest.mark.parametrize("call", ["open", "create_stream", "copy_runs", "record", "is_done"])
def test_a_device_that_refuses_ends_the_pull_and_not_the_lane(pair: tuple[Worker, Worker], call: str) -> None:
    """PEER_LOST, since another path may do. Fails when DeviceError is not turned into an outcome (planted: the lane breaks down)."""
    source, target = pair
    target.runtime.failing.add(call)
    outcome = target.pull(source.offer([1, 2]))
    assert outcome.error is TransferError.PEER_LOST and f"{call}: launch failure (719)" in outcome.detail
    target.runtime.failing.clear()
    assert target.runtime.is_idle
    assert target.pull(source.offer([1, 2])).error is None


def test_the_offer_names_blocks_of_the_pool(pair: tuple[Worker, Worker]) -> None:
    source, target = pair
    assert target.pull(source.offer([NUM_BLOCKS])).error is TransferError.REFUSED


@pytest.mark.parametrize("mode", [DigestMode.SAMPLED, DigestMode.FULL])
def test_digests_on_the_device_are_those_of_the_host(pair: tuple[Worker, Worker], mode: DigestMode) -> None:
    """And no more is copied to the host than is digested. Fails when a span lacks its block's offset, or the layer its turn (planted)."""
    source, _ = pair
    host = PoolMemory.create(LAYOUT, NUM_BLOCKS)
    host.region.blocks[:] = blocks_of(source.pool)
    ids = array("I", [5, 6, 9, 31, 0, 7])
    generations = array("Q", [3, 1, 4, 1, 5, 2**40])
    source.runtime.copied_bytes = 0
    made = digest.compute(source.pool.region, ids, generations, mode, "ab" * 16)
    assert made == digest.compute(host.region, ids, generations, mode, "ab" * 16)
    assert source.runtime.copied_bytes == len(ids) * digest.read_bytes(LAYOUT, mode)
    places = array("I", [4, 1])
    assert digest.verify(source.pool.region, array("I", [0, 6]), generations, places, mode, "ab" * 16, made) == []
    assert digest.verify(source.pool.region, array("I", [0, 9]), generations, places, mode, "ab" * 16, made) == [1]
    host.close()


def test_long_spans_are_read_whatever_the_host_buffer_holds(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when a batch begins anew at the first span (planted: crashes)."""
    monkeypatch.setattr("kvtransfer.device_pool._READ_BYTES", 1000)
    pool = make("prefill-0").pool
    assert pool.region.device is not None
    content = np.random.default_rng(2).integers(0, 256, NUM_BLOCKS * SIZE, dtype=np.uint8).tobytes()
    pool.region.device.write(0, content)
    spans = np.array([[0, 600], [100, 400], [7, 1], [50, 3000], [SIZE, 999]])
    assert [bytes(v) for v in pool.region.device.read(spans)] == [content[a : a + n] for a, n in spans.tolist()]
    assert list(pool.region.device.read(spans[:0])) == []


def test_without_a_gpu_the_remedy_is_named() -> None:
    try:
        CudaRuntime()
    except ConfigError as error:
        assert "choose kv_transport auto" in str(error)
    else:
        with pytest.raises(ConfigError, match="this process sees"):
            CudaRuntime(device_index=999)


def test_a_call_that_fails_says_which_and_why() -> None:
    error = DeviceError("cudaMalloc", 2, "cudaErrorMemoryAllocation")
    assert str(error) == "cudaMalloc: cudaErrorMemoryAllocation (2)"
