"""A KV pool in the memory of a GPU, which peers on the same GPU open by a handle; its generation words stay in host memory.

    device   [ block 0 | block 1 | ... ]                     an allocation of its own, so that the handle opens it and nothing else
    memfd    [ uint64 generation of block 0, 1, ... | clock ]   passed to peers as kvtransfer.region passes a whole pool

The words are in host memory because that is where they are raised and looked at: raised before a kernel that writes the block is
launched, looked at after the event of a copy, without a trip to the device on either side.
"""

from __future__ import annotations

import ctypes
import threading
import time
from array import array
from collections.abc import Iterator

import numpy as np

from kernels.copy_runs import Runs
from kvtransfer.cuda_runtime import DeviceRuntime
from kvtransfer.region import PoolMemory
from kvtransfer.transport import Region, RegionKind
from protocol.kv import KVLayout, ShardRectangle

# What PoolMemory makes of it are generation words alone, sealed and checked as those of any pool.
WORDS_ONLY = KVLayout(block_size_tokens=1, groups=(), shard=ShardRectangle(first_head=0, last_head=0, first_layer=0, last_layer=0))

_READ_BYTES = 4 << 20  # copied to the host at once; longer spans make it larger
_LOOK_S = 20e-6


class DevicePool:
    """Owner of the allocation and of the words; stands where PoolMemory stands for a pool in host memory."""

    def __init__(self, runtime: DeviceRuntime, layout: KVLayout, num_blocks: int, region_id: int = 0) -> None:
        """A new pool of `num_blocks` zeroed blocks, all of generation 0.

        Raises:
            DeviceError: the device has no room.
        """
        runtime.enter()
        self._words = PoolMemory.create(WORDS_ONLY, num_blocks)
        try:
            self._device = DeviceBlocks(runtime, num_blocks * layout.block_bytes)
        except BaseException:
            self._words.close()
            raise
        self.region = Region(
            region_id=region_id,
            kind=RegionKind.CUDA_IPC,
            layout=layout,
            num_blocks=num_blocks,
            fd=self._words.region.fd,
            blocks=memoryview(b""),
            generations=self._words.region.generations,
            clock=self._words.region.clock,
            device=self._device,
        )

    def raise_generations(self, block_ids: array[int], generations: array[int]) -> None:
        """Before a kernel that writes the blocks anew is launched; as in PoolMemory."""
        self._words.raise_generations(block_ids, generations)

    def close(self) -> None:
        """Give the memory back; no transfer may be under way, and peers that still have it open keep what they see until they close."""
        self._device.close()
        self._words.close()


class DeviceBlocks:
    """The blocks of one pool on the device, and a way to look at some of them from the host."""

    def __init__(self, runtime: DeviceRuntime, size_bytes: int) -> None:
        self.runtime = runtime
        self.address = runtime.allocate(size_bytes)
        self.offset_bytes = 0  # of block 0 in the allocation that `handle` opens
        try:
            self.handle = runtime.export(self.address)
            self._stream = runtime.create_stream()
        except BaseException:
            runtime.free(self.address)
            raise
        self._reading = threading.Lock()
        self._host_address = 0  # 0: nothing was read yet
        self._host_bytes = 0
        self._is_closed = False

    def read(self, spans: Runs) -> Iterator[memoryview]:
        """Host copies of spans [num_spans, 2] int64 of (offset, size) in bytes; each is valid until the next is taken.

        Copies as many at once as fit `_READ_BYTES`. One reader at a time, on any thread.
        """
        with self._reading:
            self.runtime.enter()
            first = 0
            while first < len(spans):
                ends = np.cumsum(spans[first:, 1])
                count = max(1, int(np.searchsorted(ends, _READ_BYTES, side="right")))
                host = self._copied(spans[first : first + count], ends[:count])
                for start, size in zip((ends[:count] - spans[first : first + count, 1]).tolist(), spans[first:, 1].tolist(), strict=False):
                    yield host[start : start + size]
                first += count

    def write(self, start: int, content: bytes) -> None:
        """Bytes of the host to offset `start`; returns when they are there. An engine's kernels write blocks, this is for the rest."""
        with self._reading:
            self.runtime.enter()
            given = ctypes.create_string_buffer(content, len(content))
            run = np.array([[0, start, len(content)]], dtype=np.int64)
            self.runtime.copy_runs(ctypes.addressof(given), self.address, run, self._stream)
            self.runtime.synchronize(self._stream)

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self.runtime.enter()
        self.runtime.destroy_stream(self._stream)
        if self._host_bytes:
            self.runtime.free_host(self._host_address)
        self.runtime.free(self.address)

    def _copied(self, spans: Runs, ends: Runs) -> memoryview:
        size_bytes = int(ends[-1])
        if self._host_bytes < size_bytes:
            if self._host_bytes:
                self.runtime.free_host(self._host_address)
                self._host_bytes = 0
            wanted = max(size_bytes, _READ_BYTES)
            self._host_address = self.runtime.allocate_host(wanted)
            self._host_bytes = wanted
        runs = np.stack((spans[:, 0], ends - spans[:, 1], spans[:, 1]), axis=1)
        self.runtime.copy_runs(self.address, self._host_address, runs, self._stream)
        event = self.runtime.record(self._stream)
        try:
            while not self.runtime.is_done(event):
                time.sleep(_LOOK_S)
        finally:
            self.runtime.destroy_event(event)
        return memoryview((ctypes.c_ubyte * size_bytes).from_address(self._host_address)).cast("B")
