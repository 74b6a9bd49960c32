"""Which prefixes lie in which blocks, by the names of protocol.block_hash.

A block is named by the hash at its end, so a name stands for everything before it as well. A hash never decides alone: token ids
are compared at each block on the way from the root, and each entry hangs on its parent entry, not on its parent's hash.

Two invariants keep entries reachable. Whoever holds a block holds its parents (`store` hands back the block that is already there,
and the caller takes it instead of its own). Holders let go of the deepest block first. So the least recently used block never has a child.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass

from engine.core.block_pool import BlockPool
from engine.core.kv_log import KvLog
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.worker import Tier


@dataclass(slots=True, kw_only=True, eq=False)
class CachedBlock:
    """One full block with known content."""

    block_id: int
    before: bytes  # the hash in front of it: its parent's name, or the chain's root
    hashes: tuple[bytes, ...]  # of the hash blocks inside; the last is its name
    token_ids: bytes  # uint32 words, native order
    parent: CachedBlock | None  # None: the first block of a chain
    num_children: int = 0

    @property
    def name(self) -> bytes:
        return self.hashes[-1]


class PrefixCache:
    """Names of the blocks of one pool. Bounded by the pool: an entry lives as long as its block is not reused."""

    def __init__(self, pool: BlockPool, *, block_size_tokens: int, enabled: bool) -> None:
        assert block_size_tokens % HASH_BLOCK_SIZE_TOKENS == 0
        self.enabled = enabled
        self.log = KvLog()  # of this and of the tiers behind it
        self.on_evict: Callable[[CachedBlock], None] = _nobody_else  # told of a block whose content is about to go
        self._pool = pool
        self.block_size_tokens = block_size_tokens
        self._hashes_per_block = block_size_tokens // HASH_BLOCK_SIZE_TOKENS
        self._by_name: dict[bytes, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        pool.on_evict = self._forget

    def match(self, root: bytes, hashes: list[bytes], tokens: array[int], num_tokens_max: int) -> list[CachedBlock]:
        """The longest cached run of blocks that holds the first tokens of `tokens`, at most `num_tokens_max` of them.

        hashes: names of the hash blocks of `tokens` in order, after `root`. The caller owns the blocks before it allocates others.
        """
        found: list[CachedBlock] = []
        if not self.enabled:
            return found
        parent: CachedBlock | None = None
        before = root
        size = self.block_size_tokens
        for index in range(min(num_tokens_max, len(tokens)) // size):
            entry = self._by_name.get(hashes[(index + 1) * self._hashes_per_block - 1])
            if entry is None or not self._is_child(entry, parent, before, tokens[index * size : (index + 1) * size].tobytes()):
                break
            found.append(entry)
            parent, before = entry, entry.name
        return found

    def store(
        self, parent: CachedBlock | None, before: bytes, hashes: tuple[bytes, ...], token_ids: array[int], block_id: int
    ) -> CachedBlock | None:
        """Name the content of a full, computed block. None: its name is taken by other tokens, or the cache is off.

        When an equal block is there already, that one is returned and `block_id` stays nameless: the caller swaps.
        """
        assert len(hashes) == self._hashes_per_block and len(token_ids) == self.block_size_tokens
        if not self.enabled:
            return None
        raw = token_ids.tobytes()
        entry = self._by_name.get(hashes[-1])
        if entry is not None:
            return entry if self._is_child(entry, parent, before, raw) else None
        entry = CachedBlock(block_id=block_id, before=before, hashes=hashes, token_ids=raw, parent=parent)
        self._by_name[entry.name] = entry
        self._by_block[block_id] = entry
        self._pool.name(block_id)
        if parent is not None:
            parent.num_children += 1
        self.log.store(Tier.DEVICE, before, hashes)
        return entry

    def clear(self) -> int:
        """Forget every block that nobody holds, without a word to the tiers behind; how many were dropped."""
        on_evict, self.on_evict = self.on_evict, _nobody_else
        count = self._pool.evict_cached()
        self.on_evict = on_evict
        return count

    @staticmethod
    def _is_child(entry: CachedBlock, parent: CachedBlock | None, before: bytes, token_ids: bytes) -> bool:
        return entry.parent is parent and entry.before == before and entry.token_ids == token_ids

    def _forget(self, block_id: int) -> None:
        entry = self._by_block.pop(block_id)
        assert entry.num_children == 0, "a block was evicted before its children"
        del self._by_name[entry.name]
        if entry.parent is not None:
            entry.parent.num_children -= 1
        self.log.remove(Tier.DEVICE, entry.hashes)
        self.on_evict(entry)

    def __len__(self) -> int:
        return len(self._by_name)


def _nobody_else(block: CachedBlock) -> None:
    """No tier lies behind the pool."""
