"""Softmax, then the k greatest, in plain torch and in the order transformers has."""

from __future__ import annotations

import torch


def choose_experts(logits: torch.Tensor, num_chosen: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in the package's contract."""
    likely, chosen = torch.softmax(logits.float(), -1).topk(num_chosen, -1)
    experts, order = chosen.sort(-1)
    weights = likely.gather(-1, order)
    if normalize:
        total = weights[:, 0]
        for rank in range(1, num_chosen):  # `sum` promises no order
            total = total + weights[:, rank]
        weights = weights / total.unsqueeze(-1)
    return experts, weights
