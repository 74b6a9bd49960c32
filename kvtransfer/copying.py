"""Copying blocks out of memory that another may write at any time: a seqlock over the blocks' generation words.

The source raises a generation before it writes a block anew, so unchanged words around the copy mean unchanged blocks under it.
(Ordering: on x86 loads and stores keep theirs; elsewhere the locks inside the released and retaken interpreter lock are fences.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import BlockIds, Runs, copy_blocks
from kvtransfer.lanes import Pull, PullFailed
from kvtransfer.layer_clock import wait_for
from kvtransfer.layers import Layers, layer_spans, split_by_readiness
from kvtransfer.region import first_stale
from kvtransfer.transport import Region
from protocol.kv import TransferError


def copy_verified(source: Region, pull: Pull, look_up: Callable[[float], None], *, slice_bytes: int) -> None:
    """Copy the pull's blocks; raise PullFailed unless all generations are the expected ones before and after.

    `look_up(seconds)` is called at least every `slice_bytes`; it may wait so long, and may raise. Blocks that are still being computed
    are followed layer by layer. The copy itself runs without the interpreter lock.
    """
    block_ids = np.frombuffer(pull.source_block_ids, dtype=np.uint32)
    if len(block_ids) and int(block_ids.max()) >= source.num_blocks:
        raise PullFailed(TransferError.REFUSED, f"block {int(block_ids.max())} of a pool of {source.num_blocks}")
    expected = np.frombuffer(pull.generations, dtype=np.uint64)
    check_generations(source, block_ids, expected, "before")
    block_bytes = source.layout.block_bytes
    for layers in follow(source, pull, look_up):
        for source_ids, target_ids in _slices(pull, layers, slice_bytes):
            look_up(0.0)
            copy_blocks(source.blocks, pull.target.blocks, source_ids, target_ids, block_bytes, start=layers.offset, size=layers.size_bytes)
    look_up(0.0)
    check_generations(source, block_ids, expected, "after")


def follow(source: Region, pull: Pull, look_up: Callable[[float], None]) -> Iterator[Layers]:
    """The parts of a pull in the order in which they become ready, each when it is, as many layers at once as are.

    source: the region whose clock is looked at.
    """
    shard, layout = pull.transfer.source, pull.target.layout
    whole, growing = split_by_readiness(pull)
    if not shard.layer_clock:
        yield Layers(places=whole, offset=0, size_bytes=layout.block_bytes)
        return
    wait_for(source, shard.layer_clock, look_up)
    yield Layers(places=whole, offset=0, size_bytes=layout.block_bytes)
    spans = layer_spans(layout)
    done = 0
    while len(growing) and done < len(spans):
        clock = wait_for(source, shard.layer_clock + done + 1, look_up)
        end = min(len(spans), clock - shard.layer_clock)
        yield Layers.of(layout, growing, done, end - done)
        done = end


def slices(pull: Pull, layers: Layers, slice_bytes: int) -> Iterator[Runs]:
    """Runs that are contiguous on both sides, in order, in arrays of at most `slice_bytes` (or one block) each."""
    for source_ids, target_ids in _slices(pull, layers, slice_bytes):
        yield layers.runs(pull.target.layout, source_ids, target_ids)


def _slices(pull: Pull, layers: Layers, slice_bytes: int) -> Iterator[tuple[BlockIds, BlockIds]]:
    """(source blocks, target blocks) of at most `slice_bytes`, or one block, each."""
    source_ids = np.frombuffer(pull.source_block_ids, dtype=np.uint32)
    target_ids = np.frombuffer(pull.transfer.target_block_ids, dtype=np.uint32)
    if len(layers.places) < len(source_ids):
        source_ids, target_ids = source_ids[layers.places], target_ids[layers.places]
    max_blocks = max(1, slice_bytes // layers.size_bytes)
    for first in range(0, len(source_ids), max_blocks):
        end = first + max_blocks
        yield source_ids[first:end], target_ids[first:end]


def check_generations(region: Region, block_ids: npt.NDArray[np.uint32], expected: npt.NDArray[np.uint64], when: str) -> None:
    """Raise PullFailed unless the words of `region` are the expected ones; `when` is for the reader of the text."""
    index = first_stale(region, block_ids, expected)
    if index is not None:
        block_id = int(block_ids[index])
        detail = f"block {block_id} has generation {region.generations[block_id]} {when} the copy, {int(expected[index])} was offered"
        raise PullFailed(TransferError.STALE_GENERATION, detail)
