"""NIXL as a subject of `baton bench transfer`: READ from another process's DRAM over UCX; run by its own environment's Python, with -P.

    PYTHON -P benchmarks/peers/transfer_nixl.py baton/bench/spoken.py baton/bench/transfer_spoken.py

As vLLM's connector does it: every block is described once, when the processes meet; a transfer names indices, is posted, and polled
until it is done. A pool is one registered buffer. The variables of UCX are the caller's.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

TIMEOUT_S = 60.0


def make_agent(name: str, pool: np.ndarray) -> Any:
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    if agent.register_memory([(pool.ctypes.data, len(pool), 0, "")], "DRAM") is None:
        raise RuntimeError("NIXL does not register the pool")
    return agent


def serve_source(pipe: Connection, spoken: str, chunk_bytes: int, pool_bytes: int) -> None:
    """The side that is read from: it only has to live."""
    alike = runpy.run_path(spoken)
    pool = alike["make_pool"](chunk_bytes, pool_bytes)
    alike["mark"](pool, chunk_bytes)
    agent = make_agent("source", pool)
    pipe.send((agent.get_agent_metadata(), pool.ctypes.data))
    try:
        pipe.recv()
    except EOFError:
        return


class NixlTransfers:
    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._chunk_bytes = asked["chunk_bytes"]
        self._num_blocks = asked["pool_bytes"] // self._chunk_bytes
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        arguments = (theirs, sys.argv[2], self._chunk_bytes, asked["pool_bytes"])
        context.Process(target=serve_source, args=arguments, daemon=True).start()
        theirs.close()
        self._pool = ALIKE["make_pool"](self._chunk_bytes, asked["pool_bytes"])
        self._agent = make_agent("target", self._pool)
        metadata, address = self._pipe.recv()
        self._peer = self._agent.add_remote_agent(metadata)
        self._ours = self._described("", self._pool.ctypes.data)
        self._theirs = self._described(self._peer, address)
        return {"subject": f"NIXL {version('nixl')} READ, UCX, DRAM"}

    def _described(self, agent: str, address: int) -> Any:
        blocks = [(address + i * self._chunk_bytes, self._chunk_bytes, 0) for i in range(self._num_blocks)]
        handle = self._agent.prep_xfer_dlist(agent or "NIXL_INIT_AGENT", blocks, "DRAM")
        if not handle:
            raise RuntimeError(f"NIXL does not describe {len(blocks)} blocks")
        return handle

    def prepare(self, path: str, total_bytes: int, seed: str, repeats: int) -> None:
        count = total_bytes // self._chunk_bytes
        self._drawn = ALIKE["draw_repeats"](seed, repeats, num_blocks=self._num_blocks, count=count)

    def run(self) -> dict[str, Any]:
        return {"seconds": [self._read(np.array(s, dtype=np.int32), np.array(t, dtype=np.int32)) for s, t in self._drawn][1:]}

    def _read(self, sources: np.ndarray, targets: np.ndarray) -> float:
        agent = self._agent
        began_s = time.perf_counter()
        handle = agent.make_prepped_xfer("READ", self._ours, targets, self._theirs, sources, b"")
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
            if time.perf_counter() - began_s > TIMEOUT_S:
                raise RuntimeError(f"not done after {TIMEOUT_S} s")
        seconds = time.perf_counter() - began_s
        if state != "DONE":
            raise RuntimeError(f"the transfer ended as {state}")
        agent.release_xfer_handle(handle)
        ALIKE["check"](self._pool, self._chunk_bytes, sources, targets)
        return seconds


if __name__ == "__main__":
    ALIKE = runpy.run_path(sys.argv[2])
    runpy.run_path(sys.argv[1])["answer"](NixlTransfers())
