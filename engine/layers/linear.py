"""A linear with its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.linear import linear
from kernels.numerics import Numerics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Linear:
    """x [num_rows, in] -> [num_rows, out]; weight [out, in]."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    numerics: Numerics

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias, numerics=self.numerics)
