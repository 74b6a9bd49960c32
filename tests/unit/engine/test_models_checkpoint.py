"""A checkpoint is checked before it is loaded: each kind of damage is one sentence, and pickles are never opened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from engine.checkpoint import fingerprint, open_checkpoint
from engine.models.config import ModelConfig, parse_model_config
from engine.models.tensors import expected_tensors
from protocol.errors import ModelError, ModelUnavailable, UnsupportedModel

pytestmark = pytest.mark.pure

MODEL = parse_model_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32,
    },
    {},
)  # fmt: skip
MIXTURE = parse_model_config(
    {
        "architectures": ["MixtralForCausalLM"], "num_local_experts": 3, "num_experts_per_tok": 2,
        "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 32,
    },
    {},
)  # fmt: skip


def weights(seed: int = 0, model: ModelConfig = MODEL) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in expected_tensors(model).items()}


def fused(tensors: dict[str, Any]) -> dict[str, Any]:
    """As transformers 5 holds a Mixtral: gate below gate, up below them, one tensor for all experts."""
    kept = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer in range(2):
        at = f"model.layers.{layer}"
        w1, w2, w3 = ([tensors[f"{at}.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(3)] for w in ("w1", "w2", "w3"))
        kept[f"{at}.mlp.experts.gate_up_proj"] = np.concatenate([np.stack(w1), np.stack(w3)], axis=1)
        kept[f"{at}.mlp.experts.down_proj"] = np.stack(w2)
        kept[f"{at}.mlp.gate.weight"] = tensors[f"{at}.block_sparse_moe.gate.weight"]
    return kept


def write_sharded(directory: Path, tensors: dict[str, Any]) -> None:
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:7], "model-00002-of-00002.safetensors": names[7:]}
    for shard, members in shards.items():
        save_file({name: tensors[name] for name in members}, directory / shard)
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file_gives_every_expected_tensor_in_order(tmp_path: Path) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path, MODEL)
    assert list(checkpoint.tensors) == list(expected_tensors(MODEL))
    place = checkpoint.tensors["model.norm.weight"]
    raw = (tmp_path / "model.safetensors").read_bytes()[place.offset : place.offset + place.size_bytes]
    assert np.array_equal(np.frombuffer(raw, dtype=np.float32), weights()["model.norm.weight"])


def test_one_checkpoint_has_one_fingerprint_however_it_is_sharded(tmp_path: Path) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "sharded").mkdir()
    save_file(weights(), tmp_path / "single" / "model.safetensors")
    write_sharded(tmp_path / "sharded", weights())
    first, second = (fingerprint(open_checkpoint(tmp_path / kind, MODEL), MODEL, "fast") for kind in ("single", "sharded"))
    assert first == second and first.digest == second.digest


def test_experts_in_one_tensor_are_found_where_they_lie_in_it(tmp_path: Path) -> None:
    """The same places' bytes and the same fingerprint as one tensor an expert. Seen to fail with all gates before all ups."""
    tensors = weights(model=MIXTURE)
    prints = []
    for kind, stored in (("each", tensors), ("fused", fused(tensors))):
        (tmp_path / kind).mkdir()
        save_file(stored, tmp_path / kind / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path / kind, MIXTURE)
        raw = (tmp_path / kind / "model.safetensors").read_bytes()
        for name, place in checkpoint.tensors.items():
            found = np.frombuffer(raw[place.offset : place.offset + place.size_bytes], dtype=np.float32).reshape(place.shape)
            assert np.array_equal(found, tensors[name]), name
        prints.append(fingerprint(checkpoint, MIXTURE, "fast"))
    assert prints[0] == prints[1]


