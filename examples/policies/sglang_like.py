"""The decision of SGLang's model gateway, policy cache_aware, as a policy of ours (sgl-model-gateway 0.3.2, src/policies/cache_aware.rs).

    baton serve --policy examples.policies.sglang_like:SglangLike:cache_threshold=0.3

    uneven = max load - min load > balance_abs  and  max load > balance_rel * min load        load: requests in flight
    uneven:                                     least load
    else matched / prompt > cache_threshold:    the worker that first brought the last run of blocks that matched
    else:                                       least load

Reproduced: both tests with the gateway's defaults; the approximate tree, which learns from the gateway's own choices and never from
the workers, one for each pool; one owner a run, the worker it was made for, kept when the run is split. Not reproduced: the tree is
over hash blocks of 16 tokens where theirs is over characters, so that a match is counted in whole blocks, and it forgets the
coldest leaves beyond `max_blocks` where theirs evicts by time and size of a worker's share. A worker without room is not asked
here, and ties go to the worker chosen least recently, not to the first in the list. Load here is what waits or runs for the pool
chosen for; theirs also counts, on a prefill worker, what decodes elsewhere by now.

Of 2,500 decisions each, recorded of sglang-router 0.3.2 and apart from ties, it takes all and all but one where prompts part at the
ends of blocks (4 and 8 workers), 99.6 % where they part anywhere, and 98.3 % where chance makes them begin alike
(tests/golden/test_recorded_decisions.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from random import Random

from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies import Cost, PlacementView, Pool
from router.policies.api import Booked, PolicyCommand, PolicyEvent, WorkerLeft
from router.policies.loads import requests_on
from router.policies.prefix_tree import Node, PrefixTree


@dataclass(slots=True)
class Run:
    owner: WorkerId = ""  # "": it left


class SglangLike:
    """Its "seconds" are requests in flight; a worker that owns the prefix is the only one priced."""

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config:
        cache_threshold: float = 0.3
        balance_abs: int = 64
        balance_rel: float = 1.5
        max_blocks: int = 1 << 18

    def __init__(self, config: Config) -> None:
        self.config = config
        self._trees = {True: _tree(config.max_blocks), False: _tree(config.max_blocks)}  # by "for decode"

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        loads = {worker.worker_id: requests_on(worker, view.pool) for worker in view.workers}
        most, least = max(loads.values()), min(loads.values())
        uneven = most - least > self.config.balance_abs and most > self.config.balance_rel * least
        owner = None if uneven else self._owner(self._trees[view.pool is Pool.DECODE], request)
        if owner in loads:
            return {owner: Cost(float(loads[owner]), (("requests", float(loads[owner])),))}
        return {name: Cost(float(load), (("requests", float(load)),)) for name, load in loads.items()}

    def _owner(self, tree: PrefixTree[Run], request: Place) -> WorkerId | None:
        matched, node = tree.match(request.block_hashes)
        if node is None or matched * HASH_BLOCK_SIZE_TOKENS <= self.config.cache_threshold * request.num_tokens:
            return None
        return node.record.owner

    def observe(self, event: PolicyEvent, now: float) -> None:
        if isinstance(event, Booked):
            for for_decode, worker_id in ((False, event.prefill_worker), (True, event.decode_worker)):
                leaf = self._trees[for_decode].insert(event.request.block_hashes)
                if leaf is not None and not leaf.record.owner:
                    leaf.record.owner = worker_id
        elif isinstance(event, WorkerLeft):
            for tree in self._trees.values():
                for node in tree:
                    if node.record.owner == event.worker_id:
                        node.record.owner = ""

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return ()

    def snapshot(self) -> bytes:
        return json.dumps(
            [[(parent, [h.hex() for h in hashes], run.owner) for parent, hashes, run in tree.runs()] for tree in self._trees.values()]
        ).encode()

    def restore(self, state: bytes) -> None:
        for tree, runs in zip(self._trees.values(), json.loads(state), strict=True):
            tree.restore([(parent, tuple(map(bytes.fromhex, hashes)), Run(owner)) for parent, hashes, owner in runs])


def _tree(max_blocks: int) -> PrefixTree[Run]:
    def split(upper: Node[Run], lower: Node[Run]) -> None:
        upper.record.owner = lower.record.owner

    return PrefixTree(max_blocks=max_blocks, max_nodes=max_blocks, make=Run, on_split=split, on_drop=lambda leaf: None)
