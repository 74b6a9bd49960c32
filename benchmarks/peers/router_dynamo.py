"""NVIDIA Dynamo's router as a subject of `baton bench router`; run by a Python with ai-dynamo-runtime, with -P.

    PYTHON -P benchmarks/peers/router_dynamo.py baton/bench/spoken.py

Hashing is compute_block_hash_for_seq, matching RadixTree.find_matches, deciding SelectionService.select_and_reserve, which hashes the
prompt itself and books. Its index is empty, since it takes KV events only from ZMQ: its choice is by load, which costs it less than ours.
The shape of the tree is that of baton/bench/router_load.py: 64 shared beginnings of 128 blocks on 48 workers, other runs of 128 on one.
"""

from __future__ import annotations

import asyncio
import json
import os
import runpy
import sys
import time
from importlib.metadata import version
from random import Random
from typing import Any

os.environ.setdefault("DYN_LOG", "error")

BLOCK_TOKENS = 16
SHARED, RUN = 64, 128  # beginnings, blocks of each
HOLDERS = 48
LENGTHS = {"4k": 4096, "32k": 32768}
WORKER = {"model_name": "model", "block_size": BLOCK_TOKENS, "max_num_batched_tokens": 1 << 16, "total_kv_blocks": 1 << 22}
PREFILLING, LIVE = 32, 1000  # reservations before their first token, and in all


class DynamoRouter:
    def load(self, asked: dict[str, Any]) -> dict[str, Any]:
        import dynamo._core as core

        self._core = core
        self._rng = Random(f"{asked['seed']} dynamo")
        self._loop = asyncio.new_event_loop()
        if asked["stage"] == "index":
            self._fill(asked["num_workers"], asked["num_blocks"])
        elif asked["stage"] in ("decide", "wide"):
            self._loop.run_until_complete(self._start(asked["num_workers"]))
        else:
            raise UNSUPPORTED("it is measured within a process only")
        return {"subject": f"ai-dynamo-runtime {version('ai-dynamo-runtime')}"}

    def prepare(self, figure: str, repeats: int) -> None:
        figures = {"hash/4k": self._hash, "match/4k/search": self._match, "decide/4k": self._decide, "decide/32k": self._decide}
        if figure not in figures or (figure.startswith("match") and not hasattr(self, "_tree")):
            raise UNSUPPORTED("it has no such figure")
        self._asked = (figures[figure], LENGTHS[figure.split("/")[1]], repeats)

    def run(self) -> dict[str, Any]:
        act, num_tokens, repeats = self._asked
        return {"seconds": act(num_tokens, repeats)}

    def _hash(self, num_tokens: int, repeats: int) -> list[float]:
        seconds = []
        for _ in range(repeats):
            tokens = self._tokens(num_tokens)
            began_s = time.perf_counter()
            self._core.compute_block_hash_for_seq(tokens, BLOCK_TOKENS)
            seconds.append(time.perf_counter() - began_s)
        return seconds

    # --- the index ---

    def _fill(self, num_workers: int, num_blocks: int) -> None:
        rng = self._rng
        self._tree = tree = self._core.RadixTree()
        number = 0

        def store(worker: int, parent: int | None, hashes: list[int]) -> None:
            nonlocal number
            number += 1
            blocks = [{"block_hash": h, "tokens_hash": h} for h in hashes]
            event = {"event_id": number, "data": {"stored": {"parent_hash": parent, "blocks": blocks}}}
            tree.apply_event(worker, json.dumps(event).encode())

        shared = [self._hashes() for _ in range(SHARED)]
        holders = [rng.sample(range(num_workers), min(HOLDERS, max(1, num_workers * 3 // 4))) for _ in shared]
        for beginning, workers in zip(shared, holders, strict=True):
            for worker in workers:
                store(worker, None, beginning)
        self._held: list[list[int]] = []
        for run in range((num_blocks - SHARED * RUN) // RUN):
            beginning, rest = shared[run % SHARED], self._hashes()
            store(rng.choice(holders[run % SHARED]), beginning[-1], rest)
            if len(self._held) < 4096:
                self._held.append(beginning + rest)

    def _match(self, num_tokens: int, repeats: int) -> list[float]:
        """Half of the prompts are held to their end, half to the middle."""
        seconds = []
        for _ in range(repeats):
            chain = self._rng.choice(self._held)
            if self._rng.random() < 0.5:
                chain = chain[:RUN] + self._hashes()
            began_s = time.perf_counter()
            scores = self._tree.find_matches(chain).scores
            seconds.append(time.perf_counter() - began_s)
            assert scores, "a shared beginning is held"
        return seconds

    def _hashes(self) -> list[int]:
        return [self._rng.getrandbits(63) for _ in range(RUN)]

    # --- decisions ---

    async def _start(self, num_workers: int) -> None:
        self._service = self._core.SelectionService(indexer_threads=1)
        for worker in range(num_workers):
            endpoints = {"endpoint": f"http://127.0.0.1:{20000 + worker}", "kv_events_endpoint": "tcp://127.0.0.1:39999"}
            await self._service.upsert_worker({"worker_id": worker, **WORKER, **endpoints})
        self._number = 0
        self._live: list[str] = []

    def _decide(self, num_tokens: int, repeats: int) -> list[float]:
        return self._loop.run_until_complete(self._decisions(num_tokens, repeats))

    async def _decisions(self, num_tokens: int, repeats: int) -> list[float]:
        seconds, service = [], self._service
        for _ in range(repeats):
            self._number += 1
            name = f"{self._number:032x}"
            request = {"model_name": "model", "selection_id": name, "token_ids": self._tokens(num_tokens), "expected_output_tokens": 256}
            began_s = time.perf_counter()
            await service.select_and_reserve(request)
            seconds.append(time.perf_counter() - began_s)
            self._live.append(name)
            if len(self._live) > PREFILLING:
                await service.prefill_complete(self._live[-PREFILLING])
            if len(self._live) > LIVE:
                await service.free_reservation(self._live.pop(0))
        return seconds

    def _tokens(self, count: int) -> list[int]:
        return self._rng.choices(range(100_000), k=count)


if __name__ == "__main__":
    spoken = runpy.run_path(sys.argv[1])
    UNSUPPORTED = spoken["Unsupported"]
    spoken["answer"](DynamoRouter())
