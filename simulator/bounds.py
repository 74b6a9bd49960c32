"""What no placement could beat on a trace, and what one that sees more could do: the frame a policy's figures are read in.

    infinite_cache        share of prompt tokens   every prompt finds what any earlier one began with: no workers' caches find more
    blind_infinite_cache  share of prompt tokens   workers that forget nothing, prompts dealt in turn: what is left without placement
    pooled_cache          share of prompt tokens   one cache as large as those of all workers that compute prompts, the least recently
                                                   used out first; no bound, a cleverer cache finds more
    ttft_bound            mean seconds             no order of work on these workers has a smaller mean (see `least_mean_ttft_s`)
    clairvoyant_ttft      mean seconds             a policy that knows queues, caches, pace and lengths, and takes for each request the
                                                   worker where it will be first; no bound, it never looks beyond that request

A bound says how far a policy may still come, not that anything gets there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from heapq import heappop, heappush
from statistics import fmean

from control.compose import pool_sizes
from control.config import ClusterConfig
from protocol.worker import Role
from router.config import Disaggregate
from simulator.analytic_pace import Pace
from simulator.clairvoyant import run_clairvoyant
from simulator.policy_only import prompts_of
from simulator.prompt_tree import PromptTree, Segment
from simulator.routed_cluster import LINK_S, num_kv_blocks
from simulator.routed_gateway import Served
from simulator.segment_cache import SegmentCache
from simulator.traces.trace import Trace
from simulator.true_steps import pace_of

_WHAT = {
    "infinite_cache": "hit share of a cache that forgets nothing, in arrival order; no policy finds more",
    "blind_infinite_cache": "hit share of workers that forget nothing, prompts dealt to them in turn; what is left without placement",
    "pooled_cache": "hit share of one least-recently-used cache as large as those of all workers that compute prompts; no bound",
    "ttft_bound": "mean time to first token no order of work on these workers can beat",
    "clairvoyant_ttft": "mean time to first token of a policy that sees queues, caches, pace and lengths, one request at a time; no bound",
}
_UNITS = {"ttft_bound": "s", "clairvoyant_ttft": "s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of one trace on one cluster; the file's first lines say what each is."""

    infinite_cache: float
    blind_infinite_cache: float
    pooled_cache: float
    ttft_bound: float
    clairvoyant_ttft: float | None  # None: nobody was served


def bounds_of(trace: Trace, config: ClusterConfig, *, seed: int, prompts: PromptTree | None = None) -> Bounds:
    """`prompts`: of this trace, where they are made already.

    Raises:
        ConfigError: as of `run_policy_only`.
    """
    tree = prompts if prompts is not None else prompts_of(trace, config)
    num_prefillers = config.workers.prefill_workers + config.workers.mixed_workers
    ttfts_s = [one.ttft_s for one in run_clairvoyant(tree, config, seed=seed) if one.ttft_s is not None]
    return Bounds(
        infinite_cache=tree.reusable_share,
        blind_infinite_cache=blind_share(tree, num_prefillers),
        pooled_cache=pooled_share(tree, num_prefillers * num_kv_blocks(config)),
        ttft_bound=least_mean_ttft_s(tree, config),
        clairvoyant_ttft=fmean(ttfts_s) if ttfts_s else None,
    )


def bounds_section(bounds: Sequence[Bounds]) -> dict[str, dict[str, object]]:
    """`bounds` of a comparison's document; one of each replicate, in their order."""
    return {
        spec.name: {"what": _WHAT[spec.name], "unit": _UNITS.get(spec.name, "share"), "values": [getattr(b, spec.name) for b in bounds]}
        for spec in fields(Bounds)
    }


def share_of_ceiling(served: Sequence[Served], prompts: PromptTree) -> float:
    """Of what a cache without end would have found of the prompts that were served, the part that was found; 1 where there is nothing."""
    found = [(one, prompt) for one, prompt in zip(served, prompts.prompts, strict=True) if one.terminal == "finished"]
    available = sum(prompt.reusable_tokens for _, prompt in found)
    return sum(min(one.num_cached_tokens, prompt.reusable_tokens) for one, prompt in found) / available if available else 1.0


