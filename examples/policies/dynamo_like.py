"""The cost of NVIDIA Dynamo's KV router as a policy of ours (ai-dynamo 1.6, lib/kv-router/src/scheduling/selector/default.rs).

    baton serve --policy examples.policies.dynamo_like:DynamoLike:overlap_score_credit=1.0

    in blocks   prefill = prefill_load_scale * max(0, prefill blocks there + blocks of the request - credit)
                credit  = a * device blocks + host_cache_hit_weight * host blocks
                a       = overlap_score_credit / (1 + overlap_score_credit_decay * excess prefill blocks / blocks of the request)
                decode  = full blocks active there once the request is, each counted once + decode_active_request_weight * requests there
    prefill pool: prefill          decode pool: decode          both roles: prefill + decode

Reproduced: the cost with the router's defaults, temperature 0, blocks shared by active requests counted once, reservations
forgotten after `expire_s`. Not reproduced: the disk and shared tiers, which we have not; taints, queue and conditional
disaggregation, which are the router's here; output blocks while they are generated (off by default there); softmax. What is cached
is our index's word, which marks a placed prompt at once; theirs waits for the worker's events by default. Ties go to the worker
chosen least recently, theirs to a random one.

It takes each of 5,000 decisions recorded of ai-dynamo-runtime 1.6.1 with KV events, 4 and 8 workers with both roles, apart from
ties (tests/golden/test_recorded_decisions.py).
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from dataclasses import dataclass
from random import Random

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.request import AttemptKey
from protocol.worker import WorkerId
from router.policies import Cost, PlacementView, Pool, WorkerView
from router.policies.api import Booked, Finished, Moved, PolicyCommand, PolicyEvent, Tick, WorkerLeft

Reservation = tuple[WorkerId, tuple[bytes, ...], float]  # where, which blocks, since


class DynamoLike:
    """Its "seconds" are blocks of 16 tokens."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        overlap_score_credit: float = 1.0
        overlap_score_credit_decay: float = 0.0
        host_cache_hit_weight: float = 0.75
        prefill_load_scale: float = 1.0
        decode_active_request_weight: float = 0.0
        expire_s: float = 300.0

    def __init__(self, config: Config) -> None:
        self.config = config
        self._reserved: OrderedDict[AttemptKey, Reservation] = OrderedDict()
        self._active: dict[WorkerId, Counter[bytes]] = {}

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        least_queued = min((worker.queued_prefill_tokens for worker in view.workers), default=0)
        costs = {}
        for worker in view.workers:
            prefill = 0.0 if view.pool is Pool.DECODE else self._prefill_blocks(view, request, worker, least_queued)
            decode = 0.0 if view.pool is Pool.PREFILL else self._decode_blocks(request, worker)
            costs[worker.worker_id] = Cost(prefill + decode, (("prefill", prefill), ("decode", decode)))
        return costs

    def _prefill_blocks(self, view: PlacementView, request: Place, worker: WorkerView, least_queued: int) -> float:
        config, size = self.config, HASH_BLOCK_SIZE_TOKENS
        request_blocks = request.num_tokens / size
        device = view.device_tokens.get(worker.worker_id, 0) / size
        host = view.cached_tokens.get(worker.worker_id, 0) / size - device
        excess = (worker.queued_prefill_tokens - least_queued) / size / max(request_blocks, 1.0)
        credit = config.overlap_score_credit / (1.0 + config.overlap_score_credit_decay * excess) * device
        credit += config.host_cache_hit_weight * host
        return config.prefill_load_scale * max(0.0, worker.queued_prefill_tokens / size + request_blocks - credit)

    def _decode_blocks(self, request: Place, worker: WorkerView) -> float:
        active: Counter[bytes] = self._active.get(worker.worker_id, Counter())
        new = sum(block_hash not in active for block_hash in request.block_hashes)
        return len(active) + new + self.config.decode_active_request_weight * worker.num_sequences

    def observe(self, event: PolicyEvent, now: float) -> None:
        match event:
            case Booked(request=request, decode_worker=worker_id):
                key = AttemptKey(request_id=request.request_id, attempt=request.attempt)
                self._reserved[key] = (worker_id, request.block_hashes, now)
                self._active.setdefault(worker_id, Counter()).update(request.block_hashes)
            case Moved(key=key, decode_worker=worker_id) if key in self._reserved:
                _, blocks, since_s = self._reserved[key]
                self._release(key)
                self._reserved[key] = (worker_id, blocks, since_s)
                self._active.setdefault(worker_id, Counter()).update(blocks)
            case Finished(key=key):
                self._release(key)
            case WorkerLeft(worker_id=worker_id):
                self._active.pop(worker_id, None)
            case Tick():
                while self._reserved and next(iter(self._reserved.values()))[2] <= now - self.config.expire_s:
                    self._release(next(iter(self._reserved)))

    def _release(self, key: AttemptKey) -> None:
        worker_id, blocks, _ = self._reserved.pop(key, ("", (), 0.0))
        active = self._active.get(worker_id)
        if active is not None:
            for block_hash in blocks:
                active[block_hash] -= 1
                if not active[block_hash]:
                    del active[block_hash]

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return ()

    def snapshot(self) -> bytes:
        reserved = self._reserved.items()
        return json.dumps(
            [(k.request_id, k.attempt, worker, [b.hex() for b in blocks], at) for k, (worker, blocks, at) in reserved]
        ).encode()

    def restore(self, state: bytes) -> None:
        for request_id, attempt, worker_id, names, since_s in json.loads(state):
            blocks = tuple(map(bytes.fromhex, names))
            self._reserved[AttemptKey(request_id=request_id, attempt=attempt)] = (worker_id, blocks, since_s)
            self._active.setdefault(worker_id, Counter()).update(blocks)
