"""Calibration on an engine whose times are known: it finds them, and says how far off it is where they are of another form."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest

from baton.bench.calibration import Calibration, Regime, StepBench, StepPoint, calibrate, grid, rows_of, told_steps
from baton.calibrate import as_yaml
from control.compose import step_time
from control.config import load_config
from engine.core.executor import NOTHING_SAMPLED, BatchPlan, StepResult
from engine.step_time import LinearStepTime, StepTimeModel, plan_shape
from protocol.errors import ConfigError, ModelError
from simulator.true_steps import TiledStepTime

pytestmark = pytest.mark.pure

TRUE = LinearStepTime(
    prefill_base_s=2e-3, prefill_token_s=1e-4, prefill_read_s=3e-8, decode_base_s=1e-3, decode_sequence_s=5e-5, decode_read_s=2e-8
)


class KnownTimes:
    """An executor that computes nothing, holds plans to what a real one demands of them, and reports the times of a model."""

    def __init__(self, model: StepTimeModel, *, sigma: float = 0.0, fails_at: int = -1) -> None:
        self._model = model
        self._noise = Random(0)
        self._sigma = sigma
        self._fails_at = fails_at
        self._tokens: dict[int, int] = {}  # known of each sequence
        self.plans: list[BatchPlan] = []

    def start(self, on_done: Callable[[StepResult], None]) -> None:
        self._on_done = on_done

    def submit(self, plan: BatchPlan) -> None:
        assert plan.step_id == len(self.plans)
        self.plans.append(plan)
        for sequence_id in plan.ended:
            del self._tokens[sequence_id]
        for begin in plan.starts:
            assert begin.sequence_id not in self._tokens
            self._tokens[begin.sequence_id] = len(begin.token_ids)
        blocks = [block for table in plan.entries.block_tables for block in table]
        assert len(set(blocks)) == len(blocks), "sequences share no block"
        for entry in plan.entries:
            assert entry.start + entry.num_tokens <= self._tokens[entry.sequence_id]
            assert len(entry.block_table) * 16 >= entry.start + entry.num_tokens
        for sequence_id in plan.samples.sequence_ids:
            self._tokens[sequence_id] += 1
        duration_s = self._model.step_s(plan_shape(plan)) * self._noise.lognormvariate(0.0, self._sigma)
        error = "out of memory" if plan.step_id == self._fails_at else None
        self._on_done(StepResult(step_id=plan.step_id, sampled=NOTHING_SAMPLED, duration_s=duration_s, error=error))

    def close(self) -> None:
        self.plans.clear()


def calibration_of(model: StepTimeModel, *, sigma: float = 0.0) -> Calibration:
    points = grid(max_tokens=2048, max_batch=64, max_kv_tokens=40_000)
    with StepBench(KnownTimes(model, sigma=sigma), block_size_tokens=16, vocab_size=100, rng=Random(0)) as bench:
        return calibrate(bench, points, num_rounds=2, rng=Random(0), say=lambda text: None)


def test_known_coefficients_are_found() -> None:
    """Seen to fail with decodes said to read one token more than they do."""
    found = calibration_of(TRUE)
    for name, value in asdict(TRUE).items():
        assert getattr(found.pace, name) == pytest.approx(value, rel=1e-6)
    for regime in (Regime.PREFILL_SHORT, Regime.PREFILL_LONG, Regime.DECODE_SMALL, Regime.DECODE_LARGE):
        assert max(found.errors(regime, is_held_out=True)) < 1e-6
    noisy = calibration_of(TRUE, sigma=0.1)
    for regime in Regime:
        assert statistics.median(noisy.errors(regime, is_held_out=True)) < 0.05


def test_what_is_held_out_shows_times_of_another_form() -> None:
    """Tiles of 128 tokens: short prompts of sizes that were not fitted are off by what padding costs, decodes are not.

    Seen to fail with errors taken of the points that were fitted.
    """
    found = calibration_of(TiledStepTime(base=TRUE, batch_multiple=1))
    rows = {row.name: row for row in rows_of("known", found)}
    short = rows["known/held_out/prefill_short"]
    assert short.value is not None and short.value > 0.1 and short.details["num_steps"] == 12
    assert statistics.median(found.errors(Regime.DECODE_LARGE, is_held_out=True)) < 0.01
    assert "known/fitted/mixed" not in rows, "mixed steps are never fitted"
    assert {step["held_out"] for step in told_steps(found.points)} == {True, False}


def test_held_out_sizes_are_not_among_the_fitted() -> None:
    """Lengths, batches and, beside decodes, contexts. Seen to fail with a length in both."""
    points = grid(max_tokens=2048, max_batch=64, max_kv_tokens=1 << 20)
    fitted, held_out = ([point for point in points if point.is_held_out is side] for side in (False, True))
    assert not {p.prompt_tokens for p in fitted if p.prompt_tokens} & {p.prompt_tokens for p in held_out if p.prompt_tokens}
    assert not {p.batch for p in fitted if p.batch} & {p.batch for p in held_out if p.batch}
    assert {point.regime for point in held_out} == set(Regime) and len(set(points)) == len(points)


def test_sizes_stay_within_the_bounds() -> None:
    """Seen to fail with the repeats' tokens left out of the room."""
    for point in grid(max_tokens=258, max_batch=8, max_kv_tokens=1000):
        assert point.context + max(point.prompt_tokens, 4) <= 258 and point.batch <= 8
        assert point.num_sequences * (point.context + max(point.prompt_tokens, 4)) <= 1000
    with pytest.raises(ConfigError, match="raise --max-tokens"):
        grid(max_tokens=30, max_batch=8, max_kv_tokens=1000)


def test_the_unmeasured_step_and_the_introduction_do_not_count() -> None:
    """Four steps and an introduction a point, three of them told; decodes go on from token to token. Seen to fail with all four told."""
    executor = KnownTimes(TRUE)
    with StepBench(executor, block_size_tokens=16, vocab_size=100, rng=Random(0)) as bench:
        steps = bench.measure(StepPoint(batch=2, context=10))
        assert [len(plan.entries) for plan in executor.plans] == [0, 2, 2, 2, 2]
        assert [step.shape.decode_reads for step in steps] == [24, 26, 28]
        bench.measure(StepPoint(prompt_tokens=20, context=32))
        assert executor.plans[5].ended == (0, 1) and executor.plans[6].entries[0].start == 32


def test_a_step_that_fails_is_told() -> None:
    """Seen to fail with errors of results passed over."""
    bench = StepBench(KnownTimes(TRUE, fails_at=3), block_size_tokens=16, vocab_size=100, rng=Random(0))
    with bench, pytest.raises(ModelError, match="2 tokens failed: out of memory"):
        bench.measure(StepPoint(batch=2, context=10))


def test_the_yaml_is_a_configuration_at_this_pace(tmp_path: Path) -> None:
    """Seen to fail with coefficients rounded to six places."""
    found = calibration_of(TRUE)
    path = tmp_path / "paced.yaml"
    path.write_text(as_yaml(found, "known", 512))
    config = load_config(file=path)
    pace = step_time(config)
    assert config.workers.num_kv_blocks == 512 and isinstance(pace, LinearStepTime)
    assert list(asdict(pace).values()) == pytest.approx(list(asdict(found.pace).values()), rel=1e-8)
