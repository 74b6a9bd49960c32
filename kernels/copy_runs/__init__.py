"""Copy many runs of bytes from one buffer into another, without the interpreter lock.

Contract: runs [num_runs, 3] int64 holds (source offset, target offset, size) in bytes, each inside its buffer; source and target do
not overlap, runs are copied in order. Whoever may write the source meanwhile is the caller's business (kvtransfer.copying). Where the
native kernels are not built the reference serves: the same bytes, about a microsecond a run more.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from kernels.copy_runs.reference import copy_runs_reference, first_outside
from kernels.native.library import NativeLibrary, load_library

__all__ = ["Runs", "copy_runs", "copy_runs_reference"]

Runs = npt.NDArray[np.int64]


def copy_runs(source: memoryview, target: memoryview, runs: Runs) -> None:
    """Shapes as in the package's contract.

    Raises:
        IndexError: a run lies outside its buffer; nothing was copied.
    """
    library = load_library()
    if not isinstance(library, NativeLibrary):
        bad = first_outside(runs, len(source), len(target))
        if bad < 0:
            copy_runs_reference(source, target, runs)
    else:
        runs = np.ascontiguousarray(runs, dtype=np.int64)
        bad = library.calls.baton_copy_runs(_address(source), len(source), _address(target), len(target), runs.ctypes.data, len(runs))
    if bad >= 0:
        start, to, size = runs[bad].tolist()
        raise IndexError(f"a run of {size} bytes from {start} to {to} leaves buffers of {len(source)} and {len(target)} bytes")


def _address(buffer: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
