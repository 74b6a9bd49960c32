"""Attention of one layer: project, norm, rotate, write KV into the pool, attend over the pool, project back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from kernels.attention import AttentionPlan, paged_attention
from kernels.kv_write import kv_write
from kernels.rotary import rotary


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionInputs:
    """What all layers of one step share. Rows beyond the step's tokens are padding: computed, never written to the pool."""

    cos: torch.Tensor  # [num_rows, head_dim/2]
    sin: torch.Tensor
    block_ids: torch.Tensor  # [num_tokens] int64: the slot each token's KV goes to
    offsets: torch.Tensor
    plans: Mapping[int | None, AttentionPlan]  # by window


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """x [num_rows, hidden] -> like x."""

    q: Linear
    k: Linear
    v: Linear
    output: Linear
    q_norm: RMSNorm | None  # None: the architecture has no norm over the heads
    k_norm: RMSNorm | None
    head_dim: int
    window: int | None

    def __call__(self, x: torch.Tensor, kv: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        """kv [num_blocks, 2, num_kv_heads, block_size, head_dim]: this layer of the pool, written in place."""
        num_rows = x.shape[0]
        q = self.q(x).view(num_rows, -1, self.head_dim)
        k = self.k(x).view(num_rows, -1, self.head_dim)
        v = self.v(x).view(num_rows, -1, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotary(q, inputs.cos, inputs.sin), rotary(k, inputs.cos, inputs.sin)
        kv_write(k, v, kv, inputs.block_ids, inputs.offsets)
        out = paged_attention(q, kv, inputs.plans[self.window], scale=self.head_dim**-0.5)
        return self.output(out.view(num_rows, -1))
