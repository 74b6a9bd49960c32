"""Which experts compute a token, and how much each counts.

Contract: logits [num_rows, num_experts] -> experts [num_rows, num_chosen] int64, each row's most likely ones (of equally likely
ones those of lower id) in ascending order of id, and weights [num_rows, num_chosen] float32: their share of the softmax over all
experts, or with `normalize` of those chosen. Each row is decided by itself, so the reference serves both numerics.
"""

from __future__ import annotations

from kernels.expert_choice.reference import choose_experts

__all__ = ["choose_experts"]
