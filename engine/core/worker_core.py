"""What a worker does about each thing that happens to it: `WorkerCore.on(event, now) -> commands`, for either role.

    Submit ──► inbox ──► running: prompt ──► prefill only: sample, offer, keep the blocks until the target has them
                 │              └────────► decode until every choice has ended
                 └─► KV on offer: reserve, pull, verify, acknowledge ──► decode     (failed: tell, back to the inbox, compute here)

The core owns sequences, blocks, leases and the prefix cache; it sees time only as `now`, and never waits.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, field

from engine.core.attempts import Limits, LiveAttempt, PartKey, open_sequences
from engine.core.block_pool import BlockPool
from engine.core.config import WorkerCoreConfig
from engine.core.counters import COUNTERS
from engine.core.events import (
    CacheCleared,
    CancelReceived,
    Command,
    DrainStarted,
    DropSource,
    Emit,
    Event,
    GatewayLost,
    LeaseRenewed,
    LoadDone,
    OfferCompletedReceived,
    PeerAcked,
    PeerDropped,
    PeerSaid,
    PublishKvEvents,
    PullDone,
    RaiseGenerations,
    RoleChanged,
    RunStep,
    Settle,
    Settled,
    StepDone,
    SubmitReceived,
    Tell,
    Tick,
)
from engine.core.executor import SampledTokens, StepResult
from engine.core.host_loads import HostLoads
from engine.core.host_tier import HostTier
from engine.core.intake import Intake
from engine.core.offers import Offers
from engine.core.policy import DecodePolicy, PlainDecode, PlainPrefill, PrefillPolicy
from engine.core.prefix_cache import PrefixCache
from engine.core.prefix_offers import PrefixOffers
from engine.core.prefix_pulls import PrefixPulls
from engine.core.residence import StepInFlight
from engine.core.scheduler import Scheduler
from engine.core.sequence import Sequence
from engine.step_time import FittedStepTime, StepTimeModel
from protocol.kv import FirstToken, KVLayout
from protocol.kv_messages import RequestPrefix
from protocol.lifecycle import SequenceState
from protocol.messages import NO_TOKENS, AttemptFailed, KvSnapshot, OfferCompleted, Submit, TokenColumns, TokenLogprobs, TokenRun
from protocol.request import AttemptKey, FinishReason
from protocol.worker import Role, WorkerSnapshot, WorkerState

_EWMA_WEIGHT = 0.1


@dataclass(slots=True)
class _Outputs:
    """What becomes of a step's tokens."""

    columns: dict[str, TokenColumns] = field(default_factory=dict)  # by gateway, as are runs
    runs: dict[str, list[TokenRun]] = field(default_factory=dict)
    ended: list[Sequence] = field(default_factory=list)
    prefilled: dict[LiveAttempt, None] = field(default_factory=dict)
    failed: dict[LiveAttempt, str] = field(default_factory=dict)


