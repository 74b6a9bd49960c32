"""A step's plan as tensors: token ids, positions, slots and attention tiles."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from engine.core.executor import Entries
from engine.layers.attention import AttentionInputs
from engine.models.rope import RotaryFrequencies
from kernels.attention import AttentionSpan, plan_attention
from kernels.linear.reference import ROW_TILE
from kernels.numerics import Numerics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepInputs:
    """One forward pass, ready for the decoder."""

    token_ids: torch.Tensor  # [num_rows] int64; rows beyond the step's tokens are padding
    attention: AttentionInputs
    last_rows: tuple[int, ...]  # per entry, the row of its last token


def make_inputs(
    entries: Entries,
    token_ids: array[int],
    *,
    rope: RotaryFrequencies,
    windows: Iterable[int | None],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    numerics: Numerics,
) -> StepInputs:
    """`token_ids` are those of all entries in order. There is at least one entry."""
    spans: list[AttentionSpan] = []
    positions: list[np.ndarray] = []
    block_ids: list[np.ndarray] = []
    num_tokens = 0
    for entry in entries:
        entry_positions = np.arange(entry.start, entry.start + entry.num_tokens)
        assert entry.num_tokens > 0 and len(entry.block_table) * block_size >= entry.start + entry.num_tokens, "entry outside its blocks"
        spans.append(AttentionSpan(first_row=num_tokens, start=entry.start, num_tokens=entry.num_tokens, block_table=entry.block_table))
        positions.append(entry_positions)
        block_ids.append(_uint32(entry.block_table)[entry_positions // block_size])
        num_tokens += entry.num_tokens

    padding = -num_tokens % ROW_TILE if numerics == "reference" else 0  # full row tiles once, rather than in every linear
    all_tokens = np.concatenate([_uint32(token_ids), np.zeros(padding, dtype=np.uint32)]).astype(np.int64)
    assert len(all_tokens) == num_tokens + padding, "as many token ids as the entries compute"
    all_positions = torch.from_numpy(np.concatenate([*positions, np.zeros(padding, dtype=np.int64)])).to(device)
    cos, sin = rope.cos_sin(all_positions, dtype)
    return StepInputs(
        token_ids=torch.from_numpy(all_tokens).to(device),
        attention=AttentionInputs(
            cos=cos,
            sin=sin,
            block_ids=torch.from_numpy(np.concatenate(block_ids).astype(np.int64)).to(device),
            offsets=all_positions[:num_tokens] % block_size,
            plans={
                window: plan_attention(spans, block_size=block_size, window=window, numerics=numerics, device=device)
                for window in dict.fromkeys(windows)
            },
        ),
        last_rows=tuple(span.first_row + span.num_tokens - 1 for span in spans),
    )


def _uint32(values: array[int]) -> np.ndarray:
    return np.frombuffer(values, dtype=np.uint32)
