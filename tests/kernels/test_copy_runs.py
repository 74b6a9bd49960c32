"""The native copy moves the same bytes as the reference and no other, over odd sizes; a run outside its buffer is refused whole.

Seen to fail with a size rounded down to 64 bytes, and with the target's offset taken for the source's.
"""

from __future__ import annotations

import numpy as np
import pytest

from kernels.copy_runs import copy_runs, copy_runs_reference
from kernels.native.library import load_library


def test_the_native_copy_is_what_runs_here() -> None:
    assert not isinstance(load_library(), str), load_library()


@pytest.mark.parametrize("num_runs", [0, 1, 2, 3, 200])
@pytest.mark.parametrize("largest", [1, 63, 65, 513, 9000])
def test_bytes_equal_the_reference(num_runs: int, largest: int) -> None:
    rng = np.random.default_rng(num_runs * largest)
    size = 4 * largest * max(1, num_runs)
    source = rng.integers(0, 256, size, dtype=np.uint8)
    sizes = rng.integers(0, largest + 1, num_runs)
    places = rng.permutation(max(1, num_runs))[:num_runs] * 2 * largest  # targets lie apart
    runs = np.stack([rng.integers(0, size - largest, num_runs), places, sizes], axis=1).astype(np.int64)
    ours, expected = np.zeros(size, dtype=np.uint8), np.zeros(size, dtype=np.uint8)
    copy_runs(memoryview(source), memoryview(ours), runs)
    copy_runs_reference(memoryview(source), memoryview(expected), runs)
    assert (ours == expected).all()


@pytest.mark.parametrize("bad", [(90, 0, 11), (0, 45, 6), (-1, 0, 1), (0, -1, 1), (0, 0, -1)])
def test_a_run_outside_its_buffer_copies_nothing(bad: tuple[int, int, int]) -> None:
    source, target = np.ones(100, dtype=np.uint8), np.zeros(50, dtype=np.uint8)
    with pytest.raises(IndexError, match="leaves buffers of 100 and 50 bytes"):
        copy_runs(memoryview(source), memoryview(target), np.array([(0, 0, 10), bad], dtype=np.int64))
    assert not target.any()
