"""Published step times are those published: the figures that follow from DistServe's profile, by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.published_steps import PUBLISHED, PublishedStepTime
from engine.step_time import StepShape

pytestmark = pytest.mark.pure

OPT_13B = PUBLISHED["opt-13b"][1].step_time


def prompts(*lengths: int) -> StepShape:
    shape = StepShape()
    for length in lengths:
        shape = shape.with_prefill(0, length)
    return shape


def decodes(batch: int, context: int) -> StepShape:
    return StepShape(decodes=batch, decode_reads=batch * context)


@pytest.mark.parametrize(
    ("shape", "ms"),
    [
        (prompts(512), 73.15),
        (prompts(512, 512), 127.19),
        (prompts(2048), 257.69),
        (decodes(1, 513), 20.29),
        (decodes(64, 513), 42.98),
        (decodes(128, 513), 65.50),
    ],
)
def test_steps_take_what_the_profile_says(shape: StepShape, ms: float) -> None:
    """Seen to fail with the line of large batches from 129 sequences on, and with sum(l^2) taken for twice the reads."""
    assert OPT_13B.step_s(shape) * 1e3 == pytest.approx(ms, abs=0.006)


def test_every_prompt_takes_a_and_b_l_and_c_l_squared_and_a_millisecond() -> None:
    """Of each model and size, from the coefficients as they are printed. Seen to fail with c for b - c."""
    for model, tp, a, b, c in (("opt-13b", 2, 14.743, 0.06858, 2.450e-6), ("opt-66b", 4, 29.442, 0.15135, 8.317e-6)):
        for length in (1, 100, 1777):
            told = PUBLISHED[model][tp].step_time.step_s(prompts(length))
            assert told * 1e3 == pytest.approx(a + b * length + c * length**2 + 1, rel=1e-12)


def test_chunks_of_a_prompt_take_the_whole_and_a_base_each() -> None:
    """What later chunks read of earlier ones counts. Seen to fail with the squares of the chunks."""
    whole, first, second = prompts(1000), prompts(400), StepShape().with_prefill(400, 600)
    assert OPT_13B.step_s(first) + OPT_13B.step_s(second) == pytest.approx(OPT_13B.step_s(whole) + 19.103e-3)


def test_a_mixed_step_reads_its_weights_once() -> None:
    """Seen to fail with both bases added."""
    mixed = prompts(512).with_decodes(64, 64 * 513)
    assert OPT_13B.step_s(mixed) * 1e3 == pytest.approx(73.15 + 42.98 - 19.103, abs=0.02)
    assert OPT_13B.step_s(StepShape()) == 0.0


def test_ray_costs_two_milliseconds_and_a_tenth_of_a_microsecond_a_token() -> None:
    with_ray: PublishedStepTime = replace(OPT_13B, with_ray=True)
    for shape, tokens in ((prompts(512), 512), (decodes(64, 513), 64 * 513)):
        assert with_ray.step_s(shape) - OPT_13B.step_s(shape) == pytest.approx(2e-3 + tokens * 1e-7)
    assert with_ray.step_s(StepShape()) == 0.0


def test_capacities_are_what_is_left_of_the_gpus() -> None:
    """KV and weights together are within 2 % of 80 GB a GPU: a slip of a digit would not be. Seen to fail with TP1's capacity at TP2."""
    for models, weights_gb in ((PUBLISHED["opt-13b"], 26), (PUBLISHED["opt-66b"], 132)):
        for tp, model in models.items():
            assert model.tensor_parallel == tp
            assert model.kv_tokens * model.kv_token_bytes / 1e9 + weights_gb == pytest.approx(80 * tp, rel=0.02)
