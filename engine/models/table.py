"""The architectures Baton serves, as one table of their differences. Torch-free.

All are decoder-only transformers of the Llama family: RMS norm before attention and before a gated MLP or a mixture of them,
rotary positions, grouped-query attention. What differs is a row here; what a row cannot say needs a new column, not a new file.
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
    ALL_IF_USED = "all layers if used"  # `use_sliding_window`: every layer
    LAYER_TYPES = "layer types"  # `use_sliding_window` with `layer_types`, or every layer from `max_window_layers` on


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """How an architecture's files speak of its experts."""

    block: str  # of a layer, in the checkpoints of the Hub
    gate: str  # the linears of an expert
    up: str
    down: str
    size_key: str  # of config.json: the intermediate size of an expert
    normalize_key: str | None  # of config.json: the weights of a token's experts sum to one; None: always

    @property
    def router(self) -> str:
        """The linear of a layer that chooses: [num_experts, hidden]."""
        return f"{self.block}.gate"

    def linear(self, expert: int, name: str) -> str:
        """The linear `name` (gate, up or down) of one expert of a layer."""
        return f"{self.block}.experts.{expert}.{name}"


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
    default_rms_norm_eps: float = 1e-6
    default_rope_theta: float = 10000.0
    experts: ExpertNames | None = None  # None: every layer's MLP is dense


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
        Architecture(
            name="MixtralForCausalLM",
            window=WindowRule.ALL_LAYERS,
            default_max_position_embeddings=131072,
            default_rms_norm_eps=1e-5,
            default_rope_theta=1000000.0,
            experts=ExpertNames(block="block_sparse_moe", gate="w1", up="w3", down="w2", size_key="intermediate_size", normalize_key=None),
        ),
        Architecture(
            name="Qwen3MoeForCausalLM",
            qkv_bias=BiasRule.CONFIG,
            output_bias=BiasRule.CONFIG,
            qk_norm=True,
            window=WindowRule.ALL_IF_USED,
            default_sliding_window=4096,
            experts=ExpertNames(
                block="mlp",
                gate="gate_proj",
                up="up_proj",
                down="down_proj",
                size_key="moe_intermediate_size",
                normalize_key="norm_topk_prob",
            ),
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
