"""vLLM's CPU build as a subject of `baton bench engine --compare vllm`; run by its own environment's Python, with -P.

    PYTHON -P benchmarks/peers/vllm.py baton/bench/spoken.py

The engine is LLM() with its defaults (its core in a process of its own, prefix caching on). Threads are bound to cores 0 .. N-1, OpenMP
is Intel's and the allocator tcmalloc, as vLLM's documentation for CPUs has it: a process that finds itself without them starts again
with them.
"""

from __future__ import annotations

import ctypes.util
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any

OPENMP = Path(sys.prefix) / "lib" / "libiomp5.so"  # package intel-openmp
ALLOCATOR = "tcmalloc_minimal"  # Debian libtcmalloc-minimal4
POLL_S = 0.0002


class VllmEngine:
    """LLM() driven step by step, so that its tokens have times and requests can arrive while it runs."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        num_threads = asked["num_threads"]
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND=f"0-{num_threads - 1}", OMP_NUM_THREADS=str(num_threads), VLLM_LOGGING_LEVEL="WARNING")
        import vllm

        config = _config_of(asked["model"])
        llm = vllm.LLM(
            model=asked["model"],
            dtype=asked["dtype"],
            skip_tokenizer_init=True,
            max_model_len=asked["max_model_len"],
            max_num_seqs=asked["max_num_seqs"],
            kv_cache_memory_bytes=asked["num_kv_tokens"] * _kv_bytes_per_token(config, asked["dtype"]),
            enforce_eager=asked["dtype"] == "float32",  # only tokens are looked at then, and compiling takes most of a start
            seed=0,
        )
        self._engine = llm.llm_engine
        self._num_requests = 0
        return {"engine": f"vLLM {vllm.__version__}", "max_num_batched_tokens": self._batched_tokens()}

    def _batched_tokens(self) -> int:
        return int(self._engine.vllm_config.scheduler_config.max_num_batched_tokens)

    def prepare(self, requests: list[dict[str, Any]], is_streamed: bool) -> None:
        """What is not streamed is told at its end, as LLM.generate does: its frontend has less to do then."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._requests = []
        for request in requests:
            params = SamplingParams(
                temperature=0.0,
                max_tokens=request["num_tokens"],
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA if is_streamed else RequestOutputKind.FINAL_ONLY,
            )
            self._requests.append((str(self._num_requests), request["at_s"], {"prompt_token_ids": request["prompt"]}, params))
            self._num_requests += 1

    def run(self) -> dict[str, Any]:
        index = {name: i for i, (name, *_) in enumerate(self._requests)}
        deliveries: list[list[tuple[float, int]]] = [[] for _ in index]
        token_ids: list[list[int]] = [[] for _ in index]
        arrivals = list(reversed(self._requests))
        num_open = len(index)
        began_s = time.perf_counter()
        while num_open:
            while arrivals and arrivals[-1][1] <= time.perf_counter() - began_s:
                name, _, prompt, params = arrivals.pop()
                self._engine.add_request(name, prompt, params)
            if arrivals and self._engine.engine_core.outputs_queue.empty():
                time.sleep(POLL_S)  # step() would wait for the next output, and keep an arrival waiting with it
                continue
            for output in self._engine.step():
                at_s = time.perf_counter() - began_s
                made = output.outputs[0].token_ids
                if made:
                    deliveries[index[_name_of(output)]].append((at_s, len(made)))
                    token_ids[index[_name_of(output)]].extend(made)
                num_open -= output.finished
        return {"deliveries": deliveries, "token_ids": token_ids}


def _name_of(output: Any) -> str:
    return str(output.request_id)


def _config_of(model_dir: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model_dir)


def _kv_bytes_per_token(config: Any, dtype: str) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * (4 if dtype == "float32" else 2)


def _start_with_libraries() -> None:
    """Replace this process by one that has OpenMP and the allocator loaded first."""
    allocator = ctypes.util.find_library(ALLOCATOR)
    if not OPENMP.exists() or allocator is None:
        missing = f"{OPENMP} (pip install intel-openmp)" if not OPENMP.exists() else f"lib{ALLOCATOR} (apt install libtcmalloc-minimal4)"
        raise SystemExit(f"vLLM is measured with libraries that are not here: {missing}")
    os.environ["LD_PRELOAD"] = f"{allocator}:{OPENMP}"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    if "libiomp5" not in os.environ.get("LD_PRELOAD", ""):
        _start_with_libraries()
    runpy.run_path(sys.argv[1])["answer"](VllmEngine())
