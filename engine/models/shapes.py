"""The shapes of common open models, and of any config.json: what step times and pool sizes grow with. Torch-free.

More is here than can be served (OPT, whose papers' figures are the ones to compare with): a shape says how much is read and multiplied,
engine/models/config.py everything the answer depends on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.hardware import nearest
from engine.models.config import ModelConfig, load_model_config
from protocol.errors import ConfigError
from protocol.kv import DTYPE_SIZE_BYTES, KVLayout, LayerGroup, LayerKind, ShardRectangle

DTYPE = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder-only transformer by its sizes, in bf16. Norms, biases and positions are left out: under 0.2 % of the weights."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int = 128
    intermediate_size: int  # of an MLP, or of one expert where there are experts
    vocab_size: int
    max_model_len: int
    num_mlp_linears: int = 3  # gate, up and down; 2 without a gate
    tie_embeddings: bool = False
    num_experts: int = 0  # of each layer; 0: dense
    num_chosen: int = 0  # of them, by each token

    @property
    def kv_token_bytes(self) -> int:
        """K and V of one token in all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_SIZE_BYTES[DTYPE]

    @property
    def num_parameters(self) -> int:
        """All weights."""
        return self.num_linear_parameters + self.num_embedding_parameters * (1 if self.tie_embeddings else 2)

    @property
    def num_linear_parameters(self) -> int:
        """In the layers, all experts counted."""
        return self.num_layers * (self._attention + self.num_experts * self.hidden_size + max(1, self.num_experts) * self._mlp)

    @property
    def num_token_parameters(self) -> int:
        """In the layers, those that one token is multiplied with."""
        return self.num_layers * (self._attention + self.num_experts * self.hidden_size + max(1, self.num_chosen) * self._mlp)

    @property
    def num_expert_parameters(self) -> int:
        return self.num_layers * self.num_experts * self._mlp

    @property
    def num_embedding_parameters(self) -> int:
        """Of the table of embeddings; the head has as many."""
        return self.vocab_size * self.hidden_size

    @property
    def _attention(self) -> int:
        return 2 * self.hidden_size * self.head_dim * (self.num_heads + self.num_kv_heads)

    @property
    def _mlp(self) -> int:
        return self.num_mlp_linears * self.hidden_size * self.intermediate_size

    def kv_layout(self, block_size_tokens: int) -> KVLayout:
        """Of one whole worker."""
        group = LayerGroup(
            kind=LayerKind.FULL,
            first_layer=0,
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            dtype=DTYPE,
        )
        shard = ShardRectangle(first_head=0, last_head=self.num_kv_heads, first_layer=0, last_layer=self.num_layers)
        return KVLayout(block_size_tokens=block_size_tokens, groups=(group,), shard=shard)


def _llama(
    num_layers: int,
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    intermediate_size: int,
    *,
    vocab_size: int,
    max_model_len: int,
    num_experts: int = 0,
    num_chosen: int = 0,
) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        num_experts=num_experts,
        num_chosen=num_chosen,
    )


def _opt(num_layers: int, hidden_size: int) -> ModelShape:
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=hidden_size // 128,
        num_kv_heads=hidden_size // 128,
        intermediate_size=4 * hidden_size,
        vocab_size=50_272,
        max_model_len=2048,
        num_mlp_linears=2,
        tie_embeddings=True,
    )


MODEL_SHAPES: dict[str, ModelShape] = {  # as in the config.json of each on the Hugging Face Hub
    "llama-2-7b": _llama(32, 4096, 32, 32, 11_008, vocab_size=32_000, max_model_len=4096),
    "llama-2-13b": _llama(40, 5120, 40, 40, 13_824, vocab_size=32_000, max_model_len=4096),
    "llama-2-70b": _llama(80, 8192, 64, 8, 28_672, vocab_size=32_000, max_model_len=4096),
    "llama-3-8b": _llama(32, 4096, 32, 8, 14_336, vocab_size=128_256, max_model_len=8192),
    "llama-3-70b": _llama(80, 8192, 64, 8, 28_672, vocab_size=128_256, max_model_len=8192),
    "mistral-7b": _llama(32, 4096, 32, 8, 14_336, vocab_size=32_000, max_model_len=32_768),
    "mixtral-8x7b": _llama(32, 4096, 32, 8, 14_336, vocab_size=32_000, max_model_len=32_768, num_experts=8, num_chosen=2),
    "mixtral-8x22b": _llama(56, 6144, 48, 8, 16_384, vocab_size=32_768, max_model_len=65_536, num_experts=8, num_chosen=2),
    "qwen2.5-7b": _llama(28, 3584, 28, 4, 18_944, vocab_size=152_064, max_model_len=131_072),
    "qwen2.5-14b": _llama(48, 5120, 40, 8, 13_824, vocab_size=152_064, max_model_len=131_072),
    "qwen2.5-32b": _llama(64, 5120, 40, 8, 27_648, vocab_size=152_064, max_model_len=131_072),
    "qwen2.5-72b": _llama(80, 8192, 64, 8, 29_568, vocab_size=152_064, max_model_len=131_072),
    "opt-13b": _opt(40, 5120),
    "opt-66b": _opt(64, 9216),
    "opt-175b": _opt(96, 12_288),
}


def find_shape(name: str) -> ModelShape:
    """Of a name in MODEL_SHAPES, or of a directory with a config.json.

    Raises:
        ConfigError: it is neither; the text names the nearest. ModelError: its config.json says what is not implemented.
    """
    shape = MODEL_SHAPES.get(name.lower())
    if shape is not None:
        return shape
    if (Path(name) / "config.json").is_file():
        return shape_of(load_model_config(Path(name), dtype=DTYPE))
    known = ", ".join(MODEL_SHAPES)
    raise ConfigError(
        f"model is {name!r}, which is not known{nearest(name.lower(), MODEL_SHAPES)};"
        f" name a directory with a config.json, or one of {known}"
    )


def shape_of(model: ModelConfig) -> ModelShape:
    """Of a checkpoint. Layers without experts beside such with them count as if they had them: there are few in any that is common."""
    experts = model.experts
    return ModelShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size if experts is None else experts.intermediate_size,
        vocab_size=model.vocab_size,
        max_model_len=model.max_model_len,
        tie_embeddings=model.tie_embeddings,
        num_experts=0 if experts is None else experts.num_experts,
        num_chosen=0 if experts is None else experts.num_chosen,
    )
