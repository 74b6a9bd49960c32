"""Prompts whose blocks were evicted come back from the host tier: the same tokens, without computing.

How: one real worker whose pool holds a third of what it is asked for, driven at its wire; its counters prove saves and loads, and tokens
and logprobs are compared with those of a worker that computes everything.
Seen to fail under the planted bug of the last test: a loaded block left empty.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from control.compose import compose_worker
from control.config import ClusterConfig, load_config
from protocol.request import SamplingParams
from protocol.worker import Role
from tests.worker_processes import Completion, WireGateway, Workers

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

VOCAB = 500
NUM_BLOCKS = 14
NUM_PROMPTS = 6


def make_jobs() -> list[tuple[list[int], SamplingParams]]:
    """Six prompts of five blocks and a bit; two rounds."""
    rng = random.Random(3)
    prompts = [[rng.randrange(3, VOCAB) for _ in range(85)] for _ in range(NUM_PROMPTS)]
    sampling = SamplingParams(max_tokens=6, temperature=0.9, seed=5, ignore_eos=True, num_logprobs=2)
    return [(prompt, sampling) for prompt in prompts * 2]


def config(executor: str = "torch", **workers: Any) -> ClusterConfig:
    base: dict[str, Any] = {
        "num_kv_blocks": NUM_BLOCKS,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "block_size": 16,
        "executor": executor,
    }
    model = {"numerics": "reference", "dtype": "float32", "max_model_len": 200}
    return load_config({"model": model, "workers": base | workers, "transport": {"kv_transport": "shm"}})


async def complete_all(settings: ClusterConfig, model_dir: Path, sabotage: str = "") -> tuple[list[Completion], dict[str, int]]:
    """In turn; the worker's counters at rest."""
    async with (
        Workers(settings, model_dir, {"w": Role.BOTH}, sabotage={"w": sabotage}) as workers,
        WireGateway(workers) as gateway,
    ):
        made = [await gateway.complete(prompt, sampling, prefill="w", decode="w") for prompt, sampling in make_jobs()]
        await asyncio.sleep(0.6)
        return made, (await gateway.at_rest())["w"].counters


def same(mine: list[Completion], right: list[Completion]) -> list[bool]:
    return [(a.tokens, a.logprobs, a.finish) == (b.tokens, b.logprobs, b.finish) for a, b in zip(mine, right, strict=True)]


@pytest.fixture(scope="module")
def model_dir(tiny_checkpoint: Any) -> Path:
    path: Path = tiny_checkpoint("llama", vocab_size=VOCAB, max_position_embeddings=200)
    return path


@pytest.mark.parametrize("executor", ["torch", "paced"])
def test_evicted_prompts_come_back_from_the_tier(executor: str, model_dir: Path) -> None:
    right, computed = asyncio.run(complete_all(config(executor, enable_prefix_caching=False), model_dir))
    mine, counters = asyncio.run(complete_all(config(executor, kv_host_tier_bytes=tier_bytes(model_dir)), model_dir))
    assert all(same(mine, right))
    assert computed["prompt_tokens_computed"] == 2 * NUM_PROMPTS * 85
    print({name: counters[name] for name in counters if name.startswith("host") or name in ("cached_tokens", "prompt_tokens_computed")})
    assert counters["host_loads"] >= NUM_PROMPTS - 2 and counters["host_load_failures"] == 0
    assert counters["prompt_tokens_computed"] <= NUM_PROMPTS * 85 + NUM_PROMPTS * 5 + 80, "the second round computes its last tokens"


def test_the_comparison_sees_an_empty_loaded_block(model_dir: Path) -> None:
    """Negative control."""
    right, _ = asyncio.run(complete_all(config(enable_prefix_caching=False), model_dir))
    mine, _ = asyncio.run(complete_all(config(kv_host_tier_bytes=tier_bytes(model_dir)), model_dir, sabotage="zero_load"))
    assert same(mine, right).count(False) >= 3


def tier_bytes(model_dir: Path) -> int:
    """Of 64 blocks."""
    return 64 * compose_worker(config(), model_dir).layout.block_bytes
