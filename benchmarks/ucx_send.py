"""The ucx backend beside one bare ucxx send of the same bytes: `python -m benchmarks.ucx_send --repetitions 15`.

Each row has a source and a target in processes of their own; rows take turns within a repetition, so that what else the machine does
meets all of them. Ratios are medians over repetitions of (bare seconds / row's seconds); above 1 is faster than bare.

    bare        one send of a contiguous buffer, both ends as the backend sets UCX up (error handling, shared memory)
    bare_cma    the same without error handling: UCX then takes CMA, and aborts the reader when the sender is killed
    bare_tcp    the same with error handling and UCX's own defaults: everything goes over loopback TCP
    contiguous  a pull of one run of blocks      scattered   a pull of as many blocks, none adjacent, in random order
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import select
import statistics
import subprocess
import sys
import time
from array import array

import numpy as np

from kvtransfer.config import TransportConfig
from kvtransfer.region import PoolMemory
from kvtransfer.transport import Transfer
from kvtransfer.ucx import UcxTransport
from protocol.kv import DigestMode, Endpoint, HandoffShard, KVLayout, LayerGroup, LayerKind, ShardRectangle
from protocol.wire import Identity

ROWS = ("bare", "bare_cma", "bare_tcp", "contiguous", "scattered")
SPREAD = 2  # pools are this many times larger than what is pulled


def layout(chunk_bytes: int) -> KVLayout:
    """Blocks of `chunk_bytes`, contiguous in memory."""
    group = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=chunk_bytes // 64, dtype="bfloat16")
    shard = ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1)
    return KVLayout(block_size_tokens=16, groups=(group,), shard=shard)


class Row:
    def __init__(self, name: str, size_bytes: int, chunk_bytes: int, channel_bytes: int) -> None:
        environment = dict(os.environ)
        if name == "bare":
            environment |= {"UCX_MM_ERROR_HANDLING": "y", "UCX_CMA_MEMORY_INVALIDATE": "y"}
        if name.startswith("bare"):
            environment |= {"UCX_NET_DEVICES": "lo", "UCX_MEMTYPE_CACHE": "n", "UCX_RNDV_FRAG_MEM_TYPES": "host", "UCX_LOG_FILE": "stderr"}
        command = [sys.executable, "-m", "benchmarks.ucx_send", "--row", name]
        command += ["--size-bytes", str(size_bytes), "--chunk-bytes", str(chunk_bytes), "--channel-bytes", str(channel_bytes)]
        self.processes = [
            subprocess.Popen([*command, "--side", side], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
            for side in ("source", "target")
        ]
        source, target = self.processes
        _tell(target, _told(source))
        _tell(source, _told(target))

    def run(self) -> float:
        for process in self.processes:
            _tell(process, "go")
        return float(_told(self.processes[1]))

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


def _tell(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _told(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def _say(line: str) -> None:
    print(line, flush=True)


async def be_bare(side: str, size_bytes: int, *, error_handling: bool) -> None:
    import ucxx

    buffer = np.ones(size_bytes, dtype=np.uint8)
    loop = asyncio.get_running_loop()
    ucxx.init()
    _say(bytes(ucxx.get_worker_address()).hex())
    theirs = bytes.fromhex((await loop.run_in_executor(None, sys.stdin.readline)).strip())
    address = ucxx.get_ucx_address_from_buffer(theirs)
    endpoint = await ucxx.create_endpoint_from_worker_address(address, endpoint_error_handling=error_handling)
    tag = 0
    while await loop.run_in_executor(None, sys.stdin.readline):
        start = time.perf_counter()
        tag += 1
        await (endpoint.send if side == "source" else endpoint.recv)(buffer, tag=tag, force_tag=True)
        if side == "target":
            _say(str(time.perf_counter() - start))


def be_backend(side: str, row: str, size_bytes: int, chunk_bytes: int, channel_bytes: int) -> None:
    num_blocks = size_bytes // chunk_bytes
    kv_layout = layout(chunk_bytes)
    pool = PoolMemory.create(kv_layout, SPREAD * num_blocks)
    np.frombuffer(pool.region.blocks, dtype=np.uint8)[:] = 1
    identity = Identity(name=f"{side}-0", kind="worker", epoch=1)
    transport = UcxTransport(identity, b"bench", TransportConfig(kv_transport="ucx", channel_bytes=channel_bytes))
    transport.register(pool.region)
    at = transport.endpoint()
    _say(json.dumps([at.host, at.ucx_port]))
    host, port = json.loads(sys.stdin.readline())
    ids = list(range(num_blocks))
    targets = list(ids)
    if row == "scattered":
        ids, targets = ([SPREAD * b for b in random.Random(seed).sample(range(num_blocks), num_blocks)] for seed in (1, 2))
    shard = HandoffShard(
        worker_id="source-0",
        rank=0,
        epoch=1,
        endpoint=Endpoint(host=host, ucx_port=port),
        region_id=0,
        layout=kv_layout,
        block_ids=array("I", ids),
        generations=array("Q", [0] * num_blocks),
        digest_mode=DigestMode.OFF,
        digests=b"",
    )
    transfer = Transfer(
        source=shard,
        source_indices=array("I", range(num_blocks)),
        target_region_id=0,
        target_block_ids=array("I", targets),
        deadline_s=60,
    )
    while sys.stdin.readline():
        if side == "target":
            start = time.perf_counter()
            transport.start(transfer)
            while not (done := transport.poll()):
                select.select([transport.wakeup_fd()], [], [])
            assert done[0][1].error is None, done
            _say(str(time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-bytes", type=int, default=64 << 20)
    parser.add_argument("--chunk-bytes", type=int, default=16 << 10)
    parser.add_argument("--channel-bytes", type=int, default=TransportConfig().channel_bytes)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=("source", "target"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row in ("contiguous", "scattered"):
        be_backend(args.side, args.row, args.size_bytes, args.chunk_bytes, args.channel_bytes)
        return
    if args.row:
        asyncio.run(be_bare(args.side, args.size_bytes, error_handling=args.row != "bare_cma"))
        return
    rows = {name: Row(name, args.size_bytes, args.chunk_bytes, args.channel_bytes) for name in ROWS}
    try:
        for row in rows.values():
            row.run()  # connects, and touches memory
        seconds: dict[str, list[float]] = {name: [] for name in ROWS}
        for repetition in range(args.repetitions):
            for name in ROWS if repetition % 2 else reversed(ROWS):
                seconds[name].append(rows[name].run())
    finally:
        for row in rows.values():
            row.end()
    for name, times in seconds.items():
        rate = args.size_bytes / statistics.median(times) / 1e9
        ratios = {
            base: round(statistics.median(b / t for b, t in zip(seconds[base], times, strict=True)), 2)
            for base in ("bare", "bare_cma", "bare_tcp")
        }
        print(
            json.dumps({"row": name, "gb_per_s": round(rate, 2), "best": round(args.size_bytes / min(times) / 1e9, 2), "ratio_to": ratios})
        )


if __name__ == "__main__":
    main()
