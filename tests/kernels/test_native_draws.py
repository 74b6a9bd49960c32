"""The native sampler draws the reference's tokens, bit for bit, on every instruction path and on any number of threads.

How: weights bit by bit; rows of many sizes and shapes (flat, tied, peaked, masked) under random parameters, drawn in one call. Seen to
fail with a fused multiply-add in the weights, with one equal logit too many kept by top_k, with top_p's mass taken before top_k, and with
a draw's counts not cleared for the next one.
"""

from __future__ import annotations

import random
from array import array
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from kernels.native.library import NativeError  # noqa: E402
from kernels.native.ops import NativeOps  # noqa: E402
from kernels.sampling import Draw, draw_token, weigh  # noqa: E402
from protocol.request import SamplingParams  # noqa: E402
from tests.native_paths import PATHS  # noqa: E402

SHAPES: dict[str, Any] = {
    "normal": lambda size: torch.randn(size) * 2,
    "peaked": lambda size: torch.randn(size) * 8,
    "flat": torch.zeros,
    "tied": lambda size: torch.randn(size).mul(2).round() / 2,
    "near each other": lambda size: torch.randn(size) * 0.01 - 100,
    "huge": lambda size: torch.randn(size) * 1e30,
}
SIZES = (1, 2, 15, 17, 511, 513, 2049, 5000)  # around a vector, a block of 512 and what is worth copying out
OPTIONS: dict[str, tuple[Any, ...]] = {
    "top_k": (1, 2, 40, 1000, 4999, 10**6),
    "top_p": (0.0, 1e-3, 0.3, 0.9, 1 - 1e-7),
    "min_p": (1e-6, 0.05, 0.5, 1.0),
    "presence_penalty": (0.5, -1.0),
    "frequency_penalty": (0.3,),
    "repetition_penalty": (1.1, 0.7),
}
TEMPERATURES = (0.0, 1e-4, 0.3, 0.7, 1.0, 1.0, 2.0, 1e35)


def random_draw(rng: random.Random, size: int) -> Draw:
    params: dict[str, Any] = {name: rng.choice(values) for name, values in OPTIONS.items() if rng.random() < 0.35}
    if rng.random() < 0.2:
        params["logit_bias"] = tuple((token, rng.uniform(-9, 9)) for token in sorted({rng.randrange(size) for _ in range(3)}))
    if rng.random() < 0.2:
        params |= {"min_tokens": 50, "eos_token_ids": (0, size + 3), "stop_token_ids": (rng.randrange(size),)}
    sampling = SamplingParams(max_tokens=100, temperature=rng.choice(TEMPERATURES), seed=rng.randrange(-(2**63), 2**64), **params)
    token_ids = array("I", [rng.randrange(size) for _ in range(30)])
    return Draw(params=sampling, choice=rng.randrange(3), token_ids=token_ids, num_prompt_tokens=rng.randrange(31))


@pytest.mark.parametrize("path", PATHS)
def test_weights_have_the_bits_of_the_reference(path: str) -> None:
    """Tokens would show a wrong last bit only where a random number falls beside it."""
    for make in SHAPES.values():
        for size in SIZES:
            logits = make(size)
            logits[size // 2] = -torch.inf if size > 1 else 0.0
            for temperature in TEMPERATURES[1:]:
                assert torch.equal(NativeOps(path=path).weigh(logits, temperature).double(), weigh(logits, temperature)), (
                    size,
                    temperature,
                )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_tokens_of_the_reference_are_drawn(shape: str) -> None:
    rng = random.Random(shape)
    for size in SIZES:
        logits = torch.stack([SHAPES[shape](size) for _ in range(4)])
        rows = [rng.randrange(4) for _ in range(24)]
        draws = [random_draw(rng, size) for _ in rows]
        expected = [draw_token(logits[row], draw) for row, draw in zip(rows, draws, strict=True)]
        for path in PATHS:
            drawn = NativeOps(path=path).draw(logits, rows, draws)
            for ours, theirs, draw in zip(drawn, expected, draws, strict=True):
                assert ours == theirs, (path, size, draw.params)


@pytest.mark.parametrize("path", PATHS)
def test_a_large_vocabulary_is_cut_by_guesses_from_a_sample_of_it(path: str) -> None:
    """Cuts that keep few, most, and a number nobody guesses: among equal logits, and where the sample misses what matters."""
    rng = random.Random(path)
    spikes = torch.full((40000,), -20.0)
    spikes[[7, 13001, 39999]] = torch.tensor([3.0, 2.0, 1.0])
    logits = torch.stack([torch.randn(40000), torch.randn(40000) * 4, torch.zeros(40000), torch.randn(40000).round(), spikes])
    for row in range(len(logits)):
        for params in ({"top_k": 50}, {"top_k": 20000}, {"top_p": 0.9}, {"top_p": 0.01}, {"top_k": 5000, "top_p": 0.5}, {"min_p": 0.3}):
            sampling = SamplingParams(max_tokens=1, temperature=0.8, seed=rng.randrange(2**32), **params)  # type: ignore[arg-type]
            draw = Draw(params=sampling, choice=0, token_ids=array("I", [1]), num_prompt_tokens=1)
            assert NativeOps(path=path).draw(logits, [row], [draw]) == [draw_token(logits[row], draw)], (row, params)


def test_a_draw_that_names_a_token_outside_the_vocabulary_is_refused() -> None:
    logits, fine = torch.zeros(1, 10), array("I", [1, 2])
    for params, token_ids in (
        ({"logit_bias": ((10, 1.0),)}, fine),
        ({"presence_penalty": 1.0}, array("I", [10])),
    ):
        draw = Draw(params=SamplingParams(max_tokens=1, **params), choice=0, token_ids=token_ids, num_prompt_tokens=0)  # type: ignore[arg-type]
        with pytest.raises(NativeError, match="outside the vocabulary"):
            NativeOps(path=PATHS[0]).draw(logits, [0], [draw])
