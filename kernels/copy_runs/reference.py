"""Plain numpy: one slice assignment a run, and the check before it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def copy_runs_reference(source: memoryview, target: memoryview, runs: npt.NDArray[np.int64]) -> None:
    """Shapes as in the package's contract."""
    theirs, ours = np.frombuffer(source, dtype=np.uint8), np.frombuffer(target, dtype=np.uint8)
    for start, to, size in runs.tolist():
        ours[to : to + size] = theirs[start : start + size]


def first_outside(runs: npt.NDArray[np.int64], source_bytes: int, target_bytes: int) -> int:
    """Index of the first run that leaves its buffer; -1 where none does."""
    if not len(runs):
        return -1
    sources, targets, sizes = runs.T
    outside = (runs.min(axis=1) < 0) | (sources + sizes > source_bytes) | (targets + sizes > target_bytes)
    return int(np.flatnonzero(outside)[0]) if outside.any() else -1


def first_block_outside(
    source_ids: npt.NDArray[np.uint32],
    target_ids: npt.NDArray[np.uint32],
    num_sources: int,
    num_targets: int,
    start: int,
    size: int,
    block_bytes: int,
) -> int:
    """Index of the first pair of which a block is not there; 0 where the part leaves the block; -1 where all is well."""
    if start < 0 or size < 0 or start + size > block_bytes:
        return 0
    outside = np.flatnonzero((source_ids >= num_sources) | (target_ids >= num_targets))
    return int(outside[0]) if len(outside) else -1


def runs_of_blocks(
    source_ids: npt.NDArray[np.uint32], target_ids: npt.NDArray[np.uint32], block_bytes: int, start: int, size: int
) -> npt.NDArray[np.int64]:
    """Rows of copy_runs that do what copy_blocks does."""
    starts = [ids.astype(np.int64) * block_bytes + start for ids in (source_ids, target_ids)]
    return np.stack((*starts, np.full(len(source_ids), size, dtype=np.int64)), axis=1)
