"""A policy that cheats: it looks into the workers instead of at what the router believes. Not for serving; it frames those that are.

Its reports are never late, its estimates are the workers' own pace, and it knows how long each answer will be. It takes for each request
the worker where that one will be first, so it is greedy: it tells what better knowledge does for a policy that looks at one request at a
time, and bounds nothing else. Whether a prompt is computed where it decodes is not its choice, as it is no policy's.
"""

from __future__ import annotations

from random import Random
from typing import cast

from control.config import ClusterConfig
from protocol.messages import Place
from protocol.worker import WorkerId
from router.policies.api import Cost, PlacementView, Pool, Stateless
from router.queue import FairQueue
from simulator.decode_server import DecodeServer
from simulator.policy_only import Lateness, PolicyOnlyCluster
from simulator.prompt_tree import BlockNames, PromptTree
from simulator.routed_gateway import Served

_NAME = "clairvoyant"
_NEVER_LATE = Lateness(reports_s=0.0, report_interval_s=0.0, kv_events_s=0.0)


def run_clairvoyant(prompts: PromptTree, config: ClusterConfig, *, seed: int) -> list[Served]:
    """What each request came to, as of `run_policy_only`.

    Raises:
        ConfigError: likewise.
    """
    policy = _Clairvoyant()
    cluster = PolicyOnlyCluster(config, policy, name=_NAME, seed=seed, lateness=_NEVER_LATE)
    cluster.queue = _KnowingQueue(config, prompts)
    policy.see(cluster, prompts)
    return cluster.run(prompts)


class _Clairvoyant(Stateless):
    """Seconds to the first token as they will be; of a decode pool seconds of decoding, for the whole answer."""

    def see(self, cluster: PolicyOnlyCluster, prompts: PromptTree) -> None:
        """What it looks into; before anything is asked."""
        self._cluster = cluster
        self._prompts = prompts

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        cluster, costs = self._cluster, {}
        for worker in view.workers:
            server = cluster.server(worker.worker_id)
            queue_s = prefill_s = decode_s = 0.0
            if view.pool is not Pool.DECODE:
                found = server.cache.match(cast(BlockNames, request.block_hashes).segments) * server.block_tokens
                pull = view.pulls.get(worker.worker_id)
                found = min(max(found, pull.num_tokens if pull is not None else 0), request.num_tokens - 1)
                queue_s = server.busy_s(now)
                prefill_s = cluster.pace.prompt_s(found, request.num_tokens - found, cluster.chunk_tokens)
            if view.pool is not Pool.PREFILL and isinstance(server, DecodeServer):
                kv_tokens = server.kv_tokens + request.num_tokens
                token_s = cluster.pace.decode_step_s(worker.num_sequences + 1, kv_tokens)
                decode_s = _output_tokens(self._prompts, request) * token_s
            terms = (("queue", queue_s), ("prefill", prefill_s), ("decode", decode_s))
            costs[worker.worker_id] = Cost(queue_s + prefill_s + decode_s, terms)
        return costs


class _KnowingQueue(FairQueue):
    """Predicts what will be."""

    def __init__(self, config: ClusterConfig, prompts: PromptTree) -> None:
        super().__init__(output_weight=config.router.output_weight, max_tenants=config.router.max_tenants)
        self._prompts = prompts

    def predicted_output_tokens(self, place: Place) -> int:
        return _output_tokens(self._prompts, place)


def _output_tokens(prompts: PromptTree, place: Place) -> int:
    return prompts.prompts[int(place.request_id, 16)].output_tokens
