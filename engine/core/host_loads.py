"""Prompts that wait while blocks of the host tier are copied back into the pool, before they look for more at a peer.

    begin ─► cached in the pool, then in slots? ─► reserve blocks, load ─► in the prefix cache ─► PrefixPulls.begin
                          └──► nothing in slots, or no room ──────────────────────────────────────► PrefixPulls.begin

A copy within one host has no deadline of its own: the driver ends it, well or not. A cancelled prompt's copy ends for nobody.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from engine.core.attempts import LiveAttempt
from engine.core.block_pool import BlockPool
from engine.core.events import Command, LoadBlocks, SaveBlocks
from engine.core.host_tier import HostTier, SlotEntry
from engine.core.landing import Landing, Prefix
from engine.core.prefix_cache import PrefixCache
from engine.core.prefix_pulls import PrefixPulls
from protocol.messages import PrefixPull

HOST_COUNTERS = (
    "host_blocks_saved",  # evicted from the pool into the host tier
    "host_loads",  # prompts whose blocks came back from there
    "host_load_tokens",
    "host_load_failures",
)
POOL_SHARE = 2  # at most one block in so many may be waiting for loads


@dataclass(slots=True, kw_only=True, eq=False)
class _Load:
    """One copy out of slots, and who waits for it."""

    landing: Landing
    run: list[SlotEntry]
    waiters: list[tuple[LiveAttempt, PrefixPull | None]]
    name: bytes  # of the last block


class HostLoads:
    """The stages before a worker's inbox; with a tier of no slots, prompts go straight on to the second. Counts speak of both."""

    def __init__(self, tier: HostTier, pool: BlockPool, cache: PrefixCache, pulls: PrefixPulls, counters: dict[str, int]) -> None:
        self._tier = tier
        self._pool = pool
        self._cache = cache
        self._pulls = pulls
        self._counters = counters
        self._open: dict[int, _Load] = {}  # by load id
        self._num_begun = 0
        self._num_blocks = 0  # of the landings
        if tier.num_slots:
            cache.on_evict = tier.save

    def __len__(self) -> int:
        return len(self._open) + len(self._pulls)

    @property
    def num_prompts(self) -> int:
        """That wait before the inbox."""
        return sum(len(load.waiters) for load in self._open.values()) + self._pulls.num_prompts

    @property
    def num_tokens(self) -> int:
        """To be computed for them, as the inbox counts them."""
        waiting = [live.leader for load in self._open.values() for live, _ in load.waiters]
        return sum(leader.compute_end for leader in waiting if leader is not None) + self._pulls.num_tokens

    def saves(self) -> list[Command]:
        """What was evicted in this turn: to be performed first of all."""
        saves = self._tier.take_saves()
        self._counters["host_blocks_saved"] = self._tier.num_saved
        if saves is None:
            return []
        return [SaveBlocks(block_ids=saves.block_ids, slots=saves.slots, generations=saves.generations)]

    def begin(self, live: LiveAttempt, wanted: PrefixPull | None, now: float) -> list[Command]:
        """Bring back what the tier has of a prompt, or go on at once."""
        prefix = self._prefix(live)
        found = prefix.find(self._cache) if prefix is not None else []
        run = self._tier.find(prefix, found) if prefix is not None else []
        if prefix is None or not run:
            return self._pulls.begin(live, wanted, now)
        name = run[-1].block.name
        for load in self._open.values():
            if load.name == name:
                load.waiters.append((live, wanted))
                return []
        num_tokens = (len(found) + len(run)) * self._cache.block_size_tokens
        num_hashes = num_tokens * len(prefix.hashes) // len(prefix.token_ids)
        wanted_here = Prefix(cache_root=prefix.cache_root, token_ids=prefix.token_ids[:num_tokens], hashes=prefix.hashes[:num_hashes])
        room = self._pool.num_blocks // POOL_SHARE - self._num_blocks
        self._tier.hold(run)  # reserving may evict blocks into the tier
        landing = Landing.reserve(self._pool, self._cache, wanted_here, num_blocks_max=room)
        if landing is None:
            self._tier.let_go(run)
            return self._pulls.begin(live, wanted, now)
        assert len(landing.block_ids) == len(run)
        self._num_begun += 1
        self._num_blocks += len(run)
        self._open[self._num_begun] = _Load(landing=landing, run=run, waiters=[(live, wanted)], name=name)
        return [
            LoadBlocks(
                load_id=self._num_begun,
                slots=array("I", [entry.slot for entry in run]),
                generations=array("Q", [entry.generation for entry in run]),
                block_ids=landing.block_ids,
            )
        ]

    def finish(self, load_id: int, error: str, now: float) -> list[Command]:
        """The copy has stopped; `error` empty: the blocks hold what the slots held."""
        load = self._open.pop(load_id)
        self._num_blocks -= len(load.run)
        self._tier.let_go(load.run)
        if error:
            load.landing.discard()
            self._counters["host_load_failures"] += 1
        else:
            load.landing.keep()
            self._counters["host_loads"] += 1
            self._counters["host_load_tokens"] += len(load.run) * self._cache.block_size_tokens
        commands: list[Command] = []
        for live, wanted in load.waiters:
            commands += self._pulls.begin(live, wanted, now)
        return commands

    def clear(self) -> int:
        """Drop every cached block that nobody uses, in the pool and in slots; how many of the pool's."""
        count = self._cache.clear()
        self._tier.clear()
        self._cache.log.restate()
        return count

    def cancel(self, live: LiveAttempt) -> list[Command]:
        """The attempt ends; blocks a copy may still write are given back when it has stopped."""
        for load in self._open.values():
            load.waiters = [(waiter, wanted) for waiter, wanted in load.waiters if waiter is not live]
        return self._pulls.cancel(live)

    def check(self) -> None:
        """Assert that no slot is lost, and at rest none read. For tests: linear in the slots."""
        self._tier.check(num_readers=sum(len(load.run) for load in self._open.values()))

    def _prefix(self, live: LiveAttempt) -> Prefix | None:
        """The whole blocks of the prompt that need no computing; None when there is no tier, or no block."""
        if not len(self._tier) or live.handoff is not None:
            return None
        leader, size = live.leader, self._cache.block_size_tokens
        assert leader is not None
        num_tokens = leader.num_hit_tokens_max // size * size
        if num_tokens <= 0:
            return None
        return Prefix(cache_root=leader.cache_root, token_ids=leader.tokens[:num_tokens], hashes=leader.hash_blocks(num_tokens)[:])
