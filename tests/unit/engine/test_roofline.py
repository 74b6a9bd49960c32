"""Step times and KV room from datasheets and shapes, held against published figures."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from baton.bench.models import MODELS
from engine.hardware import GPUS, find_gpu
from engine.models.config import parse_model_config
from engine.models.shapes import MODEL_SHAPES, find_shape, shape_of
from engine.models.tensors import weights_size_bytes
from engine.roofline import kv_capacity_blocks, kv_token_bytes, roofline
from engine.step_time import StepShape
from protocol.errors import ConfigError, ModelDoesNotFit

pytestmark = pytest.mark.pure

A100 = GPUS["A100"]

# DistServe's profile of OPT on A100-80GB, ms: prefill a + b*tokens + c*tokens^2; decode a + b*KV tokens + c*batch, below 95 and from there.
PROFILED = {
    ("opt-13b", 1): ((18.103, 0.10191, 7.122e-6), (19.935, 6.269e-4, 0.03851), (7.166, 5.798e-4, 0.15831)),
    ("opt-13b", 2): ((14.743, 0.06858, 2.450e-6), (13.295, 3.411e-4, 0.06296), (10.639, 3.118e-4, 0.08563)),
    ("opt-13b", 4): ((12.062, 0.03808, 5.226e-7), (10.256, 1.879e-4, 0.03269), (10.484, 1.712e-4, 0.04567)),
    ("opt-66b", 2): ((43.059, 0.27423, 2.248e-5), (48.288, 9.424e-4, 0.12755), (28.728, 4.745e-4, 0.29618)),
    ("opt-66b", 4): ((29.442, 0.15135, 8.317e-6), (30.760, 4.519e-4, 0.06328), (27.471, 4.047e-4, 0.12481)),
}


def test_kv_of_a_token_is_as_published() -> None:
    """Seen to fail with K alone counted."""
    published = {
        "opt-13b": 819_200, "opt-66b": 2_359_296, "opt-175b": 4_718_592, "llama-2-7b": 524_288,
        "llama-3-8b": 131_072, "llama-3-70b": 327_680, "mixtral-8x22b": 229_376,
    }  # fmt: skip
    for name, size_bytes in published.items():
        shape = find_shape(name)
        assert shape.kv_token_bytes == kv_token_bytes(shape) == shape.kv_layout(16).token_bytes == size_bytes
    assert kv_token_bytes(find_shape("llama-3-8b"), 16) == 2 * 131_072, "each of 8 KV heads lies on two of 16 GPUs"


def test_models_have_the_parameters_their_cards_say() -> None:
    """In billions, as their publishers round them. Seen to fail with a gated MLP for OPT."""
    published = {
        "llama-2-7b": 6.74, "llama-2-13b": 13.0, "llama-2-70b": 69.0, "llama-3-8b": 8.03, "llama-3-70b": 70.6, "mistral-7b": 7.24,
        "mixtral-8x7b": 46.7, "mixtral-8x22b": 141, "qwen2.5-7b": 7.61, "qwen2.5-14b": 14.7, "qwen2.5-32b": 32.5, "qwen2.5-72b": 72.7,
        "opt-13b": 12.9, "opt-66b": 65.7, "opt-175b": 174.6,
    }  # fmt: skip
    assert published.keys() == MODEL_SHAPES.keys()
    for name, billions in published.items():
        assert find_shape(name).num_parameters == pytest.approx(billions * 1e9, rel=0.011), name
    assert find_shape("mixtral-8x7b").num_token_parameters == pytest.approx(12.6e9, rel=0.01)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_checkpoints_shape_has_its_weights(name: str, tmp_path: Path) -> None:
    """Against the tensors a checkpoint must hold. Seen to fail with the head of tied embeddings counted."""
    (tmp_path / "config.json").write_text(json.dumps(MODELS[name]))
    shape, model = find_shape(str(tmp_path)), parse_model_config(MODELS[name], {})
    assert shape == shape_of(model)
    assert 2 * shape.num_parameters == pytest.approx(weights_size_bytes(model), rel=0.002)
    assert shape.kv_token_bytes == model.kv_layout(16).token_bytes


def test_step_times_of_opt_are_near_those_that_were_profiled() -> None:
    """40 of them, each within 30 %, 12 % on average. Seen to fail with the traffic of one GPU for two."""
    ratios = []
    for (name, ranks), (prefill, small, large) in PROFILED.items():
        model = roofline(A100, find_shape(name), tensor_parallel=ranks)
        for tokens in (256, 512, 1024, 2048):
            published_s = 1e-3 * (prefill[0] + prefill[1] * tokens + prefill[2] * tokens**2)
            ratios.append(model.step_s(StepShape().with_prefill(0, tokens)) / published_s)
        for batch in (1, 16, 64, 128):
            base, read, sequence = small if batch < 95 else large
            published_s = 1e-3 * (base + read * batch * 512 + sequence * batch)
            ratios.append(model.step_s(StepShape(decodes=batch, decode_reads=batch * 512)) / published_s)
    assert len(ratios) == 40
    assert min(ratios) > 0.7 and max(ratios) < 1.3
    assert statistics.fmean(abs(ratio - 1) for ratio in ratios) < 0.12


def test_kv_room_of_opt_is_near_what_was_profiled() -> None:
    """DistServe's table of tokens that fit, by model and GPUs. Seen to fail without the working memory."""
    profiled = {("opt-13b", 1): 66_144, ("opt-13b", 2): 163_008, ("opt-13b", 4): 356_736, ("opt-66b", 4): 78_496}
    for (name, ranks), tokens in profiled.items():
        blocks = kv_capacity_blocks(A100, find_shape(name), tensor_parallel=ranks, block_size_tokens=16)
        assert 16 * blocks == pytest.approx(tokens, rel=0.03)


