"""Random checkpoints of the shapes that are measured, and the arithmetic that sets a figure beside what the machine can do."""

from __future__ import annotations

import json
import math
from pathlib import Path

from engine.models.config import ModelConfig, load_model_config, parse_model_config
from engine.models.tensors import expected_tensors, weights_size_bytes
from protocol.errors import ConfigError
from protocol.kv import DTYPE_SIZE_BYTES

_COMMON: dict[str, object] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 16384,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA = _COMMON | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000}
_QWEN3 = _COMMON | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
_QWEN3_MOE = _COMMON | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 32000}
MODELS: dict[str, dict[str, object]] = {
    "15m": _LLAMA
    | {"hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6}
    | {"num_key_value_heads": 6, "head_dim": 48, "tie_word_embeddings": True},
    "125m": _LLAMA
    | {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"num_key_value_heads": 12, "head_dim": 64, "tie_word_embeddings": False},
    "0.5b": _QWEN3
    | {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 50000, "tie_word_embeddings": True},
    "moe": _QWEN3_MOE
    | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8}
    | {"num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": False}
    | {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 768, "norm_topk_prob": True}
    | {"decoder_sparse_step": 1, "mlp_only_layers": []},
}
_WEIGHTS_SEED = 0


def resolve_model(name: str) -> str | Path:
    """A key of MODELS, or the directory of a checkpoint.

    Raises:
        ConfigError: it is neither.
    """
    if name in MODELS:
        return name
    path = Path(name)
    if (path / "config.json").is_file():
        return path
    raise ConfigError(f"model {name!r} is neither one of {', '.join(MODELS)} nor a directory with a config.json")


def make_checkpoint(name: str, parent: Path) -> Path:
    """The random checkpoint `name` of MODELS under `parent`, in bfloat16; the same one every time."""
    import torch
    from safetensors.torch import save_file

    directory = parent / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    generator = torch.Generator().manual_seed(_WEIGHTS_SEED)
    weights = {}
    for tensor, shape in expected_tensors(parse_model_config(MODELS[name], {})).items():
        drawn = torch.ones(shape) if "norm" in tensor else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        weights[tensor] = drawn.bfloat16()
    save_file(weights, str(directory / "model.safetensors"), metadata={"format": "pt"})
    return directory


def label_of(model: str | Path) -> str:
    """How rows name it."""
    return model if isinstance(model, str) else model.resolve().name


def read_model(model_dir: Path) -> ModelConfig:
    """As it is measured: bfloat16."""
    return load_model_config(model_dir, dtype="bfloat16")


# --- arithmetic -------------------------------------------------------------------------------------------------------


def bytes_per_token(model: ModelConfig) -> int:
    """Weights that decoding one sequence reads for a token: all of them, but of the embedding one row and of the experts those chosen.

    The KV of the context is left out: 256 tokens are 1 to 10 % of the weights here.
    """
    num_weights = _linear_weights(model) + model.vocab_size * model.hidden_size
    return num_weights * DTYPE_SIZE_BYTES[model.dtype]


def prefill_flops(model: ModelConfig, num_tokens: int) -> float:
    """What the first token of a prompt needs: linears (two a weight a token) and causal attention (half the square).

    Of the last layer that is keys and values of every token; all else there, and the head, of the last token alone. Engines that
    compute more do so in vain, and it is not counted for them.
    """
    *layers, last = _layer_weights(model)
    kv_weights = 2 * model.num_kv_heads * model.head_dim * model.hidden_size
    linears = (sum(layers) + kv_weights) * num_tokens + last - kv_weights + model.vocab_size * model.hidden_size
    keys_seen = (model.num_layers - 1) * num_tokens * num_tokens / 2 + num_tokens
    return 2.0 * linears + 4.0 * keys_seen * model.num_heads * model.head_dim


def resident_weights_bytes(model: ModelConfig) -> int:
    """What a worker holds in memory of its own: everything but an embedding apart from the head, which stays in the file's pages."""
    apart = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size * DTYPE_SIZE_BYTES[model.dtype]
    return weights_size_bytes(model) - apart


def _linear_weights(model: ModelConfig) -> int:
    return sum(_layer_weights(model))


def _layer_weights(model: ModelConfig) -> list[int]:
    """Of each layer, with the experts a token is given to; norms are nothing beside them."""
    totals, experts = [0] * model.num_layers, model.experts
    for name, shape in expected_tensors(model).items():
        if ".layers." not in name:
            continue
        size = math.prod(shape)
        is_expert = experts is not None and f".{experts.names.block}.experts." in name
        layer = int(name.split(".layers.")[1].partition(".")[0])
        totals[layer] += size * experts.num_chosen // experts.num_experts if is_expert and experts is not None else size
    return totals
