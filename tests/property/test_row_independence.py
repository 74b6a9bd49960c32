"""Reference numerics: a sequence's logits have the same bits however it was computed, by torch and on every path of the native kernels.

The native kernels promise it of bfloat16 too.

How: the truth is each sequence alone, its prompt in one step, then token by token, on blocks of 16. Against it stand random
schedules of the real TorchExecutor: batches of 1 to 20, prompts cut into random chunks, some of the output recomputed as if it
were prompt (preemption), blocks of 16, 32 or 48 in scattered places, sequences joining and leaving, 1 to 3 threads; then prompts whose
first blocks another sequence computed, and a copy of its last one (prefix hit, copy-on-write). Compared with torch.equal.

Seen to fail when the reference linear is torch's linear on all rows at once, when silu_mul takes torch's silu (odd sizes),
and when an expert's rows are multiplied at once, without row tiles; natively when experts are added in the order of how many chose them,
and when of two rows in the last layer the told one is not moved to the front.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from tests.native_paths import PATHS  # noqa: E402
from tests.torch_driver import GREEDY, TorchDriver  # noqa: E402

NUM_SEQUENCES = 20
NUM_OUTPUT = 3
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "odd sizes": ("llama", {"hidden_size": 60, "intermediate_size": 99, "head_dim": 18, "num_key_value_heads": 1, "vocab_size": 515}),
    "windows and biases": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    "norms on heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "experts": ("mixtral", {}),
    "experts of odd sizes": (
        "qwen3_moe",
        {"hidden_size": 60, "head_dim": 18, "moe_intermediate_size": 33, "num_experts": 19, "norm_topk_prob": False},
    ),
}


ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kernels": "torch"},  # on one thread; the native kernels' bits do not depend on the number
    **{path: {"kernels": path} for path in PATHS},
    **{f"{path} bfloat16": {"kernels": path, "numerics": "fast", "dtype": "bfloat16"} for path in PATHS},
}


def make_prompts(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3, 500) for _ in range(rng.choice([1, 2, 15, 16, 17, 31, 33, 47, 64, 100]))] for _ in range(NUM_SEQUENCES)]


CASES = [(m, e) for m in MODELS for e in ENGINES]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def model_dir(case: tuple[str, str], tiny_checkpoint: Callable[..., Path]) -> Path:
    arch, overrides = MODELS[case[0]]
    return tiny_checkpoint(arch, num_hidden_layers=2, **overrides)


@pytest.fixture(scope="module")
def engine(case: tuple[str, str]) -> dict[str, Any]:
    return ENGINES[case[1]]


@pytest.fixture(scope="module")
def truth(model_dir: Path, engine: dict[str, Any]) -> tuple[list[list[int]], list[Any]]:
    """Per sequence its output tokens, and its logits [NUM_OUTPUT, vocab_size]."""
    outputs, logits = [], []
    with TorchDriver(model_dir, **engine) as driver:
        for i, prompt in enumerate(make_prompts(0)):
            driver.step(starts=[driver.start(i, prompt, **GREEDY)])
            output: list[int] = []
            computed, known = 0, len(prompt)
            while len(output) < NUM_OUTPUT:
                (sampled,) = driver.step([driver.entry(i, computed, known - computed)], [(0, i)])
                output += sampled.token_ids
                computed, known = known, known + 1
            driver.step(ended=[i])
            driver._free += driver.tables.pop(i)
            outputs.append(output)
            logits.append(torch.stack(driver.logits[i]))
    return outputs, logits


@pytest.mark.parametrize("seed", range(3))
def test_logits_do_not_depend_on_the_schedule(
    seed: int, model_dir: Path, engine: dict[str, Any], truth: tuple[list[list[int]], list[Any]]
) -> None:
    rng = random.Random(seed)
    prompts, (outputs, logits) = make_prompts(0), truth
    max_batch, chunk_max = rng.choice([1, 5]) if seed else NUM_SEQUENCES, rng.choice([7, 16, 40, 100])
    waiting = rng.sample(range(NUM_SEQUENCES), NUM_SEQUENCES)
    running: dict[int, int] = {}  # sequence -> computed tokens
    known = [len(prompt) for prompt in prompts]
    seen: list[list[int]] = [[] for _ in prompts]
    num_threads = 1 if engine["kernels"] == "torch" else rng.choice([1, 2, 3])
    with TorchDriver(model_dir, block_size=rng.choice([16, 32, 48]), num_threads=num_threads, **engine) as driver:
        while waiting or running:
            starts, ended, entries, samples = [], [], [], []
            for i in [i for i in running if len(seen[i]) == NUM_OUTPUT]:
                ended.append(i)
                driver._free += driver.tables[i]
                del running[i]
            while waiting and len(running) < max_batch and rng.random() < 0.7:
                i = waiting.pop()
                starts.append(driver.start(i, prompts[i], **GREEDY))
                running[i] = 0
            for i in rng.sample(list(running), len(running)):
                if rng.random() < 0.05:  # preempted: KV is computed again, prompt and output alike
                    running[i] = 0
                size = min(rng.randint(1, chunk_max), known[i] - running[i])
                if running[i] + size == known[i]:
                    samples.append((len(entries), i))
                entries.append(driver.entry(i, running[i], size))
                running[i] += size
            for sampled in driver.step(entries, samples, starts=starts, ended=ended):
                assert sampled.error is None
                seen[sampled.sequence_id] += sampled.token_ids
                known[sampled.sequence_id] += 1
        for i in range(NUM_SEQUENCES):
            assert seen[i] == outputs[i], f"tokens of sequence {i}"
            assert torch.equal(torch.stack(driver.logits[i]), logits[i]), f"bits of sequence {i}"


def test_logits_do_not_depend_on_who_computed_the_blocks(
    model_dir: Path, engine: dict[str, Any], truth: tuple[list[list[int]], list[Any]]
) -> None:
    """One sequence computes a prompt, the next takes its full blocks and computes the rest in another batch, a third takes all, the last
    as a copy.
    """
    prompts, (_, logits) = make_prompts(0), truth
    i = max(range(NUM_SEQUENCES), key=lambda i: len(prompts[i]))
    prompt, others = prompts[i], [j for j in range(NUM_SEQUENCES) if j != i][:5]
    num_full, size = len(prompt) // 16, len(prompt)
    with TorchDriver(model_dir, **engine) as driver:
        starts = [driver.start(s, prompt, **GREEDY) for s in (100, 101, 102)] + [driver.start(j, prompts[j], **GREEDY) for j in others]
        driver.step(starts=starts)
        driver.step([driver.entry(100, 0, size)], [(0, 100)])
        driver.tables[101] = driver.tables[100][:num_full]
        entries = [driver.entry(j, 0, len(prompts[j])) for j in others]
        copied = driver._free.pop(0)
        source = driver.tables[100][-1]
        driver.tables[102] = driver.tables[100][:-1]
        driver.tables[102].append(copied)
        start = min(num_full * 16, size - 1)
        driver.step(
            [*entries[:3], driver.entry(101, start, size - start), *entries[3:], driver.entry(102, size - 1, 1)],
            [(3, 101), (6, 102)],
            block_copies=[(source, copied)],
        )
        for sequence in (100, 101, 102):
            assert torch.equal(driver.logits[sequence][0], logits[i][0]), sequence


def test_the_first_token_matters_for_the_last(model_dir: Path) -> None:
    """Else the equality above would be cheap: another first token gives other logits after 90 tokens."""
    rng = random.Random(1)
    prompt = [rng.randrange(3, 500) for _ in range(90)]
    with TorchDriver(model_dir) as driver:
        driver.generate([prompt, [prompt[0] + 1, *prompt[1:]]], 1)
        distance = (driver.logits[0][0] - driver.logits[1][0]).abs().max()
    assert distance > 0.01
