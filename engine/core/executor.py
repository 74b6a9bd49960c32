"""The seam between deciding a step and computing it: BatchPlan in, StepResult out, asynchronously.

Three executors implement it: torch (engine/runner/torch_executor.py), paced (engine/paced.py) and simulated
(simulator/sim_executor.py). An executor remembers the tokens of each sequence it was told of, appends what it samples,
and so knows "the token sampled for s in step k" when step k+1 is submitted before k is done.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protocol.messages import TokenLogprobs
from protocol.request import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceStart:
    """A sequence the executor has not seen. Repeated for a sequence id only after `ended` named it."""

    sequence_id: int
    token_ids: array[int]  # prompt + delivered (+ first token of a hand-off): everything known so far
    num_prompt_tokens: int  # original boundary: output position 0 is token_ids[num_prompt_tokens]
    choice: int
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanEntry:
    """Compute KV of tokens [start, start + num_tokens) of one sequence, attending over [0, start + num_tokens)."""

    sequence_id: int
    start: int  # == num_computed_tokens before this step
    num_tokens: int
    block_table: array[int]  # uint32, covers start + num_tokens tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEntry:
    """Sample the next token of `sequence_id` from the logits of the last token of entry `entry_index`.

    The entry usually is the sequence's own; right after a shared prompt it is that of the first choice.
    """

    entry_index: int
    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """One forward pass. Order of effects: `ended`, `starts`, `block_copies`, compute, sample.

    `ended` may name a sequence whose starting step failed: unknown ids are passed over.
    """

    step_id: int
    ended: tuple[int, ...]
    starts: tuple[SequenceStart, ...]
    block_copies: tuple[tuple[int, int], ...]  # (source block, target block): copy-on-write before anything is written
    entries: tuple[PlanEntry, ...]
    samples: tuple[SampleEntry, ...]
    num_steps: int = 1  # up to this many equal steps, each sampled token the next input; block tables cover them all

    @property
    def num_tokens(self) -> int:
        return sum(e.num_tokens for e in self.entries)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What one sample entry gave: usually one token, several with speculation; or an error of this sequence alone."""

    sequence_id: int
    token_ids: array[int]
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """In the order of BatchPlan.samples. `error` set: the whole step failed and nothing was sampled."""

    step_id: int
    sampled: tuple[SampledTokens, ...]
    duration_s: float  # of all steps together
    error: str | None = None
    num_steps: int = 1  # how many of the plan's steps were done; each sample holds that many tokens


class Executor(Protocol):
    """Computes steps in the order submitted, one at a time.

    `submit` returns at once; `on_done` (given to the constructor or `start`) is called from any thread, once a step, in order.
    """

    def start(self, on_done: Callable[[StepResult], None]) -> None: ...

    def submit(self, plan: BatchPlan) -> None: ...

    def close(self) -> None:
        """Finish the step in progress, drop the rest, join the compute thread."""
        ...
