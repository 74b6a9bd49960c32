"""E2 of Preble (ICLR'25, sections 2 and 3): exploit a prefix that is cached for the most part, else explore by cost; then even out.

    cached = the most of the prompt that any candidate holds, confirmed by it or booked there      missed = the rest
    missed <  cached   EXPLOIT: one of those that hold as much, or that the prefix was allocated to
    missed >= cached   EXPLORE: all; where one decodes far more than the others, that one
    of several the least          cost(w) = L + M + P         all in seconds of the worker
        L  what was sent to it in the window: prefill of the missed tokens, and decode of the mean output where it decodes
        M  what the prompt would evict, coldest first: prefill of each victim * the share of the worker's requests that had it
        P  prefill of what the worker lacks of this prompt

    Tick: while L of the busiest > th_bal * L of the idlest, move its cheapest key portions there; a key portion that cannot be moved
    and whose time to first token has doubled within the window is copied there.

Where this departs from the paper or its released code, docs/policies.md says how.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.worker import Role, WorkerId
from router.policies.api import (
    Booked,
    Cost,
    Finished,
    FirstToken,
    KvChanged,
    Moved,
    PlacementView,
    PolicyCommand,
    PolicyEvent,
    Pool,
    Replicate,
    Tick,
    WorkerJoined,
    WorkerLeft,
    WorkerView,
)
from router.policies.e2_history import History, PromptNode, decode_s, prefill_s
from router.policies.loads import token_s

MAX_MOVES = 256  # of one rebalancing, which may not hold up the router; what is left waits for the next


class E2:
    """Preble's global scheduler. The key portion of a prompt is its deepest node with more tokens than all nodes before it."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        window_s: float = 180.0
        # What is explored goes to a worker that decodes this many times the fleet's share. The paper gives no value.
        imbal_r: float = 1.5
        rebalance: bool = True
        th_bal: float = 1.5  # of the released code; the paper says "from profiling"
        rebalance_after: int = 50  # requests a worker before loads are compared
        rebalance_interval_s: float = 1.0  # the code does it after every request
        max_tail_nodes: int = 3  # a prompt with as many nodes below its key portion (an agent's turns) gives no cause to rebalance
        replicate: bool = True
        ttft_growth: float = 2.0
        min_ttft_samples: int = 8  # in each half of the window; neither paper nor code asks for any
        max_blocks: int = 1 << 18  # of 16 tokens, remembered of past prompts
        max_nodes: int = 1 << 14  # likewise
        max_victims: int = 64  # of one virtual eviction

    def __init__(self, config: Config) -> None:
        self.config = config
        self._history = History(window_s=config.window_s, max_blocks=config.max_blocks, max_nodes=config.max_nodes)
        self._has_cause = False  # a request came since the last rebalancing that may have upset the balance
        self._rebalance_at_s = 0.0  # not before
        self._moves_left = 0
        self._wishes: tuple[Replicate, ...] = ()

    # --- the choice ---

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        if view.pool is Pool.DECODE:
            return self._score_decode(view, request)
        cached = view.cached_tokens
        most = max((cached.get(worker.worker_id, 0) for worker in view.workers), default=0)
        exploit = request.num_tokens - most < most
        candidates = self._exploited(view, request, most) if exploit else view.workers
        loads = [self._load_s(view, worker, now) for worker in candidates]
        chosen = range(len(candidates)) if exploit else self._explored(loads)
        return {candidates[i].worker_id: self._cost(view, request, candidates[i], sum(loads[i]), now) for i in chosen}

    def _exploited(self, view: PlacementView, request: Place, most: int) -> Sequence[WorkerView]:
        allocation = self._history.allocation(request.block_hashes)
        allocated = [worker for worker in view.workers if worker.worker_id in allocation]
        return allocated or [worker for worker in view.workers if view.cached_tokens.get(worker.worker_id, 0) == most]

    def _explored(self, loads: Sequence[tuple[float, float]]) -> Sequence[int]:
        """Indices of those with the greatest share of decoding in their load, if that is `imbal_r` times the fleet's; else of all."""
        fleet_prefill_s, fleet_decode_s = (sum(seconds) for seconds in zip(*loads, strict=True))
        if not fleet_decode_s:
            return range(len(loads))
        shares = [decode / (prefill + decode) if decode else 0.0 for prefill, decode in loads]
        greatest = max(shares)
        if greatest <= self.config.imbal_r * fleet_decode_s / (fleet_prefill_s + fleet_decode_s):
            return range(len(loads))
        return [i for i, share in enumerate(shares) if share == greatest]

    def _load_s(self, view: PlacementView, worker: WorkerView, now: float) -> tuple[float, float]:
        """L in its two parts, prefill and decode."""
        load = self._history.load(worker.worker_id, now)
        if not load[3]:
            return prefill_s(load, worker.cost), 0.0
        output = self._history.output_tokens(worker.worker_id, now, view.predicted_output_tokens)
        return prefill_s(load, worker.cost), decode_s(load, worker.cost, output)

    def _cost(self, view: PlacementView, request: Place, worker: WorkerView, load_s: float, now: float) -> Cost:
        missed = request.num_tokens - view.cached_tokens.get(worker.worker_id, 0)
        evict_s = self._eviction_s(request, worker, missed - worker.free_kv_tokens, now) if missed > worker.free_kv_tokens else 0.0
        own_s = worker.cost.prefill_s(missed, request.num_tokens)
        return Cost(load_s + evict_s + own_s, (("load", load_s), ("evict", evict_s), ("prefill", own_s)))

    def _eviction_s(self, request: Place, worker: WorkerView, needed: int, now: float) -> float:
        kept, seconds, num_victims = self._history.path(request.block_hashes), 0.0, 0
        for node, num_tokens, share in self._history.victims(worker.worker_id, now):
            if node in kept:
                continue
            seconds += worker.cost.prefill_s(num_tokens, node.end * HASH_BLOCK_SIZE_TOKENS) * share
            needed, num_victims = needed - num_tokens, num_victims + 1
            if needed <= 0 or num_victims >= self.config.max_victims:
                break
        return seconds

    @staticmethod
    def _score_decode(view: PlacementView, request: Place) -> dict[WorkerId, Cost]:
        costs = {}
        for worker in view.workers:
            missed = request.num_tokens - view.cached_tokens.get(worker.worker_id, 0)
            output_s = view.predicted_output_tokens * token_s(view, request, worker)
            transfer_s = view.transfer_s * missed / max(request.num_tokens, 1)
            costs[worker.worker_id] = Cost(output_s + transfer_s, (("decode", output_s), ("transfer", transfer_s)))
        return costs

    # --- what it is told ---

    def observe(self, event: PolicyEvent, now: float) -> None:
        history = self._history
        match event:
            case Booked():
                self._has_cause |= history.book(event, now) < self.config.max_tail_nodes
            case FirstToken():
                history.first_token(event, now)
            case Moved():
                history.decode_elsewhere(event)
            case Finished():
                history.finish(event, now)
            case KvChanged(worker_id=worker_id, events=events):
                history.change(worker_id, events)
            case WorkerJoined():
                history.join(event)
            case WorkerLeft(worker_id=worker_id):
                history.leave(worker_id)
            case Tick():
                self._tick(now)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        wishes, self._wishes = self._wishes, ()
        return wishes

    def snapshot(self) -> bytes:
        return json.dumps([self._history.state(), self._has_cause, self._rebalance_at_s]).encode()

    def restore(self, state: bytes) -> None:
        """Of a policy with the same parameters."""
        history, self._has_cause, self._rebalance_at_s = json.loads(state)
        self._history.restore(history)

    # --- evening out ---

    def _tick(self, now: float) -> None:
        if not (self.config.rebalance and self._has_cause and now >= self._rebalance_at_s):
            return
        self._has_cause, self._rebalance_at_s = False, now + self.config.rebalance_interval_s
        pools: dict[tuple[str, Role], list[WorkerId]] = {}
        for worker_id, record in self._history.workers.items():
            if record.role.prefills:
                pools.setdefault((record.model_id, record.role), []).append(worker_id)
        for pool in pools.values():
            if self._history.num_requests >= self.config.rebalance_after * len(pool):
                self._rebalance(pool, now)

    def _rebalance(self, pool: list[WorkerId], now: float) -> None:
        """The busiest gives to the idlest, then the next busiest, until two are as even as `th_bal` asks."""
        loads_s = {worker_id: self._sent_s(self._history.load(worker_id, now), worker_id, now) for worker_id in pool}
        self._moves_left = MAX_MOVES
        while len(pool) > 1 and self._moves_left:
            heavy, light = max(pool, key=loads_s.__getitem__), min(pool, key=loads_s.__getitem__)
            if not self._is_uneven(loads_s, heavy, light):
                return
            left = self._move_keys(loads_s, heavy, light, now)
            if self.config.replicate and self._is_uneven(loads_s, heavy, light):
                self._copy_slowed(left, heavy, light, now)
            pool.remove(heavy)

    def _is_uneven(self, loads_s: dict[WorkerId, float], heavy: WorkerId, light: WorkerId) -> bool:
        return loads_s[heavy] > self.config.th_bal * loads_s[light]

    def _move_keys(self, loads_s: dict[WorkerId, float], heavy: WorkerId, light: WorkerId, now: float) -> list[PromptNode]:
        """Cheapest first, until they are even or one more would only turn the two round; returns those left, cheapest first."""
        priced = [(self._sent_s(load, heavy, now), node) for node, load in self._history.keys(heavy, now)]
        priced.sort(key=lambda pair: (pair[0], pair[1].name))
        for index, (seconds, node) in enumerate(priced):
            if not self._is_uneven(loads_s, heavy, light) or loads_s[heavy] - seconds < loads_s[light] + seconds:
                return [node for _, node in priced[index:]]
            if not self._moves_left:
                self._has_cause = True
                return []
            self._moves_left -= 1
            self._history.move(node, heavy, light, now)
            loads_s[heavy] -= seconds
            loads_s[light] += seconds
        return []

    def _copy_slowed(self, keys: Sequence[PromptNode], heavy: WorkerId, light: WorkerId, now: float) -> None:
        """The most expensive whose time to first token grew, if any, to one more worker."""
        config, history = self.config, self._history
        for node in reversed(keys):
            holders = history.allocated.get(node) or tuple(node.record.load)
            if light in holders or history.slowdown(node, heavy, now, config.min_ttft_samples) < config.ttft_growth:
                continue
            history.allocate(node, (*holders, light))
            node.record.first_token_us.clear()  # whether that helped shows in what comes
            self._wishes += (Replicate(block_hash=node.name, worker_id=light, within_s=config.window_s),)
            return

    def _sent_s(self, load: Sequence[int], worker_id: WorkerId, now: float) -> float:
        cost = self._history.workers[worker_id].cost
        if cost is None:
            return 0.0
        return prefill_s(load, cost) + decode_s(load, cost, self._history.output_tokens(worker_id, now, 0.0))
