"""The one network all architectures of the table share, assembled from weights by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.layers.attention import Attention, AttentionInputs
from engine.layers.linear import Linear
from engine.layers.mlp import GatedMLP
from engine.layers.moe import Experts, MixtureOfExperts
from engine.layers.norm import RMSNorm
from engine.models.config import ExpertsConfig, ModelConfig
from engine.models.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from kernels.numerics import Numerics


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DecoderLayer:
    """One block: attention and MLP, each after a norm and added to the residual stream."""

    attention_norm: RMSNorm
    attention: Attention
    mlp_norm: RMSNorm
    mlp: GatedMLP | MixtureOfExperts

    def __call__(self, x: torch.Tensor, kv: torch.Tensor, inputs: AttentionInputs) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x), kv, inputs)
        return x + self.mlp(self.mlp_norm(x))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decoder:
    """Tokens -> logits, through a pool that holds the KV of everything before."""

    embedding: torch.Tensor  # [vocab_size, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: RMSNorm
    lm_head: Linear

    def __call__(
        self,
        token_ids: torch.Tensor,
        kv_layers: Sequence[torch.Tensor],
        inputs: AttentionInputs,
        logit_rows: torch.Tensor,
        *,
        on_layer: Callable[[int], None] = lambda _: None,
    ) -> torch.Tensor:
        """token_ids [num_rows] int64 -> float32 logits [len(logit_rows), vocab_size] of the rows named.

        on_layer: told the index of each layer once its KV is in the pool.
        """
        x = self.embedding[token_ids]
        for index, (layer, kv) in enumerate(zip(self.layers, kv_layers, strict=True)):
            x = layer(x, kv, inputs)
            on_layer(index)
        return self.lm_head(self.norm(x[logit_rows])).float()

    def linears(self) -> list[Linear]:
        """Every linear, the head last; of the experts of a layer one of each shape."""
        found = []
        for layer in self.layers:
            found += [layer.attention.q, layer.attention.k, layer.attention.v, layer.attention.output]
            found += layer.mlp.linears()
        return [*found, self.lm_head]


def build_decoder(config: ModelConfig, weights: Mapping[str, torch.Tensor], numerics: Numerics) -> Decoder:
    """`weights` holds every name of `expected_tensors(config)`; the decoder keeps references to them."""

    def linear(name: str) -> Linear:
        return Linear(weight=weights[f"{name}.weight"], bias=weights.get(f"{name}.bias"), numerics=numerics)

    def norm(name: str) -> RMSNorm:
        return RMSNorm(weight=weights[name], eps=config.rms_norm_eps)

    def mlp(index: int) -> GatedMLP | MixtureOfExperts:
        at = f"model.layers.{index}"
        if config.experts is not None and config.experts.layers[index]:
            return mixture(at, config.experts)
        return GatedMLP(gate=linear(f"{at}.mlp.gate_proj"), up=linear(f"{at}.mlp.up_proj"), down=linear(f"{at}.mlp.down_proj"))

    def mixture(at: str, config: ExpertsConfig) -> MixtureOfExperts:
        def of_each(name: str) -> tuple[torch.Tensor, ...]:
            return tuple(weights[f"{at}.{config.names.linear(expert, name)}.weight"] for expert in range(config.num_experts))

        names = config.names
        return MixtureOfExperts(
            router=linear(f"{at}.{names.router}"),
            experts=Experts(gate=of_each(names.gate), up=of_each(names.up), down=of_each(names.down), numerics=numerics),
            num_chosen=config.num_chosen,
            normalize=config.normalize,
        )

    def layer(index: int) -> DecoderLayer:
        at = f"model.layers.{index}"
        return DecoderLayer(
            attention_norm=norm(f"{at}.input_layernorm.weight"),
            attention=Attention(
                q=linear(f"{at}.self_attn.q_proj"),
                k=linear(f"{at}.self_attn.k_proj"),
                v=linear(f"{at}.self_attn.v_proj"),
                output=linear(f"{at}.self_attn.o_proj"),
                q_norm=norm(f"{at}.self_attn.q_norm.weight") if config.qk_norm else None,
                k_norm=norm(f"{at}.self_attn.k_norm.weight") if config.qk_norm else None,
                head_dim=config.head_dim,
                window=config.layer_windows[index],
            ),
            mlp_norm=norm(f"{at}.post_attention_layernorm.weight"),
            mlp=mlp(index),
        )

    head = weights[EMBEDDING if config.tie_embeddings else LM_HEAD]
    return Decoder(
        embedding=weights[EMBEDDING],
        layers=tuple(layer(index) for index in range(config.num_layers)),
        norm=norm(FINAL_NORM),
        lm_head=Linear(weight=head, bias=None, numerics=numerics),
    )
