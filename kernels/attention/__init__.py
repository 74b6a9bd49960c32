"""Causal grouped-query attention of a step's tokens over the KV in the pool's blocks.

Contract: `plan_attention` turns the step's spans into index tensors once; `paged_attention` uses them for every layer of one
window. q [num_rows, num_heads, head_dim]; kv [num_blocks, 2, num_kv_heads, block_size, head_dim] is one layer of the pool with the
step's own tokens already written -> [num_rows, num_heads, head_dim]; rows outside every span are zeros.
A token at position p sees positions (p - window, p]; slots beyond a sequence's tokens may hold anything, NaN included.
In reference numerics a token's bits depend on its position, its q and the KV it sees: not on the batch, on how its
sequence was cut into steps, on the block size (a multiple of 16), nor on where its blocks lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kernels.attention.reference import Slab, attend_slab, plan_slabs
from kernels.attention.sdpa import SpanIndex, attend_span, plan_spans
from kernels.attention.span import AttentionSpan
from kernels.numerics import Numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionPlan:
    """Index tensors of one step for one window. Fast numerics attend single tokens in slabs and longer spans by themselves."""

    slabs: tuple[Slab, ...] = ()
    spans: tuple[SpanIndex, ...] = ()


def plan_attention(
    spans: Sequence[AttentionSpan], *, block_size: int, window: int | None, numerics: Numerics, device: torch.device
) -> AttentionPlan:
    """`window`: tokens a query sees, itself included; None: all before it."""
    if numerics == "reference":
        return AttentionPlan(slabs=plan_slabs(spans, block_size=block_size, window=window, device=device))
    single = [span for span in spans if span.num_tokens == 1]
    longer = [span for span in spans if span.num_tokens > 1]
    return AttentionPlan(
        slabs=plan_slabs(single, block_size=block_size, window=window, device=device, query_tile=1),
        spans=plan_spans(longer, block_size=block_size, window=window, device=device),
    )


def paged_attention(q: torch.Tensor, kv: torch.Tensor, plan: AttentionPlan, *, scale: float) -> torch.Tensor:
    """See the contract above; `scale` multiplies the scores before the softmax."""
    out = torch.zeros_like(q)
    for slab in plan.slabs:
        attend_slab(q, kv, slab, scale=scale, out=out)
    for span in plan.spans:
        attend_span(q, kv, span, scale=scale, out=out)
    return out


__all__ = ["AttentionPlan", "AttentionSpan", "paged_attention", "plan_attention"]
