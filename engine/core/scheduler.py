"""The one scheduler: each step, computed tokens catch up with tokens.

Prompts, recomputes and decodes differ only in how far behind they are. A plan takes decodes first, then chunks of running
prompts, then admits from the inbox, under a token budget and a time budget. Planning runs ahead: `num_computed_tokens` moves
when a step is planned, tokens not sampled yet are placeholders, and blocks that a step in flight names are given back only
when it is done. The best sequence in order can always preempt all others, so it always goes on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass, field

from engine.core.block_pool import BlockPool
from engine.core.config import SchedulerConfig
from engine.core.executor import BatchPlan, PlanEntry, SampleEntry, SequenceStart, StepResult
from engine.core.policy import DecodePolicy, PrefillPolicy
from engine.core.prefix_cache import PrefixCache
from engine.core.residence import Residence, StepInFlight, div_ceil
from engine.core.sequence import Order, Sequence
from engine.step_time import FittedStepTime, StepShape, StepTimeModel, tokens_within
from protocol.lifecycle import SequenceState


@dataclass(slots=True, kw_only=True, eq=False)
class _Draft:
    """A plan in the making."""

    step_id: int
    num_tokens_left: int
    entries: list[PlanEntry] = field(default_factory=list)
    samples: list[SampleEntry] = field(default_factory=list)
    starts: list[SequenceStart] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    progress: list[tuple[Sequence, int, int]] = field(default_factory=list)
    sampled: list[Sequence] = field(default_factory=list)
    retired: list[int] = field(default_factory=list)
    shape: StepShape = field(default_factory=StepShape)
    num_chunks: int = 0
    is_short_of_blocks: bool = False


class Scheduler:
    """Owns which sequences wait, run or are being pulled, and the steps in flight."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        pool: BlockPool,
        cache: PrefixCache,
        prefill: PrefillPolicy,
        decode: DecodePolicy,
        step_time: StepTimeModel,
        token_bytes: int,
        counters: dict[str, int],
    ) -> None:
        self.waiting: list[Sequence] = []  # in order; leaders stand for their choices
        self.running: list[Sequence] = []  # in order
        self.pulling: dict[int, Sequence] = {}  # by sequence id: blocks reserved, KV on its way
        self.inflight: deque[StepInFlight] = deque()
        self.offered_bytes = 0  # KV kept for other workers; told by the core
        self._config = config
        self._pool = pool
        self.residence = Residence(pool, cache, self.inflight)
        self._prefill = prefill
        self._decode = decode
        self._step_time = step_time
        self._token_bytes = token_bytes
        self._counters = counters
        self._next_step_id = 0
        self._ended: list[int] = []  # sequences the executor still knows
        self._blocked: tuple[int, int] | None = None  # (sequence, pool version) of the last admission that found no room

    # --- what waits ---

    def add(self, sequence: Sequence) -> None:
        assert sequence.state is SequenceState.WAITING
        _insert(self.waiting, sequence)

    def finish(self, sequence: Sequence) -> None:
        """It ends, wherever it is; blocks are given back once no step in flight names them."""
        if sequence.state is SequenceState.RUNNING:
            _remove(self.running, sequence)
        elif sequence.sequence_id in self.pulling:
            del self.pulling[sequence.sequence_id]
        else:
            _remove_if_there(self.waiting, sequence)
        self.residence.give_back(sequence.give_up_blocks(), sequence.last_step_id)
        sequence.move(SequenceState.DONE)
        if sequence.is_known_to_executor:
            self._ended.append(sequence.sequence_id)

    # --- a step ---

    def plan(self) -> BatchPlan | None:
        """The next step; None when enough are in flight or nothing can be computed now."""
        if len(self.inflight) >= self._config.max_inflight_steps:
            return None
        draft = _Draft(step_id=self._next_step_id, num_tokens_left=self._config.max_num_batched_tokens)
        self._force_preemption(draft)
        num_steps = min(self._config.max_leap_steps, self.horizon()) if self._config.max_leap_steps > 1 else 1
        self._plan_decodes(draft, num_steps)
        for sequence in list(self.running):
            if sequence.state is SequenceState.RUNNING and not sequence.is_decoding:
                self._plan_prompt(sequence, draft)
        self._admit(draft)
        if not draft.entries:
            return None
        ended, self._ended = tuple(self._ended), []
        plan = BatchPlan(
            step_id=draft.step_id,
            ended=ended,
            starts=tuple(draft.starts),
            block_copies=tuple(draft.block_copies),
            entries=tuple(draft.entries),
            samples=tuple(draft.samples),
            num_steps=num_steps,
        )
        self._next_step_id += 1
        self.inflight.append(
            StepInFlight(
                plan=plan,
                progress=draft.progress,
                sampled=draft.sampled,
                shape=draft.shape,
                num_chunks=draft.num_chunks,
                retired=draft.retired,
            )
        )
        return plan

    def complete(self, result: StepResult) -> StepInFlight:
        """A step is done. The caller appends the sampled tokens, then calls `store`."""
        step = self.inflight.popleft()
        assert step.plan.step_id == result.step_id, f"step {result.step_id} done, {step.plan.step_id} was next"
        assert 1 <= result.num_steps <= step.plan.num_steps
        for block_id in step.retired:
            self._pool.unpin(block_id)
        for sequence in step.sampled:
            sequence.num_inflight_samples -= 1
        if result.error is None:
            leapt = result.num_steps - 1
            for sequence, residency, end in step.progress:
                if sequence.residency == residency and sequence.state is SequenceState.RUNNING:
                    sequence.num_computed_tokens += leapt
                    sequence.num_confirmed_tokens = end + leapt
            if self._config.step_time_budget_s is not None and isinstance(self._step_time, FittedStepTime):
                self._step_time.observe(step.shape, result.duration_s / result.num_steps)
        return step

    def store(self, step: StepInFlight) -> None:
        """Make the blocks that became full in a step known to the prefix cache."""
        for sequence, residency, _ in step.progress:
            if sequence.residency == residency and sequence.state is SequenceState.RUNNING:
                self.residence.store(sequence)

    def horizon(self) -> int:
        """For how many steps the batch surely stays what it is now if nothing arrives; at least 1.

        Bounded by tokens left, free blocks, and by 1 where a stop token may come at any step or the inbox could move.
        """
        num_steps = self._config.max_leap_steps
        if self._config.force_preempt_every or not self.running or len(self.running) > self._config.max_num_batched_tokens:
            return 1
        if self.waiting and self.num_slots_used < self._config.max_num_seqs:
            return 1
        for sequence in self.running:
            stops = sequence.sampling.stop_token_ids or (sequence.sampling.eos_token_ids and not sequence.sampling.ignore_eos)
            if stops or not sequence.is_decoding or sequence.num_samples_left < 1:
                return 1
            num_steps = min(num_steps, sequence.num_samples_left)
        while num_steps > 1 and self._blocks_needed(num_steps) > self._pool.num_available:
            num_steps //= 2
        return num_steps

    def _blocks_needed(self, num_steps: int) -> int:
        size = self._config.block_size_tokens
        need = 0
        for sequence in self.running:
            need += max(0, div_ceil(sequence.num_computed_tokens + num_steps, size) - len(sequence.block_table)) + 1  # 1: copy-on-write
        return need

    @property
    def num_slots_used(self) -> int:
        return sum(s.num_slots for s in self.running) + sum(s.num_slots for s in self.pulling.values())

    # --- planning ---

    def _plan_decodes(self, draft: _Draft, num_steps: int) -> None:
        count = kv_tokens = 0
        for sequence in list(self.running):
            if draft.num_tokens_left == 0:
                break
            if sequence.state is not SequenceState.RUNNING or not sequence.is_decoding or sequence.num_samples_left < 1:
                continue
            if self._make_writable(sequence, sequence.num_computed_tokens + num_steps, draft):
                count += 1
                kv_tokens += sequence.num_computed_tokens + 1
                self._enter(sequence, 1, draft)
        draft.shape = draft.shape.with_decodes(count, kv_tokens)

    def _plan_prompt(self, sequence: Sequence, draft: _Draft) -> None:
        """A chunk of one prompt, as large as policy and budgets allow."""
        start = sequence.num_computed_tokens
        remaining = sequence.compute_end - start
        if remaining <= 0 or sequence.num_samples_left < 1:
            return
        wanted = max(1, self._prefill.chunk_tokens(remaining, draft.shape.decodes))
        num_tokens = min(wanted, remaining, draft.num_tokens_left)
        budget_s = self._config.step_time_budget_s
        if budget_s is not None and draft.shape.decodes and num_tokens > 0:
            # One block a step is computed at least, or steady decoding would starve the prompts.
            least = 0 if draft.shape.prefill_tokens else min(num_tokens, self._config.block_size_tokens)
            within = tokens_within(self._step_time, draft.shape, start=start, num_tokens=num_tokens, budget_s=budget_s)
            num_tokens = max(within, least)
        if num_tokens <= 0 or not self._make_writable(sequence, start + num_tokens, draft):
            return
        draft.shape = draft.shape.with_prefill(start, num_tokens)
        draft.num_chunks += 1
        sequence.num_chunks += 1
        self._counters["max_chunks_per_prompt"] = max(self._counters["max_chunks_per_prompt"], sequence.num_chunks)
        self._enter(sequence, num_tokens, draft)

    def _enter(self, sequence: Sequence, num_tokens: int, draft: _Draft) -> None:
        """Put one entry into the draft, with its samples and, at the end of a shared prompt, its fork."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        index = len(draft.entries)
        draft.num_tokens_left -= num_tokens
        draft.entries.append(
            PlanEntry(sequence_id=sequence.sequence_id, start=start, num_tokens=num_tokens, block_table=sequence.block_table[:])
        )
        self._introduce(sequence, draft)
        sequence.num_computed_tokens = end
        members = [sequence]
        if sequence.fork is not None and end == sequence.fork.at:
            members = sequence.members()
            self._split(sequence)
        for member in members:
            member.last_step_id = draft.step_id
            draft.progress.append((member, member.residency, end))
            if member.fork is None and end == member.num_planned_tokens:
                self._introduce(member, draft)
                draft.samples.append(SampleEntry(entry_index=index, sequence_id=member.sequence_id))
                draft.sampled.append(member)
                member.num_inflight_samples += 1

    @staticmethod
    def _introduce(sequence: Sequence, draft: _Draft) -> None:
        if not sequence.is_known_to_executor:
            assert sequence.num_inflight_samples == 0
            sequence.is_known_to_executor = True
            draft.starts.append(
                SequenceStart(
                    sequence_id=sequence.sequence_id,
                    token_ids=sequence.tokens[:],
                    num_prompt_tokens=sequence.num_prompt_tokens,
                    choice=sequence.choice,
                    sampling=sequence.sampling,
                )
            )

    def _split(self, leader: Sequence) -> None:
        """The shared tokens have KV: every choice goes on by itself over the same blocks, copied when first written."""
        fork = leader.fork
        assert fork is not None and leader.num_computed_tokens == fork.at
        leader.fork = None
        for sibling in fork.siblings:
            sibling.move(SequenceState.RUNNING)
            _insert(self.running, sibling)
            sibling.prefill_end = len(sibling.tokens)
            self.residence.share(leader, sibling, fork.at)

    # --- admission ---

    def _admit(self, draft: _Draft) -> None:
        """From the inbox, in order: prompts while tokens are left. An offer of KV that finds no room holds up those behind it."""
        index = 0
        while index < len(self.waiting) and draft.num_tokens_left > 0 and not draft.is_short_of_blocks:
            sequence = self.waiting[index]
            if sequence.attempt.handoff is not None:
                return
            if sequence.attempt.prefill_only and not self._may_offer(sequence):
                index += 1
                continue
            if not self._take_room(sequence, sequence.num_planned_tokens, sequence.num_hit_tokens_max):
                return
            del self.waiting[index]
            sequence.move(SequenceState.RUNNING)
            _insert(self.running, sequence)
            sequence.prefill_end = sequence.num_planned_tokens
            members = [sequence]
            if sequence.fork is not None and sequence.num_computed_tokens == sequence.fork.at:
                members = sequence.members()
                self._split(sequence)
            for member in members:
                self._plan_prompt(member, draft)

    def reserve(self) -> list[Sequence]:
        """Take offers of KV out of the inbox for which there is room, with their blocks, into `pulling`; the caller pulls.

        Prompts ahead of an offer keep their claim: what they will need is set aside before the offer is looked at.
        """
        reserved = []
        promised_blocks = promised_slots = 0
        index = 0
        while index < len(self.waiting) and promised_slots < self._config.max_num_seqs:
            sequence = self.waiting[index]
            if sequence.attempt.prefill_only and not self._may_offer(sequence):
                index += 1
                continue
            if sequence.attempt.handoff is None:
                promised_blocks += div_ceil(sequence.num_planned_tokens, self._config.block_size_tokens)
                promised_slots += sequence.num_slots
                index += 1
                continue
            num_tokens = sequence.attempt.handoff.handoff.num_valid_tokens
            if not self._take_room(sequence, num_tokens, num_tokens, promised_blocks, promised_slots):
                break
            del self.waiting[index]
            self.pulling[sequence.sequence_id] = sequence
            reserved.append(sequence)
        return reserved

    def begin_decoding(self, sequence: Sequence, num_tokens: int) -> None:
        """The pull is verified: its first `num_tokens` tokens have KV."""
        del self.pulling[sequence.sequence_id]
        sequence.move(SequenceState.RUNNING)
        _insert(self.running, sequence)
        sequence.num_computed_tokens = sequence.num_confirmed_tokens = num_tokens
        self.residence.store(sequence)
        members = sequence.members()
        if sequence.fork is not None:
            self._split(sequence)
        for member in members:
            member.prefill_end = num_tokens  # what is left of each is its first token: a decode

    def back_to_waiting(self, sequence: Sequence) -> None:
        """The pull failed: its blocks are free, and it computes its tokens itself when its turn comes."""
        del self.pulling[sequence.sequence_id]
        self.residence.give_back(sequence.give_up_blocks(), sequence.last_step_id)
        _insert(self.waiting, sequence)

    def _take_room(
        self, sequence: Sequence, num_tokens: int, num_hit_tokens_max: int, promised_blocks: int = 0, promised_slots: int = 0
    ) -> bool:
        """Slots and blocks for `num_tokens` tokens, cached ones first; False, and nothing taken, when there is no room."""
        if self.num_slots_used + promised_slots + sequence.num_slots > self._config.max_num_seqs:
            return False
        if self._blocked == (sequence.sequence_id, self._pool.version):
            return False
        is_busy = bool(self.running or self.pulling)

        def may_leave(num_blocks_left: int) -> bool:
            left = num_blocks_left - promised_blocks
            return left >= 0 and (not is_busy or self._decode.may_admit(left, len(self.running), self._pool.num_blocks))

        if self.residence.take(sequence, num_tokens, num_hit_tokens_max, may_leave):
            self._counters["cached_tokens"] += sequence.num_computed_tokens
            return True
        if promised_blocks == 0:
            self._blocked = (sequence.sequence_id, self._pool.version)
        return False

    def _may_offer(self, sequence: Sequence) -> bool:
        being_made = sum(len(s.block_table) for s in self.running if s.attempt.prefill_only)
        size = self._config.block_size_tokens
        offered_bytes = self.offered_bytes + being_made * size * self._token_bytes
        return self._prefill.may_offer(offered_bytes, div_ceil(len(sequence.tokens), size) * size * self._token_bytes)

    # --- blocks ---

    def _make_writable(self, sequence: Sequence, end: int, draft: _Draft) -> bool:
        """Blocks for tokens up to `end`, the first one to be written ours alone. False: not in this step."""
        size = self._config.block_size_tokens
        table = sequence.block_table
        first = sequence.num_computed_tokens // size
        is_copied = first < len(table) and self._pool.is_shared(table[first])
        need = max(0, div_ceil(end, size) - len(table)) + is_copied
        if need == 0:
            return True
        if draft.is_short_of_blocks or not self._make_room(need, sequence, draft):
            draft.is_short_of_blocks = True  # those behind leave what becomes free to this one
            return False
        copied = self.residence.extend(sequence, need, is_copied=is_copied)
        if copied is not None:
            draft.block_copies.append(copied)
            draft.retired.append(copied[0])
        return True

    def _make_room(self, need: int, sequence: Sequence, draft: _Draft) -> bool:
        """Preempt sequences after this one in order until `need` blocks are, or soon will be, available. True: they are."""
        while need > self._pool.num_available_soon:
            candidates = [
                s
                for s in self.running[bisect_left(self.running, sequence.order, key=_order) + 1 :]
                if s.last_step_id != draft.step_id and s.block_table and s.num_samples_left > 0
            ]
            if not candidates:
                return False
            self._preempt(self._decode.victim(candidates))
        return need <= self._pool.num_available

    def _preempt(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.PREEMPTED)
        _remove(self.running, sequence)
        self.residence.give_back(sequence.give_up_blocks(), sequence.last_step_id)
        sequence.move(SequenceState.WAITING)
        _insert(self.waiting, sequence)
        self._counters["preemptions"] += 1

    def _force_preemption(self, draft: _Draft) -> None:
        """The test seam: only what has decoded since its admission, so that everything still comes to its end."""
        every = self._config.force_preempt_every
        if every and draft.step_id % every == every - 1:
            candidates = [s for s in self.running if s.is_decoding and s.num_computed_tokens > s.prefill_end and s.num_samples_left > 0]
            if candidates:
                self._preempt(candidates[-1])


def _order(sequence: Sequence) -> Order:
    return sequence.order


def _insert(ordered: list[Sequence], sequence: Sequence) -> None:
    insort(ordered, sequence, key=_order)


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(ordered, sequence.order, key=_order)
    assert ordered[index] is sequence
    del ordered[index]


def _remove_if_there(ordered: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(ordered, sequence.order, key=_order)
    if index < len(ordered) and ordered[index] is sequence:
        del ordered[index]
