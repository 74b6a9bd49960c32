"""The architectures Baton serves, as one table of their differences. Torch-free.

All are decoder-only transformers of the Llama family: RMS norm before attention and before a gated MLP, rotary positions,
grouped-query attention. What differs is a row here; what a row cannot say needs a new column, not a new file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocol.errors import UnsupportedModel


class BiasRule(Enum):
    """Whether a group of linears carries a bias."""

    NEVER = "never"
    ALWAYS = "always"
    CONFIG = "config"  # config.json says so: `attention_bias` or `mlp_bias`


class WindowRule(Enum):
    """Which layers attend over a sliding window only."""

    NONE = "none"
    ALL_LAYERS = "all layers"  # `sliding_window` set: every layer
    LAYER_TYPES = "layer types"  # `use_sliding_window` with `layer_types`, or every layer from `max_window_layers` on


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One row: how an architecture differs from the others."""

    name: str  # as in config.json `architectures`
    qkv_bias: BiasRule = BiasRule.NEVER
    output_bias: BiasRule = BiasRule.NEVER  # of attention's output projection
    mlp_bias: BiasRule = BiasRule.NEVER
    qk_norm: bool = False  # RMS norm over head_dim of q and k, before the rotation
    window: WindowRule = WindowRule.NONE
    default_sliding_window: int | None = None  # where config.json leaves the key out
    default_max_position_embeddings: int = 32768


ARCHITECTURES: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="LlamaForCausalLM",
            qkv_bias=BiasRule.CONFIG,
            output_bias=BiasRule.CONFIG,
            mlp_bias=BiasRule.CONFIG,
            default_max_position_embeddings=2048,
        ),
        Architecture(
            name="MistralForCausalLM",
            window=WindowRule.ALL_LAYERS,
            default_sliding_window=4096,
            default_max_position_embeddings=131072,
        ),
        Architecture(
            name="Qwen2ForCausalLM",
            qkv_bias=BiasRule.ALWAYS,
            window=WindowRule.LAYER_TYPES,
            default_sliding_window=4096,
        ),
        Architecture(
            name="Qwen3ForCausalLM",
            qkv_bias=BiasRule.CONFIG,
            output_bias=BiasRule.CONFIG,
            qk_norm=True,
            window=WindowRule.LAYER_TYPES,
            default_sliding_window=4096,
        ),
    )
}


def find_architecture(names: list[str]) -> Architecture:
    """The row for config.json's `architectures`.

    Raises:
        UnsupportedModel: none of `names` is in the table; the text lists the known ones.
    """
    for name in names:
        if name in ARCHITECTURES:
            return ARCHITECTURES[name]
    asked = ", ".join(names) if names else "(config.json names none)"
    raise UnsupportedModel(f"architecture {asked} is not supported; known: {', '.join(ARCHITECTURES)}")
