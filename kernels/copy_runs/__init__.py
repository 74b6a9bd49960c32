"""Copy many runs of bytes from one buffer into another, without the interpreter lock.

Contract: runs [num_runs, 3] int64 holds (source offset, target offset, size) in bytes, each inside its buffer; source and target do
not overlap, runs are copied in order. Whoever may write the source meanwhile is the caller's business (kvtransfer.copying). Where the
native kernels are not built the reference serves: the same bytes, about a microsecond a run more.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from kernels.copy_runs.reference import copy_runs_reference, first_block_outside, first_outside, runs_of_blocks
from kernels.native.library import NativeLibrary, load_library

__all__ = ["BlockIds", "Runs", "copy_blocks", "copy_runs", "copy_runs_reference"]

Runs = npt.NDArray[np.int64]
BlockIds = npt.NDArray[np.uint32]


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


def copy_blocks(
    source: memoryview,
    target: memoryview,
    source_ids: BlockIds,
    target_ids: BlockIds,
    block_bytes: int,
    *,
    start: int = 0,
    size: int | None = None,
) -> None:
    """Block source_ids[i] of one pool to block target_ids[i] of another, or only bytes [start, start + size) of each; ids [n] uint32.

    The same bytes as copy_runs of kvtransfer's runs of blocks, without the arrays of runs.

    Raises:
        IndexError: a block lies outside its pool, or the part outside the block; nothing was copied.
    """
    size = block_bytes - start if size is None else size
    num_sources, num_targets = len(source) // block_bytes, len(target) // block_bytes
    library = load_library()
    assert len(source_ids) == len(target_ids) and source_ids.dtype == target_ids.dtype == np.uint32, "as in the contract"
    if not isinstance(library, NativeLibrary):
        bad = first_block_outside(source_ids, target_ids, num_sources, num_targets, start, size, block_bytes)
        if bad < 0:
            copy_runs_reference(source, target, runs_of_blocks(source_ids, target_ids, block_bytes, start, size))
    else:
        source_ids, target_ids = np.ascontiguousarray(source_ids), np.ascontiguousarray(target_ids)
        bad = library.calls.baton_copy_blocks(
            _address(source), num_sources, _address(target), num_targets, block_bytes, start, size,
            source_ids.ctypes.data, target_ids.ctypes.data, len(source_ids),
        )  # fmt: skip
    if bad >= 0:
        pair = f"block {source_ids[bad]} to {target_ids[bad]}" if len(source_ids) else "no block"
        raise IndexError(
            f"bytes {start} to {start + size} of {pair} leave blocks of {block_bytes} bytes or pools of {num_sources} and {num_targets}"
        )


def _address(buffer: memoryview) -> ctypes.c_void_p:
    return ctypes.c_void_p(np.frombuffer(buffer, dtype=np.uint8).ctypes.data)
