"""Copying blocks out of memory that another may write at any time: a seqlock over the blocks' generation words.

The source raises a generation before it writes a block anew, so unchanged words around the copy mean unchanged blocks under it.
(Ordering: on x86 loads and stores keep theirs; elsewhere the locks inside the released and retaken interpreter lock are fences.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kvtransfer.lanes import Pull, PullFailed
from kvtransfer.region import first_stale
from kvtransfer.reshard import block_runs
from kvtransfer.transport import Region
from protocol.kv import TransferError

BlockRun = tuple[int, int, int]  # (source block, target block, count)


def copy_verified(source: Region, pull: Pull, look_up: Callable[[], None], *, slice_bytes: int) -> None:
    """Copy the pull's blocks; raise PullFailed unless all generations are the expected ones before and after.

    `look_up` is called at least every `slice_bytes` and may raise. The copy itself runs without the interpreter lock.
    """
    block_ids = np.frombuffer(pull.source_block_ids, dtype=np.uint32)
    if len(block_ids) and int(block_ids.max()) >= source.num_blocks:
        raise PullFailed(TransferError.REFUSED, f"block {int(block_ids.max())} of a pool of {source.num_blocks}")
    expected = np.frombuffer(pull.generations, dtype=np.uint64)
    _check_generations(source, block_ids, expected, "before")
    for step in _slices(
        block_runs(pull.source_block_ids, pull.transfer.target_block_ids), max(1, slice_bytes // source.layout.block_bytes)
    ):
        look_up()
        _copy_runs(source, pull.target, step)
    look_up()
    _check_generations(source, block_ids, expected, "after")


def _copy_runs(source: Region, target: Region, runs: list[BlockRun]) -> None:
    # Slice assignment between byte arrays is one memcpy, with the interpreter lock released.
    theirs = np.frombuffer(source.blocks, dtype=np.uint8)
    ours = np.frombuffer(target.blocks, dtype=np.uint8)
    size = source.layout.block_bytes
    for source_block, target_block, count in runs:
        ours[target_block * size : (target_block + count) * size] = theirs[source_block * size : (source_block + count) * size]


def _slices(runs: list[BlockRun], max_blocks: int) -> Iterator[list[BlockRun]]:
    """The runs in order, in lists of at most `max_blocks` blocks each."""
    step: list[BlockRun] = []
    room = max_blocks
    for source, target, count in runs:
        while count:
            taken = min(count, room)
            step.append((source, target, taken))
            source, target, count, room = source + taken, target + taken, count - taken, room - taken
            if not room:
                yield step
                step, room = [], max_blocks
    if step:
        yield step


def _check_generations(region: Region, block_ids: npt.NDArray[np.uint32], expected: npt.NDArray[np.uint64], when: str) -> None:
    index = first_stale(region, block_ids, expected)
    if index is not None:
        block_id = int(block_ids[index])
        detail = f"block {block_id} has generation {region.generations[block_id]} {when} the copy, {int(expected[index])} was offered"
        raise PullFailed(TransferError.STALE_GENERATION, detail)
