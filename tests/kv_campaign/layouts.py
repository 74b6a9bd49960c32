"""The layer structures of real models, made narrow so that a million hand-offs fit into minutes.

Number, kind and order of layers, block size and the grouping of heads are those of the model; head_dim is 4 numbers instead of 64 to 288
(one row of a token is one 8-byte word, which the paced executor's memory asks for), and a model with many KV heads keeps two or three.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from kvtransfer.layers import layer_spans
from protocol.kv import KVLayout, LayerGroup, LayerKind, ShardRectangle

BLOCK_SIZE_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignLayout:
    name: str
    model: str  # whose layers these are
    real_block_bytes: int  # of that model, bfloat16
    layout: KVLayout
    spans: tuple[tuple[int, int], ...]  # (offset, size) of each layer in a block


def _layout(name: str, model: str, kinds: list[LayerKind], *, heads: int, real_heads: int, real_dim: int) -> CampaignLayout:
    groups = []
    for kind, layers in itertools.groupby(range(len(kinds)), key=lambda layer: kinds[layer]):
        numbers = list(layers)
        groups.append(
            LayerGroup(
                kind=kind,
                first_layer=numbers[0],
                num_layers=len(numbers),
                num_kv_heads=heads,
                head_dim=4,
                dtype="bfloat16",
                window_tokens=512 if kind is LayerKind.WINDOW else None,
            )
        )
    shard = ShardRectangle(first_head=0, last_head=heads, first_layer=0, last_layer=len(kinds))
    layout = KVLayout(block_size_tokens=BLOCK_SIZE_TOKENS, groups=tuple(groups), shard=shard)
    real_block_bytes = 2 * 2 * BLOCK_SIZE_TOKENS * len(kinds) * real_heads * real_dim
    return CampaignLayout(name=name, model=model, real_block_bytes=real_block_bytes, layout=layout, spans=tuple(layer_spans(layout)))


_LOCAL_AND_GLOBAL = ([LayerKind.WINDOW] * 5 + [LayerKind.FULL]) * 4 + [LayerKind.WINDOW] * 2

LAYOUTS = (
    _layout("gqa16", "Llama 3.2 1B: 16 layers, 8 KV heads of 64", [LayerKind.FULL] * 16, heads=2, real_heads=8, real_dim=64),
    _layout("mha12", "a 125M model: 12 layers, 12 KV heads of 64", [LayerKind.FULL] * 12, heads=3, real_heads=12, real_dim=64),
    _layout("latent27", "DeepSeek V2 Lite: 27 latent layers of 576", [LayerKind.LATENT] * 27, heads=1, real_heads=1, real_dim=288),
    _layout("window26", "Gemma 3 1B: 26 layers, 5 windows of 512 to a full one", _LOCAL_AND_GLOBAL, heads=1, real_heads=1, real_dim=256),
)
