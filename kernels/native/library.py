"""Finds and loads the shared library, and tells what it can do here. Torch-free; ctypes releases the GIL during a call."""

from __future__ import annotations

import ctypes
import hashlib
from ctypes import c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kernels.native.build import LIBRARY_NAME
from kernels.numerics import Kernels
from protocol.errors import ConfigError

DTYPES = ("float32", "bfloat16")
MAX_HEAD_DIM = 512  # kMaxHeadDim of src/tasks.h
MAX_GROUP = 192  # query heads that share one KV head: kTileRows of src/tasks.h
LIBRARY = Path(__file__).parent / LIBRARY_NAME
POINTER = c_void_p


class Shape(ctypes.Structure):
    """BatonShape of src/baton_native.h."""

    _fields_ = (
        ("num_layers", c_int32), ("hidden_size", c_int32), ("num_heads", c_int32), ("num_kv_heads", c_int32), ("head_dim", c_int32),
        ("intermediate_size", c_int32), ("vocab_size", c_int32), ("is_bf16", c_int32), ("block_size", c_int32), ("num_threads", c_int32),
        ("has_qkv_bias", c_int32), ("has_output_bias", c_int32), ("has_mlp_bias", c_int32), ("has_embedding", c_int32),
        ("norm_eps", c_float), ("rotary_scale", c_float), ("frequencies", POINTER), ("windows", POINTER), ("has_experts", POINTER),
        ("num_experts", c_int32), ("num_experts_chosen", c_int32), ("expert_intermediate_size", c_int32), ("normalize_experts", c_int32),
    )  # fmt: skip


class Step(ctypes.Structure):
    """BatonStep of src/baton_native.h."""

    _fields_ = (
        ("num_entries", c_int64), ("starts", POINTER), ("sizes", POINTER), ("token_ids", POINTER), ("tables", POINTER),
        ("table_ends", POINTER), ("num_logits", c_int64), ("logit_entries", POINTER), ("logits", POINTER), ("greedy", POINTER),
        ("clock", POINTER), ("clock_begin", c_uint64),
    )  # fmt: skip


_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name: what it returns, what it takes
    "baton_paths": (c_char_p,),
    "baton_error": (c_char_p,),
    "baton_network_new": (c_void_p, POINTER, c_char_p),
    "baton_network_free": (None, c_void_p),
    "baton_network_set_linear": (c_int, c_void_p, c_int, c_int, c_int, POINTER, POINTER, POINTER),
    "baton_network_set_experts": (c_int, c_void_p, c_int, POINTER, POINTER, POINTER),
    "baton_network_set_norm": (c_int, c_void_p, c_int, c_int, POINTER),
    "baton_network_set_embedding": (c_int, c_void_p, POINTER),
    "baton_network_set_pool": (c_int, c_void_p, POINTER, c_int64),
    "baton_network_forward": (c_int, c_void_p, POINTER),
    "baton_network_draw": (c_int, c_void_p, POINTER, c_int64, c_char_p, POINTER),
    "baton_network_arena_bytes": (c_int64, c_void_p),
    "baton_network_set_arena": (c_int, c_void_p, POINTER),
    "baton_map": (c_void_p, c_int, c_int64, c_int),
    "baton_unmap": (None, POINTER, c_int64),
    "baton_linear": (c_int, c_char_p, c_int, c_int, POINTER, c_int64, c_int64, POINTER, c_int64, POINTER, POINTER),
    "baton_rms_norm": (c_int, c_char_p, c_int, POINTER, POINTER, c_int64, c_int64, c_float, POINTER),
    "baton_silu_mul": (c_int, c_char_p, c_int, POINTER, POINTER, c_int64, POINTER),
    "baton_rotary": (
        c_int, c_char_p, c_int, POINTER, c_int64, c_int, c_int, c_int, POINTER, POINTER, POINTER, c_float,
        POINTER, c_int64, POINTER, POINTER,
    ),
    "baton_attention": (
        c_int, c_char_p, c_int, POINTER, c_int, c_int, c_int, POINTER, c_int64, POINTER, c_int64, c_int64, c_int64, c_float, POINTER,
    ),
    "baton_experts": (
        c_int, c_char_p, c_int, c_int, POINTER, c_int64, c_int64, POINTER, c_int64, c_int64, c_int, c_int64,
        POINTER, POINTER, POINTER, POINTER,
    ),
    "baton_choose_experts": (c_int, c_char_p, POINTER, c_int64, c_int64, c_int64, c_int, POINTER, POINTER),
    "baton_greedy": (c_int, c_char_p, POINTER, c_int64, c_int64, POINTER),
    "baton_copy_runs": (c_int64, POINTER, c_int64, POINTER, c_int64, POINTER, c_int64),
    "baton_copy_blocks": (
        c_int64, POINTER, c_int64, POINTER, c_int64, c_int64, c_int64, c_int64, POINTER, POINTER, c_int64,
    ),
    "baton_send_runs": (c_int, c_int, POINTER, c_int64, POINTER, c_int64, POINTER),
    "baton_receive_runs": (c_int, c_int, POINTER, c_int64, POINTER, c_int64, POINTER),
    "baton_weigh": (c_int, c_char_p, POINTER, c_int64, c_float, POINTER),
    "baton_draw": (c_int, c_char_p, POINTER, c_int64, c_int64, c_char_p, POINTER),
    "baton_measure_stream": (c_double, c_int, c_int64, c_int),
    "baton_measure_peak": (c_double, c_char_p, c_int, c_int, c_int64),
}  # fmt: skip


