"""The paced executor: real processes and real KV bytes at a model's pace, without weights. Many workers fit on two cores.

Each step writes every token's word into all rows of its blocks, reads the context back from them, samples from what it read
(engine/hash_model.py), and sleeps for what the step-time model leaves. So transfers, leases and losses are as real as with torch.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from array import array
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from engine.core.executor import NOTHING_SAMPLED, BatchPlan, StepResult
from engine.hash_model import WORD_BYTES, HashModel
from engine.step_time import StepTimeModel, plan_shape
from kvtransfer.layer_clock import LayerClock
from kvtransfer.transport import Region
from protocol.errors import ConfigError
from protocol.kv import DTYPE_SIZE_BYTES

log = logging.getLogger("baton.paced")

MAX_QUEUED_STEPS = 4  # more than a scheduler ever has in flight


class RegionMemory:
    """Words in the blocks of a pool: a token's word fills its row in every layer, K and V, and head.

    Memory order of a block, group after group: [layer][2][kv_head][token][dim]. A read takes token i from row i mod number of rows,
    so that a context of some length touches every layer.
    """

    def __init__(self, region: Region) -> None:
        layout = region.layout
        words = np.frombuffer(region.blocks, dtype=np.uint64).reshape(region.num_blocks, -1)
        self._size = layout.block_size_tokens
        self._words = words
        self._groups: list[npt.NDArray[np.uint64]] = []  # a view a group: [block, row, token, word]
        bases: list[int] = []
        strides: list[int] = []
        offset = 0
        for group in layout.groups:
            row_bytes = group.head_dim * DTYPE_SIZE_BYTES[group.dtype]
            if row_bytes % WORD_BYTES:
                raise ConfigError(f"the paced executor needs rows of whole {WORD_BYTES}-byte words; head_dim makes {row_bytes} bytes")
            row_words = row_bytes // WORD_BYTES
            num_rows = 2 * group.num_layers * group.num_kv_heads
            end = offset + num_rows * self._size * row_words
            self._groups.append(words[:, offset:end].reshape(region.num_blocks, num_rows, self._size, row_words))
            bases += [offset + row * self._size * row_words for row in range(num_rows)]
            strides += [row_words] * num_rows
            offset = end
        self._bases = np.array(bases, dtype=np.int64)
        self._strides = np.array(strides, dtype=np.int64)

    def write(self, block_table: array[int], start: int, words: array[int]) -> None:
        values = np.frombuffer(words, dtype=np.uint64)
        done = 0
        while done < len(values):
            block, slot = divmod(start + done, self._size)
            count = min(self._size - slot, len(values) - done)
            for group in self._groups:
                group[block_table[block], :, slot : slot + count, :] = values[done : done + count][None, :, None]
            done += count

    def read(self, block_table: array[int], num_tokens: int) -> bytes:
        positions = np.arange(num_tokens)
        rows = positions % len(self._bases)
        blocks = np.frombuffer(block_table, dtype=np.uint32)[positions // self._size]
        places = self._bases[rows] + (positions % self._size) * self._strides[rows]
        return self._words[blocks, places].tobytes()

    def copy(self, source_block: int, target_block: int) -> None:
        self._words[target_block] = self._words[source_block]


class PacedExecutor:
    """An `Executor` over one region, computing on a thread of its own."""

    def __init__(
        self,
        region: Region,
        step_time: StepTimeModel,
        *,
        vocab_size: int,
        eos_period: int = 0,
    ) -> None:
        """eos_period: one token in so many is EOS, where the request has one; 0: never."""
        self._model = HashModel(RegionMemory(region), vocab_size=vocab_size, eos_period=eos_period)
        self._num_layers = region.layout.num_layers
        self._clock = LayerClock(region)
        self._step_time = step_time
        self._plans: queue.Queue[BatchPlan | None] = queue.Queue(maxsize=MAX_QUEUED_STEPS)
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def num_wrong_reads(self) -> int:
        """Steps' entries whose context was not what its tokens call for: 0, or something moved or reused a block it must not."""
        return self._model.num_wrong_reads

    def start(self, on_done: Callable[[StepResult], None]) -> None:
        self._thread = threading.Thread(target=self._compute, args=(on_done,), name="paced-compute", daemon=True)
        self._thread.start()

    def submit(self, plan: BatchPlan) -> None:
        self._plans.put_nowait(plan)

    def close(self) -> None:
        self._closing.set()
        if self._thread is not None:
            try:
                self._plans.put_nowait(None)
            except queue.Full:
                log.debug("steps are dropped at close")  # the thread looks at `_closing` after each step
            self._thread.join()

    def _compute(self, on_done: Callable[[StepResult], None]) -> None:
        while (plan := self._plans.get()) is not None and not self._closing.is_set():
            on_done(self._step(plan))

    def _step(self, plan: BatchPlan) -> StepResult:
        began = time.monotonic()
        try:
            sampled = self._model.run(plan)
        except (AssertionError, LookupError, ValueError) as error:  # a plan that cannot be computed is the plan's failure, not ours
            log.exception("step failed", extra={"step": plan.step_id})
            return StepResult(step_id=plan.step_id, sampled=NOTHING_SAMPLED, duration_s=time.monotonic() - began, error=repr(error))
        self._pace(plan, began)
        self._clock.step_done(plan.step_id)
        return StepResult(step_id=plan.step_id, sampled=sampled, duration_s=time.monotonic() - began)

    def _pace(self, plan: BatchPlan, began: float) -> None:
        """Sleep for what is left of the step's time; where it computes prompts, its layers are told as they would become ready."""
        step_s = self._step_time.step_s(plan_shape(plan))
        if any(size > 1 for size in plan.entries.sizes):
            for layer in range(self._num_layers):
                self._sleep_until(began + step_s * (layer + 1) / self._num_layers)
                self._clock.layer_done(plan.step_id, layer)
        self._sleep_until(began + step_s)

    def _sleep_until(self, moment: float) -> None:
        left_s = moment - time.monotonic()
        if left_s > 0:
            self._closing.wait(left_s)