def test_few_tokens_read_few_experts() -> None:
    """By hand: of 8 experts one token reads 2, sixty-four all. Seen to fail with all experts read by every step."""
    model = roofline(GPUS["H100"], find_shape("mixtral-8x7b"), tensor_parallel=2)
    expert_s = model.expert_bytes / model.bytes_per_s
    one, many = (model.step_s(StepShape(decodes=batch)) - batch * model.kv_token_bytes / model.bytes_per_s for batch in (1, 64))
    assert many - one == pytest.approx(0.75 * expert_s + 63 * model.token_exchange_s, rel=1e-6)


def test_gpus_rank_by_bandwidth_in_decode_and_by_arithmetic_in_prefill() -> None:
    """An L40S multiplies faster than an A100 and reads slower. Seen to fail with the bandwidths of two of them swapped."""
    model = find_shape("llama-3-8b")

    def ranked(shape: StepShape) -> list[str]:
        return sorted(GPUS, key=lambda name: roofline(find_gpu(name.lower()), model).step_s(shape), reverse=True)

    assert ranked(StepShape(decodes=8, decode_reads=8000)) == ["L40S", "A100", "H100", "H200"]
    assert ranked(StepShape().with_prefill(0, 2048)) == ["A100", "L40S", "H100", "H200"]
    assert sorted(GPUS, key=lambda name: kv_capacity_blocks(GPUS[name], model)) == ["L40S", "H100", "A100", "H200"]


def test_unknown_names_and_impossible_splits_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'H10'.*did you mean 'H100'"):
        find_gpu("H10")
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3-8b'.*qwen2.5-72b"):
        find_shape("llama3-8b")
    with pytest.raises(ConfigError, match="does not divide 40 heads"):
        roofline(A100, find_shape("opt-13b"), tensor_parallel=3)
    with pytest.raises(ModelDoesNotFit, match=r"141 GB of weights.*A100"):
        kv_capacity_blocks(A100, find_shape("llama-3-70b"))
