"""The waterfall of a token-accurate run: what the router believes is read where the policy reads it, what workers hold from what they tell.

    policy ──► _Watched: what each choice saw, and what was booked          worker ──► its KV events, as they leave it: what it holds
                                     └────────────────► waterfall.fall ◄────────────────┘

Nothing of the run changes: the policy is wrapped through the router's own door (`RouterCore.use_policy`), and looked at only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random

from control.config import ClusterConfig
from engine.core.events import Command, PublishKvEvents
from engine.core.events import Event as WorkerEvent
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.messages import Place
from protocol.worker import AllBlocksCleared, BlocksRemoved, BlocksStored, Tier, WorkerId
from router import policies
from router.policies.api import (
    Booked,
    Cost,
    FirstToken,
    PlacementPolicy,
    PlacementView,
    PolicyCommand,
    PolicyEvent,
    PoolPolicy,
    PoolPrices,
)
from simulator.policy_only import prompts_of
from simulator.prompt_tree import PromptTree
from simulator.routed_cluster import MODEL_ID, VOCAB_SIZE, RoutedCluster
from simulator.routed_gateway import Served
from simulator.sim_processes import SimWorkerProcess
from simulator.token_accurate import MAX_TOKENS
from simulator.traces.trace import Trace
from simulator.true_steps import TrueSteps
from simulator.waterfall import Seen, Waterfall, fall
from simulator.workload import requests_of


def routed_waterfall_of(
    trace: Trace, config: ClusterConfig, *, policy: str, seed: int, max_tokens: int | None = MAX_TOKENS, steps: TrueSteps | None = None
) -> tuple[list[Served], Waterfall]:
    """A token-accurate run, as of `run_token_accurate`, and where its reuse went.

    Raises:
        ConfigError: no such policy, or workers that cannot be simulated.
    """
    cluster = RoutedCluster(config, policy=policy, seed=seed, max_tokens=max_tokens, steps=steps)
    watch = _Watch(cluster, prompts_of(trace, config, max_tokens))
    inner = policies.load(policy)
    watched = _WatchedPool(inner, watch) if isinstance(inner, PoolPolicy) else _Watched(inner, watch)
    cluster.router.use_policy(watched, policy, cluster.loop.now, forget=False)
    served = cluster.run(requests_of(trace, model_id=MODEL_ID, vocab_size=VOCAB_SIZE, seed=seed))
    return served, watch.total(served)


class _Watch:
    """What each choice saw and what was true then."""

    def __init__(self, cluster: RoutedCluster, prompts: PromptTree) -> None:
        workers = cluster.config.workers
        self._prompts = prompts.prompts
        self._block_tokens = workers.block_size
        self._pulls = cluster.config.router.prefix_pull
        self._prefills = {worker_id: process.address.role.prefills for worker_id, process in cluster.processes.items()}
        self._held: dict[WorkerId, set[bytes]] = {worker_id: set() for worker_id in cluster.workers}
        self._promised: dict[WorkerId, Counter[bytes]] = {worker_id: Counter() for worker_id in cluster.workers}
        self._begun: set[bytes] = set()
        self._believed: dict[str, Mapping[WorkerId, int]] = {}  # by request, of its newest choice
        self._under_way: dict[str, tuple[WorkerId, tuple[bytes, ...]]] = {}
        self._seen: dict[str, Seen] = {}
        for process in cluster.processes.values():
            self._listen(process)

    def chosen_from(self, view: PlacementView, request: Place) -> None:
        self._believed[request.request_id] = dict(view.cached_tokens)

    def booked(self, event: Booked) -> None:
        place, chosen = event.request, event.prefill_worker
        believed = self._believed.pop(place.request_id, {})
        most = place.num_tokens - 1
        size = self._block_tokens // HASH_BLOCK_SIZE_TOKENS
        blocks = place.block_hashes[: place.num_tokens // self._block_tokens * size]  # others are never found
        usable = [worker_id for worker_id, prefills in self._prefills.items() if self._pulls or prefills or worker_id == chosen]
        there = {worker_id: min(self._num_there(worker_id, blocks, promised=True), most) for worker_id in usable}
        sources = usable if event.pulled_tokens else [chosen]
        self._seen[place.request_id] = Seen(
            num_tokens=place.num_tokens,
            available=self._prompts[int(place.request_id, 16)].reusable_tokens,
            begun=min(_num_leading(blocks, self._begun) * HASH_BLOCK_SIZE_TOKENS, most),
            anywhere=max(there.values()),
            believed_anywhere=max([believed.get(worker_id, 0) for worker_id in usable]),
            believed_there=event.cached_tokens + event.pulled_tokens,
            there=max(there[worker_id] for worker_id in sources),
            held_there=min(most, max(self._num_there(worker_id, blocks, promised=False) for worker_id in sources)),
        )
        self._prefilled(place.request_id)  # of an attempt before
        self._promised[chosen].update(blocks)
        self._begun.update(blocks)
        self._under_way[place.request_id] = (chosen, blocks)

    def first_token(self, event: FirstToken) -> None:
        self._prefilled(event.key.request_id)

    def total(self, served: list[Served]) -> Waterfall:
        total = Waterfall()
        for one in served:
            if one.first_token_s is not None and one.request_id in self._seen:
                total.add(fall(self._seen[one.request_id], one.num_cached_tokens))
        return total

    def _prefilled(self, request_id: str) -> None:
        worker_id, blocks = self._under_way.pop(request_id, ("", ()))
        if blocks:
            self._promised[worker_id].subtract(blocks)
            self._promised[worker_id] += Counter()  # those nobody computes any more

    def _num_there(self, worker_id: WorkerId, blocks: tuple[bytes, ...], *, promised: bool) -> int:
        """Leading tokens that a worker holds; `promised`: or computes for somebody before."""
        held, coming = self._held[worker_id], self._promised[worker_id]
        count = 0
        for block in blocks:
            if block not in held and not (promised and block in coming):
                break
            count += 1
        return count // (self._block_tokens // HASH_BLOCK_SIZE_TOKENS) * self._block_tokens

    def _listen(self, process: SimWorkerProcess) -> None:
        held = self._held[process.address.worker_id]

        def listen(event: WorkerEvent, commands: Sequence[Command]) -> None:
            for command in commands:
                if isinstance(command, PublishKvEvents):
                    for change in command.events:
                        if isinstance(change, AllBlocksCleared):
                            held.clear()
                        elif isinstance(change, BlocksStored) and change.tier is Tier.DEVICE:
                            held.update(change.hashes)
                        elif isinstance(change, BlocksRemoved) and change.tier is Tier.DEVICE:
                            held.difference_update(change.hashes)

        assert process.after_turn is None, "somebody else looks there"
        process.after_turn = listen


class _Watched:
    """A policy that is looked at."""

    def __init__(self, policy: PlacementPolicy, watch: _Watch) -> None:
        self._policy = policy
        self._watch = watch

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        self._watch.chosen_from(view, request)
        return self._policy.score(view, request, now, rng)

    def observe(self, event: PolicyEvent, now: float) -> None:
        if isinstance(event, Booked):
            self._watch.booked(event)
        elif isinstance(event, FirstToken):
            self._watch.first_token(event)
        self._policy.observe(event, now)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return self._policy.commands(now)

    def snapshot(self) -> bytes:
        return self._policy.snapshot()

    def restore(self, state: bytes) -> None:
        self._policy.restore(state)


class _WatchedPool(_Watched):
    """One that prices a pool at once."""

    def price_pool(self, view: PlacementView, request: Place, now: float, rng: Random) -> PoolPrices:
        self._watch.chosen_from(view, request)
        assert isinstance(self._policy, PoolPolicy)
        return self._policy.price_pool(view, request, now, rng)


def _num_leading(blocks: tuple[bytes, ...], known: set[bytes]) -> int:
    return next((i for i, block in enumerate(blocks) if block not in known), len(blocks))
