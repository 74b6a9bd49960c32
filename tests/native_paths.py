"""Which instruction paths of the native kernels this machine can test."""

from __future__ import annotations

from kernels.native.library import load_library

library = load_library()
MISSING = library if isinstance(library, str) else ""  # why there is nothing to test
PATHS: tuple[str, ...] = () if isinstance(library, str) else library.paths
EVERY = ("avx512_bf16", "avx512", "avx2", "portable")
