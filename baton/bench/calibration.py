"""Measuring single steps of an engine over a grid of sizes, and how well a fit to some of them foretells the others.

    grid ─► rounds, each point in an order drawn anew ─► median of each point ─► fit on one half ─► error on the other, by regime

A point is a step nobody schedules: the executor is given plans directly, so that each size is exactly what was asked for. Blocks hold
zeros in place of a context; what a step takes does not depend on what it reads.
"""

from __future__ import annotations

import queue
import statistics
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from random import Random

from baton.bench.report import Row, percentile
from engine.core.executor import BatchPlan, Entries, Executor, PlanEntry, SampleEntry, Samples, SequenceStart, StepResult
from engine.step_fit import NUM_COEFFICIENTS, MeasuredStep, fit_linear, relative_errors
from engine.step_time import LinearStepTime, plan_shape
from protocol.errors import ConfigError, ModelError
from protocol.request import SamplingParams

SCHEMA = "baton.calibrate.v1"
STEP_TIMEOUT_S = 300.0
REPEATS = 3  # of a point in a round, after one that is not counted
LONG_PROMPT = 128  # tokens
LARGE_BATCH = 8  # sequences

LENGTHS = (8, 16, 32, 64, 128, 256, 512, 1024)
BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (32, 256, 1024)
HELD_OUT_LENGTHS = (12, 24, 48, 96, 192, 384, 768)
HELD_OUT_BATCHES = (3, 6, 12, 24, 48)
HELD_OUT_CONTEXTS = (64, 512)


