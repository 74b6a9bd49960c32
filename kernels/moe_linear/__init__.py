"""y = x Wₑᵀ, each row of x by the weight of its own expert e.

Contract: weights, one [out, in] an expert, and x [num_rows, in] of one dtype; the rows of x stand expert by expert, the first
num_rows_of[0] of them for expert 0 and so on (an expert may have none) -> y [num_rows, out].
In reference numerics a row of y has the same bits whichever other rows are there, for its own expert or for another. It is one
`linear` an expert, whose numerics it takes, so the reference serves both.
"""

from __future__ import annotations

from kernels.moe_linear.reference import moe_linear

__all__ = ["moe_linear"]
