"""The same on an NVIDIA GPU: one launch for hundreds of runs, where the runtime's own copies take eight microseconds each to begin.

Through the driver and ctypes, without torch: a worker that only moves blocks loads nothing else. The kernel comes as PTX, which the
driver compiles for its device (device.cu; no compiler is needed where it runs).
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import Runs

UNIT_BYTES = 16  # of offsets, sizes and addresses
RUNS_MAX = 336  # in one launch: its parameters are 4 KiB at most
_THREADS = 256
_PART_UNITS = 4 * _THREADS  # of a run for one block of threads, while there are few
_PARTS_MAX = 64
_UNITS_MAX = 1 << 32


class _Launch(ctypes.Structure):
    _fields_ = [("source", ctypes.c_uint64), ("target", ctypes.c_uint64), ("runs", ctypes.c_uint32 * (3 * RUNS_MAX))]


class DriverError(Exception):
    """`code` is a CUresult."""

    def __init__(self, call: str, code: int) -> None:
        super().__init__(f"{call}: {code}")
        self.call = call
        self.code = code


class DeviceCopy:
    """The kernel, loaded for the device that the calling thread works with. Calls may come from any thread that works with it."""

    def __init__(self) -> None:
        """
        Raises:
            OSError: no driver here.
            DriverError: it takes the kernel not.
        """
        self._cuda = ctypes.CDLL("libcuda.so.1")
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        ptx = Path(__file__).with_name("device.ptx").read_bytes() + b"\0"
        self._call("cuModuleLoadData", ctypes.byref(self._module), ptx)
        self._call("cuModuleGetFunction", ctypes.byref(self._function), self._module, b"baton_copy_runs")

    def begin(self, source: int, target: int, runs: Runs, stream: int) -> None:
        """Begin to copy runs [num_runs, 3] int64 of (source offset, target offset, size) in bytes, all of `fits`, between device addresses.

        Raises:
            DriverError: a launch was refused; those before it go on.
        """
        units = (runs // UNIT_BYTES).astype(np.uint32)
        for first in range(0, len(units), RUNS_MAX):
            self._launch(source, target, units[first : first + RUNS_MAX], stream)

    def _launch(self, source: int, target: int, units: npt.NDArray[np.uint32], stream: int) -> None:
        launch = _Launch(source, target)
        ctypes.memmove(ctypes.addressof(launch) + _Launch.runs.offset, np.ascontiguousarray(units).ctypes.data, units.nbytes)
        parts = min(_PARTS_MAX, max(1, -(-int(units[:, 2].max()) // _PART_UNITS)))
        given = (ctypes.c_void_p * 1)(ctypes.addressof(launch))
        self._call("cuLaunchKernel", self._function, parts, len(units), 1, _THREADS, 1, 1, 0, ctypes.c_void_p(stream), given, None)

    def _call(self, name: str, *arguments: object) -> None:
        code: int = getattr(self._cuda, name)(*arguments)
        if code:
            raise DriverError(name, code)


def fits(source: int, target: int, runs: Runs) -> bool:
    """True where addresses, offsets and sizes are whole units, and 32 bits can count them."""
    return not (source | target) % UNIT_BYTES and not bool((runs % UNIT_BYTES).any()) and bool((runs // UNIT_BYTES < _UNITS_MAX).all())
