"""How fast the engine is on this machine, beside what the machine can do: native kernels and torch in turn on random checkpoints.

    python -m tests.engine_bench --model 125m --threads 1,2 --kernels auto,torch --json

Figures are medians over rounds that take the engines in turn, so that a busy neighbour disturbs both. `stream` and `peak` are
measured in the same rounds with the same threads: decoding one sequence reads every weight once a token, so `stream_share` says what is
left to win.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from engine.core.executor import PlanEntry
from engine.models.config import ModelConfig, load_model_config, parse_model_config
from engine.models.tensors import expected_tensors, weights_size_bytes
from engine.runner.config import RunnerConfig
from engine.runner.model_runner import load_model_runner
from kernels.native.library import NativeLibrary, choose_kernels, load_library
from kvtransfer.region import PoolMemory

LLAMA = {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "tie_word_embeddings")
MODELS: dict[str, dict[str, Any]] = {
    "15m": LLAMA | dict(zip(SIZES, (288, 768, 6, 6, 32000, True), strict=True)),
    "125m": LLAMA | dict(zip(SIZES, (768, 2048, 12, 12, 32000, False), strict=True)),
    "0.5b": LLAMA
    | {"architectures": ["Qwen3ForCausalLM"], "num_key_value_heads": 8, "head_dim": 64}
    | dict(zip(SIZES, (1024, 3072, 28, 16, 50000, True), strict=True)),
}
BLOCK_SIZE, NUM_BLOCKS = 16, 1200
CONTEXT, PROMPT = 256, 2048
BATCHES = (1, 8, 32)


def make_model(parent: Path, name: str) -> Path:
    directory = parent / name
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(MODELS[name]))
    tensors = expected_tensors(parse_model_config(MODELS[name], {}))
    torch.manual_seed(0)
    weights = {n: (torch.ones(s) if "norm" in n else torch.randn(s) * s[-1] ** -0.5).bfloat16() for n, s in tensors.items()}
    save_file(weights, str(directory / "model.safetensors"))
    return directory


@dataclass
class Subject:
    """One engine under test, with the seconds of each of its steps."""

    model: ModelConfig
    runner: Any
    pool: PoolMemory
    load_s: float
    times: dict[str, list[float]] = field(default_factory=dict)

    def step(self, name: str, starts: int, num_tokens: int, batch: int, repeats: int) -> None:
        num_blocks = -(-(starts + num_tokens) // BLOCK_SIZE)
        tables = [array("I", range(i * num_blocks, (i + 1) * num_blocks)) for i in range(batch)]
        entries = [PlanEntry(sequence_id=i, start=starts, num_tokens=num_tokens, block_table=table) for i, table in enumerate(tables)]
        tokens = [array("I", np.random.default_rng(i).integers(3, 30000, num_tokens).tolist()) for i in range(batch)]
        for _ in range(repeats):
            started = time.perf_counter()
            self.runner.forward(entries, tokens, list(range(batch)))
            self.times.setdefault(name, []).append(time.perf_counter() - started)


def load(model_dir: Path, kernels: Any, num_threads: int) -> Subject:
    model = load_model_config(model_dir)
    pool = PoolMemory.create(model.kv_layout(BLOCK_SIZE), NUM_BLOCKS)
    started = time.perf_counter()
    runner = load_model_runner(model_dir, RunnerConfig(numerics="fast", kernels=kernels, num_threads=num_threads), pool.region)
    load_s = time.perf_counter() - started
    runner.pool.blocks.zero_()
    return Subject(model=model, runner=runner, pool=pool, load_s=load_s)


def measure(model_dir: Path, kernels: list[str], num_threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(num_threads)
    subjects = {name: load(model_dir, name, num_threads) for name in kernels}
    library = load_library()
    assert isinstance(library, NativeLibrary), library
    path = choose_kernels(dtype="bfloat16").name.encode()
    stream: list[float] = []
    peak: list[float] = []
    for _ in range(rounds):
        stream.append(library.calls.baton_measure_stream(num_threads, 256 << 20, 3))
        peak.append(max(2 * library.calls.baton_measure_peak(path, 1, num_threads, 200) for _ in range(5)))
        for subject in subjects.values():
            for batch in BATCHES:
                subject.step(f"decode {batch}", CONTEXT, 1, batch, 10 if batch == 1 else 3)
            subject.step("prefill", 0, PROMPT, 1, 1)
    hardware = {"stream_gb_per_s": statistics.median(stream) / 1e9, "peak_gflop_per_s": statistics.median(peak) / 1e9}
    return {"hardware": hardware, "engines": {name: figures(subject, hardware) for name, subject in subjects.items()}}


def figures(subject: Subject, hardware: dict[str, float]) -> dict[str, float]:
    model = subject.model
    median = {name: statistics.median(times) for name, times in subject.times.items()}
    inner = sum(int(np.prod(shape)) for name, shape in expected_tensors(model).items() if ".layers." in name)
    flops = 2 * inner * PROMPT + 2 * PROMPT * PROMPT * model.num_heads * model.head_dim * model.num_layers
    read_bytes = weights_size_bytes(model) - (0 if model.tie_embeddings else 2 * model.vocab_size * model.hidden_size)
    result = {"load_s": subject.load_s} | {f"decode_{batch}_ms": median[f"decode {batch}"] * 1e3 for batch in BATCHES}
    result["stream_share"] = read_bytes / median["decode 1"] / 1e9 / hardware["stream_gb_per_s"]
    result["prefill_tokens_per_s"] = PROMPT / median["prefill"]
    result["prefill_peak_share"] = flops / median["prefill"] / 1e9 / hardware["peak_gflop_per_s"]
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="15m,125m")
    parser.add_argument("--kernels", default="auto,torch")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="one document on one line")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in arguments.model.split(","):
            model_dir = make_model(Path(scratch), model)
            for num_threads in map(int, arguments.threads.split(",")):
                measured = measure(model_dir, arguments.kernels.split(","), num_threads, arguments.rounds)
                results.append({"model": model, "threads": num_threads, "load": os.getloadavg()[0], **measured})
    print(json.dumps(results) if arguments.json else json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
