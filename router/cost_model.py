"""Seconds of work, the one currency of placement, fitted online to what workers report.

    a step      = step + token * prefill tokens + pair * (prefill tokens * context) + sequence * batch + kv * (batch's KV tokens)
    a prefill   = step + token * missed + pair * missed * context
    a decode    = step + sequence * batch + kv * KV tokens         (the time between two tokens)

The shape of DistServe's latency model (appendix A) with prefill and decode sharing the cost of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from protocol.worker import WorkerSnapshot

NUM_TERMS = 5
MIN_SAMPLES = 8  # before that the fit is a guess and nobody is refused by it
_DECAY = 0.98  # a sample counts half after 34 more
_DECAY_DRIFTING = 0.85  # after 4 more, while reports differ from predictions to one side: the worker has changed its pace
_DRIFT = 0.15
_RIDGE = 0.02  # pull of each coefficient towards the common scale
_LEAST_RATIO = 0.02  # of the common scale: no coefficient becomes zero or negative


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCost:
    """Coefficients in seconds. The defaults are an 8B model on one data-centre GPU, to be corrected by the first reports."""

    step_s: float = 6e-3
    prefill_token_s: float = 6e-5
    prefill_pair_s: float = 2e-9
    decode_sequence_s: float = 5e-5
    decode_kv_token_s: float = 2e-8

    def prefill_s(self, missed: int, context: int) -> float:
        """Time to compute `missed` tokens of a prompt of `context` tokens, alone."""
        return self.step_s + missed * self.prefill_token_s + missed * context * self.prefill_pair_s

    def decode_step_s(self, num_sequences: int, kv_tokens: int) -> float:
        """Time between two tokens of a batch."""
        return self.step_s + num_sequences * self.decode_sequence_s + kv_tokens * self.decode_kv_token_s

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        return (self.step_s, self.prefill_token_s, self.prefill_pair_s, self.decode_sequence_s, self.decode_kv_token_s)

    def scaled(self, ratios: list[float]) -> StepCost:
        return StepCost.of_coefficients([c * r for c, r in zip(self.coefficients, ratios, strict=True)])

    @classmethod
    def of_coefficients(cls, coefficients: Sequence[float]) -> StepCost:
        step, token, pair, sequence, kv = coefficients
        return cls(step_s=step, prefill_token_s=token, prefill_pair_s=pair, decode_sequence_s=sequence, decode_kv_token_s=kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What a worker did between two reports."""

    num_steps: int
    prefill_tokens: int
    prefill_pairs: float  # sum of tokens * context
    decode_tokens: int
    decode_kv_token_steps: float  # sum over steps of the KV tokens of the batch
    busy_s: float


class CostModel:
    """Decayed least squares of `busy_s` on the five terms of work.

    Terms are measured in seconds of the prior, so the unknowns are five ratios; each is pulled towards their common scale. A
    machine 50 times slower than the prior is known after one report, the balance of its terms after some dozens. One that changes its pace
    is known again after 40 reports, two fits: what was seen before is forgotten sooner while predictions err to one side.
    """

    def __init__(self, prior: StepCost, *, bias: float) -> None:
        self._prior = prior
        self._bias = bias
        self._gram = [[0.0] * NUM_TERMS for _ in range(NUM_TERMS)]
        self._moment = [0.0] * NUM_TERMS
        self._seen_s = 0.0
        self._prior_s = 0.0
        self._ratios = [1.0] * NUM_TERMS
        self.num_samples = 0
        self._drift = 0.0  # the same with its sign
        self.relative_error = 0.0  # running mean of |predicted - seen| / seen, before each sample was learned
        self.fitted = prior
        self.cost = prior.scaled([bias] * NUM_TERMS)

    @property
    def is_fitted(self) -> bool:
        return self.num_samples >= MIN_SAMPLES

    def borrow(self, cost: StepCost) -> None:
        """Start from what was learned of a worker of the same pool; only while nothing was seen of this one.

        Else a fresh worker would look as quick as the prior beside neighbours that are known, and draw everybody to it.
        """
        assert self.num_samples == 0
        self._prior = self.fitted = cost
        self.cost = cost.scaled([self._bias] * NUM_TERMS)

    def observe(self, work: Work) -> None:
        """Take one report in; `refit` makes it count."""
        if work.busy_s <= 0.0 or work.num_steps <= 0:
            return
        p = self._prior
        z = (
            work.num_steps * p.step_s,
            work.prefill_tokens * p.prefill_token_s,
            work.prefill_pairs * p.prefill_pair_s,
            work.decode_tokens * p.decode_sequence_s,
            work.decode_kv_token_steps * p.decode_kv_token_s,
        )
        predicted = sum(r * v for r, v in zip(self._ratios, z, strict=True))
        weight = max(0.1, 1.0 / (1 + self.num_samples))
        error = (predicted - work.busy_s) / work.busy_s
        self.relative_error += weight * (abs(error) - self.relative_error)
        self._drift += weight * (error - self._drift)
        decay = _DECAY if abs(self._drift) < _DRIFT or not self.is_fitted else _DECAY_DRIFTING
        # Weighted by 1/busy_s: a report of many steps says as much as one of few.
        scale = 1.0 / work.busy_s
        for i in range(NUM_TERMS):
            row, zi = self._gram[i], z[i] * scale
            for j in range(NUM_TERMS):
                row[j] = decay * row[j] + zi * z[j] * scale
            self._moment[i] = decay * self._moment[i] + zi
        self._seen_s = decay * self._seen_s + 1.0
        self._prior_s = decay * self._prior_s + sum(z) * scale
        self.num_samples += 1

    def refit(self) -> StepCost:
        """Solve for the coefficients; the leaned ones are then in `cost`."""
        if self.num_samples:
            common = self._seen_s / self._prior_s
            ridge = _RIDGE * sum(self._gram[i][i] for i in range(NUM_TERMS)) / NUM_TERMS + 1e-18
            matrix = [[v + (ridge if i == j else 0.0) for j, v in enumerate(row)] for i, row in enumerate(self._gram)]
            moment = [m + ridge * common for m in self._moment]
            self._ratios = [max(r, _LEAST_RATIO * common) for r in _solve(matrix, moment)]
            self.fitted = self._prior.scaled(self._ratios)
            self.cost = self.fitted.scaled([self._bias] * NUM_TERMS)
        return self.cost


def _solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """Gaussian elimination without pivoting: `matrix` is symmetric and positive definite."""
    n = len(right)
    for i in range(n):
        for k in range(i + 1, n):
            factor = matrix[k][i] / matrix[i][i]
            for j in range(i, n):
                matrix[k][j] -= factor * matrix[i][j]
            right[k] -= factor * right[i]
    for i in reversed(range(n)):
        right[i] = (right[i] - sum(matrix[i][j] * right[j] for j in range(i + 1, n))) / matrix[i][i]
    return right


def work_between(before: WorkerSnapshot, after: WorkerSnapshot, context_mean: float) -> Work:
    """What the worker computed between two of its snapshots, as far as its counters tell."""
    num_steps = max(0, after.step_count - before.step_count)

    def grown(name: str) -> int:
        return max(0, after.counters.get(name, 0) - before.counters.get(name, 0))

    prefill_tokens = grown("prompt_tokens_computed")
    return Work(
        num_steps=num_steps,
        prefill_tokens=prefill_tokens,
        prefill_pairs=prefill_tokens * context_mean,
        decode_tokens=grown("generated_tokens"),
        decode_kv_token_steps=num_steps * (before.running_kv_tokens + after.running_kv_tokens) / 2,
        busy_s=grown("busy_us") * 1e-6,
    )
