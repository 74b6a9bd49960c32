"""Prefill attention of fast numerics: gather a sequence's blocks, then torch's scaled_dot_product_attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.attention.span import AttentionSpan


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanIndex:
    """One span with its blocks and mask. Keys are counted from the first block its window reaches."""

    first_row: int
    num_tokens: int
    num_keys: int
    blocks: torch.Tensor  # [num_blocks] int64
    visible: torch.Tensor  # [num_tokens, num_keys] bool


def plan_spans(spans: Sequence[AttentionSpan], *, block_size: int, window: int | None, device: torch.device) -> tuple[SpanIndex, ...]:
    """Block ids and masks of each span."""
    indices = []
    for span in spans:
        first_block = 0 if window is None else max(0, span.start - window + 1) // block_size
        last_block = -(-span.context_len // block_size)  # rounds up
        first_key = first_block * block_size
        queries = np.arange(span.start, span.context_len)[:, None]
        keys = np.arange(first_key, span.context_len)
        visible = keys <= queries
        if window is not None:
            visible &= keys > queries - window
        table = np.frombuffer(span.block_table, dtype=np.uint32)[first_block:last_block].astype(np.int64)
        indices.append(
            SpanIndex(
                first_row=span.first_row,
                num_tokens=span.num_tokens,
                num_keys=span.context_len - first_key,
                blocks=torch.from_numpy(table).to(device),
                visible=torch.from_numpy(visible).to(device),
            )
        )
    return tuple(indices)


def attend_span(q: torch.Tensor, kv: torch.Tensor, span: SpanIndex, *, scale: float, out: torch.Tensor) -> None:
    """Write the span's rows of `out`; shapes as in the package's contract."""
    num_kv_heads, head_dim = kv.shape[2], kv.shape[4]
    gathered = kv.index_select(0, span.blocks).permute(1, 2, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)[:, :, : span.num_keys]
    rows = slice(span.first_row, span.first_row + span.num_tokens)
    attention = torch.nn.functional.scaled_dot_product_attention
    queries = q[rows].transpose(0, 1).unsqueeze(0)
    result = attention(queries, gathered[0:1], gathered[1:2], attn_mask=span.visible, scale=scale, enable_gqa=num_kv_heads != q.shape[1])
    out[rows] = result.squeeze(0).transpose(0, 1)
