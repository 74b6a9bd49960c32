"""How long a step takes: pure models used by the scheduler's time budget, the paced executor, the simulator and the planner.

A step is described by what its time grows with (`StepShape`), so every model is a function of one small record:

    prefill   a + b * tokens + c * tokens * context          (Sec. 3.1 of DistServe, OSDI'24)
    decode    d0 + d1 * batch + d2 * kv_tokens
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from engine.core.executor import BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step's time grows with. Sums over its entries, so shapes add up."""

    prefill_tokens: int = 0
    prefill_reads: int = 0  # sum over prefill entries of tokens * mean context: pairs of (query, key)
    decodes: int = 0
    decode_reads: int = 0  # KV tokens read by decodes

    def with_prefill(self, start: int, num_tokens: int) -> StepShape:
        """This step with tokens [start, start + num_tokens) of one more prompt."""
        reads = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return StepShape(
            prefill_tokens=self.prefill_tokens + num_tokens,
            prefill_reads=self.prefill_reads + reads,
            decodes=self.decodes,
            decode_reads=self.decode_reads,
        )

    def with_decodes(self, count: int, kv_tokens: int) -> StepShape:
        """This step with `count` more decodes that read `kv_tokens` tokens of KV together."""
        return StepShape(
            prefill_tokens=self.prefill_tokens,
            prefill_reads=self.prefill_reads,
            decodes=self.decodes + count,
            decode_reads=self.decode_reads + kv_tokens,
        )


def plan_shape(plan: BatchPlan, steps_before: int = 0) -> StepShape:
    """What the time of a plan's step grows with: entries of one token that is sampled count as decodes."""
    sampled = set(plan.samples.entry_indices)
    shape = StepShape()
    decodes = kv_tokens = 0
    for index, (start, num_tokens) in enumerate(zip(plan.entries.starts, plan.entries.sizes, strict=True)):
        if num_tokens == 1 and index in sampled:
            decodes += 1
            kv_tokens += start + steps_before + 1
        else:
            shape = shape.with_prefill(start, num_tokens)
    return shape.with_decodes(decodes, kv_tokens)


class StepTimeModel(Protocol):
    def step_s(self, shape: StepShape) -> float:
        """Seconds; never falls when a figure of the shape grows."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearStepTime:
    """Published or fitted coefficients, seconds a unit."""

    prefill_base_s: float = 0.0
    prefill_token_s: float
    prefill_read_s: float = 0.0
    decode_base_s: float = 0.0
    decode_sequence_s: float
    decode_read_s: float = 0.0

    def step_s(self, shape: StepShape) -> float:
        prefill = decode = 0.0
        if shape.prefill_tokens:
            prefill = self.prefill_base_s + self.prefill_token_s * shape.prefill_tokens + self.prefill_read_s * shape.prefill_reads
        if shape.decodes:
            decode = self.decode_base_s + self.decode_sequence_s * shape.decodes + self.decode_read_s * shape.decode_reads
        return prefill + decode


@dataclass(frozen=True, slots=True, kw_only=True)
class RooflineStepTime:
    """The slower of arithmetic and memory traffic, plus a fixed cost a step (launches, sampling) and what ranks exchange.

    Weights are read once a step whatever the batch, but of experts those that its tokens choose, evenly and one apart from the other;
    the KV of each decode once a token; 2 flops a parameter and token.
    """

    num_parameters: float  # that a token is multiplied with
    weight_bytes: float  # of all ranks together, as are the rates
    expert_bytes: float = 0.0  # of weight_bytes
    chosen_share: float = 1.0  # of the experts, by each token
    kv_token_bytes: float
    attention_flops_per_read: float  # 4 * num_layers * num_heads * head_dim
    flops_per_s: float
    bytes_per_s: float
    token_exchange_s: float = 0.0
    overhead_s: float = 0.0

    def step_s(self, shape: StepShape) -> float:
        tokens = shape.prefill_tokens + shape.decodes
        reads = shape.prefill_reads + shape.decode_reads
        if tokens == 0:
            return 0.0
        compute_s = (2.0 * self.num_parameters * tokens + self.attention_flops_per_read * reads) / self.flops_per_s
        weight_bytes = self.weight_bytes - self.expert_bytes * (1.0 - self.chosen_share) ** tokens
        traffic_s = (weight_bytes + self.kv_token_bytes * (shape.decode_reads + tokens)) / self.bytes_per_s
        return self.overhead_s + max(compute_s, traffic_s) + self.token_exchange_s * tokens


_NUM_FEATURES = 5


@dataclass(slots=True, kw_only=True)
class FittedStepTime:
    """Recursive least squares over the steps seen, old ones forgotten; negative coefficients count as zero.

    Features are scaled (thousands of tokens, millions of reads) so that the 5 x 5 covariance stays well conditioned.
    Until `min_steps` steps were seen it predicts 0: no budget is enforced on a guess.
    """

    forgetting: float = 0.998  # half of the weight lies on the last 350 steps
    min_steps: int = 8
    num_steps: int = 0
    _weights: list[float] = field(default_factory=lambda: [0.0] * _NUM_FEATURES)
    _covariance: list[list[float]] = field(
        default_factory=lambda: [[1e4 if i == j else 0.0 for j in range(_NUM_FEATURES)] for i in range(_NUM_FEATURES)]
    )

    def step_s(self, shape: StepShape) -> float:
        if self.num_steps < self.min_steps:
            return 0.0
        return sum(max(w, 0.0) * x for w, x in zip(self._weights, _features(shape), strict=True))

    def observe(self, shape: StepShape, duration_s: float) -> None:
        """One step of `shape` took `duration_s`."""
        x = _features(shape)
        p = self._covariance
        px = [sum(row[j] * x[j] for j in range(_NUM_FEATURES)) for row in p]
        scale = self.forgetting + sum(a * b for a, b in zip(x, px, strict=True))
        gain = [v / scale for v in px]
        error = duration_s - sum(w * v for w, v in zip(self._weights, x, strict=True))
        self._weights = [w + g * error for w, g in zip(self._weights, gain, strict=True)]
        trace = sum(p[i][i] for i in range(_NUM_FEATURES))
        forgetting = self.forgetting if trace < 1e6 else 1.0  # unexcited directions must not blow up
        self._covariance = [[(p[i][j] - gain[i] * px[j]) / forgetting for j in range(_NUM_FEATURES)] for i in range(_NUM_FEATURES)]
        self.num_steps += 1


def _features(shape: StepShape) -> tuple[float, float, float, float, float]:
    return (1.0, shape.prefill_tokens / 1e3, shape.prefill_reads / 1e6, shape.decodes / 1e2, shape.decode_reads / 1e5)


def tokens_within(model: StepTimeModel, shape: StepShape, *, start: int, num_tokens: int, budget_s: float) -> int:
    """The most tokens (at most `num_tokens`) of a prompt from `start` on that keep a step of `shape` within `budget_s`.

    By bisection, since time never falls with tokens; about log2(num_tokens) predictions.
    """
    low, high = 0, num_tokens
    if model.step_s(shape.with_prefill(start, high)) <= budget_s:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if model.step_s(shape.with_prefill(start, middle)) <= budget_s:
            low = middle
        else:
            high = middle
    return low
