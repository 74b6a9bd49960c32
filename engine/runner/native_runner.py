"""A model in the native kernels: entries in and logits out as ModelRunner, one call a step."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.core.executor import Entries
from engine.models.config import ExpertsConfig, ModelConfig
from engine.models.native import network_shape
from engine.models.rope import RotaryFrequencies
from engine.models.tensors import EMBEDDING, FINAL_NORM, LM_HEAD
from engine.runner.kv_pool import KVPool
from engine.runner.packed_weights import Packed, packed_weights
from engine.runner.step_logits import StepLogits
from engine.runner.weights import MappedWeights
from kernels.native.network import NO_LAYER, LinearPlace, NativeNetwork, NormPlace
from kernels.numerics import Kernels
from kernels.sampling import Draw
from kvtransfer.handoff import step_begin

ATTENTION = {
    LinearPlace.QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    LinearPlace.OUTPUT: ("self_attn.o_proj",),
}
MLP = {
    LinearPlace.GATE_UP: ("mlp.gate_proj", "mlp.up_proj"),
    LinearPlace.DOWN: ("mlp.down_proj",),
}
NORMS = {NormPlace.ATTENTION: "input_layernorm", NormPlace.MLP: "post_attention_layernorm"}
HEAD_NORMS = {NormPlace.Q: "self_attn.q_norm", NormPlace.K: "self_attn.k_norm"}


class NativeRunner:
    """Runs forward passes. Not thread-safe: one thread calls it."""

    def __init__(self, model: ModelConfig, network: NativeNetwork, pool: KVPool, packed: Packed) -> None:
        self.model = model
        self.pool = pool
        self.packed = packed
        self._network = network

    def forward(self, entries: Entries, token_ids: array[int], sampled_entries: array[int], *, step_id: int = 0) -> StepLogits:
        """Compute KV of every entry; `token_ids` are those of all entries in order, uint32.

        Gives the logits after the last token of the entries named. The pool's clock tells of the layers of step `step_id`.
        """
        logits, most_likely = self._network.forward(
            starts=entries.starts,
            sizes=entries.sizes,
            token_ids=token_ids,
            block_tables=entries.block_tables,
            logit_entries=sampled_entries,
            clock_begin=step_begin(step_id, self.model.num_layers),
        )
        return StepLogits(logits=logits, most_likely=most_likely)

    def draw(self, made: StepLogits, rows: Sequence[int], draws: Sequence[Draw]) -> list[int]:
        """One token for each of `draws` from its row of `made`."""
        return self._network.draw(made.logits, rows, draws)


def build_native_runner(
    model: ModelConfig, weights: MappedWeights, pool: KVPool, *, path: Kernels, num_threads: int, key: str, packed_dir: Path | None
) -> NativeRunner:
    """Put `weights` into the native kernels: packed here, or mapped from another worker that has them under `key` in `packed_dir`.

    The embedding stays in the file's pages where it has the dtype that is served; the head is packed, tied or not.
    """
    rope = RotaryFrequencies(model.rope, model.head_dim, device="cpu")
    shape = network_shape(model, block_size_tokens=pool.block_size_tokens, has_embedding=not weights.is_view(EMBEDDING))
    network = NativeNetwork(shape, path=path, num_threads=num_threads, frequencies=rope.frequencies, rotary_scale=rope.scale)

    def fill(base: int) -> None:
        network.set_arena(base)
        _pack(network, model, weights)

    packed = packed_weights(key, network.arena_bytes, fill, directory=packed_dir)
    network.set_arena(packed.base, owner=packed)
    if not shape.has_embedding:
        network.set_embedding(weights[EMBEDDING])
    network.set_pool(pool.blocks)
    network.set_clock(pool.clock_word)
    _set_norms(network, model, weights)
    weights.let_go()
    return NativeRunner(model, network, pool, packed.packed)


def _pack(network: NativeNetwork, model: ModelConfig, weights: MappedWeights) -> None:
    network.set_linear(NO_LAYER, LinearPlace.HEAD, [weights[EMBEDDING if model.tie_embeddings else LM_HEAD]], [None])
    if not weights.is_view(EMBEDDING):
        network.set_embedding(weights[EMBEDDING])
    for layer in range(model.num_layers):
        at = f"model.layers.{layer}"
        experts = model.experts if model.experts is not None and model.experts.layers[layer] else None
        linears = ATTENTION | (MLP if experts is None else {LinearPlace.ROUTER: (experts.names.router,)})
        for which, parts in linears.items():
            biases = [weights.get(f"{at}.{part}.bias") for part in parts]
            network.set_linear(layer, which, [weights[f"{at}.{part}.weight"] for part in parts], biases)
        if experts is not None:
            names = experts.names
            network.set_experts(layer, *(_of_each(experts, name, at, weights) for name in (names.gate, names.up, names.down)))


def _of_each(experts: ExpertsConfig, name: str, at: str, weights: MappedWeights) -> list[torch.Tensor]:
    return [weights[f"{at}.{experts.names.linear(expert, name)}.weight"] for expert in range(experts.num_experts)]


def _set_norms(network: NativeNetwork, model: ModelConfig, weights: MappedWeights) -> None:
    """Small: each worker has its own."""
    network.set_norm(NO_LAYER, NormPlace.FINAL, weights[FINAL_NORM])
    for layer in range(model.num_layers):
        for which, name in (NORMS | HEAD_NORMS if model.qk_norm else NORMS).items():
            network.set_norm(layer, which, weights[f"model.layers.{layer}.{name}.weight"])
