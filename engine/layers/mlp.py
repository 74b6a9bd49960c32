"""The gated MLP: down(silu(gate(x)) * up(x))."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.layers.linear import Linear
from kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GatedMLP:
    """x [num_rows, hidden] -> like x."""

    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu_mul(self.gate(x), self.up(x), numerics=self.gate.numerics))

    def linears(self) -> list[Linear]:
        return [self.gate, self.up, self.down]
