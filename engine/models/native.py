"""A ModelConfig as the native kernels name its sizes. Torch-free."""

from __future__ import annotations

from engine.models.config import ExpertsConfig, ModelConfig
from kernels.native.shape import ExpertsShape, NetworkShape


def network_shape(model: ModelConfig, *, block_size_tokens: int, has_embedding: bool | None = None) -> NetworkShape:
    """has_embedding: whether the embedding is copied beside the packed weights; None: where the checkpoint has it in another dtype."""
    return NetworkShape(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        intermediate_size=model.intermediate_size,
        vocab_size=model.vocab_size,
        dtype=model.dtype,
        block_size=block_size_tokens,
        norm_eps=model.rms_norm_eps,
        has_qkv_bias=model.qkv_bias,
        has_output_bias=model.output_bias,
        has_mlp_bias=model.mlp_bias,
        has_embedding=model.dtype != model.checkpoint_dtype if has_embedding is None else has_embedding,
        windows=model.layer_windows,
        experts=None if model.experts is None else _experts_shape(model.experts),
    )


def _experts_shape(experts: ExpertsConfig) -> ExpertsShape:
    return ExpertsShape(
        num_experts=experts.num_experts,
        num_chosen=experts.num_chosen,
        intermediate_size=experts.intermediate_size,
        normalize=experts.normalize,
        layers=experts.layers,
    )
