"""One bare ucxx send as a subject of `baton bench transfer`: as many bytes in one run; run by a Python with ucxx, with -P.

    PYTHON -P benchmarks/peers/transfer_ucxx.py baton/bench/spoken.py baton/bench/transfer_spoken.py

Endpoints are made from worker addresses without UCX's error handling, the fastest way there is on one machine (shared memory, CMA). The
target asks with a tag of eight bytes, the source sends. Where a run of as many blocks fits, it begins at the first block of each list.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import runpy
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

ASK_TAG, DATA_TAG = 1, 2
ENVIRONMENT = {"UCX_MEMTYPE_CACHE": "n", "UCX_RNDV_FRAG_MEM_TYPES": "host", "UCX_WARN_UNUSED_ENV_VARS": "n", "UCX_NET_DEVICES": "lo"}


async def meet(pipe: Connection) -> tuple[Any, Any]:
    """The module and an endpoint to the peer."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ucxx

    ucxx.init()
    pipe.send(bytes(ucxx.get_worker_address()))
    theirs = ucxx.get_ucx_address_from_buffer(pipe.recv())
    return ucxx, await ucxx.create_endpoint_from_worker_address(theirs, endpoint_error_handling=False)


def serve_source(pipe: Connection, spoken: str, chunk_bytes: int, pool_bytes: int) -> None:
    alike = runpy.run_path(spoken)
    pool = alike["make_pool"](chunk_bytes, pool_bytes)
    alike["mark"](pool, chunk_bytes)

    async def serve() -> None:
        _, endpoint = await meet(pipe)
        asked = np.empty(2, dtype=np.uint64)
        while True:
            await endpoint.recv(asked, tag=ASK_TAG, force_tag=True)
            offset, size = (int(n) for n in asked)
            if not size:
                os._exit(0)
            await endpoint.send(pool[offset : offset + size], tag=DATA_TAG, force_tag=True)

    asyncio.run(serve())


class UcxxTransfers:
    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._chunk_bytes = asked["chunk_bytes"]
        self._num_blocks = asked["pool_bytes"] // self._chunk_bytes
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (theirs, sys.argv[2], self._chunk_bytes, asked["pool_bytes"])
        multiprocessing.get_context("spawn").Process(target=serve_source, args=arguments, daemon=True).start()
        theirs.close()
        self._pool = ALIKE["make_pool"](self._chunk_bytes, asked["pool_bytes"])
        self._loop = asyncio.new_event_loop()
        ucxx, self._endpoint = self._loop.run_until_complete(meet(self._pipe))
        return {"subject": f"ucxx {ucxx.__version__}, one contiguous send"}

    def prepare(self, path: str, total_bytes: int, seed: str, repeats: int) -> None:
        self._count = total_bytes // self._chunk_bytes
        self._drawn = ALIKE["draw_repeats"](seed, repeats, num_blocks=self._num_blocks, count=self._count)

    def run(self) -> dict[str, Any]:
        return {"seconds": self._loop.run_until_complete(self._all())[1:]}

    async def _all(self) -> list[float]:
        size = self._chunk_bytes
        seconds = []
        for sources, targets in self._drawn:
            first, to = (min(ids[0], self._num_blocks - self._count) for ids in (sources, targets))
            view = self._pool[to * size : (to + self._count) * size]
            asked = np.array([first * size, len(view)], dtype=np.uint64)
            began_s = time.perf_counter()
            await self._endpoint.send(asked, tag=ASK_TAG, force_tag=True)
            await self._endpoint.recv(view, tag=DATA_TAG, force_tag=True)
            seconds.append(time.perf_counter() - began_s)
            ALIKE["check"](self._pool, size, range(first, first + self._count), range(to, to + self._count))
        return seconds


if __name__ == "__main__":
    ALIKE = runpy.run_path(sys.argv[2])
    runpy.run_path(sys.argv[1])["answer"](UcxxTransfers())
