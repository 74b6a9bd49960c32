"""Our transfers as a benchmark's subject: `python -m baton.bench.transfer_subject` speaks baton/bench/transfer_spoken.py.

This process is the target; it starts the source (baton.bench.transfer_source). A path is one of

    copy              the native scattered copy within this process, over the same lists of blocks: what a pull cannot beat
    socket            as many bytes in one run over a plain blocking TCP socket
    PATH/MODE         KVEndpoint.start_pull until its on_done, over shm, tcp or ucx with digests off, sampled or full
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from array import array
from importlib.metadata import version
from typing import Any

import numpy as np
import uvloop

from baton.bench.spoken import Unsupported, answer
from baton.bench.transfer_source import ASKED, layout_of, make_endpoint, make_pool, serve_source
from baton.bench.transfer_spoken import check, draw_repeats
from kernels.copy_runs import Runs, copy_runs
from kernels.native.library import NativeLibrary, load_library
from kvtransfer import ucx
from kvtransfer.config import TransportConfig
from kvtransfer.endpoint import KVEndpoint
from kvtransfer.region import PoolMemory
from kvtransfer.reshard import block_runs
from protocol.kv import DigestMode, KVHandoff, Outcome

PULL_TIMEOUT_S = 60.0


class BatonTransfers:
    """The target side, and the baselines that live in the same two processes."""

    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        layout = layout_of(asked["layout"], asked["chunk_bytes"])
        self._run_dir = tempfile.TemporaryDirectory(prefix="bb")  # 0700; Unix sockets have short paths
        self._pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")
        context.Process(target=serve_source, args=(theirs, layout, asked["pool_bytes"], self._run_dir.name), daemon=True).start()
        theirs.close()
        self._pool = make_pool(layout, asked["pool_bytes"], marked=False)
        self._twin: PoolMemory | None = None  # of the source's pool, in this process: what `copy` reads
        self._asked = asked
        self._layout = layout
        self._loop = uvloop.new_event_loop()
        self._endpoints: dict[str, KVEndpoint] = {}
        self._socket = socket.create_connection(("127.0.0.1", self._pipe.recv()))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, TransportConfig().socket_buffer_bytes)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        library = load_library()
        return {
            "subject": f"baton {version('baton-serve')}",
            "copy": "native" if isinstance(library, NativeLibrary) else f"reference: {library}",
            "num_layers": layout.num_layers,
        }

    def prepare(self, path: str, total_bytes: int, seed: str, repeats: int) -> None:
        num_blocks = self._pool.region.num_blocks
        count = total_bytes // self._layout.block_bytes
        drawn = draw_repeats(seed, repeats, num_blocks=num_blocks, count=count)
        self._path, self._drawn = path, drawn
        self._offer_s: list[float] = []
        self._offers: list[KVHandoff] = []
        if path in ("copy", "socket"):
            return
        transport, mode = path.split("/")
        if transport == "ucx" and not ucx.is_installed():
            raise Unsupported("ucxx is not installed in this Python")
        self._pipe.send((transport, DigestMode(mode), [sources for sources, _ in drawn]))
        made = self._pipe.recv()
        self._offers = [offer for offer, _ in made]
        self._offer_s = [seconds for _, seconds in made[1:]]
        self._loop.run_until_complete(self._connected(transport))

    def run(self) -> dict[str, Any]:
        if self._path == "copy":
            seconds = self._copies()
        elif self._path == "socket":
            seconds = self._plain()
        else:
            seconds = self._loop.run_until_complete(self._pulls())
        reply: dict[str, Any] = {"seconds": seconds[1:]}
        if self._offer_s:
            reply["offer_s"] = statistics.median(self._offer_s)
        return reply

    # --- pulls ---

    async def _connected(self, transport: str) -> KVEndpoint:
        """The first pull of a path takes every block once, so that all of the source's pool is mapped here: as after hours of service."""
        if transport in self._endpoints:
            return self._endpoints[transport]
        endpoint = make_endpoint(transport, DigestMode.OFF, self._pool, name="target", run_dir=self._run_dir.name)
        await endpoint.start()
        self._endpoints[transport] = endpoint
        every = list(range(self._pool.region.num_blocks))
        self._pipe.send((transport, DigestMode.OFF, [every]))
        ((offer, _),) = self._pipe.recv()
        await self._pull(endpoint, offer, array("I", every))
        return endpoint

    async def _pulls(self) -> list[float]:
        endpoint = await self._connected(self._path.partition("/")[0])
        seconds = []
        for offer, (sources, targets) in zip(self._offers, self._drawn, strict=True):
            seconds.append(await self._pull(endpoint, offer, array("I", targets)))
            self._check(sources, targets)
        return seconds

    async def _pull(self, endpoint: KVEndpoint, offer: KVHandoff, targets: array[int]) -> float:
        """From the call to its on_done."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[tuple[Outcome, float]] = loop.create_future()
        indices = array("I", range(len(targets)))
        began_s = time.perf_counter()
        endpoint.start_pull(offer, indices, targets, PULL_TIMEOUT_S, lambda outcome: done.set_result((outcome, time.perf_counter())))
        outcome, ended_s = await done
        if outcome.error is not None:
            raise RuntimeError(f"a pull by {outcome.path} failed: {outcome.error.value}, {outcome.detail}")
        return ended_s - began_s

    # --- what they are held against ---

    def _copies(self) -> list[float]:
        if self._twin is None:
            self._twin = make_pool(self._layout, self._asked["pool_bytes"], marked=True)
        source, target = self._twin.region.blocks, self._pool.region.blocks
        seconds = []
        for sources, targets in self._drawn:
            runs: Runs = block_runs(sources, targets) * self._layout.block_bytes
            began_s = time.perf_counter()
            copy_runs(source, target, runs)
            seconds.append(time.perf_counter() - began_s)
            self._check(sources, targets)
        return seconds

    def _plain(self) -> list[float]:
        """The blocks of the lists are only counted: where a run of as many fits, it begins at the first of them."""
        region, size = self._pool.region, self._layout.block_bytes
        seconds = []
        for sources, targets in self._drawn:
            first, to = (min(ids[0], region.num_blocks - len(ids)) for ids in (sources, targets))
            view = region.blocks[to * size : (to + len(targets)) * size]
            began_s = time.perf_counter()
            self._socket.sendall(ASKED.pack(first * size, len(view)))
            received = 0
            while received < len(view):
                count = self._socket.recv_into(view[received:], 0, socket.MSG_WAITALL)
                if not count:
                    raise ConnectionResetError("the source closed the plain socket")
                received += count
            seconds.append(time.perf_counter() - began_s)
            self._check([*range(first, first + len(sources))], [*range(to, to + len(targets))])
        return seconds

    def _check(self, sources: list[int], targets: list[int]) -> None:
        check(np.frombuffer(self._pool.region.blocks, dtype=np.uint8), self._layout.block_bytes, sources, targets)


if __name__ == "__main__":
    answer(BatonTransfers())
