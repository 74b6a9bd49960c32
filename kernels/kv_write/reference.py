"""Scatter of K and V by slot, in plain torch."""

from __future__ import annotations

import torch


def kv_write(key: torch.Tensor, value: torch.Tensor, kv: torch.Tensor, block_ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """Shapes as in the package's contract; rows of `key` beyond len(block_ids) are padding and are not written."""
    num_tokens = block_ids.shape[0]
    kv[block_ids, 0, :, offsets] = key[:num_tokens]
    kv[block_ids, 1, :, offsets] = value[:num_tokens]
