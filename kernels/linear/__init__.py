"""y = x Wᵀ + b.

Contract: x [num_rows, in], weight [out, in] (Hugging Face order), bias [out] or None, one dtype -> y [num_rows, out].
In reference numerics row i of y has the same bits whatever the other rows are, how many there are and where row i stands.
"""

from __future__ import annotations

import torch

from kernels.linear.reference import linear_in_row_tiles
from kernels.numerics import Numerics


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, numerics: Numerics) -> torch.Tensor:
    """See the contract above; owns nothing, returns a new tensor."""
    if numerics == "reference":
        return linear_in_row_tiles(x, weight, bias)
    return torch.nn.functional.linear(x, weight, bias)
