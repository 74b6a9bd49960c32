"""Requests of one conversation to one worker, without knowing what is cached where: rendezvous hashing with bounded load.

    order the workers by hash(session, worker); take the first whose requests in flight are within the bound
    bound = max(free_requests, ceil(load_factor * (requests in flight + 1) / workers))

When a worker joins or leaves, only sessions that move to it or away from it are torn from their caches (Thaler and Ravishankar,
1998). The bound keeps a worker whose sessions are busy from being the only one that is (Mirrokni, Thorup and Zadimoghaddam, 2018).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from random import Random

import xxhash

from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Stateless
from router.policies.loads import requests_on


class SessionAffinity(Stateless):
    """Its "seconds" are ranks in the session's own order of workers; those over the bound come after all others.

    A request without a session counts as one of all prompts that begin with the same block; one too short for a block goes anywhere.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        load_factor: float = 1.25  # over the mean of requests in flight; the bound of SGLang's prefix_hash
        free_requests: int = 8  # no worker with fewer turns a session away

    def __init__(self, config: Config) -> None:
        self.config = config

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        loads = {worker.worker_id: requests_on(worker, view.pool) for worker in view.workers}
        mean = (sum(loads.values()) + 1) / len(loads)
        bound = max(self.config.free_requests, ceil(self.config.load_factor * mean))
        key = _session_key(request)
        order = sorted(loads, key=lambda name: xxhash.xxh3_64_intdigest(key + name.encode()))
        costs = {}
        for rank, name in enumerate(order):
            over = 0.0 if loads[name] < bound else float(len(order))
            costs[name] = Cost(rank + over, (("rank", float(rank)), ("over", over)))
        return costs


def _session_key(request: Place) -> bytes:
    if request.session:
        return b"session " + request.session.encode() + b" "
    first = request.block_hashes[0] if request.block_hashes else request.request_id.encode()
    return b"prompt " + first + b" "
