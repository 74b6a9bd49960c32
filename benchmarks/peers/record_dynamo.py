"""Decisions of NVIDIA Dynamo's SelectionService over engines that publish KV events.

    PYTHON -P benchmarks/peers/record_dynamo.py --seed 1 --workers 4 > tests/golden/decisions/dynamo-4.json

PYTHON is one with ai-dynamo-runtime, pyzmq and msgpack.
Each engine stores what it is given and says so over ZMQ as vLLM does; the next request waits until the service's index has heard it, so
that a decision depends on nothing but what came before. The service's own defaults, blocks of 16 tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from runpy import run_path

import msgpack
import zmq

os.environ.setdefault("DYN_LOG", "error")

from dynamo._core import SelectionService

steps = run_path(str(Path(__file__).with_name("decision_workload.py")))["steps"]

BLOCK = 16
ALPHABET = 50_000
CATCH_UP_S = 10.0
SCOPE = {"model_name": "m", "routing_group": "default"}
WORKER = {"block_size": BLOCK, "data_parallel_start_rank": 0, "data_parallel_size": 1, "total_kv_blocks": 1 << 20}


class Engine:
    """Holds every prompt it was ever given."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self._socket = context.socket(zmq.PUB)
        self.port = self._socket.bind_to_random_port("tcp://127.0.0.1")
        self._sequence = 0
        self._held: set[int] = set()

    def overlap(self, hashes: Sequence[int]) -> int:
        return next((i for i, h in enumerate(hashes) if h not in self._held), len(hashes))

    def store(self, tokens: Sequence[int], hashes: Sequence[int]) -> None:
        known = self.overlap(hashes)
        if known == len(hashes):
            return
        parent = hashes[known - 1] if known else None
        new_tokens = list(tokens[known * BLOCK : len(hashes) * BLOCK])
        batch = [time.time(), [["BlockStored", list(hashes[known:]), parent, new_tokens, BLOCK, None, "GPU"]], 0]
        self._socket.send_multipart([b"", self._sequence.to_bytes(8, "big"), msgpack.packb(batch)])
        self._sequence += 1
        self._held.update(hashes)


def chain(tokens: Sequence[int]) -> list[int]:
    hashes, parent = [], b""
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        parent = hashlib.blake2b(parent + repr(tokens[start : start + BLOCK]).encode(), digest_size=7).digest()
        hashes.append(int.from_bytes(parent, "big"))
    return hashes


async def record(num_requests: int, num_workers: int, seed: int) -> list[int]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    engines = {worker: Engine(context) for worker in range(num_workers)}
    service = SelectionService(indexer_threads=1)
    for worker, engine in engines.items():
        endpoints = {"endpoint": f"http://worker-{worker}", "kv_events_endpoint": f"tcp://127.0.0.1:{engine.port}"}
        await service.upsert_worker({"worker_id": worker, **SCOPE, **WORKER, **endpoints, "max_num_batched_tokens": 1 << 16})
    await asyncio.sleep(1.5)  # the subscriptions, of which nothing tells
    chosen = []
    for step in steps(num_requests, seed=seed, block_tokens=1, alphabet=ALPHABET):
        for number in step.prefilled:
            await service.prefill_complete(str(number))
        for number in step.ended:
            await service.free_reservation(str(number))
        prompt, hashes = {**SCOPE, "token_ids": list(step.tokens)}, chain(step.tokens)
        truth = {worker: engine.overlap(hashes) for worker, engine in engines.items()}
        await _caught_up(service, prompt, truth)
        answer = await service.select_and_reserve({**prompt, "selection_id": str(step.number), "expected_output_tokens": 64})
        chosen.append(answer["worker_id"])
        engines[chosen[-1]].store(step.tokens, hashes)
    service.shutdown()
    return chosen


async def _caught_up(service: SelectionService, prompt: dict[str, object], truth: dict[int, int]) -> None:
    until_s = time.monotonic() + CATCH_UP_S
    while time.monotonic() < until_s:
        scores = await service.overlap_scores(prompt)
        if {row["worker_id"]: row["device_blocks"] for row in scores["workers"]} == truth:
            return
        await asyncio.sleep(0.002)
    raise SystemExit(f"the index did not hear of all blocks within {CATCH_UP_S:g} s; expected {truth}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=2500)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    choices = asyncio.run(record(given.requests, given.workers, given.seed))
    router = f"ai-dynamo-runtime {version('ai-dynamo-runtime')}"
    head = {"router": router, "seed": given.seed, "workers": given.workers, "block_tokens": 1, "alphabet": ALPHABET}
    print(json.dumps({**head, "chosen": "".join(map(str, choices))}))