class WorkerCore:
    """The pure core of one worker. One event at a time; commands are performed in order."""

    def __init__(
        self,
        config: WorkerCoreConfig,
        *,
        worker_id: str,
        epoch: int,
        role: Role,
        layout: KVLayout,
        num_blocks: int,
        fingerprint: bytes,
        max_model_len: int,
        prefill: PrefillPolicy | None = None,
        decode: DecodePolicy | None = None,
        step_time: StepTimeModel | None = None,
    ) -> None:
        """policies: None takes the plain ones of engine.core.policy. step_time: None fits one to the steps seen."""
        assert layout.block_size_tokens == config.scheduler.block_size_tokens, "one block size for layout and scheduler"
        self._config = config
        self._worker_id = worker_id
        self._epoch = epoch
        self._role = role
        self._state = WorkerState.READY
        self._limits = Limits(max_model_len=max_model_len, max_num_seqs=config.scheduler.max_num_seqs, num_blocks=num_blocks, layout=layout)
        self._counters = dict.fromkeys(COUNTERS, 0)
        self._prefill = prefill or PlainPrefill(max_offered_bytes=config.max_offered_bytes)
        self._pool = BlockPool(num_blocks)
        self._cache = PrefixCache(self._pool, block_size_tokens=layout.block_size_tokens, enabled=config.scheduler.enable_prefix_caching)
        self._scheduler = Scheduler(
            config.scheduler,
            pool=self._pool,
            cache=self._cache,
            prefill=self._prefill,
            decode=decode or PlainDecode(),
            step_time=step_time or FittedStepTime(),
            token_bytes=layout.token_bytes,
            counters=self._counters,
        )
        self._offers = Offers(
            self._pool,
            self._counters,
            worker_id=worker_id,
            epoch=epoch,
            layout=layout,
            fingerprint=fingerprint,
            lease_s=config.lease_s,
            digest_mode=config.digest_mode,
        )
        self.is_offering = self._offers.is_open  # by hand-off id
        self._intake = Intake(
            config,
            self._scheduler,
            self._counters,
            layout=layout,
            fingerprint=fingerprint,
            fail=lambda live, reason: self._fail(live, reason, retryable=False),
        )
        self._prefixes = PrefixPulls(
            config,
            self._scheduler,
            self._pool,
            self._cache,
            self._counters,
            worker_id=worker_id,
            epoch=epoch,
            layout=layout,
            fingerprint=fingerprint,
        )
        self._loads = HostLoads(HostTier.of(config, layout, self._cache.log), self._pool, self._cache, self._prefixes, self._counters)
        self._prefix_offers = PrefixOffers(config, self._limits, self._pool, self._cache, self._offers)
        self._attempts: dict[PartKey, LiveAttempt] = {}
        self._remembered: OrderedDict[PartKey, None] = OrderedDict()  # ended; a repeated Submit of one is ignored
        self._num_submits = 0
        self._next_sequence_id = 0
        self._step_time_ewma_s = 0.0
        self._out: list[Command] = []

    # --- the one entrance ---

    def on(self, event: Event, now: float) -> list[Command]:
        """What to do about `event`. Steps come first, so that computing does not wait for the sending of tokens."""
        self._out = []
        if isinstance(event, StepDone):
            self._step_done(event.result, now)
        elif isinstance(event, SubmitReceived):
            self._submit(event.gateway, event.submit, now)
        elif isinstance(event, CancelReceived):
            self._cancel(AttemptKey(request_id=event.request_id, attempt=event.attempt))
        elif isinstance(event, GatewayLost):
            for live in [a for a in self._attempts.values() if a.gateway == event.gateway]:
                self._end(live)
            self._offers.cancel_of(event.gateway)
        elif isinstance(event, PullDone) and self._prefixes.is_ours(event.handoff_id):
            self._out += self._prefixes.finish(event.handoff_id, event.outcome, now)
        elif isinstance(event, PullDone):
            self._out += self._intake.finish(event.handoff_id, event.outcome, now)
        elif isinstance(event, (PeerAcked, PeerDropped, LeaseRenewed)):
            self._offers.hear(event, now)
        elif isinstance(event, OfferCompletedReceived):
            self._complete(event.completed, now)
        elif isinstance(event, LoadDone):
            self._out += self._loads.finish(event.load_id, event.error, now)
        elif isinstance(event, PeerSaid):
            self._peer_said(event, now)
        elif isinstance(event, RoleChanged):
            self._role = event.role
        elif isinstance(event, DrainStarted):
            self._state = WorkerState.DRAINING
        elif isinstance(event, CacheCleared):
            self._loads.clear()
        elif isinstance(event, Settled):
            self._scheduler.residence.store_rest()
        else:
            assert isinstance(event, Tick)
            self._offers.expire(now)
            self._out += self._intake.tick(now)
            for live in self._intake.overdue(now):
                self._fail(live, f"no first token within {self._config.max_handoff_wait_s:g} s of an early offer", retryable=True)
            self._out += self._prefixes.tick(now)
        return self._with_steps(now)

    def _with_steps(self, now: float) -> list[Command]:
        """The commands of this turn, behind the steps and pulls that can start now."""
        self._out += self._intake.start(now)
        self._scheduler.offered_bytes = self._offers.offered_bytes
        steps: list[Command] = []
        while (plan := self._scheduler.plan()) is not None:
            self._counters["max_batch"] = max(self._counters["max_batch"], len(plan.entries))
            steps.append(RunStep(plan=plan))
            if self._config.offer_early:
                self._out += self._offers.offer_early(self._scheduler.inflight[-1], now)
                self._scheduler.offered_bytes = self._offers.offered_bytes
        commands = self._loads.saves()
        block_ids, generations = self._pool.take_raised()
        if block_ids:
            commands.append(RaiseGenerations(block_ids=block_ids, generations=generations))
        commands += steps
        commands += self._out
        if events := self._cache.log.take():
            commands.append(PublishKvEvents(events=events))
        if self._scheduler.residence.has_rest:
            commands.append(Settle())
        return commands

    # --- attempts come and go ---

    def _submit(self, gateway: str, submit: Submit, now: float) -> None:
        live = LiveAttempt(key=submit.attempt.key, gateway=gateway, prefill_only=submit.prefill_only)
        if live.part in self._attempts or live.part in self._remembered:
            self._counters["duplicates_ignored"] += 1
            return
        num_waiting = len(self._scheduler.waiting) + len(self._scheduler.parked) + self._loads.num_prompts
        if self._state is WorkerState.DRAINING:
            self._refuse(live, submit, "the worker is draining", retryable=True)
        elif num_waiting >= self._config.max_waiting:
            reason = f"inbox full: {num_waiting} attempts wait, max_waiting is {self._config.max_waiting}"
            self._refuse(live, submit, reason, retryable=True)
        elif (impossible := self._limits.refusal(submit)) is not None:
            self._refuse(live, submit, impossible, retryable=False)
        else:
            self._open(live, submit, now)

    def _refuse(self, live: LiveAttempt, submit: Submit, reason: str, *, retryable: bool) -> None:
        self._counters["attempts_refused"] += 1
        if submit.handoff is not None:
            self._out.append(DropSource(handoff=submit.handoff, reason=reason))
        self._fail(live, reason, retryable=retryable)

    def _open(self, live: LiveAttempt, submit: Submit, now: float) -> None:
        attempt = submit.attempt
        num_tokens = attempt.request.num_prompt_tokens + len(attempt.delivered[attempt.live_choices[0]])
        first, second = self._prefill.order(attempt.request.priority, self._num_submits, num_tokens)
        open_sequences(
            live,
            submit,
            order=(first, second, self._num_submits),
            next_sequence_id=self._next_sequence_id,
            max_model_len=self._limits.max_model_len,
        )
        self._num_submits += 1
        self._next_sequence_id += len(live.sequences)
        self._attempts[live.part] = live
        if submit.handoff is not None:
            assert live.leader is not None
            self._scheduler.add(live.leader)
            self._out += self._intake.accept(live, submit.handoff, attempt, now)
        else:
            self._out += self._loads.begin(live, submit.prefix_pull, now)

    def _cancel(self, key: AttemptKey) -> None:
        for prefill_only in (True, False):
            live = self._attempts.get((key.request_id, key.attempt, prefill_only))
            if live is not None:
                self._end(live)
        self._offers.cancel(key)

    def _complete(self, completed: OfferCompleted, now: float) -> None:
        live = self._attempts.get((completed.request_id, completed.attempt, False))
        if live is None:
            self._counters["late_messages"] += 1
        else:
            self._out += self._intake.complete(live, completed.completion, now)

    def _fail(self, live: LiveAttempt, reason: str, *, retryable: bool) -> None:
        if live.early_offer is not None:
            self._offers.withdraw(live.early_offer.handoff_id)
        failed = AttemptFailed(request_id=live.key.request_id, attempt=live.key.attempt, reason=reason, retryable=retryable)
        self._end(live)
        self._out.append(Tell(gateway=live.gateway, message=failed))

    def _end(self, live: LiveAttempt) -> None:
        """Nothing of it is computed any more; a copy under way keeps its blocks until it has stopped."""
        self._out += self._intake.cancel(live)
        self._out += self._loads.cancel(live)
        for sequence in live.sequences.values():
            self._scheduler.finish(sequence)
        live.sequences.clear()
        self._attempts.pop(live.part, None)
        self._remembered[live.part] = None
        if len(self._remembered) > self._config.max_remembered_attempts:
            self._remembered.popitem(last=False)

    # --- prefixes of and for other workers ---

    def _peer_said(self, event: PeerSaid, now: float) -> None:
        message = event.message
        if not isinstance(message, RequestPrefix):
            self._out += self._prefixes.answered(event.worker_id, message, now)
        elif message.requester.worker_id == event.worker_id:
            self._out.append(self._prefix_offers.answer(message, now, is_draining=self._state is WorkerState.DRAINING))

    # --- a step is done ---

    def _step_done(self, result: StepResult, now: float) -> None:
        step = self._scheduler.complete(result)
        duration_s = result.duration_s / result.num_steps
        weight = 1.0 - (1.0 - _EWMA_WEIGHT) ** result.num_steps if self._counters["steps"] else 1.0
        self._step_time_ewma_s += (duration_s - self._step_time_ewma_s) * weight
        self._counters["steps"] += result.num_steps
        self._counters["busy_us"] += round(result.duration_s * 1e6)
        if result.error is not None:
            for live in dict.fromkeys(sequence.attempt for sequence in step.sequences):
                if live.part in self._attempts:
                    self._fail(live, f"step {result.step_id} failed: {result.error}", retryable=True)
            return
        self._counters["prompt_tokens_computed"] += step.shape.prefill_tokens
        self._counters["chunks"] += step.num_chunks
        self._take_tokens(step, result, now)

    def _take_tokens(self, step: StepInFlight, result: StepResult, now: float) -> None:
        """Append, emit, name full blocks; then end what has ended, and offer prompts that are computed for others."""
        out = _Outputs()
        assert result.sampled.sequence_ids == step.plan.samples.sequence_ids, "results come in the order of the plan's samples"
        first = 0
        if result.sampled.is_plain and result.num_steps == 1:
            first = len(step.batch.sequences)
            self._take_decodes(step, result.sampled.token_ids[:first], out)
        for sequence, sampled in zip(step.sampled[first:], result.sampled.since(first), strict=True):
            if sequence.state is SequenceState.DONE:
                continue  # it stopped, or was cancelled, after this step was planned: a surplus token
            live = sequence.attempt
            if sampled.error is not None:
                out.failed[live] = sampled.error
                continue
            run = self._append(sequence, sampled)
            out.runs.setdefault(live.gateway, []).append(run)
            if live.prefill_only:
                out.prefilled[live] = None
                if run.finish_reason is None:
                    live.first_tokens.append(FirstToken(choice=sequence.choice, token_id=run.token_ids[-1]))
            elif run.finish_reason is not None:
                out.ended.append(sequence)
        for gateway in out.columns | out.runs:
            runs, columns = tuple(out.runs.get(gateway, ())), out.columns.get(gateway, NO_TOKENS)
            self._out.append(Emit(gateway=gateway, step_id=result.step_id, runs=runs, tokens=columns))
        for live, error in out.failed.items():
            self._fail(live, error, retryable=False)
        self._scheduler.store(step, result.num_steps)
        for sequence in out.ended:
            if sequence.state is not SequenceState.DONE:
                self._end_choice(sequence)
        for live in out.prefilled:
            if live.part in self._attempts:
                self._offer(live, now)

    def _take_decodes(self, step: StepInFlight, token_ids: array[int], out: _Outputs) -> None:
        """One token of each row of the step's batch: most of them are told as columns, the last of a choice as a run."""
        sequences, stop_token_ids = step.batch.sequences, step.batch.stop_token_ids
        looked_at = []
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True)):
            sequence.tokens.append(token_id)
            if len(sequence.tokens) >= sequence.max_total_tokens or token_id in stop_token_ids:
                looked_at.append(row)
        surplus = {row for row, s in enumerate(sequences) if s.state is SequenceState.DONE} if step.gone else set()
        told_apart = set(surplus)
        for row in looked_at:
            sequence = sequences[row]
            if row not in surplus and (reason := self._finish_reason(sequence, token_ids[row])) is not None:
                told_apart.add(row)
                run = self._run(sequence, sequence.num_outputs - 1, token_ids[row : row + 1], reason)
                out.runs.setdefault(sequence.attempt.gateway, []).append(run)
                out.ended.append(sequence)
        self._counters["generated_tokens"] += len(sequences) - len(surplus)
        out.columns = step.batch.outputs(step.starts, token_ids, told_apart)

    def _append(self, sequence: Sequence, sampled: SampledTokens) -> TokenRun:
        """Take tokens up to the one that ends the choice; what was computed beyond it is dropped."""
        position = sequence.num_outputs
        reason: FinishReason | None = None
        count = 0
        for token_id in sampled.token_ids:
            sequence.tokens.append(token_id)
            count += 1
            reason = self._finish_reason(sequence, token_id)
            if reason is not None:
                break
        self._counters["generated_tokens"] += count
        return self._run(sequence, position, sampled.token_ids[:count], reason, sampled.logprobs[:count])

    @staticmethod
    def _run(
        sequence: Sequence,
        position: int,
        token_ids: array[int],
        reason: FinishReason | None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> TokenRun:
        live = sequence.attempt
        is_first = position == sequence.first_position and live.leader is not None
        return TokenRun(
            request_id=live.key.request_id,
            attempt=live.key.attempt,
            choice=sequence.choice,
            position=position,
            token_ids=token_ids,
            logprobs=logprobs,
            finish_reason=reason,
            num_cached_tokens=min(live.leader.num_cached_tokens, sequence.num_prompt_tokens) if is_first and live.leader else 0,
        )

    def _finish_reason(self, sequence: Sequence, token_id: int) -> FinishReason | None:
        """Of the choice whose newest token is `token_id`. Before `min_tokens` others it is no stop, as the sampler's mask has it."""
        sampling = sequence.sampling
        if sequence.num_outputs > sampling.min_tokens:
            is_eos = token_id in sampling.eos_token_ids and not sampling.ignore_eos
            if is_eos or token_id in sampling.stop_token_ids:
                return FinishReason.STOP
        if sequence.num_outputs >= sampling.max_tokens or len(sequence.tokens) >= self._limits.max_model_len:
            return FinishReason.LENGTH
        return None

    def _end_choice(self, sequence: Sequence) -> None:
        live = sequence.attempt
        self._scheduler.finish(sequence)
        del live.sequences[sequence.choice]
        if not live.sequences:
            self._end(live)

    def _offer(self, live: LiveAttempt, now: float) -> None:
        """The prompt is computed and every choice has its first token: keep the blocks for the worker that decodes."""
        self._out += self._offers.offer(live, now)
        self._end(live)

    # --- what others see ---

    def snapshot(self, now: float) -> WorkerSnapshot:
        """How the worker is at `now`; `age_s` counts from here."""
        waiting, running = self._scheduler.waiting, self._scheduler.running
        behind = waiting.num_tokens + self._loads.num_tokens
        behind += sum(max(0, s.compute_end - s.num_computed_tokens) for s in running if not s.is_decoding)
        behind += sum(step.shape.prefill_tokens for step in self._scheduler.inflight)  # planned is not computed
        return WorkerSnapshot(
            worker_id=self._worker_id,
            epoch=self._epoch,
            role=self._role,
            state=self._state,
            age_s=0.0,
            step_count=self._counters["steps"],
            last_event_number=self._cache.log.last_number,
            num_waiting=len(waiting) + len(self._scheduler.pulling) + len(self._scheduler.parked) + self._loads.num_prompts,
            num_pulling=len(self._scheduler.pulling),
            num_running=len(running),
            waiting_tokens=behind,
            running_kv_tokens=sum(s.num_computed_tokens for s in running),
            num_blocks_total=self._pool.num_blocks,
            num_blocks_free=self._pool.num_free,
            num_blocks_owned=self._pool.num_owned,
            num_blocks_leased=self._pool.num_leased,
            num_blocks_cached=self._pool.num_cached,
            num_preemptions=self._counters["preemptions"],
            step_time_ewma_s=self._step_time_ewma_s,
            counters=dict(self._counters),
        )

    def kv_snapshot(self) -> KvSnapshot:
        return self._cache.log.snapshot(self._worker_id, self._epoch)

    @property
    def awaits_time(self) -> bool:
        """True while a Tick may do something: a lease, a pull or a wait can run out, or a step be planned that could not be before."""
        return not self.is_at_rest and bool(
            not self._scheduler.inflight or len(self._offers) or len(self._intake) or len(self._prefixes) or self._scheduler.parked
        )

    @property
    def is_at_rest(self) -> bool:
        """True when nothing waits, runs, is pulled or offered, and no step is in flight."""
        return not (
            self._attempts or self._scheduler.inflight or len(self._offers) or len(self._intake) or len(self._prefixes) or len(self._loads)
        )

    def check(self) -> None:
        """Assert the conservation law, and that at rest only the prefix cache holds blocks. Linear in the pool: for tests."""
        self._pool.check()
        self._loads.check()
        if self.is_at_rest:
            assert self._pool.num_owned == 0 and self._pool.num_leased == 0, "a block is held by nobody that lives"
