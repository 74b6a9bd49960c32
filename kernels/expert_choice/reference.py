"""Softmax, then the k greatest, in plain torch and in the order transformers has. `topk` promises nothing of equals: it is not used."""

from __future__ import annotations

import torch


def choose_experts(logits: torch.Tensor, num_chosen: int, *, normalize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Shapes as in the package's contract."""
    likely = torch.softmax(logits.float(), -1)
    experts = torch.sort(likely, dim=-1, descending=True, stable=True).indices[:, :num_chosen].sort(-1).values
    weights = likely.gather(-1, experts)
    if normalize:
        total = weights[:, 0]
        for rank in range(1, num_chosen):  # `sum` promises no order
            total = total + weights[:, rank]
        weights = weights / total.unsqueeze(-1)
    return experts, weights
