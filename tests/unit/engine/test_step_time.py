"""Step-time models say what their papers say, and the fitted one finds what it is shown."""

from __future__ import annotations

from random import Random

import pytest

from engine.step_time import FittedStepTime, LinearStepTime, RooflineStepTime, StepShape, tokens_within

pytestmark = pytest.mark.pure

LINEAR = LinearStepTime(
    prefill_base_s=0.01, prefill_token_s=1e-4, prefill_read_s=1e-8, decode_base_s=0.005, decode_sequence_s=2e-4, decode_read_s=1e-7
)


def test_shapes_count_tokens_and_reads() -> None:
    shape = StepShape().with_prefill(100, 10).with_decodes(3, 600)
    assert (shape.prefill_tokens, shape.decodes, shape.decode_reads) == (10, 3, 600)
    assert shape.prefill_reads == sum(100 + i for i in range(1, 11))
    whole = StepShape().with_prefill(0, 64)
    split = StepShape().with_prefill(0, 20).with_prefill(20, 44)
    assert whole == split, "chunks of one prompt read what the whole reads"


def test_linear_is_the_sum_of_its_terms() -> None:
    assert LINEAR.step_s(StepShape()) == 0.0
    assert LINEAR.step_s(StepShape(decodes=2, decode_reads=100)) == pytest.approx(0.005 + 4e-4 + 1e-5)
    assert LINEAR.step_s(StepShape(prefill_tokens=10, prefill_reads=55)) == pytest.approx(0.01 + 1e-3 + 5.5e-7)


def test_roofline_is_bound_by_memory_for_few_tokens_and_by_arithmetic_for_many() -> None:
    model = RooflineStepTime(
        num_parameters=1e9, weight_bytes=2e9, kv_token_bytes=1e5, attention_flops_per_read=1e5, flops_per_s=1e14, bytes_per_s=1e12
    )
    assert model.step_s(StepShape()) == 0.0
    assert model.step_s(StepShape(decodes=1)) == pytest.approx(2e9 / 1e12, rel=0.01)
    assert model.step_s(StepShape(prefill_tokens=8192)) == pytest.approx(2e9 * 8192 / 1e14, rel=0.01)


def test_fit_finds_the_coefficients_it_is_shown() -> None:
    rng = Random(1)
    fitted = FittedStepTime()
    for _ in range(400):
        shape = (
            StepShape().with_decodes(rng.randint(1, 64), rng.randint(100, 50_000)).with_prefill(rng.randint(0, 2000), rng.randint(1, 500))
        )
        fitted.observe(shape, LINEAR.step_s(shape) * rng.uniform(0.98, 1.02))
    for shape in (StepShape().with_decodes(32, 20_000).with_prefill(500, 200), StepShape().with_decodes(5, 5_000).with_prefill(0, 400)):
        assert fitted.step_s(shape) == pytest.approx(LINEAR.step_s(shape), rel=0.1)


def test_fit_survives_a_year_of_equal_steps() -> None:
    """The covariance of directions never seen must not blow up. Seen to fail without the bound on its trace."""
    fitted = FittedStepTime(forgetting=0.9)
    shape = StepShape().with_decodes(8, 8000)
    for _ in range(10_000):
        fitted.observe(shape, 0.02)
    assert fitted.step_s(shape) == pytest.approx(0.02, rel=1e-3)
    fitted.observe(StepShape().with_prefill(0, 512), 0.05)
    assert 0.0 <= fitted.step_s(shape) < 1.0


def test_no_budget_is_enforced_on_a_guess() -> None:
    assert FittedStepTime().step_s(StepShape(decodes=1000)) == 0.0


@pytest.mark.parametrize("budget_s", [0.0, 0.0101, 0.02, 0.0345, 1.0])
@pytest.mark.parametrize("start", [0, 1000])
def test_most_tokens_within_a_budget(budget_s: float, start: int) -> None:
    shape = StepShape().with_decodes(4, 400)
    count = tokens_within(LINEAR, shape, start=start, num_tokens=300, budget_s=budget_s)
    fits = [n for n in range(1, 301) if LINEAR.step_s(shape.with_prefill(start, n)) <= budget_s]
    assert count == max(fits, default=0)
