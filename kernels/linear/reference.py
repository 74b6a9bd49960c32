"""The linear of reference numerics: BLAS calls of one fixed number of rows.

BLAS picks its kernel, and with it the order of additions, by the shape of the call. Measured on torch 2.13 with MKL, AVX-512:
a row computed in a call of up to 3 rows has other bits than in a larger one; in tiles of 16 rows it has one answer, at any
place in the tile (tests/kernels/test_row_kernels.py). Fewer than 16 output features take a kernel that looks at addresses,
so such weights are widened.
"""

from __future__ import annotations

import torch

ROW_TILE = 16
MIN_OUT_FEATURES = 16


def linear_in_row_tiles(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [num_rows, in] float32; the last tile is filled up with rows of zeros."""
    num_rows, num_out = x.shape[0], weight.shape[0]
    if num_out < MIN_OUT_FEATURES:
        weight = torch.nn.functional.pad(weight, (0, 0, 0, MIN_OUT_FEATURES - num_out))
    if missing := -num_rows % ROW_TILE:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    x, transposed = x.contiguous(), weight.t()
    if x.shape[0] == ROW_TILE:
        y = torch.mm(x, transposed)
    else:
        y = x.new_empty((x.shape[0], transposed.shape[1]))
        for first in range(0, x.shape[0], ROW_TILE):
            torch.mm(x[first : first + ROW_TILE], transposed, out=y[first : first + ROW_TILE])
    y = y[:num_rows, :num_out]
    return y if bias is None else y + bias


def depends_on_place(weight: torch.Tensor) -> bool:
    """Whether this machine's BLAS breaks the promise for `weight`: a row's bits change with its place or its neighbours.

    A probe of one tile, so that another CPU or BLAS than the one measured is noticed before it answers.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((ROW_TILE, weight.shape[1]), generator=generator)
    y = linear_in_row_tiles(x, weight, None)
    for shift in (1, 7):
        if not torch.equal(linear_in_row_tiles(x.roll(shift, 0), weight, None).roll(-shift, 0), y):
            return True
    alone = torch.zeros_like(x)
    alone[5] = x[0]
    return not torch.equal(linear_in_row_tiles(alone, weight, None)[5], y[0])
