"""What the torch executor is told. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from kernels.numerics import Kernels, Numerics
from protocol.errors import ConfigError
from protocol.kv import DTYPE_SIZE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerConfig:
    """How one worker computes.

    In torch reference numerics run on one thread: its sums are split over threads, which changes their bits. The native kernels' are not.
    """

    numerics: Numerics = "reference"
    dtype: str = "auto"  # float32 in reference numerics, else the checkpoint's own; or a name of DTYPE_SIZE_BYTES
    device: str = "auto"
    kernels: Kernels = "auto"  # an instruction path of the native kernels, or torch
    num_threads: int = 1
    max_inflight_steps: int = 8  # submitted and not done; more is a bug of the caller

    def __post_init__(self) -> None:
        if self.numerics not in ("reference", "fast"):
            raise ConfigError(f"numerics {self.numerics!r} is unknown; known: reference, fast")
        if self.dtype != "auto" and self.dtype not in DTYPE_SIZE_BYTES:
            raise ConfigError(f"dtype {self.dtype!r} is not supported; known: auto, {', '.join(DTYPE_SIZE_BYTES)}")
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"device {self.device!r} is not supported by this version; known: auto, cpu")
        if self.num_threads < 1:
            raise ConfigError(f"num_threads {self.num_threads} must be at least 1")
        if self.numerics == "reference" and self.kernels == "torch" and self.num_threads != 1:
            raise ConfigError(
                f"in torch reference numerics run on 1 thread, not {self.num_threads}: its bits depend on their number;"
                " leave threads at 1, use fast numerics, or kernels auto where the native ones are built"
            )