class NativeError(Exception):
    """The library refused a call; the text is its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NativeLibrary:
    """The loaded library. `calls` has one attribute for each function of src/baton_native.h."""

    calls: ctypes.CDLL
    paths: tuple[Kernels, ...]  # that this machine can run, best first
    digest: str  # of the library's file: equal ones pack weights alike

    def check(self, status: int) -> None:
        """Raises NativeError where a call returned other than 0."""
        if status:
            raise NativeError(self.calls.baton_error().decode())


@cache
def load_library(path: Path = LIBRARY) -> NativeLibrary | str:
    """The library, or why there is none in one clause."""
    try:
        calls = ctypes.CDLL(str(path))
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(calls, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        return (
            "the native kernels are not built (`make native`, which needs g++)"
            if not path.exists()
            else f"the native kernels cannot be loaded ({error})"
        )
    return NativeLibrary(calls=calls, paths=tuple(calls.baton_paths().decode().split(",")), digest=digest)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenKernels:
    """Who computes here."""

    name: Kernels  # never "auto"
    note: str = ""  # where that is slower than it could be, for `baton status`

    @property
    def bits(self) -> str:
        """Equal names promise equal bits of float32 results."""
        return {"avx512_bf16": "fused", "avx512": "fused", "avx2": "fused"}.get(self.name, self.name)


def choose_kernels(asked: Kernels = "auto", *, dtype: str, head_dim: int = 2, group: int = 1) -> ChosenKernels:
    """What computes a model of `dtype` on this machine; "auto" is the best there is.

    Args:
        group: query heads that share one KV head.

    Raises:
        ConfigError: a path asked for by name is not to be had.
    """
    if asked == "torch":
        return ChosenKernels(name="torch")
    library = load_library()
    if isinstance(library, str) or (reason := _why_not(dtype, head_dim, group)):
        reason = library if isinstance(library, str) else reason
        if asked != "auto":
            raise ConfigError(f"kernels {asked} cannot be used: {reason}; use auto or torch")
        return ChosenKernels(name="torch", note=f"kernels torch, which are slow: {reason}")
    if asked != "auto":
        if asked not in library.paths:
            raise ConfigError(f"kernels {asked} cannot be used: this machine has {', '.join(library.paths)}")
        return ChosenKernels(name=asked)
    best = library.paths[0]
    return ChosenKernels(name=best, note="" if best != "portable" else "kernels portable, which are slow: no AVX2 and no AVX-512 here")


def _why_not(dtype: str, head_dim: int, group: int) -> str:
    """Why the native kernels cannot compute such a model; empty: they can."""
    if dtype not in DTYPES:
        return f"the native kernels have no {dtype}"
    if head_dim > MAX_HEAD_DIM:
        return f"head_dim {head_dim} exceeds the {MAX_HEAD_DIM} of the native kernels"
    if group > MAX_GROUP:
        return f"{group} query heads share a KV head, the native kernels take at most {MAX_GROUP}"
    return ""
