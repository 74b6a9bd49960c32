"""Drives a real TorchExecutor step by step as a scheduler would, and keeps the logits it sampled from."""

from __future__ import annotations

import queue
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from engine.core.executor import BatchPlan, Entries, PlanEntry, SampledTokens, SampleEntry, Samples, SequenceStart, StepResult
from engine.models.config import load_model_config
from engine.runner.config import RunnerConfig
from engine.runner.torch_executor import TorchExecutor
from kvtransfer.region import PoolMemory
from protocol.request import SamplingParams

GREEDY = {"temperature": 0.0, "ignore_eos": True}


class TorchDriver:
    """`with TorchDriver(model_dir) as driver`: starts, chunks and samples sequences; blocks are given out in a scattered order."""

    def __init__(
        self,
        model_dir: Path,
        *,
        numerics: Any = "reference",
        dtype: str = "auto",
        kernels: Any = "auto",
        num_threads: int = 1,
        block_size: int = 16,
        num_blocks: int = 256,
    ) -> None:
        torch.set_num_threads(1)  # the oracle beside it too: on two shared cores threads wait for each other
        model = load_model_config(model_dir, dtype=dtype, numerics=numerics)
        self.pool = PoolMemory.create(model.kv_layout(block_size), num_blocks)
        self.executor = TorchExecutor(
            model_dir, RunnerConfig(numerics=numerics, dtype=dtype, kernels=kernels, num_threads=num_threads), self.pool.region
        )
        self.block_size = block_size
        self.tables: dict[int, array[int]] = {}
        self.logits: dict[int, list[Any]] = {}  # per sequence, one row a sample
        self._free = [(i * 7 + 3) % num_blocks for i in range(num_blocks)] if num_blocks % 7 else list(range(num_blocks))
        self._results: queue.Queue[StepResult] = queue.Queue()
        self._num_steps = 0
        self._rows: Any = None
        forward = self.executor._runner.forward

        def recording(*args: Any, **options: Any) -> Any:
            made = forward(*args, **options)
            self._rows = made.logits
            return made

        self.executor._runner.forward = recording  # type: ignore[method-assign]

    def __enter__(self) -> TorchDriver:
        self.executor.start(self._results.put)
        return self

    def __exit__(self, *_: object) -> None:
        self.executor.close()
        self.pool.close()

    def start(
        self, sequence_id: int, tokens: Sequence[int], *, num_prompt_tokens: int | None = None, choice: int = 0, **sampling: Any
    ) -> Any:
        self.tables[sequence_id] = array("I")
        self.logits[sequence_id] = []
        return SequenceStart(
            sequence_id=sequence_id,
            token_ids=array("I", tokens),
            num_prompt_tokens=len(tokens) if num_prompt_tokens is None else num_prompt_tokens,
            choice=choice,
            sampling=SamplingParams(max_tokens=1000, **sampling),
        )

    def entry(self, sequence_id: int, start: int, num_tokens: int) -> PlanEntry:
        table = self.tables[sequence_id]
        while len(table) * self.block_size < start + num_tokens:
            table.append(self._free.pop(0))
        return PlanEntry(sequence_id=sequence_id, start=start, num_tokens=num_tokens, block_table=table[:])

    def step(
        self,
        entries: Sequence[PlanEntry] = (),
        samples: Sequence[tuple[int, int]] = (),
        *,
        starts: Sequence[SequenceStart] = (),
        ended: Sequence[int] = (),
        block_copies: Sequence[tuple[int, int]] = (),
    ) -> tuple[SampledTokens, ...]:
        """One step, waited for; `samples` are (entry index, sequence id)."""
        result = self.step_result(entries, samples, starts=starts, ended=ended, block_copies=block_copies)
        assert result.error is None, result.error
        rows = {entry: row for row, entry in enumerate(sorted({entry for entry, _ in samples}))}
        for entry, sequence_id in samples:
            self.logits[sequence_id].append(self._rows[rows[entry]].clone())
        return tuple(result.sampled)

    def step_result(
        self,
        entries: Sequence[PlanEntry] = (),
        samples: Sequence[tuple[int, int]] = (),
        *,
        starts: Sequence[SequenceStart] = (),
        ended: Sequence[int] = (),
        block_copies: Sequence[tuple[int, int]] = (),
    ) -> StepResult:
        self._num_steps += 1
        plan = BatchPlan(
            step_id=self._num_steps,
            ended=tuple(ended),
            starts=tuple(starts),
            block_copies=tuple(block_copies),
            entries=Entries.of(entries),
            samples=Samples.of(SampleEntry(entry_index=entry, sequence_id=sequence_id) for entry, sequence_id in samples),
        )
        self.executor.submit(plan)
        result = self._results.get(timeout=60)
        assert result.step_id == self._num_steps
        return result

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int, *, chunk: int = 1000, **sampling: Any) -> list[list[int]]:
        """All prompts in chunks of `chunk` tokens, then all sequences decode together; sequence ids are their indices."""
        starts = [self.start(i, prompt, **({**GREEDY, **sampling})) for i, prompt in enumerate(prompts)]
        outputs: list[list[int]] = [[] for _ in prompts]
        computed = [0] * len(prompts)
        while any(len(output) < num_tokens for output in outputs):
            entries, samples = [], []
            for i, prompt in enumerate(prompts):
                known = len(prompt) + len(outputs[i])
                if len(outputs[i]) == num_tokens:
                    continue
                size = min(chunk, known - computed[i])
                if computed[i] + size == known:
                    samples.append((len(entries), i))
                entries.append(self.entry(i, computed[i], size))
                computed[i] += size
            for sampled in self.step(entries, samples, starts=starts):
                assert sampled.error is None, sampled.error
                outputs[sampled.sequence_id].extend(sampled.token_ids)
            starts = []
        return outputs
