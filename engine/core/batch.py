"""What a step is made of: the sequences that decode together, and the draft of a plan with them and chunks of prompts.

The columns of a decode batch (of its plan and of its output) stay while the same sequences decode; a step of it then costs one short
loop to plan and one to take its tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection
from dataclasses import dataclass, field

from engine.core.executor import Entries, PlanEntry, SampleEntry, Samples, SequenceStart
from engine.core.sequence import Order, Sequence
from engine.step_time import StepShape
from protocol.messages import TokenColumns


@dataclass(slots=True, kw_only=True, eq=False)
class _Receiver:
    """The rows of a batch that one gateway asked for."""

    gateway: str
    rows: list[int]
    request_ids: tuple[str, ...]
    attempts: array[int]
    choices: array[int]

    def columns(self, positions: array[int], token_ids: array[int]) -> TokenColumns:
        return TokenColumns(
            request_ids=self.request_ids, attempts=self.attempts, choices=self.choices, positions=positions, token_ids=token_ids
        )

    def narrowed(self, without: Collection[int]) -> _Receiver:
        kept = [place for place, row in enumerate(self.rows) if row not in without]
        return _Receiver(
            gateway=self.gateway,
            rows=[self.rows[place] for place in kept],
            request_ids=tuple([self.request_ids[place] for place in kept]),
            attempts=array("I", [self.attempts[place] for place in kept]),
            choices=array("I", [self.choices[place] for place in kept]),
        )


class DecodeBatch:
    """Rows are in the order of `sequences`, and never change."""

    def __init__(self, sequences: list[Sequence]) -> None:
        self.sequences = sequences
        self.sequence_ids = array("q", [s.sequence_id for s in sequences])
        self.samples = Samples(entry_indices=array("q", range(len(sequences))), sequence_ids=self.sequence_ids)
        self.sizes = array("q", [1]) * len(sequences)
        self.stop_token_ids = frozenset(
            token_id
            for sampling in {id(s.sampling): s.sampling for s in sequences}.values()
            for token_id in sampling.stop_token_ids + (() if sampling.ignore_eos else sampling.eos_token_ids)
        )
        self._before_output = [s.num_prompt_tokens - 1 for s in sequences]  # the token there gives output position 0
        self._receivers: list[_Receiver] | None = None

    def outputs(self, starts: list[int], token_ids: array[int], without: Collection[int]) -> dict[str, TokenColumns]:
        """One new token of each row but those in `without`, by the gateway that asked for it. `starts`: the token each row computed."""
        if self._receivers is None:
            self._receivers = self._make_receivers()
        positions = array("I", [start - before for start, before in zip(starts, self._before_output, strict=True)])
        if len(self._receivers) == 1 and not without:
            (only,) = self._receivers
            return {only.gateway: only.columns(positions, token_ids)}
        told = self._receivers if not without else [r.narrowed(without) for r in self._receivers]
        return {
            r.gateway: r.columns(array("I", [positions[row] for row in r.rows]), array("I", [token_ids[row] for row in r.rows]))
            for r in told
            if r.rows
        }

    def _make_receivers(self) -> list[_Receiver]:
        rows_of: dict[str, list[int]] = {}
        for row, sequence in enumerate(self.sequences):
            rows_of.setdefault(sequence.attempt.gateway, []).append(row)
        keys = [sequence.attempt.key for sequence in self.sequences]
        return [
            _Receiver(
                gateway=gateway,
                rows=rows,
                request_ids=tuple([keys[row].request_id for row in rows]),
                attempts=array("I", [keys[row].attempt for row in rows]),
                choices=array("I", [self.sequences[row].choice for row in rows]),
            )
            for gateway, rows in rows_of.items()
        ]


NO_DECODES = DecodeBatch([])


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """A plan in the making."""

    step_id: int
    num_tokens_left: int
    batch: DecodeBatch = NO_DECODES
    decode_starts: list[int] = field(default_factory=list)
    prompts: list[PlanEntry] = field(default_factory=list)
    samples: list[SampleEntry] = field(default_factory=list)  # of prompts
    starts: list[SequenceStart] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    chunks: list[tuple[Sequence, int]] = field(default_factory=list)  # (sequence, tokens that have KV afterwards) of prompts
    sampled_prompts: list[Sequence] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)
    shape: StepShape = field(default_factory=StepShape)
    num_chunks: int = 0
    short_order: Order | None = None  # of the first sequence that found no blocks: those behind it leave it what becomes free

    def entries(self) -> Entries:
        batch, prompts = self.batch, Entries.of(self.prompts)
        starts, tables = array("q", self.decode_starts), tuple([s.block_table for s in batch.sequences])
        if not prompts:
            return Entries(sequence_ids=batch.sequence_ids, starts=starts, sizes=batch.sizes, block_tables=tables)
        return Entries(
            sequence_ids=batch.sequence_ids + prompts.sequence_ids,
            starts=starts + prompts.starts,
            sizes=batch.sizes + prompts.sizes,
            block_tables=tables + prompts.block_tables,
        )

    def all_samples(self) -> Samples:
        if not self.samples:
            return self.batch.samples
        first, rest = self.batch.samples, Samples.of(self.samples)
        return Samples(entry_indices=first.entry_indices + rest.entry_indices, sequence_ids=first.sequence_ids + rest.sequence_ids)
