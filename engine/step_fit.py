"""A linear step-time model from measured steps: the least squares of relative errors, with no coefficient below zero. Torch-free.

Relative, because a pace is used for steps of a millisecond and of a second alike; not negative, because a step never gets shorter when
more is computed in it (engine.step_time.StepTimeModel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from engine.step_time import LinearStepTime, StepShape, StepTimeModel

NUM_COEFFICIENTS = 6

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """One step and what it took."""

    shape: StepShape
    duration_s: float


def fit_linear(steps: Sequence[MeasuredStep]) -> LinearStepTime:
    """The model whose sum of squared relative errors over `steps` is least. What they do not show (no decode among them) is 0."""
    durations = np.array([step.duration_s for step in steps])
    assert len(steps) and durations.min() > 0.0, "steps take time"
    columns = np.array([_terms(step.shape) for step in steps], dtype=np.float64) / durations[:, None]
    base, token, read, decode_base, sequence, decode_read = _least_squares(columns, np.ones(len(steps)))
    return LinearStepTime(
        prefill_base_s=base,
        prefill_token_s=token,
        prefill_read_s=read,
        decode_base_s=decode_base,
        decode_sequence_s=sequence,
        decode_read_s=decode_read,
    )


def relative_errors(model: StepTimeModel, steps: Sequence[MeasuredStep]) -> list[float]:
    """|predicted - measured| / measured of each."""
    return [abs(model.step_s(step.shape) - step.duration_s) / step.duration_s for step in steps]


def _terms(shape: StepShape) -> tuple[int, ...]:
    """What each coefficient of LinearStepTime is multiplied with."""
    return (
        min(1, shape.prefill_tokens),
        shape.prefill_tokens,
        shape.prefill_reads,
        min(1, shape.decodes),
        shape.decodes,
        shape.decode_reads,
    )


def _least_squares(columns: Array, right: Array) -> list[float]:
    """min |columns @ x - right| with x >= 0, exactly: of each set of columns (64 at most) the free solution, the best that is not negative.

    Every optimum is the free solution over the columns where it is positive (Lawson and Hanson 1974, chapter 23).
    """
    norms = np.linalg.norm(columns, axis=0)
    shown = [int(index) for index in np.flatnonzero(norms)]
    best, best_error = np.zeros(NUM_COEFFICIENTS), float(right @ right)
    for count in range(1, len(shown) + 1):
        for chosen in combinations(shown, count):
            scaled = columns[:, chosen] / norms[list(chosen)]
            solution, _, _, _ = np.linalg.lstsq(scaled, right, rcond=None)
            error = float(np.sum((scaled @ solution - right) ** 2))
            if solution.min() >= 0.0 and error < best_error:
                best = np.zeros(NUM_COEFFICIENTS)
                best[list(chosen)] = solution / norms[list(chosen)]
                best_error = error
    return [float(value) for value in best]
