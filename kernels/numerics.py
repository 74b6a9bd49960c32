"""The two promises a kernel can be asked for. Torch-free, so that configuration can name them."""

from __future__ import annotations

from typing import Literal

Numerics = Literal["reference", "fast"]
"""reference: a row's bits depend on that row alone, never on the batch, the chunking or the phase. fast: whatever is fast."""

Kernels = Literal["auto", "torch", "avx512_bf16", "avx512", "avx2", "portable"]
"""Who computes: torch, or the native kernels (kernels/native) on one instruction path. auto: the best this machine has."""