# --- caches -------------------------------------------------------------------------------------------------------------


def blind_share(prompts: PromptTree, num_workers: int) -> float:
    """Share of prompt tokens found by `num_workers` caches that forget nothing, the prompts dealt to them in turn."""
    seen: list[set[Segment]] = [set() for _ in range(max(1, num_workers))]
    num_found = 0
    for prompt in prompts.prompts:
        known = seen[prompt.number % len(seen)]
        num_blocks = 0
        for segment in prompt.segments:
            if segment not in known:
                break
            num_blocks += segment.num_blocks
        known.update(prompt.segments)
        num_found += min(num_blocks * prompts.block_tokens, max(0, prompt.num_tokens - 1))
    return num_found / max(1, prompts.num_tokens)


def pooled_share(prompts: PromptTree, num_blocks: int) -> float:
    """Share of prompt tokens found by one cache of so many blocks that evicts the least recently used."""
    cache = SegmentCache(num_blocks)
    num_found = 0
    for prompt in prompts.prompts:
        num_found += min(cache.match(prompt.segments) * prompts.block_tokens, max(0, prompt.num_tokens - 1))
        cache.pin(prompt.segments)
        cache.store(prompt.segments)
        cache.unpin(prompt.segments)
    return num_found / max(1, prompts.num_tokens)


# --- time ---------------------------------------------------------------------------------------------------------------


def least_mean_ttft_s(prompts: PromptTree, config: ClusterConfig) -> float:
    """A mean time to first token that these workers cannot beat, whoever places and in whatever order they compute.

    The greater of two. The mean of each prompt alone on an idle worker, with everything found that any earlier prompt began with. And
    the mean of one worker as fast as all that may compute prompts together, that does always first what is soonest done and may put
    anything aside (preemptive SRPT, which has the least mean of any order: Schrage, 1968), and pays of each step only the share that its
    tokens have of a full one. What decode workers do beside prompts is left out, and links take what they take.
    It holds where shared text is computed first by whoever came first.

    Raises:
        ConfigError: workers without a pace.
    """
    pace, chunk_tokens = Pace(pace_of(config)), min(config.workers.max_num_batched_tokens, config.prefill.chunk_tokens_alone)
    if not prompts.prompts:
        return 0.0
    sizes = pool_sizes(config)
    num_workers = sizes[Role.PREFILL] + sizes[Role.BOTH]
    if config.router.disaggregate is not Disaggregate.ALWAYS:
        num_workers += sizes[Role.DECODE]
    missed = [(p.reusable_tokens, p.num_tokens - p.reusable_tokens) for p in prompts.prompts]
    alone_s = fmean([pace.prompt_s(start, num_tokens, chunk_tokens) for start, num_tokens in missed])
    step_s = pace.step_s([(0, 1)])  # what a step takes however little it holds, or more
    least_s = [
        (pace.prompt_s(start, num_tokens, chunk_tokens) - step_s * (-(-num_tokens // chunk_tokens) - num_tokens / chunk_tokens))
        / num_workers
        for start, num_tokens in missed
    ]
    together_s = fmean(_srpt_s([p.at_s for p in prompts.prompts], least_s))
    return 4 * LINK_S + max(alone_s, together_s)


def _srpt_s(arrivals_s: Sequence[float], work_s: Sequence[float]) -> list[float]:
    """Time in system of each, in order of their ends, at one server that works on whoever has least left."""
    left: list[tuple[float, float]] = []  # (work left, arrival)
    stayed_s: list[float] = []
    now = 0.0

    def work_until(at_s: float) -> None:
        nonlocal now
        while left and now < at_s:
            remaining_s, arrived_s = heappop(left)
            if now + remaining_s > at_s:
                heappush(left, (remaining_s - (at_s - now), arrived_s))
                break
            now += remaining_s
            stayed_s.append(now - arrived_s)
        now = max(now, at_s) if at_s != float("inf") else now

    for at_s, took_s in zip(arrivals_s, work_s, strict=True):
        work_until(at_s)
        heappush(left, (took_s, at_s))
    work_until(float("inf"))
    return stayed_s
