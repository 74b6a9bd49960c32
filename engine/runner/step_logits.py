"""What a forward pass gives back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

NOT_FINITE = -1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepLogits:
    """One row for each entry that is sampled from."""

    logits: torch.Tensor  # [num_rows, vocab_size] float32
    most_likely: list[int]  # of each row the first of its greatest; NOT_FINITE where a logit is infinite or not a number


def with_most_likely(logits: torch.Tensor) -> StepLogits:
    """Of logits made by torch."""
    ids = logits.argmax(-1).masked_fill_(~torch.isfinite(logits).all(-1), NOT_FINITE)
    return StepLogits(logits=logits, most_likely=ids.tolist())
