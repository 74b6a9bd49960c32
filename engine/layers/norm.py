"""RMS norm with its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.rms_norm import rms_norm


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RMSNorm:
    """Over the last dimension of x."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)
