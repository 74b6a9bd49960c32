"""From configuration and checkpoint to a worker's plan: blocks and lengths that follow from memory, errors with the arithmetic, cores."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from control.compose import MEMORY_SHARE, WorkerPlan, compose_worker, compose_worker_core, numerics_of, pinned, plan_worker, pool_sizes
from control.config import ClusterConfig, load_config
from control.memory import available_memory_bytes
from engine.core.config import SchedulerConfig, WorkerCoreConfig
from engine.hardware import GPUS
from engine.models.config import ModelConfig, parse_model_config
from engine.models.shapes import MODEL_SHAPES
from engine.models.tensors import expected_tensors
from engine.roofline import roofline
from engine.step_time import FittedStepTime, LinearStepTime, StepShape
from kernels.native.library import ChosenKernels
from protocol.errors import ConfigError, ModelDoesNotFit
from protocol.kv import DigestMode, FailurePolicy, ModelFingerprint
from protocol.worker import Role

pytestmark = pytest.mark.pure

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
}
MODEL: ModelConfig = parse_model_config(TINY, {}, numerics="reference")
BLOCK_BYTES = MODEL.kv_layout(16).block_bytes
FINGERPRINT = ModelFingerprint(weights="w", config="c", rope="r", dtype="float32", quantization="", numerics="reference")
GIB = 1 << 30


def plan(tree: dict[str, Any] | None = None, *, memory_bytes: int | None = None, model: ModelConfig = MODEL) -> WorkerPlan:
    return plan_worker(load_config(tree), model, fingerprint=FINGERPRINT, memory_bytes=memory_bytes)


def test_pool_of_our_choosing_holds_every_sequence_and_no_more() -> None:
    """64 sequences of 2048 tokens in blocks of 16. Seen to fail with all free memory taken."""
    for memory_bytes in (None, 64 * GIB):
        made = plan(memory_bytes=memory_bytes)
        assert (made.num_kv_blocks, made.max_model_len) == (64 * 128, 2048)


def little_memory_bytes(num_blocks: int) -> int:
    """Free memory in which each of two workers has room for so many blocks beside weights and processes."""
    weights_and_processes = 2 * 400 * 1024 * 1024 + 4 * sum(math.prod(shape) for shape in expected_tensors(MODEL).values())
    return math.ceil((weights_and_processes + 2 * num_blocks * BLOCK_BYTES) / MEMORY_SHARE) + 10


def test_little_memory_makes_a_smaller_pool_and_then_a_shorter_length() -> None:
    for num_blocks in (500, 40):
        made = plan(memory_bytes=little_memory_bytes(num_blocks))
        assert made.num_kv_blocks == num_blocks
        assert made.max_model_len == min(2048, num_blocks * 16)


def test_a_host_tier_takes_its_memory_from_the_pool() -> None:
    """Two workers with as much tier as 100 blocks each. Seen to fail with the tier not counted."""
    tree = {"workers": {"kv_host_tier_bytes": 100 * BLOCK_BYTES + 7}}
    made = plan(tree, memory_bytes=little_memory_bytes(500))
    assert made.num_host_blocks == 100 and made.core.host_tier_bytes == 100 * BLOCK_BYTES + 7
    assert plan(memory_bytes=little_memory_bytes(500)).num_kv_blocks - made.num_kv_blocks in (100, 101)
    with pytest.raises(ConfigError, match="leave nothing"):
        plan({"workers": {"kv_host_tier_bytes": 8 * GIB}}, memory_bytes=GIB)


def test_what_does_not_fit_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ModelDoesNotFit, match=r"does not fit: .* weights \+ 2 x .* available"):
        plan(memory_bytes=GIB // 2)
    with pytest.raises(ModelDoesNotFit, match="1000000 blocks"):
        plan({"workers": {"num_kv_blocks": 1_000_000}}, memory_bytes=GIB)


def test_blocks_and_length_follow_what_the_user_said() -> None:
    """Seen to fail with the length left at the model's when the pool is smaller."""
    assert plan({"workers": {"num_kv_blocks": 10}}).max_model_len == 160
    made = plan({"workers": {"kv_cache_memory_bytes": 100 * BLOCK_BYTES + 5}, "model": {"max_model_len": 1000}})
    assert (made.num_kv_blocks, made.max_model_len) == (100, 1000)
    assert plan({"model": {"max_model_len": 100}}).num_kv_blocks == 64 * 7


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (
            {"model": {"max_model_len": 4096}},
            "max_model_len 4,096 exceeds the 2,048 tokens the checkpoint can address; lower --max-model-len",
        ),
        (
            {"model": {"max_model_len": 1000}, "workers": {"num_kv_blocks": 10}},
            "10 KV blocks of 16 tokens hold 160, fewer than max_model_len 1,000",
        ),
        ({"workers": {"kv_cache_memory_bytes": 100}}, "kv_cache_memory_bytes 100 holds 0 blocks; give at least"),
        ({"workers": {"device": "cuda"}}, "'cuda' is not supported by this version"),
        ({"model": {"numerics": "reference"}, "workers": {"threads": 4}}, "reference numerics run on 1 thread, not 4"),
    ],
)
def test_contradictions_are_refused(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        plan(tree)


@pytest.mark.parametrize(
    ("tree", "blocks_that_fit", "max_model_len"),
    [({}, 500, 2048), ({}, 40, 640), ({"workers": {"kv_cache_memory_bytes": 30 * BLOCK_BYTES + 5}}, 500, 480)],
)
def test_pinned_configuration_plans_the_same_again(tree: dict[str, Any], blocks_that_fit: int, max_model_len: int) -> None:
    """A worker that is replaced later, whatever memory is free then, has the blocks and the length of the first.

    Seen to fail without pinning, and with the blocks, the length or the user's bytes left as they were.
    """
    first = plan(tree, memory_bytes=little_memory_bytes(blocks_that_fit))
    assert first.max_model_len == max_model_len
    told = pinned(load_config(tree), first)
    again = plan_worker(told, MODEL, fingerprint=FINGERPRINT)
    assert (again.num_kv_blocks, again.max_model_len) == (first.num_kv_blocks, max_model_len)
    assert told.model.max_model_len == max_model_len and told.workers.kv_cache_memory_bytes is None


def test_numerics_are_exact_for_float32_unless_something_only_fast_ones_have_is_asked_for() -> None:
    """Seen to fail with each of the four conditions left out."""
    for tree, dtype, expected in [
        ({}, "float32", "reference"),
        ({}, "bfloat16", "fast"),
        ({"model": {"numerics": "reference"}}, "bfloat16", "reference"),
        ({"workers": {"threads": 2}}, "float32", "fast"),
        ({"workers": {"device": "cuda"}}, "float32", "fast"),
        ({"model": {"numerics": "fast"}}, "float32", "fast"),
    ]:
        assert numerics_of(load_config(tree), dtype) == expected, (tree, dtype)
    native = ChosenKernels(name="portable")
    assert numerics_of(load_config({"workers": {"threads": 2}}), "float32", native) == "reference", "whose bits do not depend on threads"


def test_defaults_of_the_workers_section_are_those_of_the_engine() -> None:
    """Two homes of one default must not drift. Seen to fail with max_waiting 255."""
    assert plan().core == WorkerCoreConfig(scheduler=SchedulerConfig(), digest_mode=DigestMode.SAMPLED)


def test_settings_reach_core_and_executor() -> None:
    tree = {
        "workers": {"block_size": 32, "max_num_seqs": 3, "max_num_batched_tokens": 77, "enable_prefix_caching": False, "lease_s": 5},
        "transport": {"kv_transport": "tcp", "kv_load_failure_policy": "fail"},
        "prefill": {"order_by": "shortest_first", "chunk_tokens_beside_decodes": 64},
        "decode": {"watermark_fraction": 0.1},
    }
    made = plan(tree)
    scheduler = made.core.scheduler
    assert (scheduler.block_size_tokens, scheduler.max_num_seqs, scheduler.max_num_batched_tokens) == (32, 3, 77)
    assert not scheduler.enable_prefix_caching and made.core.lease_s == 5 and made.core.digest_mode is DigestMode.FULL
    assert made.layout.block_size_tokens == 32 and made.core.kv_load_failure_policy is FailurePolicy.FAIL
    assert made.prefill.chunk_tokens(500, 1) == 64 and made.prefill.order(0, 9, 5) == (0, 5)
    assert not made.decode.may_admit(9, 0, 100) and made.decode.may_admit(10, 0, 100)


def test_paced_workers_have_a_pace_and_real_ones_are_measured() -> None:
    assert plan().step_time is None
    paced = plan({"workers": {"executor": "paced"}, "paced": {"decode_base_s": 0.5, "decode_sequence_s": 0, "decode_read_s": 0}}).step_time
    assert isinstance(paced, LinearStepTime) and paced.step_s(StepShape(decodes=9)) == 0.5


def test_the_pace_may_be_that_of_a_model_on_gpus() -> None:
    """Seen to fail with tensor_parallel left out."""
    paced = plan({"workers": {"executor": "paced"}, "paced": {"gpu": "h100", "model": "llama-3-70b", "tensor_parallel": 4}}).step_time
    assert paced == roofline(GPUS["H100"], MODEL_SHAPES["llama-3-70b"], tensor_parallel=4)


def test_no_core_is_told_how_long_a_step_takes() -> None:
    """Not a paced one either. Seen to fail with the plan's pace given to the core."""
    made = plan({"workers": {"executor": "paced"}})
    core = compose_worker_core(made, worker_id="w", epoch=1, role=Role.BOTH)
    assert made.step_time is not None and isinstance(core._scheduler._step_time, FittedStepTime)


def test_core_is_built_for_each_role() -> None:
    made = plan({"workers": {"num_kv_blocks": 12}})
    for role in Role:
        core = compose_worker_core(made, worker_id=f"{role.value}-0", epoch=7, role=role)
        snapshot = core.snapshot(0.0)
        assert (snapshot.role, snapshot.epoch, snapshot.num_blocks_total, snapshot.num_blocks_unaccounted) == (role, 7, 12, 0)


def test_pool_sizes_are_the_users() -> None:
    config = load_config({"workers": {"prefill_workers": 2, "decode_workers": 3, "mixed_workers": 1}})
    assert pool_sizes(config) == {Role.PREFILL: 2, Role.DECODE: 3, Role.BOTH: 1}


def write_checkpoint(folder: Path) -> None:
    """TINY with every weight zero, in one safetensors file."""
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in expected_tensors(MODEL).items():
        size = 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(TINY))
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(offset))


def test_plan_is_made_from_a_directory_without_torch(tmp_path: Path) -> None:
    """Two workers of one checkpoint agree on fingerprint; the numerics are part of it."""
    write_checkpoint(tmp_path)
    config = ClusterConfig()
    first, second = compose_worker(config, tmp_path, memory_bytes=8 * GIB), compose_worker(config, tmp_path)
    assert first.fingerprint == second.fingerprint and first.layout == MODEL.kv_layout(16)
    assert compose_worker(load_config({"model": {"numerics": "fast"}}), tmp_path).fingerprint != first.fingerprint


def test_a_containers_limit_counts_when_it_is_less(tmp_path: Path) -> None:
    """Cached files can be taken back. Seen to fail with memory.current taken whole."""
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert available_memory_bytes(tmp_path) == 150_000
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes(tmp_path) > 1_000_000
