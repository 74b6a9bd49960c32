"""The pool's memory: sealed, nameless, readable by a peer and by nothing else."""

from __future__ import annotations

import gc
import mmap
import os
from array import array
from collections.abc import Iterator

import numpy as np
import pytest

from kvtransfer.region import PoolMemory, blocks_offset, first_stale, pool_bytes
from protocol.errors import LayoutMismatch
from protocol.kv import KVLayout, LayerGroup, LayerKind, ShardRectangle

pytestmark = pytest.mark.pure


def _layout(block_size_tokens: int = 16) -> KVLayout:
    group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
    rectangle = ShardRectangle(first_head=0, last_head=2, first_layer=0, last_layer=2)
    return KVLayout(block_size_tokens=block_size_tokens, groups=(group,), shard=rectangle)


@pytest.fixture
def pool() -> Iterator[PoolMemory]:
    memory = PoolMemory.create(_layout(), 7)
    yield memory
    memory.close()


@pytest.mark.parametrize("num_blocks", [1, 511, 512, 513])  # around one page of generation words
def test_blocks_start_on_a_page_after_the_generation_words(num_blocks: int) -> None:
    memory = PoolMemory.create(_layout(), num_blocks)
    try:
        assert blocks_offset(num_blocks) % mmap.PAGESIZE == 0 and blocks_offset(num_blocks) >= 8 * num_blocks
        assert len(memory.region.blocks) == num_blocks * _layout().block_bytes == memory.region.size_bytes
        assert len(memory.region.generations) == num_blocks
        memory.region.generations[num_blocks - 1] = 2**64 - 1
        assert bytes(memory.region.blocks[:64]) == bytes(64)
    finally:
        memory.close()


def test_reader_sees_writes_and_cannot_write(pool: PoolMemory) -> None:
    """Fails when attach maps with the default protection (mapping is then refused by the seal)."""
    view = PoolMemory.attach(os.dup(pool.region.fd), _layout(), 7)
    pool.region.blocks[3] = 77
    pool.raise_generations(array("I", [5]), array("Q", [9]))
    assert view.region.blocks[3] == 77 and view.region.generations[5] == 9
    assert view.region.blocks.readonly and view.region.generations.readonly
    with pytest.raises(OSError):
        mmap.mmap(pool.region.fd, pool_bytes(_layout(), 7))
    with pytest.raises(OSError):
        os.pwrite(pool.region.fd, b"x", 0)
    view.close()


def test_size_is_sealed_and_checked_against_the_announced_layout(pool: PoolMemory) -> None:
    with pytest.raises(OSError):
        os.ftruncate(pool.region.fd, 4096)
    with pytest.raises(LayoutMismatch, match="announced layout"):
        PoolMemory.attach(os.dup(pool.region.fd), _layout(), 8)
    with pytest.raises(LayoutMismatch, match="announced layout"):
        PoolMemory.attach(os.dup(pool.region.fd), _layout(32), 7)


def test_unsealed_memory_is_refused() -> None:
    """Fails when attach forgets to look at the seals."""
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, pool_bytes(_layout(), 2))
    with pytest.raises(LayoutMismatch, match="not sealed"):
        PoolMemory.attach(fd, _layout(), 2)
    with pytest.raises(OSError):
        os.fstat(fd)  # attach owned it


def test_generations_only_grow(pool: PoolMemory) -> None:
    pool.raise_generations(array("I", [2]), array("Q", [5]))
    with pytest.raises(AssertionError, match="would fall"):
        pool.raise_generations(array("I", [2]), array("Q", [4]))


def test_first_stale_names_the_first_block_that_differs(pool: PoolMemory) -> None:
    pool.raise_generations(array("I", [1, 3]), array("Q", [4, 6]))
    ids = np.array([3, 1, 0], dtype=np.uint32)
    assert first_stale(pool.region, ids, np.array([6, 4, 0], dtype=np.uint64)) is None
    assert first_stale(pool.region, ids, np.array([6, 3, 1], dtype=np.uint64)) == 1


def test_close_leaves_no_descriptor_and_no_mapping() -> None:
    gc.collect()  # what other tests left in cycles
    before = set(os.listdir("/proc/self/fd")), _num_pools_mapped()
    memory = PoolMemory.create(_layout(), 3)
    view = PoolMemory.attach(os.dup(memory.region.fd), _layout(), 3)
    view.close()
    memory.close()
    memory.close()
    assert (set(os.listdir("/proc/self/fd")), _num_pools_mapped()) == before


def _num_pools_mapped() -> int:
    with open("/proc/self/maps") as maps:
        return sum("baton-kv" in line for line in maps)


def test_close_spares_memory_an_array_still_reads() -> None:
    memory = PoolMemory.create(_layout(), 3)
    values = np.frombuffer(memory.region.blocks, dtype=np.uint8)
    memory.close()
    assert int(values.sum()) == 0
