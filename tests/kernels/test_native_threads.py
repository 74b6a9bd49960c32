"""Compute threads cost nothing while there is nothing to compute: they spin 50 us after a step, then sleep.

How: CPU time of this whole process over half a second in which a loaded engine with three threads has no step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from tests.native_paths import PATHS
from tests.torch_driver import TorchDriver

IDLE_S = 0.5


def test_an_idle_engine_burns_no_cpu(tiny_checkpoint: Callable[..., Path]) -> None:
    with TorchDriver(tiny_checkpoint("llama"), kernels=PATHS[0], num_threads=3) as driver:
        driver.generate([[5, 6, 7] * 20], 4)
        time.sleep(0.05)  # the last spin
        before = time.process_time()
        time.sleep(IDLE_S)
        burnt_s = time.process_time() - before
    assert burnt_s < 0.1 * IDLE_S
