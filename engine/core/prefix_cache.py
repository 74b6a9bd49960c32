"""Which prefixes lie in which blocks, by the names of protocol.block_hash, and the events that tell the router.

A block is named by the hash at its end, so a name stands for everything before it as well. A hash never decides alone: token ids
are compared at each block on the way from the root, and each entry hangs on its parent entry, not on its parent's hash.

Two invariants keep entries reachable. Whoever holds a block holds its parents (`store` hands back the block that is already there,
and the caller takes it instead of its own). Holders let go of the deepest block first. So the least recently used block never has a child.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from engine.core.block_pool import BlockPool
from protocol.block_hash import HASH_BLOCK_SIZE_TOKENS
from protocol.worker import BlocksRemoved, BlocksStored, KvEvent


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
        self.last_event_number = 0
        self._pool = pool
        self.block_size_tokens = block_size_tokens
        self._hashes_per_block = block_size_tokens // HASH_BLOCK_SIZE_TOKENS
        self._by_name: dict[bytes, CachedBlock] = {}
        self._by_block: dict[int, CachedBlock] = {}
        self._announced: dict[
            bytes, _Announced
        ] = {}  # hash block -> how many blocks hold it (more than one: blocks larger than a hash block)
        self._stored: _Run | None = None  # event being gathered
        self._removed: list[bytes] = []
        self._events: list[KvEvent] = []
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
        self._announce(entry)
        return entry

    @staticmethod
    def _is_child(entry: CachedBlock, parent: CachedBlock | None, before: bytes, token_ids: bytes) -> bool:
        return entry.parent is parent and entry.before == before and entry.token_ids == token_ids

    def _forget(self, block_id: int) -> None:
        entry = self._by_block.pop(block_id)
        assert entry.num_children == 0, "a block was evicted before its children"
        del self._by_name[entry.name]
        if entry.parent is not None:
            entry.parent.num_children -= 1
        self._retract(entry)

    def __len__(self) -> int:
        return len(self._by_name)

    # --- events, in hash blocks ---

    def take_events(self) -> tuple[KvEvent, ...]:
        """Changes since the last call, numbered on without a gap."""
        self._end_stored()
        self._end_removed()
        events, self._events = tuple(self._events), []
        return events

    def listing(self) -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
        """(hashes, parent of each) of everything that can be hit now, parents first."""
        return tuple(self._announced), tuple(a.before for a in self._announced.values())

    def _announce(self, entry: CachedBlock) -> None:
        self._end_removed()
        before = entry.before
        for name in entry.hashes:
            known = self._announced.get(name)
            if known is not None:
                known.count += 1
            else:
                self._announced[name] = _Announced(before=before, count=1)
                if self._stored is None or self._stored.last != before:
                    self._end_stored()
                    self._stored = _Run(parent=before, last=before, hashes=[])
                self._stored.hashes.append(name)
                self._stored.last = name
            before = name

    def _retract(self, entry: CachedBlock) -> None:
        self._end_stored()
        for name in reversed(entry.hashes):
            known = self._announced[name]
            known.count -= 1
            if known.count == 0:
                del self._announced[name]
                self._removed.append(name)

    def _end_stored(self) -> None:
        if self._stored is not None:
            self.last_event_number += 1
            self._events.append(BlocksStored(number=self.last_event_number, parent=self._stored.parent, hashes=tuple(self._stored.hashes)))
            self._stored = None

    def _end_removed(self) -> None:
        if self._removed:
            self.last_event_number += 1
            self._events.append(BlocksRemoved(number=self.last_event_number, hashes=tuple(self._removed)))
            self._removed = []


@dataclass(slots=True, kw_only=True)
class _Announced:
    before: bytes
    count: int


@dataclass(slots=True, kw_only=True)
class _Run:
    parent: bytes
    last: bytes
    hashes: list[bytes]
