"""Small random checkpoints, made by transformers in the form the Hub serves, for tests that need a model of a given architecture."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
SHAPE: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 9, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_checkpoint(parent: Path, arch: str, **overrides: Any) -> Path:
    """A directory under `parent` with a random checkpoint, the same one for the same arguments.

    Args:
        arch: a key of ARCHITECTURES.
        overrides: fields of the architecture's transformers config, `dtype` ("float32"), `seed` (0) and `fused_experts` (False: one
            tensor an expert, as on the Hub) among them.
    """
    name = hashlib.sha256(json.dumps([arch, overrides], sort_keys=True).encode()).hexdigest()[:16]
    directory = parent / f"{arch}-{name}"
    if directory.exists():
        return directory

    import torch
    import transformers

    seed, dtype = overrides.pop("seed", 0), overrides.pop("dtype", "float32")
    fused_experts = overrides.pop("fused_experts", False)
    model_class = getattr(transformers, ARCHITECTURES[arch])
    config = model_class.config_class(**(SHAPE | EXPERTS.get(arch, {}) | overrides))
    torch.manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for tensor_name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * _spread(tensor_name, tensor) + ("norm" in tensor_name))
    model.to(getattr(torch, dtype)).save_pretrained(directory, save_original_format=not fused_experts)
    return directory


def _spread(name: str, tensor: Any) -> float:
    """Wide enough that attention picks tokens out: the first token matters for later ones, and greedy output is no loop."""
    if "norm" in name or name.endswith("bias"):
        return 0.1
    if "embed_tokens" in name:
        return 1.0
    factor = 1.6 if "q_proj" in name or "k_proj" in name else 1.0
    return float(factor / tensor.shape[-1] ** 0.5)
