"""One slice assignment a run, in plain numpy."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def copy_runs_reference(source: memoryview, target: memoryview, runs: npt.NDArray[np.int64]) -> None:
    """Shapes as in the package's contract."""
    theirs, ours = np.frombuffer(source, dtype=np.uint8), np.frombuffer(target, dtype=np.uint8)
    for start, to, size in runs.tolist():
        ours[to : to + size] = theirs[start : start + size]
