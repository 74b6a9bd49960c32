"""Each architecture computes what transformers computes: logits within 1e-4 and the same 64 greedy tokens, float32.

How: random checkpoints made by transformers, run by the real TorchExecutor on paged blocks with the prompt in chunks; the oracle
runs prompt + output at once. Seen to fail with the rotary angle 1 % too large, a window one token wider, and q_norm left out; of
experts with gate and up exchanged, the step of layers counted from 0, norm_topk_prob taken for true, and the parts of a fused tensor
all read from its start.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engine.demo import DEMO_MODEL_DIR  # noqa: E402
from tests.checkpoints import ARCHITECTURES, LLAMA3_ROPE  # noqa: E402
from tests.native_paths import PATHS  # noqa: E402
from tests.torch_driver import TorchDriver  # noqa: E402

pytestmark = pytest.mark.golden

NUM_GREEDY = 64
TOLERANCE = 1e-4  # sums of up to 160 products in float32, in another order
DEMO_TOLERANCE = 1e-3  # of up to 704, and logits up to 30
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, one KV head": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama biases, head_dim of its own": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}),
    "llama 3 rope beyond its trained 64 tokens": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama linear rope": ("llama", {"rope_parameters": LINEAR_ROPE, "max_position_embeddings": 64}),
    "llama yarn rope": ("llama", {"rope_parameters": YARN_ROPE, "max_position_embeddings": 256}),
    "mistral past its window": ("mistral", {"sliding_window": 40}),
    "mistral without window, tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2 windows from layer 1, tied": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 1, "tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 tied, windows by layer type": (
        "qwen3",
        {
            "head_dim": 16,
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mixtral": ("mixtral", {}),
    "mixtral past its window, one expert a token, tied": (
        "mixtral",
        {"sliding_window": 40, "num_experts_per_tok": 1, "tie_word_embeddings": True},
    ),
    "mixtral, all experts of a layer in one tensor": ("mixtral", {"fused_experts": True, "num_local_experts": 17}),
    "qwen3 moe": ("qwen3_moe", {"head_dim": 32}),
    "qwen3 moe, weights as they are, windows, biases": (
        "qwen3_moe",
        {"norm_topk_prob": False, "use_sliding_window": True, "sliding_window": 40, "attention_bias": True},
    ),
    "qwen3 moe, dense layers between, in one tensor": (
        "qwen3_moe",
        {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "fused_experts": True},
    ),
}


def oracle_logits(model_dir: Path, tokens: list[int], dtype: str = "float32") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float()


COMPUTED_BY = [("reference", "torch"), ("fast", "torch"), *(("reference", path) for path in PATHS)]


@pytest.mark.parametrize(
    ("case", "numerics", "kernels"),
    [(case, *by) for case in CASES for by in COMPUTED_BY],
)
def test_logits_and_greedy_tokens_equal_transformers(case: str, numerics: str, kernels: str, tiny_checkpoint: Callable[..., Path]) -> None:
    arch, overrides = CASES[case]
    model_dir = tiny_checkpoint(arch, **overrides)
    rng = random.Random(case)
    prompts = [[rng.randrange(3, 512) for _ in range(num_tokens)] for num_tokens in (1, 150)]
    with TorchDriver(model_dir, numerics=numerics, kernels=kernels, block_size=32) as driver:
        outputs = driver.generate(prompts, NUM_GREEDY, chunk=37)
        logits = [torch.stack(driver.logits[i]) for i in range(len(prompts))]
    for prompt, output, ours in zip(prompts, outputs, logits, strict=True):
        theirs = oracle_logits(model_dir, prompt + output)[len(prompt) - 1 : -1]
        assert (ours - theirs).abs().max() < TOLERANCE
        assert output == theirs.argmax(-1).tolist()


SIXTEEN_BIT: dict[str, tuple[str, ...]] = {"bfloat16": PATHS, "float16": ()}  # and who computes it natively; torch computes both


@pytest.mark.parametrize(
    ("arch", "dtype", "kernels"),
    [(arch, dtype, k) for arch in ARCHITECTURES for dtype, native in SIXTEEN_BIT.items() for k in ("torch", *native)],
)
def test_sixteen_bits_cost_no_more_than_they_cost_transformers(
    arch: str, dtype: str, kernels: str, tiny_checkpoint: Callable[..., Path]
) -> None:
    """The tolerance of 16 bits is that of transformers itself: how far its logits lie from those in float32.

    Native kernels, whose residual stream, norms and scores are float32, are allowed no more of it (measured: half); torch, which rounds
    where transformers does but in another order, 1.25 times as much. The median over tokens counts: one whose experts are nearly tied may
    take another one, here or there.
    """
    model_dir = tiny_checkpoint(arch, dtype=dtype, num_hidden_layers=2, **({"sliding_window": 40} if arch == "mistral" else {}))
    prompt = [random.Random(0).randrange(3, 512) for _ in range(70)]
    with TorchDriver(model_dir, numerics="fast", kernels=kernels) as driver:
        (output,) = driver.generate([prompt], 24, chunk=33)
        ours = torch.stack(driver.logits[0])
    exact, theirs = (oracle_logits(model_dir, prompt + output, oracle)[len(prompt) - 1 : -1] for oracle in ("float32", dtype))

    def error(logits: Any) -> float:
        return float((logits - exact).square().mean(-1).sqrt().median())

    assert error(ours) < (1.25 if kernels == "torch" else 1.0) * error(theirs)


@pytest.mark.parametrize("kernels", ["torch", *PATHS])
def test_demo_model_equals_transformers(kernels: str) -> None:
    """The shipped checkpoint on text it was made for, both its weights in bf16 computed in float32. Seen to fail with rope_theta 10001."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(DEMO_MODEL_DIR / "tokenizer.json"))
    prompts = [tokenizer.encode(text).ids for text in ("def main():", f'"""{__doc__}"""\n\nimport random\n\n\nclass Point:\n')]
    with TorchDriver(DEMO_MODEL_DIR, kernels=kernels) as driver:
        outputs = driver.generate(prompts, NUM_GREEDY, chunk=48)
        logits = [torch.stack(driver.logits[i]) for i in range(len(prompts))]
    for prompt, output, ours in zip(prompts, outputs, logits, strict=True):
        theirs = oracle_logits(DEMO_MODEL_DIR, prompt + output)[len(prompt) - 1 : -1]
        assert (ours - theirs).abs().max() < DEMO_TOLERANCE
        assert output == theirs.argmax(-1).tolist()
