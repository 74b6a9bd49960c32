"""Which blocks a sequence lives in: taking room, sharing, copying on write, giving back, and naming what became full.

A block that a step in flight names stays pinned until that step is done, so nothing else ever writes into it meanwhile.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from engine.core.batch import DecodeBatch
from engine.core.block_pool import BlockPool
from engine.core.executor import BatchPlan
from engine.core.prefix_cache import PrefixCache
from engine.core.sequence import Sequence
from engine.step_time import StepShape
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS


@dataclass(slots=True, kw_only=True, eq=False)
class StepInFlight:
    """A planned step and what becomes true when it is done: entries and samples of `batch` first, then those of prompts."""

    plan: BatchPlan
    batch: DecodeBatch
    starts: list[int]  # by row of the batch: the token it computes
    chunks: list[tuple[Sequence, int]]  # (sequence, tokens that then have KV) of prompts
    sampled_prompts: list[Sequence]
    shape: StepShape
    num_chunks: int
    retired: list[int] = field(default_factory=list)  # blocks pinned until it is done
    gone: set[Sequence] = field(default_factory=set)  # those that gave up their blocks since

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.batch.sequences, *(sequence for sequence, _ in self.chunks)]

    @property
    def sampled(self) -> list[Sequence]:
        """In the order of plan.samples."""
        return self.batch.sequences + self.sampled_prompts


class Residence:
    """Block tables of sequences over one pool and its prefix cache."""

    def __init__(self, pool: BlockPool, cache: PrefixCache, inflight: deque[StepInFlight]) -> None:
        self._pool = pool
        self._cache = cache
        self._inflight = inflight
        self._size = cache.block_size_tokens
        self._stored_later: list[tuple[Sequence, int, int]] = []  # (sequence, tokens, residency)

    def take(
        self, sequence: Sequence, num_tokens: int, num_known_tokens: int, num_hit_tokens_max: int, may_leave: Callable[[int], bool]
    ) -> bool:
        """Blocks for `num_tokens` tokens, cached ones first; False, and nothing taken, when too few blocks would be left.

        The first `num_known_tokens` may come from the cache, and all but those after `num_hit_tokens_max` need no computing then: where
        the cache has more, the last block found is copied when it is written. may_leave: told how many blocks would be available
        afterwards (negative: there are not enough).
        """
        hashes = sequence.hash_blocks(num_known_tokens) if self._cache.enabled else []
        hits = self._cache.match(sequence.cache_root, hashes, sequence.tokens, num_known_tokens)
        for hit in hits:
            self._pool.own(hit.block_id)
        need = div_ceil(num_tokens, self._size) - len(hits)
        if len(hits) * self._size > num_hit_tokens_max and not may_leave(self._pool.num_available - need - 1):
            self._pool.disown(hits.pop().block_id)  # no block for the copy: its tokens are computed again
            need += 1
        if not may_leave(self._pool.num_available - need):
            for hit in reversed(hits):
                self._pool.disown(hit.block_id)
            return False
        num_hit_tokens = min(len(hits) * self._size, num_hit_tokens_max)
        if sequence.num_residencies == 0:
            sequence.num_cached_tokens = num_hit_tokens
        sequence.block_table = array("I", [hit.block_id for hit in hits]) + self._pool.allocate(need)
        sequence.num_computed_tokens = num_hit_tokens
        sequence.num_stored_blocks = len(hits)
        sequence.last_stored = hits[-1] if hits else None
        return True

    def num_cached_tokens(self, sequence: Sequence) -> int:
        """How much of it the cache holds now."""
        hashes = sequence.hash_blocks(sequence.compute_end) if self._cache.enabled else []
        return len(self._cache.match(sequence.cache_root, hashes, sequence.tokens, sequence.compute_end)) * self._size

    def extend(self, sequence: Sequence, count: int, *, is_copied: bool) -> tuple[int, int] | None:
        """`count` more blocks. `is_copied`: one of them replaces the shared block it would write next, and (source, target) is returned.

        The caller retires the source with the step that copies it.
        """
        table, block_ids = sequence.block_table[:], self._pool.allocate(count)
        copied = None
        if is_copied:
            index = sequence.num_computed_tokens // self._size
            copied = (table[index], block_ids.pop())
            table[index] = copied[1]
            self._pool.pin(copied[0])
            self._pool.disown(copied[0])
            if index < sequence.num_stored_blocks:  # the copy has no name, and may be written otherwise than what it was copied from
                assert index == sequence.num_stored_blocks - 1 and sequence.last_stored is not None, "only the last block is written"
                sequence.num_stored_blocks, sequence.last_stored = index, sequence.last_stored.parent
        table.extend(block_ids)
        sequence.block_table = table
        return copied

    def share(self, leader: Sequence, sibling: Sequence, num_tokens: int) -> None:
        """`sibling` goes on from the first `num_tokens` tokens of `leader`. One that only samples a first token takes no blocks."""
        sibling.num_computed_tokens = num_tokens
        if sibling.attempt.prefill_only:
            return
        sibling.block_table = leader.block_table[: div_ceil(num_tokens, self._size)]
        for block_id in sibling.block_table:
            self._pool.own(block_id)
        sibling.hashes = leader.hashes[: num_tokens // HASH_BLOCK_SIZE_TOKENS]
        sibling.num_stored_blocks = leader.num_stored_blocks
        sibling.last_stored = leader.last_stored
        sibling.can_store = leader.can_store

    def give_back(self, block_ids: array[int], last_step_id: int) -> None:
        """Let go, deepest block first; pinned until step `last_step_id` is done, if that is in flight."""
        step = next((s for s in self._inflight if s.plan.step_id == last_step_id), None)
        for block_id in reversed(block_ids):
            if step is not None:
                self._pool.pin(block_id)
                step.retired.append(block_id)
            self._pool.disown(block_id)

    def store_later(self, sequence: Sequence, num_tokens: int) -> None:
        """Its tokens came whole from another worker: it begins to decode at once, and `store_rest` names its blocks meanwhile."""
        self._stored_later.append((sequence, num_tokens, sequence.num_residencies))

    @property
    def has_rest(self) -> bool:
        return bool(self._stored_later)

    def store_rest(self) -> None:
        """Name what was put off, of sequences that still have those blocks."""
        later, self._stored_later = self._stored_later, []
        for sequence, num_tokens, residency in later:
            if sequence.num_residencies == residency:
                self.store(sequence, num_tokens)

    def store(self, sequence: Sequence, num_tokens: int) -> None:
        """Name the full blocks among the first `num_tokens` tokens of `sequence`, which have KV."""
        table = sequence.block_table
        num_full = min(num_tokens, len(sequence.tokens), len(table) * self._size) // self._size
        if not self._cache.enabled or not sequence.can_store or sequence.num_stored_blocks >= num_full:
            return
        per_block = self._size // HASH_BLOCK_SIZE_TOKENS
        hashes = sequence.hash_blocks(num_full * self._size)
        for index in range(sequence.num_stored_blocks, num_full):
            first = index * per_block
            before = hashes[first - 1] if first else sequence.cache_root
            names = tuple(hashes[first : first + per_block])
            tokens = sequence.tokens[index * self._size : (index + 1) * self._size]
            entry = self._cache.store(sequence.last_stored, before, names, tokens, table[index])
            if entry is None:
                sequence.can_store = False
                return
            if entry.block_id != table[index]:  # another sequence computed the same: hold its block, so that parents outlive children
                self._swap(sequence, index, entry.block_id)
                table = sequence.block_table
            sequence.last_stored = entry
            sequence.num_stored_blocks = index + 1

    def _swap(self, sequence: Sequence, index: int, block_id: int) -> None:
        """Hold this block in place of an equal one of our own; every choice that shares ours does, or it would hold children without it."""
        ours = sequence.block_table[index]
        for holder in (sequence, *(s for s in sequence.attempt.sequences.values() if s is not sequence)):
            table = holder.block_table
            if index < len(table) and table[index] == ours:
                self._pool.own(block_id)
                self.give_back(table[index : index + 1], holder.last_step_id)
                holder.block_table = table[:index] + array("I", [block_id]) + table[index + 1 :]


def div_ceil(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`, rounded up."""
    return -(-count // size)
