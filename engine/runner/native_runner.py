"""A model in the native kernels: entries in and logits out as ModelRunner, one call a step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch

from engine.core.executor import PlanEntry
from engine.models.config import ExpertsConfig, ModelConfig
from engine.models.rope import RotaryFrequencies
from engine.models.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from engine.runner.kv_pool import KVPool
from engine.runner.step_logits import StepLogits
from engine.runner.weights import TORCH_DTYPES
from kernels.native.network import NO_LAYER, ExpertsShape, LinearPlace, NativeNetwork, NetworkShape, NormPlace, step_arrays
from kernels.numerics import Kernels
from kernels.sampling import Draw


class NativeRunner:
    """Runs forward passes. Not thread-safe: one thread calls it."""

    def __init__(self, model: ModelConfig, network: NativeNetwork, pool: KVPool) -> None:
        self.model = model
        self.pool = pool
        self._network = network

    def forward(self, entries: Sequence[PlanEntry], tokens: Sequence[array[int]], sampled_entries: Sequence[int]) -> StepLogits:
        """Compute KV of every entry; `tokens[i]` are the ids entry i computes.

        Gives the logits after the last token of the entries named.
        """
        step = step_arrays([e.start for e in entries], tokens, [e.block_table for e in entries], sampled_entries)
        logits, most_likely = self._network.forward(step)
        return StepLogits(logits=logits, most_likely=most_likely)

    def draw(self, made: StepLogits, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """One token for each of `draws` from its row of `made`."""
        return self._network.draw(made.logits, rows, draws)


def build_native_runner(
    model: ModelConfig, weights: dict[str, torch.Tensor], pool: KVPool, *, path: Kernels, num_threads: int
) -> NativeRunner:
    """Pack `weights` and take each out of the dictionary once it is packed, so that a model is in memory about once."""
    rope = RotaryFrequencies(model.rope, model.head_dim, device="cpu")
    network = NativeNetwork(
        NetworkShape(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            dtype=TORCH_DTYPES[model.dtype],
            block_size=pool.block_size_tokens,
            norm_eps=model.rms_norm_eps,
            rotary_scale=rope.scale,
            frequencies=rope.frequencies,
            windows=model.layer_windows,
            experts=None if model.experts is None else _experts_shape(model.experts),
        ),
        path=path,
        num_threads=num_threads,
    )
    network.set_pool(pool.blocks)
    network.set_linear(NO_LAYER, LinearPlace.HEAD, [weights[EMBEDDING] if model.tie_embeddings else weights.pop(LM_HEAD)], [None])
    network.set_embedding(weights.pop(EMBEDDING))
    network.set_norm(NO_LAYER, NormPlace.FINAL, weights.pop(FINAL_NORM))
    for layer in range(model.num_layers):
        _set_layer(network, layer, weights, model)
    return NativeRunner(model, network, pool)


def _experts_shape(config: ExpertsConfig) -> ExpertsShape:
    return ExpertsShape(
        num_experts=config.num_experts,
        num_chosen=config.num_chosen,
        intermediate_size=config.intermediate_size,
        normalize=config.normalize,
    )


def _set_layer(network: NativeNetwork, layer: int, weights: dict[str, torch.Tensor], model: ModelConfig) -> None:
    at = f"model.layers.{layer}"

    def set_linear(which: LinearPlace, *names: str) -> None:
        parts = [weights.pop(f"{at}.{name}.weight") for name in names]
        network.set_linear(layer, which, parts, [weights.pop(f"{at}.{name}.bias", None) for name in names])

    set_linear(LinearPlace.QKV, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    set_linear(LinearPlace.OUTPUT, "self_attn.o_proj")
    if (experts := model.experts) is not None and experts.layers[layer]:
        set_linear(LinearPlace.ROUTER, experts.names.router)
        _set_experts(network, layer, weights, experts)
    else:
        set_linear(LinearPlace.GATE_UP, "mlp.gate_proj", "mlp.up_proj")
        set_linear(LinearPlace.DOWN, "mlp.down_proj")
    network.set_norm(layer, NormPlace.ATTENTION, weights.pop(f"{at}.input_layernorm.weight"))
    network.set_norm(layer, NormPlace.MLP, weights.pop(f"{at}.post_attention_layernorm.weight"))
    if model.qk_norm:
        network.set_norm(layer, NormPlace.Q, weights.pop(f"{at}.self_attn.q_norm.weight"))
        network.set_norm(layer, NormPlace.K, weights.pop(f"{at}.self_attn.k_norm.weight"))


def _set_experts(network: NativeNetwork, layer: int, weights: dict[str, torch.Tensor], config: ExpertsConfig) -> None:
    def of_each(name: str) -> list[torch.Tensor]:
        linears = (config.names.linear(expert, name) for expert in range(config.num_experts))
        return [weights.pop(f"model.layers.{layer}.{linear}.weight") for linear in linears]

    network.set_experts(layer, of_each(config.names.gate), of_each(config.names.up), of_each(config.names.down))
