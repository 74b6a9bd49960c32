"""Linear, RMS norm, rotary and gated SiLU: right against float64, and in reference numerics row by row the same bits.

How: sweeps over odd sizes and row counts around one tile of 16; each row alone must equal the same row at any place of any batch.
Seen to fail with the row tiles taken away (linear), and with torch's own silu.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.linear import linear  # noqa: E402
from kernels.linear.reference import depends_on_place  # noqa: E402
from kernels.rms_norm import rms_norm  # noqa: E402
from kernels.rotary import rotary  # noqa: E402
from kernels.silu_mul import silu_mul  # noqa: E402

ROW_COUNTS = [1, 2, 15, 16, 17, 33, 100]
SIZES = [1, 7, 16, 33, 64, 100, 384]


def assert_rows_are_independent(kernel: Callable[..., Any], *inputs: Any) -> None:
    """Each row of 100, computed in batches of every size at a shifted place, has the bits it has in the whole."""
    whole = kernel(*inputs)
    for num_rows in ROW_COUNTS:
        for first in (0, 1, 13, 100 - num_rows):
            rows = slice(first, min(first + num_rows, 100))
            assert torch.equal(kernel(*(x[rows].clone() for x in inputs)), whole[rows]), (num_rows, first)


@pytest.mark.parametrize("num_out", SIZES)
@pytest.mark.parametrize("num_in", SIZES)
def test_linear(num_in: int, num_out: int) -> None:
    x, weight, bias = torch.randn(100, num_in), torch.randn(num_out, num_in), torch.randn(num_out)
    exact = x.double() @ weight.double().T + bias.double()
    for numerics in ("reference", "fast"):
        y = linear(x, weight, bias, numerics=numerics)
        assert y.shape == (100, num_out)
        assert (y - exact).abs().max() < 1e-4  # float32 sums of up to 384 products of size 1
    assert_rows_are_independent(lambda rows: linear(rows, weight, bias, numerics="reference"), x)
    assert not depends_on_place(weight)


def test_linear_of_no_rows_is_empty() -> None:
    for numerics in ("reference", "fast"):
        assert linear(torch.zeros(0, 32), torch.zeros(48, 32), None, numerics=numerics).shape == (0, 48)


def test_linear_does_not_depend_on_where_the_weight_lies() -> None:
    """A mapped safetensors tensor begins at any multiple of 8 bytes."""
    x, weight = torch.randn(5, 33), torch.randn(9, 33)
    buffer = torch.empty(9 * 33 + 2)
    moved = buffer[2:].view(9, 33).copy_(weight)
    assert torch.equal(linear(x, weight, None, numerics="reference"), linear(x, moved, None, numerics="reference"))


@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size: int) -> None:
    x, weight = torch.randn(100, size) * 3, torch.randn(size)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert (rms_norm(x, weight, 1e-5) - exact).abs().max() < 1e-5
    assert_rows_are_independent(lambda rows: rms_norm(rows, weight, 1e-5), x)
    heads = torch.randn(100, 3, size)
    assert_rows_are_independent(lambda rows: rms_norm(rows, weight, 1e-5), heads)
    narrow = rms_norm(x.bfloat16(), weight.bfloat16(), 1e-5)
    assert narrow.dtype == torch.bfloat16 and torch.allclose(narrow.double(), exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("head_dim", [2, 6, 16, 33 * 2])
@pytest.mark.parametrize("num_heads", [1, 3])
def test_rotary_turns_each_pair_by_its_angle(num_heads: int, head_dim: int) -> None:
    x, angles = torch.randn(100, num_heads, head_dim), torch.randn(100, head_dim // 2) * 100
    turned = rotary(x, angles.cos(), angles.sin())
    half = head_dim // 2
    as_complex = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.exp(1j * angles.double()).unsqueeze(1)
    assert torch.allclose(turned.double(), torch.cat((as_complex.real, as_complex.imag), -1), atol=1e-5)
    assert_rows_are_independent(lambda rows, by: rotary(rows, by.cos(), by.sin()), x, angles)


@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(size: int) -> None:
    gate, up = torch.randn(100, size) * 5, torch.randn(100, size)
    exact = gate.double() * torch.sigmoid(gate.double()) * up
    for numerics in ("reference", "fast"):
        assert torch.allclose(silu_mul(gate, up, numerics=numerics).double(), exact, rtol=1e-5, atol=1e-6)
    assert_rows_are_independent(lambda a, b: silu_mul(a, b, numerics="reference"), gate, up)


def test_silu_mul_of_extremes_is_finite() -> None:
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    for numerics in ("reference", "fast"):
        assert torch.allclose(silu_mul(gate, torch.ones_like(gate), numerics=numerics), torch.tensor([[0.0, 0.0, 0.0, 100.0, 1e4]]))
