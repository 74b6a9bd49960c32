"""Layers of blocks as byte ranges: what a pull that follows its source layer by layer copies at once. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import Runs
from kvtransfer.reshard import block_runs
from protocol.kv import KVLayout

if TYPE_CHECKING:
    from kvtransfer.lanes import Pull

Places = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layers:
    """The bytes [offset, offset + size_bytes) of each block of a pull at `places`: positions in its lists of blocks, in rising order."""

    places: Places
    offset: int
    size_bytes: int

    @classmethod
    def of(cls, layout: KVLayout, places: Places, first_layer: int, num_layers: int) -> Layers:
        """`num_layers` layers from `first_layer` on, counted within the shard; 0: all of the block."""
        if not num_layers:
            return cls(places=places, offset=0, size_bytes=layout.block_bytes)
        spans = layer_spans(layout)[first_layer : first_layer + num_layers]
        return cls(places=places, offset=spans[0][0], size_bytes=sum(size for _, size in spans))

    def runs(self, layout: KVLayout, source_ids: npt.NDArray[Any], target_ids: npt.NDArray[Any]) -> Runs:
        """(source offset, target offset, size) in bytes for these blocks; whole blocks adjacent on both sides are one run."""
        if self.size_bytes == layout.block_bytes:
            return block_runs(source_ids, target_ids) * layout.block_bytes
        runs = np.empty((len(source_ids), 3), dtype=np.int64)
        runs[:, 0] = np.asarray(source_ids, dtype=np.int64) * layout.block_bytes + self.offset
        runs[:, 1] = np.asarray(target_ids, dtype=np.int64) * layout.block_bytes + self.offset
        runs[:, 2] = self.size_bytes
        return runs


def split_by_readiness(pull: Pull) -> tuple[Places, Places]:
    """Places of the blocks that were whole when the offer was made, and of those whose layers come one by one."""
    shard = pull.transfer.source
    if not shard.layer_clock:
        return np.arange(len(pull.source_block_ids)), np.empty(0, dtype=np.int64)
    is_whole = np.frombuffer(pull.transfer.source_indices, dtype=np.uint32) < shard.num_whole_blocks
    return np.flatnonzero(is_whole), np.flatnonzero(~is_whole)


def layer_spans(layout: KVLayout) -> list[tuple[int, int]]:
    """(offset in a block, size) in bytes of K and V of each layer, in memory order, which is the order of computing."""
    spans = []
    start = 0
    for group in layout.groups:
        size = layout.block_size_tokens * group.token_bytes // group.num_layers
        for _ in range(group.num_layers):
            spans.append((start, size))
            start += size
    return spans
