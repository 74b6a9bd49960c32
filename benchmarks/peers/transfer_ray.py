"""Ray's object store as a subject of `baton bench transfer`; run by a Python with ray, with -P.

    PYTHON -P benchmarks/peers/transfer_ray.py baton/bench/spoken.py baton/bench/transfer_spoken.py

The source is an actor: asked for a repeat it gathers the blocks into one array, which its answer puts into the object store. The
target gets a view of it there (no copy) and scatters it over its pool.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
import time
from typing import Any

import numpy as np

STORE_BYTES = 1 << 30


def make_source() -> Any:
    """The actor's class; made here, so that Ray is imported by whoever loads it."""
    import ray

    class Source:
        def __init__(self, spoken: str, chunk_bytes: int, pool_bytes: int) -> None:
            alike = runpy.run_path(spoken)
            pool = alike["make_pool"](chunk_bytes, pool_bytes)
            alike["mark"](pool, chunk_bytes)
            self._rows = pool.view(np.uint64).reshape(-1, chunk_bytes // 8)
            self._lists: list[np.ndarray] = []

        def prepare(self, lists: list[list[int]]) -> None:
            self._lists = [np.array(ids) for ids in lists]

        def gathered(self, repeat: int) -> np.ndarray:
            return self._rows[self._lists[repeat]]

    return ray.remote(num_cpus=0)(Source)


class RayTransfers:
    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0")
        import ray

        self._ray = ray
        self._chunk_bytes = asked["chunk_bytes"]
        self._num_blocks = asked["pool_bytes"] // self._chunk_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="bb", ignore_cleanup_errors=True)
        ray.init(
            address="local",
            num_cpus=2,
            object_store_memory=STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=self._folder.name,
        )
        self._source = make_source().remote(sys.argv[2], self._chunk_bytes, asked["pool_bytes"])
        ray.get(self._source.prepare.remote([]))
        self._pool = ALIKE["make_pool"](self._chunk_bytes, asked["pool_bytes"])
        self._rows = self._pool.view(np.uint64).reshape(-1, self._chunk_bytes // 8)
        return {"subject": f"Ray {ray.__version__} object store, gathered and scattered by numpy"}

    def prepare(self, path: str, total_bytes: int, seed: str, repeats: int) -> None:
        count = total_bytes // self._chunk_bytes
        self._drawn = ALIKE["draw_repeats"](seed, repeats, num_blocks=self._num_blocks, count=count)
        self._ray.get(self._source.prepare.remote([sources for sources, _ in self._drawn]))

    def run(self) -> dict[str, Any]:
        seconds = []
        for repeat, (sources, targets) in enumerate(self._drawn):
            ids = np.array(targets)
            began_s = time.perf_counter()
            self._rows[ids] = self._ray.get(self._source.gathered.remote(repeat))
            seconds.append(time.perf_counter() - began_s)
            ALIKE["check"](self._pool, self._chunk_bytes, sources, targets)
        return {"seconds": seconds[1:]}


if __name__ == "__main__":
    ALIKE = runpy.run_path(sys.argv[2])
    runpy.run_path(sys.argv[1])["answer"](RayTransfers())
