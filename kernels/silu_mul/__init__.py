"""y = silu(gate) * up, the gate of a gated MLP.

Contract: gate, up [num_rows, size] -> y like gate. In reference numerics an element has the same bits wherever it stands.
"""

from __future__ import annotations

import torch

from kernels.numerics import Numerics
from kernels.silu_mul.reference import silu_mul_by_exp


def silu_mul(gate: torch.Tensor, up: torch.Tensor, *, numerics: Numerics) -> torch.Tensor:
    """See the contract above; returns a new tensor."""
    if numerics == "reference":
        return silu_mul_by_exp(gate, up)
    return torch.nn.functional.silu(gate) * up
