"""Rotary positions: each pair (x[i], x[i + head_dim/2]) of a head is turned by the angle of its position.

Contract: x [num_tokens, num_heads, head_dim], cos and sin [num_tokens, head_dim/2] -> like x. Element-wise, so the reference
serves both numerics. Frequencies come from engine/models/rope.py.
"""

from __future__ import annotations

from kernels.rotary.reference import rotary

__all__ = ["rotary"]
