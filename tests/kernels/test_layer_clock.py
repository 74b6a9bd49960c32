"""The clock of a pool under real executors: when it says that a layer is written, it is.

A reader on another thread takes each layer's bytes the moment the clock names it, and they must be those of the finished step.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtransfer.handoff import step_begin
from kvtransfer.layer_clock import reached, wait_for
from kvtransfer.layers import layer_spans
from tests.torch_driver import GREEDY, TorchDriver

NUM_TOKENS = 480  # the layers of a step take long enough to be caught half-written


@pytest.mark.parametrize("kernels", ["portable", "torch"])
def test_a_layer_is_whole_when_the_clock_says_so(kernels: str, tiny_checkpoint: Any) -> None:
    """Seen to fail with the native store in front of the rotary rows, and with `on_layer` called before the layer."""
    model_dir: Path = tiny_checkpoint("llama", vocab_size=500)
    with TorchDriver(model_dir, kernels=kernels, num_blocks=64) as driver:
        region = driver.pool.region
        layout = region.layout
        blocks = np.frombuffer(region.blocks, dtype=np.uint8).reshape(region.num_blocks, layout.block_bytes)
        for attempt in range(10):
            start = driver.start(attempt, [(7 * i + attempt) % 500 for i in range(NUM_TOKENS)], **GREEDY)
            entry = driver.entry(attempt, 0, NUM_TOKENS)
            step_id = driver._num_steps + 1
            table = np.frombuffer(entry.block_table, dtype=np.uint32)
            blocks[table] = 0xEE
            seen: list[bytes] = []

            def follow(step_id: int = step_id, table: Any = table, seen: list[bytes] = seen) -> None:
                for layer, (offset, size) in enumerate(layer_spans(layout)):
                    wait_for(region, step_begin(step_id, layout.num_layers) + layer + 1, lambda _: None)
                    seen.append(blocks[table, offset : offset + size].tobytes())

            reader = threading.Thread(target=follow)
            reader.start()
            driver.step([entry], [(0, attempt)], starts=[start])
            reader.join(10)
            assert not reader.is_alive(), "the clock never came to the last layer"
            assert seen == [blocks[table, offset : offset + size].tobytes() for offset, size in layer_spans(layout)]
            assert reached(region) == step_begin(step_id + 1, layout.num_layers)
            driver._free = list(range(region.num_blocks))
