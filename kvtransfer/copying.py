"""Copying blocks out of memory that another may write at any time: a seqlock over the blocks' generation words.

The source raises a generation before it writes a block anew, so unchanged words around the copy mean unchanged blocks under it.
(Ordering: on x86 loads and stores keep theirs; elsewhere the locks inside the released and retaken interpreter lock are fences.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import Runs, copy_runs
from kvtransfer.lanes import Pull, PullFailed
from kvtransfer.region import first_stale
from kvtransfer.reshard import block_runs
from kvtransfer.transport import Region
from protocol.kv import TransferError


def copy_verified(source: Region, pull: Pull, look_up: Callable[[], None], *, slice_bytes: int) -> None:
    """Copy the pull's blocks; raise PullFailed unless all generations are the expected ones before and after.

    `look_up` is called at least every `slice_bytes` and may raise. The copy itself runs without the interpreter lock.
    """
    block_ids = np.frombuffer(pull.source_block_ids, dtype=np.uint32)
    if len(block_ids) and int(block_ids.max()) >= source.num_blocks:
        raise PullFailed(TransferError.REFUSED, f"block {int(block_ids.max())} of a pool of {source.num_blocks}")
    expected = np.frombuffer(pull.generations, dtype=np.uint64)
    _check_generations(source, block_ids, expected, "before")
    for runs in _slices(block_ids, np.frombuffer(pull.transfer.target_block_ids, dtype=np.uint32), source.layout.block_bytes, slice_bytes):
        look_up()
        copy_runs(source.blocks, pull.target.blocks, runs)
    look_up()
    _check_generations(source, block_ids, expected, "after")


def _slices(source_ids: npt.NDArray[np.uint32], target_ids: npt.NDArray[np.uint32], block_bytes: int, slice_bytes: int) -> Iterator[Runs]:
    """Runs of blocks adjacent on both sides, in order, in arrays of at most `slice_bytes` (or one block) each."""
    max_blocks = max(1, slice_bytes // block_bytes)
    for first in range(0, len(source_ids), max_blocks):
        end = first + max_blocks
        yield block_runs(source_ids[first:end], target_ids[first:end]) * block_bytes


def _check_generations(region: Region, block_ids: npt.NDArray[np.uint32], expected: npt.NDArray[np.uint64], when: str) -> None:
    index = first_stale(region, block_ids, expected)
    if index is not None:
        block_id = int(block_ids[index])
        detail = f"block {block_id} has generation {region.generations[block_id]} {when} the copy, {int(expected[index])} was offered"
        raise PullFailed(TransferError.STALE_GENERATION, detail)
