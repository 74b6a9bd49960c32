"""The memory of a KV pool: one anonymous file that peers may map read-only, with a generation word in front of each block.

    memfd = [ uint64 generation of block 0, 1, ... | uint64 clock | padding to a page | block 0 | block 1 | ... ]

The file has no name, so nothing is left behind by kill -9. Its size is sealed, so a mapping can never fault; and it is sealed
against new writable mappings, so a peer that received the descriptor can read the pool and nothing else.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
from array import array

import numpy as np
import numpy.typing as npt

from kvtransfer.mapping import map_aligned
from kvtransfer.transport import Region, RegionKind
from protocol.errors import LayoutMismatch
from protocol.kv import KVLayout

_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; Python names it from 3.13 on
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class PoolMemory:
    """Owner of one mapping. `region` is what executors and transports use; its views die with `close`."""

    def __init__(
        self, mapping: memoryview | mmap.mmap, *, fd: int, kind: RegionKind, layout: KVLayout, num_blocks: int, region_id: int
    ) -> None:
        start = blocks_offset(num_blocks)
        whole = memoryview(mapping)
        self.region = Region(
            region_id=region_id,
            kind=kind,
            layout=layout,
            num_blocks=num_blocks,
            fd=fd,
            blocks=whole[start : start + num_blocks * layout.block_bytes],
            generations=whole[: 8 * num_blocks].cast("Q"),
            clock=whole[8 * num_blocks : 8 * num_blocks + 8].cast("Q"),
        )
        self._mapping: memoryview | mmap.mmap | None = mapping
        self._whole = whole
        self._closed = False

    @classmethod
    def create(cls, layout: KVLayout, num_blocks: int, region_id: int = 0) -> PoolMemory:
        """A new pool of `num_blocks` zeroed blocks, all of generation 0. Memory is taken from the system as blocks are touched."""
        size_bytes = pool_bytes(layout, num_blocks)
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size_bytes)
            mapping = map_aligned(fd, size_bytes, writable=True)
            # After our own mapping, the only writable one there will ever be.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL)
        except BaseException:
            os.close(fd)
            raise
        return cls(mapping, fd=fd, kind=RegionKind.MEMFD, layout=layout, num_blocks=num_blocks, region_id=region_id)

    @classmethod
    def attach(cls, fd: int, layout: KVLayout, num_blocks: int, region_id: int = 0) -> PoolMemory:
        """A read-only view of a peer's pool. Takes ownership of `fd`, also when it raises.

        Raises:
            LayoutMismatch: the file is not of the size the announced layout asks for, or its size is not sealed.
        """
        try:
            size_bytes = pool_bytes(layout, num_blocks)
            actual_bytes = os.fstat(fd).st_size
            if actual_bytes != size_bytes:
                raise LayoutMismatch(f"the peer's pool has {actual_bytes} bytes, its announced layout makes {size_bytes}")
            if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SIZE_SEALS != _SIZE_SEALS:
                raise LayoutMismatch("the size of the peer's pool is not sealed; it could shrink under our reads")
            mapping = map_aligned(fd, size_bytes, writable=False)
        except BaseException:
            os.close(fd)
            raise
        return cls(mapping, fd=fd, kind=RegionKind.MEMFD, layout=layout, num_blocks=num_blocks, region_id=region_id)

    @classmethod
    def private(cls, layout: KVLayout, num_blocks: int, region_id: int) -> PoolMemory:
        """Memory no peer can map: staging for blocks that are laid out anew after they were verified."""
        mapping = mmap.mmap(-1, pool_bytes(layout, num_blocks))
        return cls(mapping, fd=-1, kind=RegionKind.PRIVATE, layout=layout, num_blocks=num_blocks, region_id=region_id)

    def raise_generations(self, block_ids: array[int], generations: array[int]) -> None:
        """Write new generation words; the caller does so before it writes the blocks anew. Generations only grow."""
        words = self.region.generations
        for block_id, generation in zip(block_ids, generations, strict=True):
            assert generation >= words[block_id], f"generation of block {block_id} would fall from {words[block_id]} to {generation}"
            words[block_id] = generation

    def close(self) -> None:
        """Give the memory back. Tensors that still look at the blocks keep the mapping alive until they go."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(BufferError):
            self.region.blocks.release()
            self.region.generations.release()
            self.region.clock.release()
            self._whole.release()
            if isinstance(self._mapping, mmap.mmap):
                self._mapping.close()
        self._mapping = None
        if self.region.fd >= 0:
            os.close(self.region.fd)


def pool_bytes(layout: KVLayout, num_blocks: int) -> int:
    """Size of the file: generation words, clock, padding, blocks."""
    assert num_blocks > 0, f"a pool of {num_blocks} blocks"
    return blocks_offset(num_blocks) + num_blocks * layout.block_bytes


def blocks_offset(num_blocks: int) -> int:
    """Where block 0 starts: the first page after the generation words and the clock."""
    return -(-8 * (num_blocks + 1) // mmap.PAGESIZE) * mmap.PAGESIZE


def first_stale(region: Region, block_ids: npt.NDArray[np.uint32], expected: npt.NDArray[np.uint64]) -> int | None:
    """Index of the first block whose generation is not the expected one; None when all are."""
    differs = np.frombuffer(region.generations, dtype=np.uint64)[block_ids] != expected
    return int(differs.argmax()) if differs.any() else None
