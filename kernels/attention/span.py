"""What attention is asked for: a run of consecutive tokens of one sequence."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpan:
    """Tokens at positions [start, start + num_tokens) of a sequence are rows [first_row, first_row + num_tokens) of q."""

    first_row: int
    start: int
    num_tokens: int
    block_table: array[int]  # covers start + num_tokens tokens

    @property
    def context_len(self) -> int:
        return self.start + self.num_tokens
