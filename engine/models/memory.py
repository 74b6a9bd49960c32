"""Whether a model fits, told before anything is loaded, with the arithmetic. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from engine.models.config import ModelConfig
from engine.models.native import network_shape
from engine.models.tensors import weights_size_bytes
from kernels.native.shape import arena_bytes
from kernels.numerics import Kernels
from protocol.errors import ModelDoesNotFit
from protocol.kv import DTYPE_SIZE_BYTES

PROCESS_BYTES = 400 * 1024 * 1024  # resident size of a worker with torch loaded and no model, rounded up
GIB = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What the workers of one machine take. `num_blocks` is per worker."""

    weights_bytes: int  # of one copy
    num_weight_copies: int
    num_workers: int
    process_bytes: int  # of one worker, beside weights and pool
    block_bytes: int
    num_blocks: int

    @property
    def pool_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def total_bytes(self) -> int:
        return self.num_weight_copies * self.weights_bytes + self.num_workers * (self.process_bytes + self.pool_bytes)

    def __str__(self) -> str:
        """The sum, as a person would write it."""
        return (
            f"{self.num_weight_copies} x {_gib(self.weights_bytes)} weights"
            f" + {self.num_workers} x ({_gib(self.process_bytes)} process"
            f" + {self.num_blocks} blocks of {self.block_bytes / 1024:.0f} KiB KV = {_gib(self.pool_bytes)})"
            f" = {_gib(self.total_bytes)}"
        )


def memory_plan(
    config: ModelConfig,
    *,
    memory_bytes: int,
    num_workers: int,
    block_size_tokens: int,
    max_model_len: int,
    num_blocks: int | None = None,
    kernels: Kernels = "torch",
) -> MemoryPlan:
    """How `num_workers` workers share `memory_bytes` of one machine.

    Weights that native `kernels` pack are one copy a machine (engine/runner/packed_weights.py), and so are those that torch maps from the
    file in the checkpoint's own dtype; what torch converts is one copy a worker. `num_blocks` per worker; None: all that fit, at least
    one sequence of `max_model_len` tokens.

    Raises:
        ModelDoesNotFit: the least pool, or the one asked for, does not fit; the text shows the sum and what to change.
    """
    least_blocks = -(-max_model_len // block_size_tokens)  # rounds up
    is_converted = kernels == "torch" and config.dtype != config.checkpoint_dtype
    asked = MemoryPlan(
        weights_bytes=weights_size_bytes(config) if kernels == "torch" else native_weights_bytes(config, kernels, block_size_tokens),
        num_weight_copies=num_workers if is_converted else 1,
        num_workers=num_workers,
        process_bytes=PROCESS_BYTES,
        block_bytes=config.kv_layout(block_size_tokens).block_bytes,
        num_blocks=least_blocks if num_blocks is None else num_blocks,
    )
    if asked.total_bytes > memory_bytes:
        pool = f"--max-model-len than {max_model_len}" if num_blocks is None else "--kv-cache-memory-bytes"
        remedy = f"use fewer workers, a lower {pool}, a smaller dtype than {config.dtype} or a smaller model"
        raise ModelDoesNotFit(f"{config.architecture} does not fit: {asked} > {_gib(memory_bytes)} available; {remedy}")
    if num_blocks is not None:
        return asked
    spare_blocks = (memory_bytes - asked.total_bytes) // (num_workers * asked.block_bytes)
    return MemoryPlan(
        weights_bytes=asked.weights_bytes,
        num_weight_copies=asked.num_weight_copies,
        num_workers=num_workers,
        process_bytes=PROCESS_BYTES,
        block_bytes=asked.block_bytes,
        num_blocks=least_blocks + spare_blocks,
    )


def native_weights_bytes(config: ModelConfig, kernels: Kernels, block_size_tokens: int) -> int:
    """What the workers of one machine hold together: the packed weights, and the embedding where it stays in the file's pages.

    A tied table counts twice: its rows are looked up in the file, and as the head it is packed.
    """
    shape = network_shape(config, block_size_tokens=block_size_tokens)
    mapped_bytes = 0 if shape.has_embedding else config.vocab_size * config.hidden_size * DTYPE_SIZE_BYTES[config.dtype]
    return arena_bytes(shape, kernels) + mapped_bytes


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
