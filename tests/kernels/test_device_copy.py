"""The copy kernel for NVIDIA GPUs moves the same bytes as the reference and no other; what does not fit it goes by the runtime's copies.

Seen to fail with the target's offset taken for the source's (on a GPU), and with sizes left out of `fits`.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from kernels.copy_runs import Runs, copy_runs_reference
from kernels.copy_runs.device import RUNS_MAX, UNIT_BYTES, fits
from kvtransfer.cuda_runtime import CudaRuntime
from tests.conformance.pairs import has_gpus

SIZE = 8 << 20
gpu = [pytest.mark.gpu, pytest.mark.skipif(not has_gpus(1), reason="needs an NVIDIA GPU: python -m pytest tests/kernels -m gpu")]


def runs_of(*runs: tuple[int, int, int]) -> Runs:
    return np.array(runs, dtype=np.int64).reshape(-1, 3)


def test_only_whole_units_fit() -> None:
    assert fits(1 << 40, 1 << 41, runs_of((16, 32, 48), (0, 0, 16)))
    assert fits(0, 0, runs_of())
    for source, target, run in ((8, 0, (0, 0, 16)), (0, 4, (0, 0, 16)), (0, 0, (8, 0, 16)), (0, 0, (0, 1, 16)), (0, 0, (0, 0, 17))):
        assert not fits(source, target, runs_of(run))
    assert not fits(0, 0, runs_of((UNIT_BYTES << 32, 0, 16))), "32 bits count units"


@pytest.fixture
def device() -> Iterator[tuple[CudaRuntime, int, int, int]]:
    """A runtime, two allocations of SIZE and a stream."""
    runtime = CudaRuntime()
    runtime.enter()
    source, target, stream = runtime.allocate(SIZE), runtime.allocate(SIZE), runtime.create_stream()
    yield runtime, source, target, stream
    runtime.synchronize(stream)
    runtime.destroy_stream(stream)
    runtime.free(source)
    runtime.free(target)


@pytest.mark.parametrize("unit", [pytest.param(16, marks=gpu), pytest.param(1, marks=gpu)])
@pytest.mark.parametrize("num_runs", [1, RUNS_MAX, RUNS_MAX + 1, 1000])
def test_bytes_equal_the_reference(device: tuple[CudaRuntime, int, int, int], unit: int, num_runs: int) -> None:
    """unit 1: addresses and sizes of any kind, which the kernel does not take."""
    runtime, source, target, stream = device
    rng = np.random.default_rng(num_runs)
    largest = SIZE // num_runs // unit
    sizes = rng.integers(0, largest + 1, num_runs) * unit
    starts = np.array([rng.integers(0, (SIZE - size) // unit + 1) for size in sizes]) * unit
    places = rng.permutation(num_runs) * largest * unit
    runs = np.stack([starts, places, sizes], axis=1).astype(np.int64)
    content, expected, found = rng.integers(0, 256, SIZE, dtype=np.uint8), np.zeros(SIZE, np.uint8), np.empty(SIZE, np.uint8)
    whole = runs_of((0, 0, SIZE))
    runtime.copy_runs(content.ctypes.data, source, whole, stream)
    runtime.copy_on_device(source, target, runs, stream)
    runtime.copy_runs(target, found.ctypes.data, whole, stream)
    runtime.synchronize(stream)
    copy_runs_reference(memoryview(content), memoryview(expected), runs)
    assert (found == expected).all()
