"""Step times and KV room of a model on GPUs that are not here: from datasheets and shapes, with stated shares of the peaks. Torch-free.

The shares and fixed costs below put OPT-13B (TP 1, 2, 4) and OPT-66B (TP 2, 4) within 30 % of every step time that DistServe measured on
A100s, 11 % on average over prompts of 256 to 2,048 tokens and batches of 1 to 128 (tests/unit/engine/test_roofline.py). Good for comparing
placements, not for promising a latency: `baton calibrate` measures.
"""

from __future__ import annotations

from engine.hardware import MIB, Gpu
from engine.models.shapes import DTYPE, ModelShape
from engine.step_time import RooflineStepTime
from protocol.errors import ConfigError, ModelDoesNotFit
from protocol.kv import DTYPE_SIZE_BYTES

COMPUTE_SHARE = 0.6  # of the peak, in matrix products of hundreds of rows
TRAFFIC_SHARE = 0.7  # of the memory's bandwidth
LINK_SHARE = 0.7
STEP_S = 3e-3  # launches, sampling, scheduling
ALL_REDUCE_S = 30e-6  # before its first byte; there are two a layer
MEMORY_SHARE = 0.95  # of a GPU's memory that the engine takes
WORKING_BYTES = 1_500_000_000  # of a GPU: activations, the runtime


def roofline(gpu: Gpu, model: ModelShape, *, tensor_parallel: int = 1) -> RooflineStepTime:
    """Of one worker: `model` in bf16, split by heads over `tensor_parallel` GPUs that reduce over a ring twice a layer.

    Raises:
        ConfigError: the heads cannot be split so. ModelDoesNotFit: into the memory of so many.
    """
    _check(gpu, model, tensor_parallel)
    size_bytes = DTYPE_SIZE_BYTES[DTYPE]
    ranks = tensor_parallel
    reduced_bytes = 2 * model.num_layers * model.hidden_size * size_bytes * 2 * (ranks - 1) / ranks  # over each link, for each token
    return RooflineStepTime(
        num_parameters=model.num_token_parameters,
        weight_bytes=(model.num_linear_parameters + model.num_embedding_parameters) * size_bytes,  # the head; of embeddings a row a token
        expert_bytes=model.num_expert_parameters * size_bytes,
        chosen_share=model.num_chosen / model.num_experts if model.num_experts else 1.0,
        kv_token_bytes=kv_token_bytes(model, ranks),
        attention_flops_per_read=4 * model.num_layers * model.num_heads * model.head_dim,
        flops_per_s=COMPUTE_SHARE * gpu.bf16_flops_per_s * ranks,
        bytes_per_s=TRAFFIC_SHARE * gpu.bytes_per_s * ranks,
        token_exchange_s=reduced_bytes / (LINK_SHARE * gpu.link_bytes_per_s),
        overhead_s=STEP_S + (2 * model.num_layers * ALL_REDUCE_S if ranks > 1 else 0.0),
    )


def kv_token_bytes(model: ModelShape, tensor_parallel: int = 1) -> int:
    """On all GPUs of a worker together: more of them than KV heads hold copies."""
    return model.kv_token_bytes * max(1, tensor_parallel // model.num_kv_heads)


def kv_capacity_blocks(gpu: Gpu, model: ModelShape, *, tensor_parallel: int = 1, block_size_tokens: int = 16) -> int:
    """KV blocks that fit beside the weights.

    Raises:
        ConfigError: the heads cannot be split so. ModelDoesNotFit: not a single one does.
    """
    left_bytes = _check(gpu, model, tensor_parallel)
    return left_bytes // (block_size_tokens * kv_token_bytes(model, tensor_parallel))


def _check(gpu: Gpu, model: ModelShape, ranks: int) -> int:
    """Bytes left for KV on all GPUs of a worker."""
    if ranks < 1 or model.num_heads % ranks:
        raise ConfigError(f"tensor_parallel is {ranks}, which does not divide {model.num_heads} heads; use a divisor")
    if ranks > model.num_kv_heads and ranks % model.num_kv_heads:
        raise ConfigError(f"tensor_parallel is {ranks}, no multiple of {model.num_kv_heads} KV heads; use a divisor or a multiple")
    weight_bytes = model.num_parameters * DTYPE_SIZE_BYTES[DTYPE]
    room_bytes = ranks * (int(MEMORY_SHARE * gpu.memory_bytes) - WORKING_BYTES)
    left_bytes = room_bytes - weight_bytes
    if left_bytes < 16 * kv_token_bytes(model, ranks):
        raise ModelDoesNotFit(
            f"tensor_parallel is {ranks}: {weight_bytes / 1e9:,.0f} GB of weights leave no room for KV in the {room_bytes / 1e9:,.0f} GB"
            f" that {ranks} x {gpu.name} ({gpu.memory_bytes // MIB:,} MiB) give; raise it, or take a larger GPU or a smaller model"
        )
    return left_bytes
