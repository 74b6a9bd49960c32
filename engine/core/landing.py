"""Pool blocks that a prefix is being copied into from elsewhere, outside any sequence, until the prefix cache has them.

    reserve ──► copy under way: blocks ours alone, cached parents held ──► keep: named, then cached      the copy was verified
                                                                     └──► discard: free again            it was not

A prompt that waits for the copy finds the blocks in the prefix cache when it is admitted, as if they had been computed here; where
they were evicted meanwhile, or the copy failed, it computes them. So the scheduler knows nothing of copies.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from engine.core.block_pool import BlockPool
from engine.core.prefix_cache import CachedBlock, PrefixCache
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prefix:
    """The first tokens of a prompt, in whole blocks, with their names."""

    cache_root: bytes
    token_ids: array[int]
    hashes: list[bytes]  # of its hash blocks, in order

    def find(self, cache: PrefixCache) -> list[CachedBlock]:
        """The blocks of it that are cached, from the first on."""
        return cache.match(self.cache_root, self.hashes, self.token_ids, len(self.token_ids))


class Landing:
    """Blocks of one copy. `first_block` counts in the prefix: those before lie in the cache already, and are held too."""

    def __init__(self, pool: BlockPool, cache: PrefixCache, prefix: Prefix, held: list[CachedBlock], block_ids: array[int]) -> None:
        self.block_ids = block_ids
        self._pool = pool
        self._cache = cache
        self._prefix = prefix
        self._held = held

    @classmethod
    def reserve(cls, pool: BlockPool, cache: PrefixCache, prefix: Prefix, *, num_blocks_max: int) -> Landing | None:
        """Blocks for all of `prefix` that is not cached here; None when that is more than `num_blocks_max`, or than can be had."""
        held = prefix.find(cache)
        for block in held:
            pool.own(block.block_id)
        need = len(prefix.token_ids) // cache.block_size_tokens - len(held)
        if need > min(num_blocks_max, pool.num_available):
            _let_go(pool, held)
            return None
        return cls(pool, cache, prefix, held, pool.allocate(need))

    @property
    def first_block(self) -> int:
        return len(self._held)

    def keep(self) -> None:
        """The blocks hold what they should: name them, and leave them to the cache."""
        size, root = self._cache.block_size_tokens, self._prefix.cache_root
        per_block = size // HASH_BLOCK_SIZE_TOKENS
        tokens, hashes = self._prefix.token_ids, self._prefix.hashes
        chain = list(self._held)
        unnamed = list(self.block_ids)
        while unnamed:
            index = len(chain)
            first = index * per_block
            entry = self._cache.store(
                chain[-1] if chain else None,
                hashes[first - 1] if first else root,
                tuple(hashes[first : first + per_block]),
                tokens[index * size : (index + 1) * size],
                unnamed[0],
            )
            if entry is None:
                break  # our name stands for other tokens: what follows cannot be reached under it either
            block_id = unnamed.pop(0)
            if entry.block_id != block_id:  # computed here meanwhile
                self._pool.own(entry.block_id)
                self._pool.disown(block_id)
            chain.append(entry)
        for block_id in reversed(unnamed):
            self._pool.disown(block_id)
        _let_go(self._pool, chain)

    def discard(self) -> None:
        """What they hold counts for nothing."""
        for block_id in reversed(self.block_ids):
            self._pool.disown(block_id)
        _let_go(self._pool, self._held)


def _let_go(pool: BlockPool, chain: list[CachedBlock]) -> None:
    """The deepest first, so that it is evicted first."""
    for block in reversed(chain):
        pool.disown(block.block_id)