def test_experts_of_another_number_or_in_both_forms_are_refused(tmp_path: Path) -> None:
    tensors = weights(model=MIXTURE)
    path = tmp_path / "model.safetensors"
    name = "model.layers.0.mlp.experts.down_proj"
    save_file(fused(tensors) | {name: np.ones((4, 16, 24), dtype=np.float32)}, path)
    with pytest.raises(ModelError, match=r"down_proj has shape \[4, 16, 24\]; config\.json says \[3, 16, 24\]"):
        open_checkpoint(tmp_path, MIXTURE)
    save_file(tensors | {name: np.ones((3, 16, 24), dtype=np.float32)}, path)
    with pytest.raises(ModelError, match=r"has model\.layers\.0\.mlp\.experts\.down_proj, which MixtralForCausalLM"):
        open_checkpoint(tmp_path, MIXTURE)


def test_how_many_experts_a_token_takes_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    """No tensor shows it, and it changes the KV. Seen to fail with it left out."""
    save_file(weights(model=MIXTURE), tmp_path / "model.safetensors")
    assert MIXTURE.experts is not None
    changed = (replace(MIXTURE.experts, num_chosen=1), replace(MIXTURE.experts, normalize=False))
    models = [MIXTURE, *(replace(MIXTURE, experts=experts) for experts in changed)]
    assert len({fingerprint(open_checkpoint(tmp_path, model), model, "fast").digest for model in models}) == 3


def test_two_checkpoints_of_one_shape_have_different_fingerprints(tmp_path: Path) -> None:
    """Seen to fail with the sampled bytes left out of the digest."""
    digests = set()
    changed = weights()
    changed["model.layers.1.mlp.down_proj.weight"] = changed["model.layers.1.mlp.down_proj.weight"] + 1e-3
    for name, tensors in (("a", weights(0)), ("b", weights(1)), ("c", changed)):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path / name, MODEL)
        digests |= {fingerprint(checkpoint, MODEL, numerics).digest for numerics in ("fast", "reference")}
    assert len(digests) == 6


def test_pickled_weights_are_refused_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ModelUnavailable, match=r"pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        open_checkpoint(tmp_path, MODEL)


def test_an_empty_directory_says_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailable, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path, MODEL)


def test_tensors_that_do_not_match_the_config_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    missing = weights()
    del missing["model.layers.0.self_attn.q_proj.weight"]
    save_file(missing, path)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
        open_checkpoint(tmp_path, MODEL)
    save_file(weights() | {"model.layers.0.self_attn.q_norm.weight": np.ones(8, dtype=np.float32)}, path)
    with pytest.raises(ModelError, match=r"q_norm\.weight, which LlamaForCausalLM as configured does not read"):
        open_checkpoint(tmp_path, MODEL)
    save_file(weights() | {"lm_head.weight": np.ones((31, 16), dtype=np.float32)}, path)
    with pytest.raises(ModelError, match=r"lm_head\.weight has shape \[31, 16\]; config\.json says \[32, 16\]"):
        open_checkpoint(tmp_path, MODEL)
    save_file(weights() | {"lm_head.weight": np.ones((32, 16), dtype=np.int8)}, path)
    with pytest.raises(UnsupportedModel, match="I8"):
        open_checkpoint(tmp_path, MODEL)


def test_precomputed_frequencies_are_ignored(tmp_path: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, dtype=np.float32)}
    save_file(weights() | extra, tmp_path / "model.safetensors")
    assert list(open_checkpoint(tmp_path, MODEL).tensors) == list(expected_tensors(MODEL))


@pytest.mark.parametrize("kept_bytes", [0, 4, 100, -1])
def test_a_file_cut_short_is_noticed(tmp_path: Path, kept_bytes: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(weights(), path)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ModelUnavailable, match="cut short"):
        open_checkpoint(tmp_path, MODEL)


def test_a_missing_shard_and_a_file_outside_the_directory_are_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, weights())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelUnavailable, match=r"lacks model-00002-of-00002\.safetensors"):
        open_checkpoint(tmp_path, MODEL)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../elsewhere.safetensors"}}))
    with pytest.raises(ModelError, match="same directory"):
        open_checkpoint(tmp_path, MODEL)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelUnavailable, match="not an index"):
        open_checkpoint(tmp_path, MODEL)