class Regime(Enum):
    """Where errors are told apart."""

    PREFILL_SHORT = "prefill_short"  # fewer than LONG_PROMPT tokens
    PREFILL_LONG = "prefill_long"
    DECODE_SMALL = "decode_small"  # fewer than LARGE_BATCH sequences
    DECODE_LARGE = "decode_large"
    MIXED = "mixed"  # a prompt's chunk beside decodes; never fitted


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPoint:
    """`prompt_tokens` of one prompt after `context` others, and `batch` sequences that decode with `context` tokens each."""

    prompt_tokens: int = 0
    batch: int = 0
    context: int = 0
    is_held_out: bool = False

    @property
    def num_sequences(self) -> int:
        return self.batch + (1 if self.prompt_tokens else 0)

    @property
    def tokens_each(self) -> int:
        """Most KV of one of its sequences, at the end of the last repeat."""
        return self.context + max(self.prompt_tokens, REPEATS + 1)

    @property
    def regime(self) -> Regime:
        if self.prompt_tokens and self.batch:
            return Regime.MIXED
        if self.prompt_tokens:
            return Regime.PREFILL_LONG if self.prompt_tokens >= LONG_PROMPT else Regime.PREFILL_SHORT
        return Regime.DECODE_LARGE if self.batch >= LARGE_BATCH else Regime.DECODE_SMALL


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredPoint:
    """The median of all repeats, at the sizes of the middle one."""

    point: StepPoint
    step: MeasuredStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was measured, and the pace fitted to what was not held out."""

    pace: LinearStepTime
    points: tuple[MeasuredPoint, ...]

    def errors(self, regime: Regime, *, is_held_out: bool) -> list[float]:
        """Relative errors of the pace, of the points of one regime."""
        measured = [one.step for one in self.points if one.point.regime is regime and one.point.is_held_out is is_held_out]
        return relative_errors(self.pace, measured)


def grid(*, max_tokens: int, max_batch: int, max_kv_tokens: int) -> list[StepPoint]:
    """Points within the bounds: prompts and contexts of at most `max_tokens` together, `max_kv_tokens` of KV at once.

    Raises:
        ConfigError: too few are left to fit anything to.
    """
    points = [StepPoint(prompt_tokens=n, context=c) for n in LENGTHS for c in (0, *CONTEXTS)]
    points += [StepPoint(batch=b, context=c) for b in BATCHES for c in CONTEXTS]
    points += [StepPoint(prompt_tokens=n, context=c, is_held_out=True) for n in HELD_OUT_LENGTHS for c in (0, *HELD_OUT_CONTEXTS)]
    points += [StepPoint(batch=b, context=c, is_held_out=True) for b in HELD_OUT_BATCHES for c in HELD_OUT_CONTEXTS]
    points += [StepPoint(prompt_tokens=n, batch=b, context=64, is_held_out=True) for n in (24, 192) for b in (3, 12)]
    kept = [
        point
        for point in points
        if point.tokens_each <= max_tokens and point.batch <= max_batch and point.num_sequences * point.tokens_each <= max_kv_tokens
    ]
    if sum(not point.is_held_out for point in kept) < 2 * NUM_COEFFICIENTS:
        raise ConfigError(
            f"sequences of {max_tokens:,} tokens in KV for {max_kv_tokens:,} leave {len(kept)} sizes to measure, too few for a fit;"
            " raise --max-tokens or --kv-bytes"
        )
    return kept


class StepBench:
    """An executor and its pool, one step at a time. Use as a context manager: it starts the executor and closes it."""

    def __init__(self, executor: Executor, *, block_size_tokens: int, vocab_size: int, rng: Random) -> None:
        self._executor = executor
        self._block_size = block_size_tokens
        self._vocab_size = vocab_size
        self._rng = rng
        self._results: queue.SimpleQueue[StepResult] = queue.SimpleQueue()
        self._num_steps = 0
        self._sequence_ids = range(0)  # that the executor knows
        self._next_sequence_id = 0

    def __enter__(self) -> StepBench:
        self._executor.start(self._results.put)
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.close()

    def measure(self, point: StepPoint) -> list[MeasuredStep]:
        """The point REPEATS times, after once unmeasured, which is when its memory is touched first.

        Decodes go on from token to token, so a repeat reads one token more. Sequences are introduced in a step of their own: what that
        takes is no part of what a step takes again and again.

        Raises:
            ModelError: the executor could not compute it.
        """
        self._introduce(point)
        return [self._step(point, repeat) for repeat in range(REPEATS + 1)][1:]

    def _introduce(self, point: StepPoint) -> None:
        ended, first = self._sequence_ids, self._next_sequence_id
        self._sequence_ids = range(first, first + point.num_sequences)
        self._next_sequence_id = first + point.num_sequences
        starts = tuple(
            SequenceStart(
                sequence_id=sequence_id,
                token_ids=array("I", self._rng.choices(range(3, self._vocab_size), k=point.context + max(1, num_tokens))),
                num_prompt_tokens=point.context + max(1, num_tokens),
                choice=0,
                sampling=SamplingParams(max_tokens=1 << 20, temperature=0.0, ignore_eos=True),
            )
            for sequence_id, num_tokens in self._sizes(point)
        )
        self._run((), starts=starts, ended=tuple(ended))

    def _step(self, point: StepPoint, repeat: int) -> MeasuredStep:
        """A prompt is computed again as it was; decodes are `repeat` tokens further."""
        blocks_each = -(-point.tokens_each // self._block_size)
        entries = [
            PlanEntry(
                sequence_id=sequence_id,
                start=point.context if num_tokens else point.context + repeat,
                num_tokens=max(1, num_tokens),
                block_table=array("I", range(index * blocks_each, (index + 1) * blocks_each)),
            )
            for index, (sequence_id, num_tokens) in enumerate(self._sizes(point))
        ]
        plan, result = self._run(entries)
        return MeasuredStep(shape=plan_shape(plan), duration_s=result.duration_s)

    def _sizes(self, point: StepPoint) -> list[tuple[int, int]]:
        """(sequence, prompt tokens it computes; 0: it decodes), the prompt first."""
        return list(zip(self._sequence_ids, [point.prompt_tokens] * bool(point.prompt_tokens) + [0] * point.batch, strict=True))

    def _run(
        self, entries: Sequence[PlanEntry], *, starts: tuple[SequenceStart, ...] = (), ended: tuple[int, ...] = ()
    ) -> tuple[BatchPlan, StepResult]:
        plan = BatchPlan(
            step_id=self._num_steps,
            ended=ended,
            starts=starts,
            block_copies=(),
            entries=Entries.of(entries),
            samples=Samples.of(SampleEntry(entry_index=index, sequence_id=entry.sequence_id) for index, entry in enumerate(entries)),
        )
        self._num_steps += 1
        self._executor.submit(plan)
        try:
            result = self._results.get(timeout=STEP_TIMEOUT_S)
        except queue.Empty:
            raise ModelError(
                f"a step of {plan.num_tokens:,} tokens took longer than {STEP_TIMEOUT_S:.0f} s; measure smaller ones"
            ) from None
        if result.error is not None:
            raise ModelError(f"a step of {plan.num_tokens:,} tokens failed: {result.error}; see the log")
        return plan, result


def calibrate(bench: StepBench, points: Sequence[StepPoint], *, num_rounds: int, rng: Random, say: Callable[[str], None]) -> Calibration:
    """Measure every point in every round and fit. Rounds keep a machine that slows down for a while from slowing one size."""
    seen: dict[StepPoint, list[MeasuredStep]] = {point: [] for point in points}
    for number in range(1, num_rounds + 1):
        order = list(points)
        rng.shuffle(order)
        for index, point in enumerate(order):
            say(f"round {number}/{num_rounds}, step {index + 1}/{len(order)}: {_told(point)}")
            seen[point] += bench.measure(point)
    measured = tuple(MeasuredPoint(point=point, step=median_of(steps)) for point, steps in seen.items())
    return Calibration(pace=fit_linear([one.step for one in measured if not one.point.is_held_out]), points=measured)


def median_of(steps: Sequence[MeasuredStep]) -> MeasuredStep:
    """The median time, at the shape of the repeat in the middle."""
    shapes = sorted((step.shape for step in steps), key=lambda shape: shape.decode_reads)
    return MeasuredStep(shape=shapes[len(shapes) // 2], duration_s=statistics.median(step.duration_s for step in steps))


def rows_of(label: str, calibration: Calibration) -> list[Row]:
    """Error of each regime, of what was fitted and of what was held out."""
    rows = []
    for is_held_out in (False, True):
        for regime in Regime:
            errors = calibration.errors(regime, is_held_out=is_held_out)
            if errors:
                name = f"{label}/{'held_out' if is_held_out else 'fitted'}/{regime.value}"
                details = {"p90": round(percentile(errors, 0.9), 4), "num_steps": len(errors)}
                rows.append(Row(name=name, value=round(statistics.median(errors), 4), unit="relative error", details=details))
    return rows


def told_steps(points: Iterable[MeasuredPoint]) -> list[dict[str, object]]:
    """A record a point, for the document."""
    return [
        {
            "regime": one.point.regime.value,
            "held_out": one.point.is_held_out,
            "prefill_tokens": one.step.shape.prefill_tokens,
            "prefill_reads": one.step.shape.prefill_reads,
            "decodes": one.step.shape.decodes,
            "decode_reads": one.step.shape.decode_reads,
            "duration_s": round(one.step.duration_s, 9),
        }
        for one in points
    ]


def _told(point: StepPoint) -> str:
    parts = [f"{point.prompt_tokens} tokens of a prompt"] * bool(point.prompt_tokens) + [f"{point.batch} decodes"] * bool(point.batch)
    return f"{' and '.join(parts)} after {point.context}"
