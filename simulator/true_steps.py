"""What steps really take in a simulation: a model of another form than the router fits, times noise. Nobody who decides is given it.

A policy tried on the model it believes in shows how well it solves equations, not how well it places. The router fits a sum of five terms
(router/cost_model.py), a worker's scheduler another sum (engine.step_time.FittedStepTime); a step here is

    noise(seed, worker, number of the step) * (base(shape, padded) + knee)

    padded   prompt tokens to whole tiles of the matrix product; decodes to the batch sizes a CUDA graph is captured for
    base     what the configuration calls for, with arithmetic and memory traffic at the same time: the slower of them, which is no sum
    knee     beyond a batch size each further sequence costs more, as in DistServe's two sets of decode constants (simdistserve: B >= 95)
"""

from __future__ import annotations

from dataclasses import dataclass

from control.compose import step_time
from control.config import ClusterConfig
from engine.step_time import LinearStepTime, StepShape, StepTimeModel
from protocol.errors import ConfigError
from simulator.noise import Lognormal

STEP_SIGMA = 0.05
PAST_KNEE = 0.006  # of a step of one sequence, for each beyond the knee: 0.12 of 20 ms with OPT-13B on an A100


@dataclass(frozen=True, slots=True, kw_only=True)
class TiledStepTime:
    """A `StepTimeModel` around another: `base` at the sizes a GPU computes, which are seldom those it is asked for."""

    base: StepTimeModel
    tile_tokens: int = 128  # rows of a tile of the matrix product
    batch_multiple: int = 8  # decode batches are padded to 1, 2, 4 and multiples of this
    batch_knee: int = 96  # sequences
    knee_sequence_s: float = 0.0  # of each sequence beyond the knee

    def step_s(self, shape: StepShape) -> float:
        padded = StepShape(
            prefill_tokens=_up_to_multiple(shape.prefill_tokens, self.tile_tokens),
            prefill_reads=shape.prefill_reads,
            decodes=self._captured(shape.decodes),
            decode_reads=shape.decode_reads,
        )
        return self.base.step_s(padded) + self.knee_sequence_s * max(0, shape.decodes - self.batch_knee)

    def _captured(self, decodes: int) -> int:
        if decodes <= self.batch_multiple // 2:
            return 1 << (decodes - 1).bit_length() if decodes else 0
        return _up_to_multiple(decodes, self.batch_multiple)


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlappedStepTime:
    """A `StepTimeModel` from the terms of a linear one: prompts are arithmetic, decodes and weights traffic, and the slower counts.

    No step is shorter than one decode without a context, since the weights are read by all.
    """

    terms: LinearStepTime

    def step_s(self, shape: StepShape) -> float:
        if not shape.prefill_tokens + shape.decodes:
            return 0.0
        arithmetic = StepShape(prefill_tokens=shape.prefill_tokens, prefill_reads=shape.prefill_reads)
        traffic = StepShape(decodes=max(1, shape.decodes), decode_reads=shape.decode_reads)
        return max(self.terms.step_s(arithmetic), self.terms.step_s(traffic))


@dataclass(frozen=True, slots=True, kw_only=True)
class TrueSteps:
    """Of all workers of one simulation. `sigma`: of the noise of a single step."""

    model: StepTimeModel
    sigma: float = 0.0
    seed: int = 0

    def noise_of(self, worker_id: str) -> Lognormal:
        """The factors of one worker's steps, by the number of the step."""
        return Lognormal(self.seed, "step", worker_id, sigma=self.sigma)


def true_steps(config: ClusterConfig, *, seed: int, sigma: float = STEP_SIGMA) -> TrueSteps:
    """Tiles, knee and noise around the pace of `config`, whose arithmetic and traffic overlap.

    Raises:
        ConfigError: its workers have no pace.
    """
    pace = pace_of(config)
    return TrueSteps(model=tiled(OverlappedStepTime(terms=pace) if isinstance(pace, LinearStepTime) else pace), sigma=sigma, seed=seed)


def plain_steps(config: ClusterConfig) -> TrueSteps:
    """The pace of `config` as it stands, which is that of live paced workers.

    Raises:
        ConfigError: its workers have no pace.
    """
    return TrueSteps(model=pace_of(config))


def tiled(base: StepTimeModel) -> TiledStepTime:
    return TiledStepTime(base=base, knee_sequence_s=PAST_KNEE * base.step_s(StepShape(decodes=1)))


def pace_of(config: ClusterConfig) -> StepTimeModel:
    pace = step_time(config)
    if pace is None:
        raise ConfigError("a simulated worker needs a pace; give workers.executor: paced")
    return pace


def _up_to_multiple(count: int, size: int) -> int:
    return -(-count // size) * size
