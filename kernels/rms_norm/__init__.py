"""y = x / sqrt(mean(x²) + eps) * weight, over the last dimension.

Contract: x [..., size], weight [size] -> y like x. The mean is taken in float32 whatever the dtype. Each row is reduced by
itself and always in one order, so the reference serves both numerics.
"""

from __future__ import annotations

from kernels.rms_norm.reference import rms_norm

__all__ = ["rms_norm"]
