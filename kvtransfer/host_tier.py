"""The bytes of a worker's host tier: blocks evicted from the pool, in slots of memory of our own.

Saving happens on the caller's thread, before it returns, since the block is written anew right after. Loading takes as long as it takes and
may run on another thread: its slots are not saved into meanwhile, and their generations are compared before and after.
"""

from __future__ import annotations

from array import array
from typing import Protocol

import numpy as np

from kernels.copy_runs import BlockIds, copy_blocks
from kvtransfer.region import PoolMemory, first_stale
from kvtransfer.transport import Region


class HostTierMemory(Protocol):
    """What a driver asks of a tier, wherever the pool lies. A pool on a device may order its copies on the device's stream."""

    def save(self, block_ids: array[int], slots: array[int], generations: array[int]) -> None:
        """Blocks of the pool into slots; they may be written anew when it returns, or what writes them is ordered behind."""
        ...

    def load(self, slots: array[int], generations: array[int], block_ids: array[int]) -> str:
        """Slots into blocks of the pool, which are readable when it returns. Empty, or what was wrong with the slots."""
        ...

    def close(self) -> None: ...


class CpuHostTier:
    """For pools in the CPU's memory: copies without the interpreter lock. Memory is taken from the system as slots are first used."""

    def __init__(self, pool: Region, num_slots: int) -> None:
        self._pool = pool
        self._memory = PoolMemory.private(pool.layout, num_slots, region_id=-1)
        self._slots = self._memory.region

    def save(self, block_ids: array[int], slots: array[int], generations: array[int]) -> None:
        self._memory.raise_generations(slots, generations)
        self._copy(self._pool, block_ids, self._slots, slots)

    def load(self, slots: array[int], generations: array[int], block_ids: array[int]) -> str:
        if (wrong := self._differing(slots, generations)) is None:
            self._copy(self._slots, slots, self._pool, block_ids)
            wrong = self._differing(slots, generations)
        return wrong or ""

    def close(self) -> None:
        self._memory.close()

    @staticmethod
    def _copy(source: Region, source_ids: array[int], target: Region, target_ids: array[int]) -> None:
        copy_blocks(source.blocks, target.blocks, _ids(source_ids), _ids(target_ids), source.layout.block_bytes)

    def _differing(self, slots: array[int], generations: array[int]) -> str | None:
        index = first_stale(self._slots, _ids(slots), np.frombuffer(generations, dtype=np.uint64))
        if index is None:
            return None
        return f"slot {slots[index]} has generation {self._slots.generations[slots[index]]}, {generations[index]} was saved"


def _ids(block_ids: array[int]) -> BlockIds:
    return np.frombuffer(block_ids, dtype=np.uint32)
