"""The seam between deciding a step and computing it: BatchPlan in, StepResult out, asynchronously.

Three executors implement it: torch (engine/runner/torch_executor.py), paced (engine/paced.py) and simulated
(simulator/sim_executor.py). An executor remembers the tokens of each sequence it was told of, appends what it samples,
and so knows "the token sampled for s in step k" when step k+1 is submitted before k is done.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
class Entries:
    """The entries of a step, column by column: a decode step of 64 sequences is four columns, not 64 objects.

    Whoever has a column keeps it as it is: steps share those that do not change between them, block tables above all.
    """

    sequence_ids: array[int]  # int64, as are starts and sizes
    starts: array[int]
    sizes: array[int]
    block_tables: tuple[array[int], ...]

    @classmethod
    def of(cls, entries: Iterable[PlanEntry]) -> Entries:
        rows = tuple(entries)
        return cls(
            sequence_ids=array("q", [e.sequence_id for e in rows]),
            starts=array("q", [e.start for e in rows]),
            sizes=array("q", [e.num_tokens for e in rows]),
            block_tables=tuple([e.block_table for e in rows]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> PlanEntry:
        return PlanEntry(
            sequence_id=self.sequence_ids[index],
            start=self.starts[index],
            num_tokens=self.sizes[index],
            block_table=self.block_tables[index],
        )

    def __iter__(self) -> Iterator[PlanEntry]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleEntry:
    """Sample the next token of `sequence_id` from the logits of the last token of entry `entry_index`.

    The entry usually is the sequence's own; right after a shared prompt it is that of the first choice.
    """

    entry_index: int
    sequence_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """What a step samples, column by column."""

    entry_indices: array[int]  # int64, as are the sequence ids; never falling
    sequence_ids: array[int]

    @classmethod
    def of(cls, samples: Iterable[SampleEntry]) -> Samples:
        rows = tuple(samples)
        return cls(entry_indices=array("q", [s.entry_index for s in rows]), sequence_ids=array("q", [s.sequence_id for s in rows]))

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __getitem__(self, index: int) -> SampleEntry:
        return SampleEntry(entry_index=self.entry_indices[index], sequence_id=self.sequence_ids[index])

    def __iter__(self) -> Iterator[SampleEntry]:
        return map(self.__getitem__, range(len(self)))


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """One forward pass. Order of effects: `ended`, `starts`, `block_copies`, compute, sample.

    `ended` may name a sequence whose starting step failed: unknown ids are passed over.
    """

    step_id: int
    ended: tuple[int, ...]
    starts: tuple[SequenceStart, ...]
    block_copies: tuple[tuple[int, int], ...]  # (source block, target block): copy-on-write before anything is written
    entries: Entries
    samples: Samples
    num_steps: int = 1  # up to this many equal steps, each sampled token the next input; block tables cover them all

    @property
    def num_tokens(self) -> int:
        return sum(self.entries.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledTokens:
    """What one sample entry gave: usually one token, several with speculation; or an error of this sequence alone."""

    sequence_id: int
    token_ids: array[int]
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """What a step sampled, column by column, in the order of BatchPlan.samples."""

    sequence_ids: array[int]  # int64
    token_ids: array[int]  # uint32, of all samples; that of one with an error means nothing
    counts: array[int] | None = None  # how many of them are each sample's; None: one
    logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # by index, of samples asked for them
    errors: dict[int, str] = field(default_factory=dict)  # by index, of sequences that failed alone

    @classmethod
    def of(cls, sampled: Iterable[SampledTokens]) -> Sampled:
        rows = tuple(sampled)
        token_ids = array("I")
        for row in rows:
            token_ids += row.token_ids
        return cls(
            sequence_ids=array("q", [row.sequence_id for row in rows]),
            token_ids=token_ids,
            counts=None if all(len(row.token_ids) == 1 for row in rows) else array("q", [len(row.token_ids) for row in rows]),
            logprobs={index: row.logprobs for index, row in enumerate(rows) if row.logprobs},
            errors={index: row.error for index, row in enumerate(rows) if row.error is not None},
        )

    @property
    def is_plain(self) -> bool:
        """One token a sample, and nothing to say about it."""
        return self.counts is None and not self.logprobs and not self.errors

    def __len__(self) -> int:
        return len(self.sequence_ids)

    def __iter__(self) -> Iterator[SampledTokens]:
        return self.since(0)

    def since(self, first_index: int) -> Iterator[SampledTokens]:
        """Of the samples from `first_index` on."""
        end = first_index if self.counts is None else sum(self.counts[:first_index])
        for index in range(first_index, len(self)):
            first, end = end, end + (1 if self.counts is None else self.counts[index])
            error = self.errors.get(index)
            yield SampledTokens(
                sequence_id=self.sequence_ids[index],
                token_ids=self.token_ids[first:end] if error is None else array("I"),
                logprobs=self.logprobs.get(index, ()),
                error=error,
            )


NOTHING_SAMPLED = Sampled(sequence_ids=array("q"), token_ids=array("I"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """The end of a step. `error` set: the whole step failed and nothing was sampled."""

    step_id: int
    sampled: Sampled
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
