"""A mixture of experts in place of the MLP: a router sends each token through a few of many gated MLPs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.layers.linear import Linear
from kernels.expert_choice import choose_experts
from kernels.moe_linear import moe_linear
from kernels.numerics import Numerics
from kernels.silu_mul import silu_mul


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Experts:
    """The gated MLPs, one weight [out, in] an expert in each tuple."""

    gate: tuple[torch.Tensor, ...]
    up: tuple[torch.Tensor, ...]
    down: tuple[torch.Tensor, ...]
    numerics: Numerics

    def __call__(self, x: torch.Tensor, experts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """x [num_rows, hidden]; experts and weights [num_rows, num_chosen], as `choose_experts` gives them -> like x.

        A row is put together from its experts in ascending order of id, in float32, and rounded once: its sum does not depend
        on who else chose them.
        """
        (num_rows, num_chosen), hidden = experts.shape, x.shape[1]
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)  # pairs (row, choice), expert by expert
        num_rows_of = chosen.bincount(minlength=len(self.gate)).tolist()
        rows = x[order // num_chosen]
        gate = moe_linear(rows, self.gate, num_rows_of, numerics=self.numerics)
        up = moe_linear(rows, self.up, num_rows_of, numerics=self.numerics)
        down = moe_linear(silu_mul(gate, up, numerics=self.numerics), self.down, num_rows_of, numerics=self.numerics)

        parts = torch.empty_like(down).index_copy_(0, order, down).view(num_rows, num_chosen, hidden)
        y = parts[:, 0].float() * weights[:, :1]
        for choice in range(1, num_chosen):
            y = y + parts[:, choice].float() * weights[:, choice : choice + 1]
        return y.to(x.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MixtureOfExperts:
    """x [num_rows, hidden] -> like x."""

    router: Linear
    experts: Experts
    num_chosen: int  # experts a token
    normalize: bool  # their weights sum to one

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        chosen, weights = choose_experts(self.router(x), self.num_chosen, normalize=self.normalize)
        return self.experts(x, chosen, weights)

    def linears(self) -> list[Linear]:
        """One of each shape."""
        first = (self.experts.gate[0], self.experts.up[0], self.experts.down[0])
        return [self.router, *(Linear(weight=weight, bias=None, numerics=self.experts.numerics) for weight in first)]
