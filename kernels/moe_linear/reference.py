"""The grouped linear as a loop over experts, in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kernels.linear import linear
from kernels.numerics import Numerics


def moe_linear(x: torch.Tensor, weights: Sequence[torch.Tensor], num_rows_of: Sequence[int], *, numerics: Numerics) -> torch.Tensor:
    """Shapes as in the package's contract; returns a new tensor. In reference numerics each expert fills row tiles of its own."""
    assert sum(num_rows_of) == x.shape[0], f"{sum(num_rows_of)} rows for the experts, {x.shape[0]} rows given"
    y = x.new_empty((x.shape[0], weights[0].shape[0]))
    first = 0
    for weight, num_rows in zip(weights, num_rows_of, strict=True):
        if num_rows:
            y[first : first + num_rows] = linear(x[first : first + num_rows], weight, None, numerics=numerics)
        first += num_rows
    return y
