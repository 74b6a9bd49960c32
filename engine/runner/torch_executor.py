"""The real executor: computes BatchPlans with torch on a thread of its own.

The loop thread submits and returns; the compute thread runs steps in order and reports each through `on_done`. torch releases
the GIL inside its operations, so sockets and leases go on while a step computes.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.core.executor import BatchPlan, PlanEntry, SampledTokens, SequenceStart, StepResult
from engine.runner.config import RunnerConfig
from engine.runner.model_runner import ModelRunner, load_model_runner
from engine.runner.native_runner import NativeRunner
from engine.runner.packed_weights import Packed
from engine.runner.step_logits import NOT_FINITE, StepLogits
from kernels.sampling import Draw, logprobs_of, takes_most_likely
from kvtransfer.transport import Region

log = logging.getLogger(__name__)

OnDone = Callable[[StepResult], None]


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """What the compute thread remembers of a sequence until a plan ends it."""

    token_ids: array[int]
    draw: Draw  # over these very token_ids
    error: str | None  # why nothing can be sampled for it; None: it is well


class TorchExecutor:
    """Implements engine.core.executor.Executor over a checkpoint and a pool.

    The constructor loads the weights, which takes as long as it takes; `on_done` is called on the compute thread.
    packed_dir: see load_model_runner.
    """

    def __init__(self, model_dir: Path, config: RunnerConfig, region: Region, *, packed_dir: Path | None = None) -> None:
        self._num_threads = config.num_threads
        self._runner: ModelRunner | NativeRunner = load_model_runner(model_dir, config, region, packed_dir=packed_dir)
        self._sequences: dict[int, _Sequence] = {}
        self._plans: queue.Queue[BatchPlan | None] = queue.Queue(maxsize=config.max_inflight_steps + 1)  # + 1: the end mark
        self._thread: threading.Thread | None = None
        self._on_done: OnDone | None = None
        self._closing = False

    @property
    def packed(self) -> Packed | None:
        """How the weights are held; None: torch reads them where the files are mapped."""
        return self._runner.packed if isinstance(self._runner, NativeRunner) else None

    def start(self, on_done: OnDone) -> None:
        assert self._thread is None, "started once"
        self._on_done = on_done
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    def submit(self, plan: BatchPlan) -> None:
        """Queue a step; raises queue.Full beyond `max_inflight_steps`, which is a bug of the caller."""
        assert not self._closing, "submit after close"
        self._plans.put_nowait(plan)

    def close(self) -> None:
        """Finish the step in progress, drop the rest, join the compute thread."""
        self._closing = True
        if self._thread is not None and self._thread.is_alive():
            self._plans.put(None)
            self._thread.join()

    # --- the compute thread ---

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        assert self._on_done is not None
        while (plan := self._plans.get()) is not None:
            if self._closing:
                continue
            self._on_done(self._step(plan))

    def _step(self, plan: BatchPlan) -> StepResult:
        started = time.perf_counter()
        sampled: tuple[SampledTokens, ...] = ()
        error = None
        try:
            sampled = self._compute(plan)
        except Exception as failure:  # whatever torch raised, the core must hear of it: it decides what to do with the step's sequences
            log.exception("step failed", extra={"step_id": plan.step_id, "num_tokens": plan.num_tokens})
            error = f"{type(failure).__name__}: {failure}"
        return StepResult(step_id=plan.step_id, sampled=sampled, duration_s=time.perf_counter() - started, error=error)

    @torch.inference_mode()
    def _compute(self, plan: BatchPlan) -> tuple[SampledTokens, ...]:
        for sequence_id in plan.ended:
            self._sequences.pop(sequence_id, None)
        for start in plan.starts:
            assert start.sequence_id not in self._sequences, f"sequence {start.sequence_id} started twice"
            self._sequences[start.sequence_id] = self._admit(start)
        for source, target in plan.block_copies:
            self._runner.pool.copy_block(source, target)
        if not plan.entries:
            return ()
        sampled_entries = sorted({s.entry_index for s in plan.samples})  # an entry's logits are made once for all its choices
        made = self._runner.forward(plan.entries, [self._tokens(e) for e in plan.entries], sampled_entries)
        row_of_entry = {entry: row for row, entry in enumerate(sampled_entries)}
        rows = [row_of_entry[s.entry_index] for s in plan.samples]
        return self._sample([s.sequence_id for s in plan.samples], made, rows)

    def _admit(self, start: SequenceStart) -> _Sequence:
        """A sequence with ids outside the vocabulary is computed as if they were 0, and never sampled."""
        vocab_size = self._runner.model.vocab_size
        error = None
        token_ids = array("I", start.token_ids)
        if (highest := max(token_ids, default=0)) >= vocab_size:
            error = f"token id {highest} is outside the vocabulary of {vocab_size}"
            token_ids = array("I", [token if token < vocab_size else 0 for token in token_ids])
        if (highest := max((token for token, _ in start.sampling.logit_bias), default=0)) >= vocab_size:
            error = f"logit_bias names token {highest}, outside the vocabulary of {vocab_size}"
        return _Sequence(
            token_ids=token_ids,
            draw=Draw(params=start.sampling, choice=start.choice, token_ids=token_ids, num_prompt_tokens=start.num_prompt_tokens),
            error=error,
        )

    def _tokens(self, entry: PlanEntry) -> array[int]:
        known = self._sequences[entry.sequence_id].token_ids
        end = entry.start + entry.num_tokens
        assert end <= len(known), f"sequence {entry.sequence_id} has {len(known)} tokens, asked to compute up to {end}"
        return known[entry.start : end]

    def _sample(self, sequence_ids: list[int], made: StepLogits, rows: list[int]) -> tuple[SampledTokens, ...]:
        """The next token of each sequence from its row; what takes more than the greatest logit is drawn in one call."""
        tokens: dict[int, int] = {}  # by sequence
        drawn: list[tuple[int, int, Draw]] = []  # sequence, row and draw
        for sequence_id, row in zip(sequence_ids, rows, strict=True):
            sequence = self._sequences[sequence_id]
            if sequence.error is None and made.most_likely[row] == NOT_FINITE:
                sequence.error = f"logits after token {len(sequence.token_ids)} are not finite"
            if sequence.error is None:
                tokens[sequence_id] = made.most_likely[row]
                if not takes_most_likely(sequence.draw):
                    drawn.append((sequence_id, row, sequence.draw))
        if drawn:
            made_of = self._runner.draw(made, [row for _, row, _ in drawn], [draw for _, _, draw in drawn])
            tokens.update(zip((sequence_id for sequence_id, _, _ in drawn), made_of, strict=True))
        return tuple(self._told(sequence_id, tokens, made.logits[row]) for sequence_id, row in zip(sequence_ids, rows, strict=True))

    def _told(self, sequence_id: int, tokens: dict[int, int], logits: torch.Tensor) -> SampledTokens:
        """Remember a sequence's token; with its logprobs where they were asked for."""
        sequence = self._sequences[sequence_id]
        if sequence.error is not None:
            return SampledTokens(sequence_id=sequence_id, token_ids=array("I"), error=sequence.error)
        token_id, num_logprobs = tokens[sequence_id], sequence.draw.params.num_logprobs
        sequence.token_ids.append(token_id)
        logprobs = () if num_logprobs is None else (logprobs_of(logits, token_id, num_logprobs),)
        return SampledTokens(sequence_id=sequence_id, token_ids=sequence.token_ids[-1:], logprobs=logprobs)
