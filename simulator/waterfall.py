"""Where reuse is lost between what a trace offers and what a policy's workers find.

    available ─┬─ in flight   nobody has begun to compute it: its first prompt waits, though it came before
               ├─ eviction    it lies nowhere any more, nor is being computed
               ├─ staleness   it lay somewhere, or was being computed there, and the router did not know; or it believed what was no more
               ├─ load trade  the router knew, and chose another worker
               ├─ in flight   it was still being computed where the prompt was sent, when its turn came
               ├─ eviction    it lay there, and was evicted before its turn
               └─ found

Each prompt goes down these steps at its own choice; each step's shortfall is lost there. What a prompt finds beyond the last step (computed
meanwhile by a sibling) is given back. So the parts of a prompt add up to what was available of it, exactly. Counted are prompts that were
computed, in tokens of full hash blocks, in order of arrival.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from control.config import ClusterConfig
from protocol.worker import WorkerId
from router.choice import Choice
from simulator.analytic_worker import Flight
from simulator.policy_only import PolicyOnlyCluster, Watcher, prompts_of, run_policy_only
from simulator.prompt_tree import Prompt, PromptTree, Segment
from simulator.routed_gateway import Served
from simulator.traces.trace import Trace


@dataclass(slots=True, kw_only=True)
class Waterfall:
    """Prompt tokens. available = in_flight + staleness + load_trade + eviction + found."""

    num_tokens: int = 0  # of all prompts that were computed
    available: int = 0
    in_flight: int = 0
    staleness: int = 0
    load_trade: int = 0
    eviction: int = 0
    found: int = 0

    def add(self, other: Waterfall) -> None:
        for spec in fields(self):
            setattr(self, spec.name, getattr(self, spec.name) + getattr(other, spec.name))

    @property
    def lost(self) -> int:
        return self.in_flight + self.staleness + self.load_trade + self.eviction


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Of one prompt at its choice, in tokens. A worker counts what it holds and what it is computing for somebody before."""

    num_tokens: int
    available: int  # to a cache without end
    begun: int  # of it, what was ever computed, or is being computed
    anywhere: int  # the most that any worker has, of those the prompt could have used
    believed_anywhere: int  # the most that the router believes of any of them
    believed_there: int  # of the worker it went to, with what that one was to pull
    there: int  # what that one has, with what it can pull
    held_there: int  # of it, what is computed


def fall(seen: Seen, found: int) -> Waterfall:
    """The steps of one prompt of which `found` tokens were found where it was computed."""
    part = Waterfall(num_tokens=seen.num_tokens, available=seen.available)
    level = seen.available
    steps = (
        (seen.begun, "in_flight"),
        (seen.anywhere, "eviction"),
        (seen.believed_anywhere, "staleness"),
        (seen.believed_there, "load_trade"),
        (seen.there, "staleness"),
        (max(found, seen.held_there), "in_flight"),
        (found, "eviction"),
    )
    for below, name in steps:
        lost = max(0, level - below)
        setattr(part, name, getattr(part, name) + lost)
        level -= lost
    surplus = min(found, seen.available) - level  # came after the choice
    for name in ("in_flight", "eviction", "staleness", "load_trade"):
        given_back = min(surplus, getattr(part, name))
        setattr(part, name, getattr(part, name) - given_back)
        surplus -= given_back
        level += given_back
    part.found = level
    assert part.available == part.found + part.lost, f"{part} does not add up"
    return part


class WaterfallWatcher(Watcher):
    """Adds up a policy-only run."""

    def __init__(self) -> None:
        self.total = Waterfall()
        self._seen: dict[int, Seen] = {}  # by number of the prompt, until it is computed
        self._promised: dict[WorkerId, Counter[Segment]] = {}  # of prompts under way there
        self._begun: set[Segment] = set()

    def placing(self, cluster: PolicyOnlyCluster, prompt: Prompt, choice: Choice, now: float) -> None:
        most = max(0, prompt.num_tokens - 1)
        chosen = choice.prefill.worker_id
        usable = [w.worker_id for w in cluster.fleet.workers if cluster.pulls_prefixes or w.role.prefills or w.worker_id == chosen]
        there = {worker_id: min(self._there(cluster, worker_id, prompt), most) for worker_id in usable}
        believed = choice.decode_ranking.cached_tokens
        source = choice.pull.source if choice.pull is not None else chosen
        self._seen[prompt.number] = Seen(
            num_tokens=prompt.num_tokens,
            available=prompt.reusable_tokens,
            begun=min(self._num_begun(prompt) * cluster.block_tokens, most),
            anywhere=max(there.values()),
            believed_anywhere=max([believed.get(worker_id, 0) for worker_id in usable]),
            believed_there=choice.cached_tokens + choice.pulled_tokens,
            there=max(there[chosen], there[source]),
            held_there=min(most, max(cluster.server(w).cache.match(prompt.segments) for w in (chosen, source)) * cluster.block_tokens),
        )
        self._begun.update(prompt.segments)
        self._promised.setdefault(chosen, Counter()).update(prompt.segments)

    def prefilled(self, flight: Flight) -> None:
        self.total.add(fall(self._seen.pop(flight.prompt.number), flight.cached_tokens))
        self._promised[flight.served.prefill_worker].subtract(flight.prompt.segments)

    def _num_begun(self, prompt: Prompt) -> int:
        num_blocks = 0
        for segment in prompt.segments:
            if segment not in self._begun:
                break
            num_blocks += segment.num_blocks
        return num_blocks

    def _there(self, cluster: PolicyOnlyCluster, worker_id: WorkerId, prompt: Prompt) -> int:
        cache, promised = cluster.server(worker_id).cache, self._promised.get(worker_id, Counter())
        num_blocks = 0
        for segment in prompt.segments:
            here = segment.num_blocks if promised[segment] > 0 else cache.num_held(segment)
            num_blocks += here
            if here < segment.num_blocks:
                break
        return num_blocks * cluster.block_tokens


def waterfall_of(
    trace: Trace, config: ClusterConfig, *, policy: str, seed: int, prompts: PromptTree | None = None
) -> tuple[list[Served], Waterfall]:
    """A policy-only run, and where its reuse went.

    Raises:
        ConfigError: as of `run_policy_only`.
    """
    watcher = WaterfallWatcher()
    tree = prompts if prompts is not None else prompts_of(trace, config)
    served = run_policy_only(trace, config, policy=policy, seed=seed, prompts=tree, watcher=watcher)
    return served, watcher.total


def waterfall_section(waterfalls: Mapping[str, Sequence[Waterfall]]) -> dict[str, dict[str, float]]:
    """`waterfall` of a comparison's document: by label, over its replicates together, shares of prompt tokens that add up.

    What was in flight counts as stale: whoever chose could not have known it in time.
    """
    section = {}
    for label, parts in waterfalls.items():
        total = Waterfall()
        for part in parts:
            total.add(part)
        tokens = {
            "available": total.available,
            "staleness": total.staleness + total.in_flight,
            "load_trade": total.load_trade,
            "eviction": total.eviction,
            "found": total.found,
        }
        section[label] = {name: count / max(1, total.num_tokens) for name, count in tokens.items()}
    return section
