"""The tensors a checkpoint of a ModelConfig must hold, by their names in Hugging Face files. Torch-free."""

from __future__ import annotations

import math

from engine.models.config import ModelConfig
from protocol.kv import DTYPE_SIZE_BYTES

Shape = tuple[int, ...]

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def expected_tensors(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape, in the order a forward pass reads them."""
    tensors: dict[str, Shape] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer_tensors(config, layer).items()}
    tensors[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_embeddings:
        tensors[LM_HEAD] = (config.vocab_size, config.hidden_size)
    return tensors


def fused_tensors(config: ModelConfig) -> dict[str, tuple[Shape, list[str]]]:
    """The other form of experts, which transformers 5 has in memory and writes if asked: all experts of a layer in one tensor.

    Name -> its shape and the tensors of `expected_tensors` that lie in it, one after the other.
    """
    fused: dict[str, tuple[Shape, list[str]]] = {}
    if (experts := config.experts) is None:
        return fused
    names, hidden, every = experts.names, config.hidden_size, range(experts.num_experts)
    for layer in (layer for layer, has_experts in enumerate(experts.layers) if has_experts):
        at = f"model.layers.{layer}"
        gate_up = [f"{at}.{names.linear(expert, name)}.weight" for expert in every for name in (names.gate, names.up)]
        down = [f"{at}.{names.linear(expert, names.down)}.weight" for expert in every]
        fused[f"{at}.mlp.gate.weight"] = (len(every), hidden), [f"{at}.{names.router}.weight"]
        fused[f"{at}.mlp.experts.gate_up_proj"] = (len(every), 2 * experts.intermediate_size, hidden), gate_up
        fused[f"{at}.mlp.experts.down_proj"] = (len(every), hidden, experts.intermediate_size), down
    return fused


def is_ignorable(name: str, config: ModelConfig) -> bool:
    """True for tensors some files hold and nothing reads: precomputed frequencies, a copy of tied embeddings."""
    return name.endswith("rotary_emb.inv_freq") or (config.tie_embeddings and name == LM_HEAD)


def weights_size_bytes(config: ModelConfig) -> int:
    """Bytes of the weights in the dtype they are computed in."""
    return sum(math.prod(shape) for shape in expected_tensors(config).values()) * DTYPE_SIZE_BYTES[config.dtype]


def _layer_tensors(config: ModelConfig, layer: int) -> dict[str, Shape]:
    hidden = config.hidden_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    linears = {
        "self_attn.q_proj": (q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, q_size, config.output_bias),
        **_mlp_linears(config, layer),
    }
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    if config.qk_norm:
        tensors |= {"self_attn.q_norm.weight": (config.head_dim,), "self_attn.k_norm.weight": (config.head_dim,)}
    for name, (num_out, num_in, bias) in linears.items():
        tensors[f"{name}.weight"] = (num_out, num_in)
        if bias:
            tensors[f"{name}.bias"] = (num_out,)
    return tensors


def _mlp_linears(config: ModelConfig, layer: int) -> dict[str, tuple[int, int, bool]]:
    """Name -> (out features, in features, bias)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    if (experts := config.experts) is None or not experts.layers[layer]:
        return {
            "mlp.gate_proj": (inner, hidden, config.mlp_bias),
            "mlp.up_proj": (inner, hidden, config.mlp_bias),
            "mlp.down_proj": (hidden, inner, config.mlp_bias),
        }
    names, inner = experts.names, experts.intermediate_size
    linears = {names.router: (experts.num_experts, hidden, False)}
    for expert in range(experts.num_experts):
        linears[names.linear(expert, names.gate)] = (inner, hidden, False)
        linears[names.linear(expert, names.up)] = (inner, hidden, False)
        linears[names.linear(expert, names.down)] = (hidden, inner, False)
    return linears
