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
