"""The other side of our own transfers: a process with a pool full of marked blocks that makes offers, and a plain socket beside them.

target (baton.bench.transfer_subject) ── pipe: ("offer", path, mode, ids) ──► source ── KVEndpoint ── shm, tcp, ucx ──► target
                                      ── plain TCP: (offset, size) ─────────► source ── sendall ────────────────────► target
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
import time
from array import array
from multiprocessing.connection import Connection

import numpy as np
import uvloop

from baton.bench.transfer_spoken import mark
from kvtransfer.config import TransportConfig
from kvtransfer.endpoint import KVEndpoint
from kvtransfer.mapping import HUGE_PAGE_BYTES, make_resident
from kvtransfer.region import PoolMemory
from protocol.kv import DigestMode, HandoffKind, HandoffShard, KVHandoff, KVLayout, LayerGroup, LayerKind, Lease, ShardRectangle
from protocol.kv import Endpoint as KVAddress

SECRET = b"of this benchmark"
FINGERPRINT = b"f" * 16
BLOCK_TOKENS = 16
LAYER_BYTES = 4096  # of one layer with one head of 64 in bfloat16: K and V of 16 tokens
LEASE_S = 600.0
IDLE_CLOSE_S = 3600.0  # a subject stands still while others have their turn
ASKED = struct.Struct("<QQ")  # of the plain socket: offset and size in bytes


def layout_of(name: str, chunk_bytes: int) -> KVLayout:
    """The pool layout of a shape of baton.bench.models; `name` "": layers of one head, as many as make up the chunk."""
    if name:
        from baton.bench.models import MODELS
        from engine.models.config import parse_model_config

        layout = parse_model_config(MODELS[name], {}).kv_layout(BLOCK_TOKENS)
        assert layout.block_bytes == chunk_bytes, (layout.block_bytes, chunk_bytes)
        return layout
    num_layers, rest = divmod(chunk_bytes, LAYER_BYTES)
    assert num_layers and not rest, f"a chunk of {chunk_bytes} bytes is not a multiple of {LAYER_BYTES}"
    group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=num_layers, num_kv_heads=1, head_dim=64, dtype="bfloat16")
    shard = ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=num_layers)
    return KVLayout(block_size_tokens=BLOCK_TOKENS, groups=(group,), shard=shard)


def make_pool(layout: KVLayout, pool_bytes: int, *, marked: bool) -> PoolMemory:
    """As a worker has it once its pool is in use: all of it memory, in huge pages where the system gives them."""
    pool = PoolMemory.create(layout, pool_bytes // layout.block_bytes)
    blocks = np.frombuffer(pool.region.blocks, dtype=np.uint8)
    first: int = blocks.ctypes.data
    done = -(first % HUGE_PAGE_BYTES)  # the generation words lie before the blocks: see kvtransfer.fault_ahead
    while done < len(blocks):
        make_resident(first + done, min(HUGE_PAGE_BYTES, len(blocks) - done))
        done += HUGE_PAGE_BYTES
    if marked:
        mark(blocks, layout.block_bytes)
        ids = range(pool.region.num_blocks)
        pool.raise_generations(array("I", ids), array("Q", [1] * len(ids)))
    return pool


def make_endpoint(path: str, mode: DigestMode, pool: PoolMemory, *, name: str, run_dir: str) -> KVEndpoint:
    """A worker's endpoint for one path; the rest of its config is what `baton serve` has."""
    config = TransportConfig(kv_transport=path, digest_mode=mode, idle_close_s=IDLE_CLOSE_S, fault_ahead_bytes=0)
    worker_id = f"{name}-{path}-{mode.value}"
    return KVEndpoint(config, pool, worker_id=worker_id, epoch=1, secret=SECRET, run_dir=run_dir, fingerprint=FINGERPRINT)


def serve_source(pipe: Connection, layout: KVLayout, pool_bytes: int, run_dir: str) -> None:
    """Entry of the process; it ends with its pipe."""
    source = _Source(make_pool(layout, pool_bytes, marked=True), run_dir)
    pipe.send(source.socket_port)
    uvloop.run(source.answer(pipe))


class _Source:
    def __init__(self, pool: PoolMemory, run_dir: str) -> None:
        self._pool = pool
        self._run_dir = run_dir
        self._endpoints: dict[tuple[str, DigestMode], KVEndpoint] = {}
        self._num_offers = 0
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, TransportConfig().socket_buffer_bytes)
        self.socket_port: int = listener.getsockname()[1]
        threading.Thread(target=self._serve_plain, args=(listener,), daemon=True).start()

    async def answer(self, pipe: Connection) -> None:
        """Offers as they are asked for: for each list of block ids the hand-off, and the seconds that making it took."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                path, mode, lists = await loop.run_in_executor(None, pipe.recv)
            except EOFError:
                os._exit(0)  # threads that serve peers have nobody left to serve
            endpoint = await self._endpoint(path, mode)
            offers = []
            for ids in lists:
                handoff = self._handoff(array("I", ids), endpoint.endpoint())
                began_s = time.perf_counter()
                filled = endpoint.fill_offer(handoff)
                offers.append((filled, time.perf_counter() - began_s))
            pipe.send(offers)

    async def _endpoint(self, path: str, mode: DigestMode) -> KVEndpoint:
        if (path, mode) not in self._endpoints:
            endpoint = make_endpoint(path, mode, self._pool, name="source", run_dir=self._run_dir)
            await endpoint.start()
            self._endpoints[path, mode] = endpoint
        return self._endpoints[path, mode]

    def _handoff(self, block_ids: array[int], address: KVAddress) -> KVHandoff:
        self._num_offers += 1
        region = self._pool.region
        shard = HandoffShard(
            worker_id="",  # fill_offer says the rest
            rank=0,
            epoch=0,
            endpoint=address,
            region_id=0,
            layout=region.layout,
            block_ids=block_ids,
            generations=array("Q", [region.generations[block_id] for block_id in block_ids]),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )
        return KVHandoff(
            handoff_id=f"{self._num_offers:032x}",
            kind=HandoffKind.PREFILL,
            request_id=f"{self._num_offers:032x}",
            attempt=0,
            fingerprint=FINGERPRINT,
            token_ids=array("I", bytes(4 * BLOCK_TOKENS * len(block_ids))),
            layer_watermark=region.layout.num_layers,
            first_tokens=(),
            lease=Lease(duration_s=LEASE_S),
            shards=(shard,),
        )

    def _serve_plain(self, listener: socket.socket) -> None:
        """One peer, blocking: what a socket can do with a contiguous buffer and nothing around it."""
        peer, _ = listener.accept()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while asked := peer.recv(ASKED.size, socket.MSG_WAITALL):
            offset, size = ASKED.unpack(asked)
            peer.sendall(self._pool.region.blocks[offset : offset + size])
