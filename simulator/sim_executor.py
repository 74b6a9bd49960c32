"""The simulated executor: the tokens of the paced one, on the virtual clock, and the memory it keeps its words in."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable

from engine.core.executor import NOTHING_SAMPLED, BatchPlan, StepResult
from engine.hash_model import WORD_BYTES, HashModel
from engine.step_time import StepTimeModel, plan_shape
from simulator.loop import VirtualLoop


class SimPool:
    """One word a token, and a generation word a block. A block about to be written anew is poisoned: stale reads cannot go unseen."""

    def __init__(self, num_blocks: int, block_size_tokens: int) -> None:
        self.block_size_tokens = block_size_tokens
        self.generations = array("Q", bytes(num_blocks * WORD_BYTES))
        self.num_steps_done = 0  # KV of steps with a lower id is written
        self._words = array("Q", bytes(num_blocks * block_size_tokens * WORD_BYTES))

    def raise_generations(self, block_ids: array[int], generations: array[int]) -> None:
        for block_id, generation in zip(block_ids, generations, strict=True):
            assert generation > self.generations[block_id]
            self.generations[block_id] = generation
            self.write_block(block_id, array("Q", [0xDEAD << 48 | generation] * self.block_size_tokens))

    def step_done(self, step_id: int) -> None:
        self.num_steps_done = step_id + 1

    def write(self, block_table: array[int], start: int, words: array[int]) -> None:
        size = self.block_size_tokens
        for index, word in enumerate(words, start):
            self._words[block_table[index // size] * size + index % size] = word

    def read(self, block_table: array[int], num_tokens: int) -> bytes:
        size = self.block_size_tokens
        words = array("Q")
        for block_id in block_table[: -(-num_tokens // size)]:
            words += self._words[block_id * size : (block_id + 1) * size]
        return words[:num_tokens].tobytes()

    def copy(self, source_block: int, target_block: int) -> None:
        self.write_block(target_block, self.read_block(source_block))

    def read_block(self, block_id: int) -> array[int]:
        size = self.block_size_tokens
        return self._words[block_id * size : (block_id + 1) * size]

    def write_block(self, block_id: int, words: array[int]) -> None:
        size = self.block_size_tokens
        self._words[block_id * size : (block_id + 1) * size] = words


class SimExecutor:
    """An `Executor`: steps take the model's time and have their effects when they end, one after the other.

    Of a plan for several steps it does as many as fit before the next call on the loop, and the one that call falls into.
    """

    def __init__(self, loop: VirtualLoop, model: HashModel, step_time: StepTimeModel) -> None:
        self.error: Callable[[BatchPlan], str | None] = lambda _: None  # a seeded fault: the whole step fails with this text
        self.after_step: Callable[[int], None] = lambda _: None  # told the id of each step whose KV is written
        self._loop = loop
        self._model = model
        self._step_time = step_time
        self._queued: deque[BatchPlan] = deque()
        self._on_done: Callable[[StepResult], None] | None = None
        self._running: BatchPlan | None = None

    @property
    def num_wrong_reads(self) -> int:
        return self._model.num_wrong_reads

    def start(self, on_done: Callable[[StepResult], None]) -> None:
        self._on_done = on_done

    def submit(self, plan: BatchPlan) -> None:
        self._queued.append(plan)
        if self._running is None:
            self._begin()

    def close(self) -> None:
        self._on_done = None
        self._queued.clear()

    def _begin(self) -> None:
        plan = self._running = self._queued.popleft()
        duration_s = self._step_time.step_s(plan_shape(plan))
        num_steps = 1
        while num_steps < plan.num_steps and self._loop.now + duration_s < self._loop.next_s:
            duration_s += self._step_time.step_s(plan_shape(plan, num_steps))
            num_steps += 1
        self._loop.call_later(duration_s, lambda: self._end(plan, num_steps, duration_s))

    def _end(self, plan: BatchPlan, num_steps: int, duration_s: float) -> None:
        self._running = None
        if self._on_done is None:
            return
        error = self.error(plan)
        sampled = self._model.run(plan, num_steps)
        self.after_step(plan.step_id)
        if error is not None:
            sampled = NOTHING_SAMPLED
        done = StepResult(step_id=plan.step_id, sampled=sampled, duration_s=duration_s, error=error, num_steps=num_steps)
        on_done = self._on_done
        if self._queued:
            self._begin()
        on_done(done)
