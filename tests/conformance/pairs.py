"""A source and a target over each backend, for the conformance suite; most sources are other processes: this file run as a script.

Content of block b at generation g is the byte string `content(b, g)`, so a delivered block says itself whether it is the one
that was offered.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import select
import subprocess
import sys
import time
from array import array
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kvtransfer.config import TransportConfig
from kvtransfer.cuda_ipc import CudaIpcTransport
from kvtransfer.cuda_runtime import CudaRuntime
from kvtransfer.device_pool import DevicePool
from kvtransfer.faulty import FaultRates, FaultyTransport
from kvtransfer.local import LocalExchange, LocalTransport
from kvtransfer.region import PoolMemory
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import KVTransport, Ticket, Transfer
from protocol.errors import ConfigError
from protocol.kv import DigestMode, Endpoint, HandoffShard, KVLayout, LayerGroup, LayerKind, Outcome, ShardRectangle
from protocol.wire import Identity
from tests.conformance.loopback_runtime import LoopbackRuntime

SECRET = b"of this cluster"
NUM_BLOCKS = 256
GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=2, num_kv_heads=2, head_dim=32, dtype="float32")
LAYOUT = KVLayout(
    block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=2, first_layer=0, last_layer=2)
)  # 16 KiB a block
BLOCK_BYTES = LAYOUT.block_bytes
Pool = PoolMemory | DevicePool
NO_GPU = "needs an NVIDIA GPU: python -m pytest tests/conformance -m gpu -k cuda_ipc"
NO_TWO_GPUS = "needs two NVIDIA GPUs: python -m pytest tests/conformance -m gpu -k nccl"
CONFIG = TransportConfig(
    copy_slice_bytes=4 * BLOCK_BYTES, max_inflight_bytes=64 * BLOCK_BYTES, socket_buffer_bytes=64 << 10, connect_timeout_s=20
)


def has_gpus(count: int) -> bool:
    try:
        CudaRuntime(count - 1)
    except ConfigError:
        return False
    return True


def content(block_id: int, generation: int) -> bytes:
    words = np.full(BLOCK_BYTES // 8, (block_id << 32) + generation, dtype=np.uint64)
    words[::7] += np.uint64(1 << 60)
    return words.tobytes()


def write_block(pool: Pool, block_id: int, generation: int) -> None:
    """As an engine does: first the generation, then the bytes."""
    pool.raise_generations(array("I", [block_id]), array("Q", [generation]))
    if pool.region.device is not None:
        pool.region.device.write(block_id * BLOCK_BYTES, content(block_id, generation))
    else:
        pool.region.blocks[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES] = content(block_id, generation)


def make_pool(backend: str) -> Pool:
    if backend == "cuda_ipc_loopback":
        return DevicePool(LoopbackRuntime(), LAYOUT, NUM_BLOCKS)
    if backend == "cuda_ipc":
        return DevicePool(CudaRuntime(), LAYOUT, NUM_BLOCKS)
    return PoolMemory.create(LAYOUT, NUM_BLOCKS)


def make_transport(
    name: str, worker_id: str, epoch: int, run_dir: str, exchange: LocalExchange | None, pool: Pool, port: int = 0
) -> KVTransport:
    identity = Identity(name=worker_id, kind="worker", epoch=epoch, fingerprint=b"f" * 16)
    if name in ("local", "faulty"):
        assert exchange is not None
        local = LocalTransport(exchange, worker_id=worker_id, epoch=epoch)
        return local if name == "local" else FaultyTransport(local, FaultRates(), random.Random(0))
    if name == "shm":
        return ShmTransport(identity, SECRET, CONFIG, unix_path=f"{run_dir}/{worker_id}.kv")
    if pool.region.device is not None:
        runtime = pool.region.device.runtime
        return CudaIpcTransport(identity, SECRET, CONFIG, unix_path=f"{run_dir}/{worker_id}.kv", runtime=runtime)
    config = TransportConfig(
        max_inflight_bytes=CONFIG.max_inflight_bytes,
        socket_buffer_bytes=64 << 10,
        channel_bytes=24 * BLOCK_BYTES,
        stall_timeout_s=CONFIG.stall_timeout_s,
        port=port,
        ucx_port=port,
        nccl_port=port,
    )
    if name == "ucx":
        from kvtransfer.ucx import UcxTransport

        return UcxTransport(identity, SECRET, config)
    if name == "nccl":
        import torch

        from kvtransfer.nccl import NcclTransport

        return NcclTransport(identity, SECRET, config, device=torch.device("cpu"))
    if name == "nccl_gpus":
        import torch

        from kvtransfer.nccl import NcclTransport

        return NcclTransport(identity, SECRET, config, device=torch.device("cuda", 0 if worker_id.startswith("decode") else 1))
    assert name == "tcp"
    return TcpTransport(identity, SECRET, config)


class Source:
    """The process (or, for local, the transport) whose blocks are pulled."""

    def __init__(
        self, backend: str, run_dir: str, exchange: LocalExchange, *, worker_id: str = "prefill-0", epoch: int = 1, port: int = 0
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.process: subprocess.Popen[str] | None = None
        if backend in ("local", "faulty"):
            self.pool = make_pool(backend)
            for block_id in range(NUM_BLOCKS):
                write_block(self.pool, block_id, 1)
            self.transport = make_transport(backend, worker_id, epoch, run_dir, exchange, self.pool)
            self.transport.register(self.pool.region)
            self.endpoint = self.transport.endpoint()
            return
        command = [sys.executable, __file__, backend, run_dir, worker_id, str(epoch), str(port)]
        paths = filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))  # `tests` is no package that is installed
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join(paths))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.endpoint = Endpoint(**self._reply())

    def shard(self, block_ids: list[int], generation: int = 1, epoch: int | None = None) -> HandoffShard:
        return HandoffShard(
            worker_id=self.worker_id,
            rank=0,
            epoch=self.epoch if epoch is None else epoch,
            endpoint=self.endpoint,
            region_id=0,
            layout=LAYOUT,
            block_ids=array("I", block_ids),
            generations=array("Q", [generation] * len(block_ids)),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )

    def rewrite(self, block_id: int, generation: int) -> None:
        if self.process is None:
            write_block(self.pool, block_id, generation)
        else:
            self.say("rewrite", block_id, generation)
            self._reply()

    def say(self, *words: object) -> None:
        assert self.process is not None and self.process.stdin is not None
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is None:
            self.transport.close()
            self.pool.close()
            return
        self.process.kill()  # also ends a stopped process
        self.process.wait(10)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _reply(self) -> dict[str, object]:
        assert self.process is not None and self.process.stdout is not None
        reply: dict[str, object] = json.loads(self.process.stdout.readline())
        return reply


class Target:
    """Our side: a zeroed pool and the backend under test."""

    def __init__(self, backend: str, run_dir: str, exchange: LocalExchange) -> None:
        self.pool = make_pool(backend)
        self.transport = make_transport(backend, "decode-0", 7, run_dir, exchange, self.pool)
        self.transport.register(self.pool.region)
        self.seen: dict[Ticket, Outcome] = {}

    def start(self, shard: HandoffShard, target_ids: list[int], *, indices: list[int] | None = None, deadline_s: float = 20.0) -> Ticket:
        places = indices if indices is not None else list(range(len(target_ids)))
        return self.transport.start(
            Transfer(
                source=shard,
                source_indices=array("I", places),
                target_region_id=0,
                target_block_ids=array("I", target_ids),
                deadline_s=deadline_s,
            )
        )

    def outcome(self, ticket: Ticket, timeout_s: float = 25.0) -> Outcome:
        end = time.monotonic() + timeout_s
        while ticket not in self.seen:
            if self.transport.wakeup_fd() >= 0:
                ready, _, _ = select.select([self.transport.wakeup_fd()], [], [], max(0.0, end - time.monotonic()))
                assert ready, f"no outcome in {timeout_s} s"
            for done, outcome in self.transport.poll():
                assert done not in self.seen, "an outcome was told twice"
                self.seen[done] = outcome
        return self.seen[ticket]

    def pull(self, shard: HandoffShard, target_ids: list[int], *, indices: list[int] | None = None, deadline_s: float = 20.0) -> Outcome:
        return self.outcome(self.start(shard, target_ids, indices=indices, deadline_s=deadline_s))

    def block(self, block_id: int) -> bytes:
        if self.pool.region.device is not None:
            (view,) = map(bytes, self.pool.region.device.read(np.array([[block_id * BLOCK_BYTES, BLOCK_BYTES]])))
            return view
        return bytes(self.pool.region.blocks[block_id * BLOCK_BYTES : (block_id + 1) * BLOCK_BYTES])

    def close(self) -> None:
        self.transport.close()
        self.pool.close()


class Pair:
    """A source and a target; `close` also ends whatever other sources a test began."""

    def __init__(self, backend: str, run_dir: str) -> None:
        self.backend = backend
        self.run_dir = run_dir
        self.exchange = LocalExchange()
        self.sources: list[Source] = []
        self.source = self.another_source("prefill-0", 1)
        self.target = Target(backend, run_dir, self.exchange)

    def another_source(self, worker_id: str, epoch: int, port: int = 0) -> Source:
        self.sources.append(Source(self.backend, self.run_dir, self.exchange, worker_id=worker_id, epoch=epoch, port=port))
        return self.sources[-1]

    def restart_source(self) -> None:
        """The same address, another incarnation."""
        self.source.stop()
        Path(self.run_dir, "prefill-0.kv").unlink(missing_ok=True)
        said = self.source.endpoint
        self.source = self.another_source("prefill-0", self.source.epoch + 1, said.port or said.ucx_port or said.nccl_port)

    def close(self) -> None:
        self.target.close()
        for source in self.sources:
            source.stop()


def _be_a_source(backend: str, run_dir: str, worker_id: str, epoch: str, port: str) -> None:
    pool = make_pool(backend)
    for block_id in range(NUM_BLOCKS):
        write_block(pool, block_id, 1)
    transport = make_transport(backend, worker_id, int(epoch), run_dir, None, pool, int(port))
    transport.register(pool.region)
    at = transport.endpoint()
    print(json.dumps(asdict(at)), flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case ["rewrite", block_id, generation]:
                write_block(pool, block_id, generation)
                print("{}", flush=True)
            case ["churn", seconds]:
                _churn(pool, seconds)


def _churn(pool: Pool, seconds: float) -> None:
    """Write all blocks anew, one after another, with a pause between two rounds in which they can be pulled."""
    end = time.monotonic() + seconds
    generation = 1
    while time.monotonic() < end:
        generation += 1
        for block_id in range(NUM_BLOCKS):
            write_block(pool, block_id, generation)
        time.sleep(0.02)


if __name__ == "__main__":
    _be_a_source(*sys.argv[1:])
