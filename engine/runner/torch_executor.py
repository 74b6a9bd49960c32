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

from engine.core.executor import NOTHING_SAMPLED, BatchPlan, Entries, Sampled, Samples, SequenceStart, StepResult
from engine.runner.config import RunnerConfig
from engine.runner.model_runner import ModelRunner, load_model_runner
from engine.runner.native_runner import NativeRunner
from engine.runner.packed_weights import Packed
from engine.runner.step_logits import NOT_FINITE, StepLogits
from kernels.sampling import Draw, is_greedy, logprobs_of
from kvtransfer.transport import Region
from protocol.messages import TokenLogprobs

log = logging.getLogger(__name__)

OnDone = Callable[[StepResult], None]


@dataclass(slots=True, kw_only=True)
class _Sequence:
    """What the compute thread remembers of a sequence until a plan ends it."""

    token_ids: array[int]
    draw: Draw  # over these very token_ids
    error: str | None  # why nothing can be sampled for it; None: it is well
    greedy_from: int | None  # with so many tokens known the next is the most likely, and nothing need be drawn; None: never
    num_logprobs: int | None  # of each token; None: none are asked for


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
        sampled = NOTHING_SAMPLED
        error = None
        try:
            sampled = self._compute(plan)
        except Exception as failure:  # whatever torch raised, the core must hear of it: it decides what to do with the step's sequences
            log.exception("step failed", extra={"step_id": plan.step_id, "num_tokens": plan.num_tokens})
            error = f"{type(failure).__name__}: {failure}"
        self._runner.pool.clock.step_done(plan.step_id)
        return StepResult(step_id=plan.step_id, sampled=sampled, duration_s=time.perf_counter() - started, error=error)

    def _compute(self, plan: BatchPlan) -> Sampled:
        for sequence_id in plan.ended:
            self._sequences.pop(sequence_id, None)
        for start in plan.starts:
            assert start.sequence_id not in self._sequences, f"sequence {start.sequence_id} started twice"
            self._sequences[start.sequence_id] = self._admit(start)
        for source, target in plan.block_copies:
            self._runner.pool.copy_block(source, target)
        if not plan.entries:
            return NOTHING_SAMPLED
        entry_rows = {entry: row for row, entry in enumerate(dict.fromkeys(plan.samples.entry_indices))}  # one for all choices of an entry
        made = self._runner.forward(plan.entries, self._token_ids(plan.entries), array("q", entry_rows), step_id=plan.step_id)
        return self._sample(plan.samples, made, [entry_rows[entry] for entry in plan.samples.entry_indices])

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
            greedy_from=start.num_prompt_tokens + start.sampling.min_tokens if is_greedy(start.sampling) else None,
            num_logprobs=start.sampling.num_logprobs,
        )

    def _token_ids(self, entries: Entries) -> array[int]:
        """Those each entry computes, one after the other."""
        token_ids = array("I")
        for sequence_id, start, num_tokens in zip(entries.sequence_ids, entries.starts, entries.sizes, strict=True):
            known = self._sequences[sequence_id].token_ids
            end = start + num_tokens
            assert end <= len(known), f"sequence {sequence_id} has {len(known)} tokens, asked to compute up to {end}"
            if num_tokens == 1:
                token_ids.append(known[start])
            else:
                token_ids += known[start:end]
        return token_ids

    def _sample(self, samples: Samples, made: StepLogits, rows: list[int]) -> Sampled:
        """The next token of each sequence from its row; what takes more than the greatest logit is drawn in one call."""
        sequences = [self._sequences[sequence_id] for sequence_id in samples.sequence_ids]
        token_ids = array("I")
        errors: dict[int, str] = {}
        drawn = []
        for index, (sequence, row) in enumerate(zip(sequences, rows, strict=True)):
            token_id = made.most_likely[row]
            if token_id == NOT_FINITE and sequence.error is None:
                sequence.error = f"logits after token {len(sequence.token_ids)} are not finite"
            if sequence.error is not None:
                errors[index], token_id = sequence.error, 0
            elif sequence.greedy_from is None or len(sequence.token_ids) < sequence.greedy_from:
                drawn.append(index)
            token_ids.append(token_id)
        if drawn:
            chosen = self._runner.draw(made, [rows[i] for i in drawn], [sequences[i].draw for i in drawn])
            for index, token_id in zip(drawn, chosen, strict=True):
                token_ids[index] = token_id
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        for index, sequence in enumerate(sequences):
            if sequence.error is None:
                sequence.token_ids.append(token_ids[index])
                if sequence.num_logprobs is not None:
                    logprobs[index] = (logprobs_of(made.logits[rows[index]], token_ids[index], sequence.num_logprobs),)
        return Sampled(sequence_ids=samples.sequence_ids, token_ids=token_ids, logprobs=logprobs, errors=errors)
