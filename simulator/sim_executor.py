"""The simulated executor: steps on the virtual clock, and the memory in which a model of words keeps them."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from engine.core.executor import NOTHING_SAMPLED, BatchPlan, Sampled, StepResult
from engine.hash_model import WORD_BYTES
from engine.step_time import StepShape, StepTimeModel, plan_shape
from simulator.loop import Timer, VirtualLoop
from simulator.noise import Lognormal

NO_NOISE = Lognormal(sigma=0.0)
_LEG_STEPS = 8


class SimPool:
    """A generation word for each block and, where KV is simulated, a word for each token.

    A block about to be written anew is poisoned: stale reads cannot go unseen.
    """

    def __init__(self, num_blocks: int, block_size_tokens: int, *, holds_words: bool = True) -> None:
        self.block_size_tokens = block_size_tokens
        self.holds_words = holds_words
        self.generations = [0] * num_blocks
        self.num_steps_done = 0  # KV of steps with a lower id is written
        self._words = np.zeros((num_blocks if holds_words else 0, block_size_tokens), dtype=np.uint64)

    def raise_generations(self, block_ids: array[int], generations: array[int]) -> None:
        mine = self.generations
        for block_id, generation in zip(block_ids, generations, strict=True):
            assert generation > mine[block_id]
            mine[block_id] = generation
        if self.holds_words:
            self._words[np.asarray(block_ids)] = (np.asarray(generations) | np.uint64(0xDEAD << 48))[:, None]

    def step_done(self, step_id: int) -> None:
        self.num_steps_done = step_id + 1

    def write(self, block_table: array[int], start: int, words: array[int]) -> None:
        places = np.arange(start, start + len(words))
        blocks = np.frombuffer(block_table, dtype=np.uint32)[places // self.block_size_tokens]
        self._words[blocks, places % self.block_size_tokens] = np.frombuffer(words, dtype=np.uint64)

    def read(self, block_table: array[int], num_tokens: int) -> bytes:
        blocks = np.frombuffer(block_table, dtype=np.uint32)[: -(-num_tokens // self.block_size_tokens)]
        return self._words[blocks].tobytes()[: num_tokens * WORD_BYTES]

    def copy(self, source_block: int, target_block: int) -> None:
        self._words[target_block] = self._words[source_block]

    def read_block(self, block_id: int) -> array[int]:
        """Its words; none where KV is not simulated."""
        return array("Q", self._words[block_id].tobytes()) if self.holds_words else array("Q")

    def write_block(self, block_id: int, words: array[int]) -> None:
        if self.holds_words:
            self._words[block_id] = words


class TokenModel(Protocol):
    """What samples: engine.hash_model.HashModel reads KV, simulator.prompt_tokens.PromptTokens believes that it is there."""

    num_wrong_reads: int

    def run(self, plan: BatchPlan, num_steps: int = 1) -> Sampled:
        """Effects of the first `num_steps` steps of `plan`, in the order BatchPlan states; their samples."""
        ...


class SimExecutor:
    """An `Executor`: steps take the model's time and have their effects when they end, one after the other.

    A plan for several steps is done whole, unless `cut` ends it with the step that is being computed.
    """

    def __init__(self, loop: VirtualLoop, model: TokenModel, step_time: StepTimeModel, noise: Lognormal = NO_NOISE) -> None:
        """noise: of each step's time, by its number among all steps of this executor."""
        self.error: Callable[[BatchPlan], str | None] = lambda _: None  # a seeded fault: the whole step fails with this text
        self.after_step: Callable[[int], None] = lambda _: None  # told the id of each step whose KV is written
        self._loop = loop
        self._model = model
        self._step_time = step_time
        self._noise = noise
        self._num_steps = 0  # begun, each of a plan for several counted
        self._queued: deque[BatchPlan] = deque()
        self._on_done: Callable[[StepResult], None] | None = None
        self._running: BatchPlan | None = None
        self._began_s = 0.0
        self._ends_s: list[float] = []  # of the running plan's steps
        self._timer: Timer | None = None
        self._shape = StepShape()  # of its first step

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

    @property
    def num_steps_past(self) -> int:
        """Of the running plan those that are over, and that nobody was told of yet."""
        return bisect_right(self._ends_s, self._loop.now) if self._running is not None else 0

    @property
    def past_s(self) -> float:
        """How long they took."""
        num_past = self.num_steps_past
        return self._ends_s[num_past - 1] - self._began_s if num_past else 0.0

    @property
    def num_samples(self) -> int:
        """Of each step of the running plan."""
        return len(self._running.samples) if self._running is not None else 0

    def cut(self) -> None:
        """The batch may change: of several steps, let the one that is being computed be the last."""
        if self._running is None or self._running.num_steps == 1:
            return
        assert self._timer is not None
        self._timer.cancel()
        del self._ends_s[self.num_steps_past + 1 :]
        self._timer = self._loop.call_at(max(self._loop.now, self._ends_s[-1]), self._end)

    def _begin(self) -> None:
        plan = self._running = self._queued.popleft()
        self._shape = plan_shape(plan)
        self._began_s, self._ends_s = self._loop.now, []
        self._go_on()

    def _go_on(self) -> None:
        """To the end of the plan, or a leg of it: what is cut soon need not be foreseen to its end."""
        plan, shape, ends_s = self._running, self._shape, self._ends_s
        assert plan is not None
        end_s = ends_s[-1] if ends_s else self._began_s
        for step in range(len(ends_s), min(len(ends_s) + _LEG_STEPS, plan.num_steps)):
            step_s = self._step_time.step_s(shape if step == 0 else shape.with_decodes(0, step * shape.decodes))
            end_s += step_s * self._noise.factor(self._num_steps + step)
            ends_s.append(end_s)
        self._timer = self._loop.call_at(end_s, self._go_on if len(ends_s) < plan.num_steps else self._end)

    def _end(self) -> None:
        plan, num_steps = self._running, len(self._ends_s)
        assert plan is not None
        self._running = self._timer = None
        self._num_steps += num_steps
        if self._on_done is None:
            return
        error = self.error(plan)
        sampled = self._model.run(plan, num_steps)
        self.after_step(plan.step_id)
        if error is not None:
            sampled = NOTHING_SAMPLED
        duration_s = self._loop.now - self._began_s
        done = StepResult(step_id=plan.step_id, sampled=sampled, duration_s=duration_s, error=error, num_steps=num_steps)
        on_done = self._on_done
        if self._queued:
            self._begin()
        on_done(done)
