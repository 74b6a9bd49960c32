"""`vllm serve` of vLLM's CPU build, as `baton bench disagg --peer-env vllm=PYTHON` starts it; run by its own environment's Python, with -P.

    PYTHON -P benchmarks/peers/vllm_serve.py MODEL_DIR PORT NUM_THREADS KV_CACHE_GIB [further flags of `vllm serve`]

Threads are bound to cores 0 .. N-1, OpenMP is Intel's and the allocator tcmalloc, as vLLM's documentation for CPUs has it.
"""

from __future__ import annotations

import ctypes.util
import os
import sys
from pathlib import Path

OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"  # package intel-openmp
ALLOCATOR = "tcmalloc_minimal"  # Debian libtcmalloc-minimal4


def main(model_dir: str, port: str, num_threads: str, kv_cache_gib: str, *flags: str) -> None:
    allocator = ctypes.util.find_library(ALLOCATOR)
    if not OPENMP.exists() or allocator is None:
        missing = f"{OPENMP} (pip install intel-openmp)" if not OPENMP.exists() else f"lib{ALLOCATOR} (apt install libtcmalloc-minimal4)"
        raise SystemExit(f"vLLM is measured with libraries that are not here: {missing}")
    environment = os.environ | {
        "LD_PRELOAD": f"{allocator}:{OPENMP}",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{int(num_threads) - 1}",
        "OMP_NUM_THREADS": num_threads,
        "VLLM_CPU_KVCACHE_SPACE": kv_cache_gib,
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main", "serve", model_dir, "--host", "127.0.0.1", "--port", port, *flags]
    os.execve(sys.executable, command, environment)


if __name__ == "__main__":
    main(*sys.argv[1:])
