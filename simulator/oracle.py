"""A policy that cheats: it looks into the workers instead of at what the router believes. Not for serving; it frames those that are.

Its reports are never late, its estimates are the workers' own pace, and it knows how long each answer will be. It takes for each request
the worker where that one will be first, so it is greedy: it tells what better knowledge does for a policy that looks at one request at a
time, and bounds nothing else. Whether a prompt is computed where it decodes is not its choice, as it is no policy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import cast

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Pool, Stateless
from router.queue import FairQueue
from simulator.analytic_pace import Pace
from simulator.analytic_worker import DecodeServer, PrefillServer
from simulator.prompt_tree import BlockNames

ORACLE = "oracle_ttft"

Server = PrefillServer | DecodeServer


class OracleTtft(Stateless):
    """Seconds to the first token as they will be; of a decode pool seconds of decoding, for the whole answer. `see` comes first."""

    def see(self, servers: Mapping[WorkerId, Server], pace: Pace, output_tokens: Callable[[Place], int], chunk_tokens: int) -> None:
        """What it looks into."""
        self._servers = servers
        self._pace = pace
        self._output_tokens = output_tokens
        self._chunk_tokens = chunk_tokens

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            server = self._servers[worker.worker_id]
            queue_s = prefill_s = decode_s = 0.0
            if view.pool is not Pool.DECODE:
                found = server.cache.match(cast(BlockNames, request.block_hashes).segments) * HASH_BLOCK_SIZE_TOKENS
                pull = view.pulls.get(worker.worker_id)
                found = min(max(found, pull.num_tokens if pull is not None else 0), request.num_tokens - 1)
                queue_s = server.busy_s(now)
                prefill_s = self._pace.prompt_s(found, request.num_tokens - found, self._chunk_tokens)
            if view.pool is not Pool.PREFILL and isinstance(server, DecodeServer):
                kv_tokens = server.kv_tokens + request.num_tokens
                decode_s = self._output_tokens(request) * self._pace.decode_step_s(worker.num_sequences + 1, kv_tokens)
            costs[worker.worker_id] = Cost(
                queue_s + prefill_s + decode_s, (("queue", queue_s), ("prefill", prefill_s), ("decode", decode_s))
            )
        return costs


class KnowingQueue(FairQueue):
    """A queue that predicts what will be."""

    def know(self, output_tokens: Callable[[Place], int]) -> None:
        self._known_tokens = output_tokens

    def predicted_output_tokens(self, place: Place) -> int:
        return self._known_tokens(place)
