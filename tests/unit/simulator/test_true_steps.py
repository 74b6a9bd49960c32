"""What steps really take in a simulation: of another form than any sum of terms, and noise that is a function of its place."""

from __future__ import annotations

import statistics
from math import log

import pytest

from control.config import load_config
from engine.step_time import LinearStepTime, StepShape, StepTimeModel
from protocol.errors import ConfigError
from simulator.noise import Lognormal
from simulator.true_steps import PAST_KNEE, OverlappedStepTime, TiledStepTime, plain_steps, tiled, true_steps

pytestmark = pytest.mark.pure

BASE = LinearStepTime(prefill_base_s=0.01, prefill_token_s=1e-4, prefill_read_s=1e-8, decode_base_s=0.02, decode_sequence_s=1e-3)


def prompt(num_tokens: int) -> StepShape:
    return StepShape().with_prefill(0, num_tokens)


def test_prompt_tokens_come_in_tiles_and_batches_in_captured_sizes() -> None:
    """By hand against the base. Seen to fail with tiles rounded down."""
    model = TiledStepTime(base=BASE)
    for asked, computed in ((1, 128), (128, 128), (129, 256)):
        reads = asked * (asked + 1) // 2
        assert model.step_s(prompt(asked)) == pytest.approx(0.01 + computed * 1e-4 + reads * 1e-8)
    for asked, computed in ((1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (9, 16), (96, 96)):
        assert model.step_s(StepShape(decodes=asked)) == pytest.approx(0.02 + computed * 1e-3)
    assert model.step_s(StepShape()) == 0.0


def test_beyond_the_knee_each_sequence_costs_more() -> None:
    """Seen to fail with a knee that is counted from the padded batch."""
    model = tiled(BASE)
    assert model.knee_sequence_s == pytest.approx(PAST_KNEE * 0.021)
    assert model.step_s(StepShape(decodes=96)) == pytest.approx(0.02 + 96e-3)
    assert model.step_s(StepShape(decodes=104)) == pytest.approx(0.02 + 104e-3 + 8 * PAST_KNEE * 0.021)
    assert model.step_s(StepShape(decodes=97)) == pytest.approx(0.02 + 104e-3 + PAST_KNEE * 0.021)


def test_of_a_linear_pace_the_slower_of_prompts_and_decodes_counts() -> None:
    """By hand; the pace itself would add them. Seen to fail with the sum."""
    model = OverlappedStepTime(terms=BASE)
    assert model.step_s(StepShape(prefill_tokens=500, decodes=10)) == pytest.approx(0.06) == model.step_s(StepShape(prefill_tokens=500))
    assert model.step_s(StepShape(prefill_tokens=100, decodes=10)) == pytest.approx(0.03) == model.step_s(StepShape(decodes=10))
    assert model.step_s(StepShape(prefill_tokens=1)) == pytest.approx(0.021), "the weights are read all the same"
    assert model.step_s(StepShape()) == 0.0
    config = load_config({"workers": {"executor": "paced"}})
    (steps, pace), shape = (true_steps(config, seed=0).model, plain_steps(config).model), StepShape(prefill_tokens=512, decodes=8)
    assert steps.step_s(shape) < 0.9 * pace.step_s(shape)


@pytest.mark.parametrize("base", [BASE, OverlappedStepTime(terms=BASE)])
def test_time_never_falls_when_a_shape_grows(base: StepTimeModel) -> None:
    """Over a grid, one figure raised at a time: the promise of StepTimeModel. Seen to fail with reads scaled up with their tiles."""
    model = tiled(base)
    sizes = (0, 1, 2, 3, 7, 8, 9, 95, 96, 97, 127, 128, 129, 500)
    for tokens in sizes:
        for decodes in sizes:
            shape = StepShape(prefill_tokens=tokens, prefill_reads=tokens * 300, decodes=decodes, decode_reads=decodes * 100)
            here = model.step_s(shape)
            assert model.step_s(shape.with_decodes(1, 0)) >= here
            more = StepShape(prefill_tokens=tokens + 1, prefill_reads=shape.prefill_reads, decodes=decodes, decode_reads=shape.decode_reads)
            assert model.step_s(more) >= here


def test_noise_has_mean_one_and_the_deviation_asked_for() -> None:
    """20,000 draws. Seen to fail without the shift of the logarithm's mean."""
    draws = [Lognormal(1, "step", "w", sigma=0.5).factor(n) for n in range(20_000)]
    assert statistics.fmean(draws) == pytest.approx(1.0, abs=4 * 0.533 / 20_000**0.5)  # 0.533: deviation of the factor itself
    assert statistics.stdev(map(log, draws)) == pytest.approx(0.5, abs=4 * 0.5 / (2 * 20_000) ** 0.5)
    assert Lognormal(1, sigma=0.0).factor(7) == 1.0


def test_noise_is_a_function_of_seed_worker_and_step() -> None:
    """Whatever was asked before. Seen to fail with the worker left out of the key."""
    noise = Lognormal(1, "step", "a", sigma=0.3)
    assert [noise.factor(n) for n in (5, 2, 5)] == [Lognormal(1, "step", "a", sigma=0.3).factor(n) for n in (5, 2, 5)]
    steps = true_steps(load_config({"workers": {"executor": "paced"}}), seed=3)
    others = [steps.noise_of("a"), steps.noise_of("b"), true_steps(load_config({"workers": {"executor": "paced"}}), seed=4).noise_of("a")]
    assert len({other.factor(0) for other in others}) == 3 and len({others[0].factor(n) for n in range(100)}) == 100


def test_workers_without_a_pace_have_no_true_one() -> None:
    with pytest.raises(ConfigError, match="executor: paced"):
        true_steps(load_config({}), seed=0)
