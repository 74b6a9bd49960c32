"""The worker's KV blocks as torch tensors, over memory the transports read and write too."""

from __future__ import annotations

import torch

from engine.runner.weights import TORCH_DTYPES
from kvtransfer.layer_clock import LayerClock
from kvtransfer.transport import Region


class KVPool:
    """Views of a region's blocks; owns no memory and must not outlive the region.

    Memory order [block][layer][2][kv_head][token][dim]; all layers of one worker have one shape.
    """

    def __init__(self, region: Region) -> None:
        layout = region.layout
        shapes = {(group.num_kv_heads, group.head_dim, group.dtype) for group in layout.groups}
        assert len(shapes) == 1, f"layer groups of different shapes: {sorted(shapes)}"
        ((num_kv_heads, head_dim, dtype),) = shapes
        self.block_size_tokens = layout.block_size_tokens
        self.num_blocks = region.num_blocks
        self.blocks = torch.frombuffer(region.blocks, dtype=TORCH_DTYPES[dtype]).view(
            region.num_blocks, layout.num_layers, 2, num_kv_heads, layout.block_size_tokens, head_dim
        )
        self.layers = self.blocks.unbind(1)  # each [num_blocks, 2, num_kv_heads, block_size, head_dim]
        self.clock_word = region.clock
        self.clock = LayerClock(region)

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block over all layers (copy-on-write)."""
        self.blocks[target] = self.blocks[source]
