"""What a network is made of, and how much memory its packed weights take. Torch-free: who plans memory asks before anything is loaded."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from kernels.native.library import NativeError, NativeLibrary, Shape, load_library
from kernels.numerics import Kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """The mixture of experts of the layers that have one."""

    num_experts: int
    num_chosen: int  # of them, by each token
    intermediate_size: int  # of one expert
    normalize: bool  # the weights of a token's experts sum to one
    layers: tuple[bool, ...]  # per layer: it has experts in place of the MLP


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkShape:
    """Sizes of a decoder as src/baton_native.h names them."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    dtype: str  # float32 or bfloat16
    block_size: int  # tokens
    norm_eps: float
    has_qkv_bias: bool
    has_output_bias: bool
    has_mlp_bias: bool
    has_embedding: bool  # a copy beside the packed weights; else it is borrowed
    windows: tuple[int | None, ...]  # per layer
    experts: ExpertsShape | None = None  # None: every layer is dense


class NetworkHandle:
    """A network inside the library, freed with this object. Gives every pointer's memory to the library for the call only."""

    def __init__(self, shape: NetworkShape, *, path: Kernels, num_threads: int, frequencies: np.ndarray, rotary_scale: float) -> None:
        """frequencies: [head_dim / 2] float32, radians a token.

        Raises:
            NativeError: this machine has no such path, or the library cannot compute such a shape.
        """
        library = load_library()
        assert isinstance(library, NativeLibrary), library
        self.library = library
        windows = np.array([window or 0 for window in shape.windows], dtype=np.int64)
        assert frequencies.dtype == np.float32 and frequencies.shape == (shape.head_dim // 2,) and len(windows) == shape.num_layers
        record = Shape(
            num_layers=shape.num_layers,
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            is_bf16=shape.dtype == "bfloat16",
            block_size=shape.block_size,
            num_threads=num_threads,
            has_qkv_bias=shape.has_qkv_bias,
            has_output_bias=shape.has_output_bias,
            has_mlp_bias=shape.has_mlp_bias,
            has_embedding=shape.has_embedding,
            norm_eps=shape.norm_eps,
            rotary_scale=rotary_scale,
            frequencies=frequencies.ctypes.data,
            windows=windows.ctypes.data,
        )
        if (experts := shape.experts) is not None:
            has_experts = np.array(experts.layers, dtype=np.int64)
            assert len(has_experts) == shape.num_layers
            record.has_experts = has_experts.ctypes.data
            record.num_experts, record.num_experts_chosen = experts.num_experts, experts.num_chosen
            record.expert_intermediate_size, record.normalize_experts = experts.intermediate_size, experts.normalize
        self.pointer: int | None = library.calls.baton_network_new(ctypes.byref(record), path.encode())
        if self.pointer is None:
            raise NativeError(library.calls.baton_error().decode())

    def __del__(self) -> None:
        if getattr(self, "pointer", None) is not None:
            self.library.calls.baton_network_free(self.pointer)
            self.pointer = None

    @property
    def arena_bytes(self) -> int:
        """What its packed weights take."""
        return int(self.library.calls.baton_network_arena_bytes(self.pointer))


def arena_bytes(shape: NetworkShape, path: Kernels) -> int:
    """Bytes of the packed weights of a network of `shape`, told without packing anything."""
    frequencies = np.zeros(shape.head_dim // 2, dtype=np.float32)
    return NetworkHandle(shape, path=path, num_threads=1, frequencies=frequencies, rotary_scale=1.0).arena_bytes


__all__ = ["ExpertsShape", "NetworkHandle", "NetworkShape", "arena_bytes"]
