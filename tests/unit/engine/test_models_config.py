"""config.json of published checkpoints is read as transformers reads it, and what is not implemented is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.models.config import RopeKind, load_model_config, parse_model_config
from engine.models.memory import GIB, memory_plan
from engine.models.table import ARCHITECTURES
from engine.models.tensors import expected_tensors, weights_size_bytes
from protocol.errors import ConfigError, ModelDoesNotFit, ModelError, ModelUnavailable, UnsupportedModel
from protocol.kv import LayerKind

pytestmark = pytest.mark.pure

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 131072, "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": False, "attention_bias": False, "hidden_act": "silu",
}  # fmt: skip
LLAMA_2_7B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32, "vocab_size": 32000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-05, "rope_scaling": None, "torch_dtype": "float16", "eos_token_id": 2,
}  # fmt: skip
MISTRAL_7B: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN_25_HALF_B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "max_window_layers": 21, "use_sliding_window": False, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "eos_token_id": 151645,
}  # fmt: skip
QWEN3_06B: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "rms_norm_eps": 1e-06, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "torch_dtype": "bfloat16", "bos_token_id": 151643, "eos_token_id": 151645,
}  # fmt: skip

MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768, "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0, "sliding_window": None, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "mlp_only_layers": [],
    "decoder_sparse_step": 1, "vocab_size": 151936, "max_position_embeddings": 40960, "max_window_layers": 48, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": None, "use_sliding_window": False, "torch_dtype": "bfloat16", "eos_token_id": 151645,
}  # fmt: skip


def parse(config: dict[str, Any], generation: dict[str, Any] | None = None, **options: Any) -> Any:
    return parse_model_config(config, generation or {}, **options)


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (LLAMA_31_8B, 8_030_261_248),
        (LLAMA_2_7B, 6_738_415_616),
        (MISTRAL_7B, 7_241_732_096),
        (QWEN_25_HALF_B, 494_032_768),
        (QWEN3_06B, 596_049_920),
        (MIXTRAL_8X7B, 46_702_792_704),
        (QWEN3_30B_A3B, 30_532_122_624),
    ],
    ids=["llama-3.1-8b", "llama-2-7b", "mistral-7b", "qwen2.5-0.5b", "qwen3-0.6b", "mixtral-8x7b", "qwen3-30b-a3b"],
)
def test_expected_tensors_hold_as_many_parameters_as_the_model_card_says(config: dict[str, Any], num_parameters: int) -> None:
    model = parse(config)
    assert sum(math.prod(shape) for shape in expected_tensors(model).values()) == num_parameters
    assert weights_size_bytes(model) == 2 * num_parameters


def test_both_dialects_of_rotary_options_are_read_alike() -> None:
    old = parse(LLAMA_31_8B)
    new = dict(LLAMA_31_8B)
    new["rope_parameters"] = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    assert parse(new) == old
    assert old.rope.kind is RopeKind.LLAMA3 and old.rope.theta == 500000.0 and old.rope.original_max_position_embeddings == 8192
    assert old.max_model_len == 131072, "llama3 scaling is already in max_position_embeddings"


def test_absent_keys_take_the_architectures_defaults() -> None:
    model = parse(LLAMA_2_7B)
    assert (model.num_kv_heads, model.head_dim, model.rope.theta, model.rope.kind) == (32, 128, 10000.0, RopeKind.DEFAULT)
    assert not (model.qkv_bias or model.output_bias or model.mlp_bias or model.qk_norm or model.tie_embeddings)
    assert parse({**MISTRAL_7B, "sliding_window": None}).layer_windows == (None,) * 32
    without = {key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"}
    assert parse(without).layer_windows == (4096,) * 32


def test_yarn_extends_the_longest_sequence_by_its_factor() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert parse({**QWEN_25_HALF_B, "rope_scaling": scaling}).max_model_len == 131072


def test_what_differs_between_architectures_follows_the_table() -> None:
    qwen2, qwen3 = parse(QWEN_25_HALF_B), parse(QWEN3_06B)
    assert qwen2.qkv_bias and not qwen2.output_bias and not qwen2.qk_norm
    assert qwen3.qk_norm and not qwen3.qkv_bias and qwen3.head_dim == 128
    biased = parse({**LLAMA_31_8B, "attention_bias": True, "mlp_bias": True})
    assert biased.qkv_bias and biased.output_bias and biased.mlp_bias


def test_experts_follow_the_table_and_the_config() -> None:
    """Seen to fail with `normalize` False for Mixtral."""
    mixtral, qwen = parse(MIXTRAL_8X7B).experts, parse(QWEN3_30B_A3B).experts
    assert (mixtral.num_experts, mixtral.num_chosen, mixtral.intermediate_size, mixtral.normalize) == (8, 2, 14336, True)
    assert (qwen.num_experts, qwen.num_chosen, qwen.intermediate_size, qwen.normalize) == (128, 8, 768, True)
    assert parse({**QWEN3_30B_A3B, "norm_topk_prob": None}).experts.normalize is False
    assert parse(QWEN3_06B).experts is None
    renamed = dict(QWEN3_30B_A3B)
    renamed["num_local_experts"] = renamed.pop("num_experts")
    assert parse(renamed).experts == qwen, "as transformers 5 writes it"
    bare = {key: value for key, value in MIXTRAL_8X7B.items() if key not in ("rms_norm_eps", "rope_theta")}
    assert parse(bare) == parse(MIXTRAL_8X7B)


def test_which_layers_have_experts_follows_the_step_and_the_dense_ones_named() -> None:
    """Seen to fail with the step counted from layer 0."""
    four = {**QWEN3_30B_A3B, "num_hidden_layers": 4}
    assert parse(four).experts.layers == (True, True, True, True)
    assert parse({**four, "decoder_sparse_step": 2}).experts.layers == (False, True, False, True)
    some = parse({**four, "mlp_only_layers": [0, 2]})
    assert some.experts.layers == (False, True, False, True)
    tensors = expected_tensors(some)
    assert tensors["model.layers.0.mlp.gate_proj.weight"] == (6144, 2048)
    assert tensors["model.layers.1.mlp.experts.127.gate_proj.weight"] == (768, 2048)
    assert "model.layers.1.mlp.gate_proj.weight" not in tensors and "model.layers.0.mlp.gate.weight" not in tensors
    assert parse({**four, "mlp_only_layers": [0, 1, 2, 3]}).experts is None


def test_every_layer_of_a_qwen3_moe_has_its_window_where_it_is_used() -> None:
    windowed = {**QWEN3_30B_A3B, "use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 3}
    assert parse(windowed).layer_windows == (64, 64, 64)
    assert parse({**windowed, "use_sliding_window": False}).layer_windows == (None,) * 3
    assert parse({**MIXTRAL_8X7B, "sliding_window": 64, "num_hidden_layers": 3}).layer_windows == (64, 64, 64)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_experts": None}, "num_experts is None"),
        ({"num_experts_per_tok": 129}, "129 is more than the 128"),
        ({"num_experts_per_tok": None}, "num_experts_per_tok"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step 0"),
        ({"mlp_only_layers": 3}, "mlp_only_layers 3"),
        ({"mlp_only_layers": ["0"]}, "mlp_only_layers"),
    ],
)
def test_damaged_options_of_experts_are_errors_that_name_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse({**QWEN3_30B_A3B, **change})


def test_windows_follow_max_window_layers_or_layer_types() -> None:
    windowed = {**QWEN_25_HALF_B, "use_sliding_window": True, "num_hidden_layers": 4, "max_window_layers": 3, "sliding_window": 64}
    assert parse(windowed).layer_windows == (None, None, None, 64)
    typed = {**windowed, "layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]}
    assert parse(typed).layer_windows == (64, None, None, 64)
    groups = parse(typed).kv_layout(16).groups
    assert [(g.kind, g.first_layer, g.num_layers, g.window_tokens) for g in groups] == [
        (LayerKind.WINDOW, 0, 1, 64), (LayerKind.FULL, 1, 2, None), (LayerKind.WINDOW, 3, 1, 64),
    ]  # fmt: skip


def test_kv_layout_counts_the_bytes_of_a_token() -> None:
    layout = parse(LLAMA_31_8B).kv_layout(32)
    assert layout.token_bytes == 2 * 32 * 8 * 128 * 2
    assert layout.block_bytes == 32 * layout.token_bytes
    with pytest.raises(ConfigError, match="block size 24"):
        parse(LLAMA_31_8B).kv_layout(24)


def test_end_tokens_come_as_one_id_or_a_list_from_generation_config_first() -> None:
    assert parse(LLAMA_31_8B).eos_token_ids == (128001,)
    assert parse(LLAMA_31_8B, {"eos_token_id": [128001, 128008, 128009]}).eos_token_ids == (128001, 128008, 128009)
    assert parse({**LLAMA_31_8B, "eos_token_id": None}).eos_token_ids == ()


def test_reference_numerics_are_float32() -> None:
    assert parse(LLAMA_31_8B, dtype="auto", numerics="reference").dtype == "float32"
    assert parse(LLAMA_31_8B, dtype="auto", numerics="fast").dtype == "bfloat16"
    with pytest.raises(ConfigError, match="float32 only"):
        parse(LLAMA_31_8B, dtype="bfloat16", numerics="reference")
    with pytest.raises(ConfigError, match="int3"):
        parse(LLAMA_31_8B, dtype="int3")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "names none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*length"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        parse({**LLAMA_31_8B, **change})


def test_an_unknown_architecture_is_told_the_known_ones() -> None:
    with pytest.raises(UnsupportedModel) as refused:
        parse({**LLAMA_31_8B, "architectures": ["FalconForCausalLM"]})
    assert all(name in str(refused.value) for name in ARCHITECTURES)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "big"}, "hidden_size"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_key_value_heads": 5}, "5 key-value heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": 4}, "rope_scaling"),
    ],
)
def test_a_damaged_config_is_an_error_that_names_the_key(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        parse({**LLAMA_31_8B, **change})


def test_a_directory_without_a_readable_config_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"no config\.json"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelUnavailable, match="fetch the checkpoint again"):
        load_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_06B))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert load_model_config(tmp_path).eos_token_ids == (7, 8)


def test_a_model_that_cannot_fit_is_refused_with_the_sum() -> None:
    model = parse(LLAMA_31_8B)
    with pytest.raises(ModelDoesNotFit) as refused:
        memory_plan(model, memory_bytes=16 * GIB, num_workers=2, block_size_tokens=16, max_model_len=8192)
    text = str(refused.value)
    assert "14.96 GiB weights" in text and "512 blocks of 2048 KiB KV = 1.00 GiB" in text and "> 16.00 GiB" in text


def test_all_experts_count_as_weights_not_only_those_a_token_takes() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"86\.99 GiB weights"):
        memory_plan(parse(MIXTRAL_8X7B), memory_bytes=64 * GIB, num_workers=2, block_size_tokens=16, max_model_len=8192)


def test_what_is_left_of_memory_becomes_kv_blocks() -> None:
    model = parse(QWEN3_06B)
    plan = memory_plan(model, memory_bytes=16 * GIB, num_workers=4, block_size_tokens=16, max_model_len=4096)
    assert plan.num_weight_copies == 1, "mapped weights are shared"
    assert plan.total_bytes <= 16 * GIB < plan.total_bytes + 4 * plan.block_bytes
    converted = memory_plan(
        parse(QWEN3_06B, dtype="float32"), memory_bytes=24 * GIB, num_workers=4, block_size_tokens=16, max_model_len=4096
    )
    assert converted.num_weight_copies == 4 and converted.weights_bytes == 2 * plan.weights_bytes
    asked = memory_plan(model, memory_bytes=16 * GIB, num_workers=4, block_size_tokens=16, max_model_len=4096, num_blocks=300)
    assert asked.num_blocks == 300
