"""Put K and V of a step's tokens into their slots of the pool.

Contract: key, value [num_tokens, num_kv_heads, head_dim]; kv [num_blocks, 2, num_kv_heads, block_size, head_dim] is one layer
of the pool, written in place; block_ids, offsets [num_tokens] int64 name each token's slot, no slot twice. A copy, so the
reference serves both numerics.
"""

from __future__ import annotations

from kernels.kv_write.reference import kv_write

__all__ = ["kv_write"]
