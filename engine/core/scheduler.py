"""The one scheduler: each step, computed tokens catch up with tokens.

Prompts, recomputes and decodes differ only in how far behind they are. A plan takes decodes first, then chunks of running
prompts, then admits from the inbox, under a token budget and a time budget. Planning runs ahead: `num_computed_tokens` moves
when a step is planned, tokens not sampled yet are placeholders, and blocks that a step in flight names are given back only
when it is done. The best sequence in order can always preempt all others, so it always goes on.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from engine.core.batch import DecodeBatch, Draft
from engine.core.block_pool import BlockPool
from engine.core.config import SchedulerConfig
from engine.core.executor import BatchPlan, PlanEntry, SampleEntry, SequenceStart, StepResult
from engine.core.inbox import Inbox, by_order
from engine.core.policy import DecodePolicy, PrefillPolicy
from engine.core.prefix_cache import PrefixCache
from engine.core.residence import Residence, StepInFlight, div_ceil
from engine.core.sequence import Sequence
from engine.step_time import FittedStepTime, StepTimeModel, tokens_within
from protocol.lifecycle import SequenceState


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
        self.waiting = Inbox(prefill.hit_groups())
        self.running: list[Sequence] = []  # in order
        self.pulling: dict[int, Sequence] = {}  # by sequence id: blocks reserved, KV on its way
        self.parked: dict[int, Sequence] = {}  # by sequence id: no KV came, and its first token is not known yet
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
        self._batch: DecodeBatch | None = None  # of those that decode; None: they are others than in the last step
        self._num_slots_used: int | None = None  # None: to be counted anew
        self._blocked: tuple[int, int, int] | None = None  # what the last admission that found no room depended on

    # --- what waits ---

    def add(self, sequence: Sequence) -> None:
        assert sequence.state is SequenceState.WAITING
        self.waiting.enter(sequence, self.residence.num_cached_tokens)

    def finish(self, sequence: Sequence) -> None:
        """It ends, wherever it is; blocks are given back once no step in flight names them."""
        if sequence.state is SequenceState.RUNNING:
            self._stop_running(sequence)
        elif sequence.sequence_id in self.pulling:
            self._stop_pulling(sequence)
        elif sequence.sequence_id in self.parked:
            del self.parked[sequence.sequence_id]
        else:
            self.waiting.remove(sequence)
        self._give_up_blocks(sequence)
        sequence.move(SequenceState.DONE)
        if sequence.is_known_to_executor:
            self._ended.append(sequence.sequence_id)

    # --- a step ---

    def plan(self) -> BatchPlan | None:
        """The next step; None when enough are in flight or nothing can be computed now."""
        if len(self.inflight) >= self._config.max_inflight_steps:
            return None
        if not self.running and not self.waiting:
            return None
        draft = Draft(step_id=self._next_step_id, num_tokens_left=self._config.max_num_batched_tokens)
        self._force_preemption(draft)
        num_steps = min(self._config.max_leap_steps, self.horizon()) if self._config.max_leap_steps > 1 else 1
        num_running = len(self.running)
        if self._plan_decodes(draft, num_steps) < num_running:
            for sequence in list(self.running):
                if sequence.state is SequenceState.RUNNING and not sequence.is_decoding:
                    self._plan_prompt(sequence, draft)
        if self.waiting:
            self._admit(draft)
        if not draft.decode_starts and not draft.prompts:
            return None
        ended, self._ended = tuple(self._ended), []
        plan = BatchPlan(
            step_id=draft.step_id,
            ended=ended,
            starts=tuple(draft.starts),
            block_copies=tuple(draft.block_copies),
            entries=draft.entries(),
            samples=draft.all_samples(),
            num_steps=num_steps,
        )
        self._next_step_id += 1
        self.inflight.append(
            StepInFlight(
                plan=plan,
                batch=draft.batch,
                starts=draft.decode_starts,
                chunks=draft.chunks,
                sampled_prompts=draft.sampled_prompts,
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
        if result.error is None:
            if (leapt := result.num_steps - 1) > 0:
                for sequence in step.sequences:
                    if sequence not in step.gone:
                        sequence.num_computed_tokens += leapt
                        sequence.num_planned_tokens += leapt
            if self._config.step_time_budget_s is not None and isinstance(self._step_time, FittedStepTime):
                middle = step.shape.with_decodes(0, (result.num_steps - 1) * step.shape.decodes // 2)
                self._step_time.observe(middle, result.duration_s / result.num_steps)
        return step

    def store(self, step: StepInFlight, num_steps: int) -> None:
        """Make the blocks that became full in `num_steps` steps of a plan known to the prefix cache."""
        size = self._config.block_size_tokens
        for sequence, start in zip(step.batch.sequences, step.starts, strict=True):
            if (start + num_steps) % size < num_steps and sequence not in step.gone:
                self.residence.store(sequence, start + num_steps)
        for sequence, end in step.chunks:
            if sequence not in step.gone:
                self.residence.store(sequence, end)

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
        if self._num_slots_used is None:
            self._num_slots_used = sum(s.num_slots for s in self.running) + sum(s.num_slots for s in self.pulling.values())
        return self._num_slots_used

    # --- planning ---

    def _plan_decodes(self, draft: Draft, num_steps: int) -> int:
        """One token of every sequence that decodes, in order; returns how many decode."""
        if self._batch is None:
            self._batch = DecodeBatch([s for s in self.running if s.is_decoding and s.num_samples_left > 0])
        batch, step_id, starts = self._batch, draft.step_id, draft.decode_starts
        num_rows = len(batch.sequences)
        for sequence in batch.sequences if num_rows <= draft.num_tokens_left else batch.sequences[: draft.num_tokens_left]:
            start = sequence.num_computed_tokens
            if start + num_steps > sequence.decode_end and not self._may_decode(sequence, start + num_steps, draft):
                continue
            starts.append(start)
            sequence.num_computed_tokens = start + 1
            sequence.num_planned_tokens += 1
            sequence.last_step_id = step_id
        if len(starts) < num_rows:
            batch, self._batch = DecodeBatch([s for s in batch.sequences if s.last_step_id == step_id]), None
        draft.batch = batch
        draft.num_tokens_left -= len(starts)
        draft.shape = draft.shape.with_decodes(len(starts), sum(starts) + len(starts))
        return num_rows

    def _may_decode(self, sequence: Sequence, end: int, draft: Draft) -> bool:
        """The longer look, at the first token of a residency, of a block, and where the last token is on its way."""
        if sequence.state is not SequenceState.RUNNING or sequence.num_samples_left < 1:
            return False
        if not self._make_writable(sequence, end, draft):
            return False
        self._introduce(sequence, draft)
        sequence.decode_end = min(len(sequence.block_table) * self._config.block_size_tokens, sequence.max_total_tokens - 1)
        return True

    def _plan_prompt(self, sequence: Sequence, draft: Draft) -> None:
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

    def _enter(self, sequence: Sequence, num_tokens: int, draft: Draft) -> None:
        """Put the chunk of a prompt into the draft, with its samples and, at the end of a shared prompt, its fork."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        index = len(draft.decode_starts) + len(draft.prompts)
        draft.num_tokens_left -= num_tokens
        draft.prompts.append(
            PlanEntry(sequence_id=sequence.sequence_id, start=start, num_tokens=num_tokens, block_table=sequence.block_table)
        )
        self._introduce(sequence, draft)
        sequence.num_computed_tokens = end
        members = [sequence]
        if sequence.fork is not None and end == sequence.fork.at:
            members = sequence.members()
            self._split(sequence)
        for member in members:
            member.last_step_id = draft.step_id
            draft.chunks.append((member, end))
            if member.is_decoding:
                self._batch = None
            if member.fork is None and end == member.num_planned_tokens:
                self._introduce(member, draft)
                draft.samples.append(SampleEntry(entry_index=index, sequence_id=member.sequence_id))
                draft.sampled_prompts.append(member)
                member.num_planned_tokens += 1

    @staticmethod
    def _introduce(sequence: Sequence, draft: Draft) -> None:
        if not sequence.is_known_to_executor:
            assert sequence.num_planned_tokens == len(sequence.tokens)
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
            self._start_running(sibling)
            sibling.prefill_end = len(sibling.tokens)
            self.residence.share(leader, sibling, fork.at)

    # --- admission ---

    def _admit(self, draft: Draft) -> None:
        """From the inbox, in order: prompts while tokens are left. An offer of KV that finds no room holds up those behind it."""
        being_made = self._bytes_being_made()
        may_leave = True
        while draft.num_tokens_left > 0 and draft.short_order is None:
            sequence = self.waiting.next(may_leave=may_leave)
            if sequence is None or sequence.attempt.handoff is not None:
                return
            if sequence.attempt.prefill_only and not self._may_offer(sequence, being_made):
                may_leave = False
                continue
            if not self._take_room(sequence, sequence.num_planned_tokens, sequence.compute_end, sequence.num_hit_tokens_max):
                return
            self.waiting.begin(sequence)
            sequence.move(SequenceState.RUNNING)
            self._start_running(sequence)
            if sequence.attempt.prefill_only:
                being_made += self._table_bytes(sequence)
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
        reserved: list[Sequence] = []
        promised_blocks = promised_slots = 0
        leaving = self.waiting.next_leaving
        may_leave = leaving is not None and self._may_offer(leaving, self._bytes_being_made())
        for sequence in self.waiting if may_leave else self.waiting.staying():
            if promised_slots >= self._config.max_num_seqs:
                break
            if sequence.attempt.handoff is None:
                promised_blocks += div_ceil(sequence.num_planned_tokens, self._config.block_size_tokens)
                promised_slots += sequence.num_slots
                continue
            num_tokens = sequence.attempt.handoff.handoff.num_valid_tokens
            if not self._take_room(sequence, num_tokens, num_tokens, num_tokens, promised_blocks, promised_slots):
                break
            self.pulling[sequence.sequence_id] = sequence
            self._num_slots_used = None
            reserved.append(sequence)
        for sequence in reserved:
            self.waiting.begin(sequence)
        return reserved

    def begin_decoding(self, sequence: Sequence, num_tokens: int) -> None:
        """The pull is verified: its first `num_tokens` tokens have KV."""
        self._stop_pulling(sequence)
        sequence.move(SequenceState.RUNNING)
        self._start_running(sequence)
        sequence.num_computed_tokens = num_tokens
        self.residence.store_later(sequence, num_tokens)
        members = sequence.members()
        if sequence.fork is not None:
            self._split(sequence)
        for member in members:
            member.prefill_end = num_tokens  # what is left of each is its first token: a decode

    def take_first_token(self, sequence: Sequence, token_id: int) -> None:
        """Of a sequence that waits for KV, wherever it does."""
        was_waiting = self.waiting.remove(sequence)
        sequence.take_first_token(token_id)
        if was_waiting:
            self.waiting.add(sequence)

    def park(self, sequence: Sequence) -> None:
        """No KV will come, but another worker is about to sample the first token: it waits for that, outside the inbox."""
        if sequence.sequence_id in self.pulling:
            self._stop_pulling(sequence)
            self._give_up_blocks(sequence)
        else:
            self.waiting.remove(sequence)
        self.parked[sequence.sequence_id] = sequence

    def unpark(self, sequence: Sequence) -> None:
        """Its first token is known: it computes its tokens itself when its turn comes."""
        del self.parked[sequence.sequence_id]
        self.waiting.add(sequence)

    def back_to_waiting(self, sequence: Sequence) -> None:
        """The pull failed: its blocks are free, and it computes its tokens itself when its turn comes."""
        self._stop_pulling(sequence)
        self._give_up_blocks(sequence)
        self.waiting.add(sequence)

    def _take_room(
        self,
        sequence: Sequence,
        num_tokens: int,
        num_known_tokens: int,
        num_hit_tokens_max: int,
        promised_blocks: int = 0,
        promised_slots: int = 0,
    ) -> bool:
        """Slots and blocks for `num_tokens` tokens, cached ones first; False, and nothing taken, when there is no room."""
        if self.num_slots_used + promised_slots + sequence.num_slots > self._config.max_num_seqs:
            return False
        is_busy = bool(self.running or self.pulling)
        depends_on = (sequence.sequence_id, self._pool.num_available, len(self.running) if is_busy else -1)
        if self._blocked == depends_on:
            return False

        def may_leave(num_blocks_left: int) -> bool:
            left = num_blocks_left - promised_blocks
            return left >= 0 and (not is_busy or self._decode.may_admit(left, len(self.running), self._pool.num_blocks))

        if self.residence.take(sequence, num_tokens, num_known_tokens, num_hit_tokens_max, may_leave):
            self._counters["cached_tokens"] += sequence.num_computed_tokens
            return True
        if promised_blocks == 0:
            self._blocked = depends_on
        return False

    def _may_offer(self, sequence: Sequence, being_made_bytes: int) -> bool:
        size = self._config.block_size_tokens
        prompt_bytes = div_ceil(len(sequence.tokens), size) * size * self._token_bytes
        return self._prefill.may_offer(self.offered_bytes + being_made_bytes, prompt_bytes)

    def _bytes_being_made(self) -> int:
        """KV of running prompts that will be offered."""
        return sum(self._table_bytes(s) for s in self.running if s.attempt.prefill_only and s.attempt.early_offer is None)

    def _table_bytes(self, sequence: Sequence) -> int:
        return len(sequence.block_table) * self._config.block_size_tokens * self._token_bytes

    # --- blocks ---

    def _make_writable(self, sequence: Sequence, end: int, draft: Draft) -> bool:
        """Blocks for tokens up to `end`, the first one to be written ours alone. False: not in this step."""
        size = self._config.block_size_tokens
        table = sequence.block_table
        first = sequence.num_computed_tokens // size
        is_copied = first < len(table) and self._pool.is_shared(table[first])
        need = max(0, div_ceil(end, size) - len(table)) + is_copied
        if need == 0:
            return True
        if draft.short_order is not None and draft.short_order < sequence.order:
            return False
        if not self._make_room(need, sequence, draft):
            draft.short_order = sequence.order
            return False
        copied = self.residence.extend(sequence, need, is_copied=is_copied)
        if copied is not None:
            draft.block_copies.append(copied)
            draft.retired.append(copied[0])
        return True

    def _make_room(self, need: int, sequence: Sequence, draft: Draft) -> bool:
        """Preempt sequences after this one in order until `need` blocks are, or soon will be, available. True: they are."""
        while need > self._pool.num_available_soon:
            candidates = [
                s
                for s in self.running[bisect_left(self.running, sequence.order, key=by_order) + 1 :]
                if s.last_step_id != draft.step_id and s.block_table and s.num_samples_left > 0
            ]
            if not candidates:
                return False
            self._preempt(self._decode.victim(candidates))
        return need <= self._pool.num_available

    def _preempt(self, sequence: Sequence) -> None:
        sequence.move(SequenceState.PREEMPTED)
        self._stop_running(sequence)
        self._give_up_blocks(sequence)
        sequence.move(SequenceState.WAITING)
        self.waiting.add(sequence)
        self._counters["preemptions"] += 1

    def _force_preemption(self, draft: Draft) -> None:
        """The test seam: only what has decoded since its admission, so that everything still comes to its end."""
        every = self._config.force_preempt_every
        if every and draft.step_id % every == every - 1:
            candidates = [s for s in self.running if s.is_decoding and s.num_computed_tokens > s.prefill_end and s.num_samples_left > 0]
            if candidates:
                self._preempt(candidates[-1])

    # --- who runs ---

    def _start_running(self, sequence: Sequence) -> None:
        insort(self.running, sequence, key=by_order)
        self._batch = self._num_slots_used = None

    def _stop_running(self, sequence: Sequence) -> None:
        index = bisect_left(self.running, sequence.order, key=by_order)
        assert self.running[index] is sequence
        del self.running[index]
        self._batch = self._num_slots_used = None

    def _stop_pulling(self, sequence: Sequence) -> None:
        del self.pulling[sequence.sequence_id]
        self._num_slots_used = None

    def _give_up_blocks(self, sequence: Sequence) -> None:
        for step in self.inflight:
            step.gone.add(sequence)
        self.residence.give_back(sequence.give_up_blocks(), sequence.last_step_id)
