"""torch.distributed over gloo as a subject of `baton bench transfer`; run by a Python with torch, with -P.

    PYTHON -P benchmarks/peers/transfer_gloo.py baton/bench/spoken.py baton/bench/transfer_spoken.py

The target asks with one number; the source gathers (index_select) and sends; the target receives and scatters (index_copy_).
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from typing import Any

SOURCE, TARGET = 1, 0


def join(rank: int, file: str) -> Any:
    import torch
    import torch.distributed

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    return torch


def serve_source(pipe: Connection, file: str, spoken: str, chunk_bytes: int, pool_bytes: int) -> None:
    """For each run the lists of all repeats come by the pipe, and each repeat is asked for over gloo."""
    torch = join(SOURCE, file)
    alike = runpy.run_path(spoken)
    pool = alike["make_pool"](chunk_bytes, pool_bytes)
    alike["mark"](pool, chunk_bytes)
    rows = torch.from_numpy(pool).view(torch.int64).view(-1, chunk_bytes // 8)
    pipe.send(True)
    asked = torch.zeros(1, dtype=torch.int64)
    while True:
        try:
            lists = [torch.tensor(ids) for ids in pipe.recv()]
        except EOFError:
            os._exit(0)  # gloo would wait for its peer
        for ids in lists:
            torch.distributed.recv(asked, TARGET)
            torch.distributed.send(rows.index_select(0, ids), TARGET)


class GlooTransfers:
    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._chunk_bytes = asked["chunk_bytes"]
        self._num_blocks = asked["pool_bytes"] // self._chunk_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="bb")
        file = os.path.join(self._folder.name, "meeting")
        self._pipe, theirs = multiprocessing.Pipe()
        arguments = (theirs, file, sys.argv[2], self._chunk_bytes, asked["pool_bytes"])
        multiprocessing.get_context("spawn").Process(target=serve_source, args=arguments, daemon=True).start()
        theirs.close()
        self._torch = torch = join(TARGET, file)
        self._pool = ALIKE["make_pool"](self._chunk_bytes, asked["pool_bytes"])
        self._rows = torch.from_numpy(self._pool).view(torch.int64).view(-1, self._chunk_bytes // 8)
        assert self._pipe.recv()
        return {"subject": f"gloo of torch {torch.__version__}, index_select and index_copy"}

    def prepare(self, path: str, total_bytes: int, seed: str, repeats: int) -> None:
        count = total_bytes // self._chunk_bytes
        self._drawn = ALIKE["draw_repeats"](seed, repeats, num_blocks=self._num_blocks, count=count)

    def run(self) -> dict[str, Any]:
        torch = self._torch
        self._pipe.send([sources for sources, _ in self._drawn])
        seconds = []
        received = torch.empty((len(self._drawn[0][0]), self._chunk_bytes // 8), dtype=torch.int64)
        for repeat, (sources, targets) in enumerate(self._drawn):
            ids = torch.tensor(targets)
            began_s = time.perf_counter()
            torch.distributed.send(torch.tensor([repeat]), SOURCE)
            torch.distributed.recv(received, SOURCE)
            self._rows.index_copy_(0, ids, received)
            seconds.append(time.perf_counter() - began_s)
            ALIKE["check"](self._pool, self._chunk_bytes, sources, targets)
        return {"seconds": seconds[1:]}


if __name__ == "__main__":
    ALIKE = runpy.run_path(sys.argv[2])
    runpy.run_path(sys.argv[1])["answer"](GlooTransfers())
