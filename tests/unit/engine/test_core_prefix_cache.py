"""A prefix is found by its names, believed only by its tokens, and told to the router without a gap."""

from __future__ import annotations

from array import array

import pytest

from engine.core.block_pool import BlockPool
from engine.core.prefix_cache import CachedBlock, PrefixCache
from protocol.block_hash import block_hashes
from protocol.worker import BlocksRemoved, BlocksStored, Tier

pytestmark = pytest.mark.pure

ROOT, OTHER_ROOT = b"r" * 16, b"o" * 16


def tokens(*blocks: int) -> array[int]:
    """16 equal tokens for each number."""
    return array("I", [b for b in blocks for _ in range(16)])


class Chains:
    """A cache with the least that stores whole chains into it."""

    def __init__(self, num_blocks: int = 8, block_size: int = 16) -> None:
        self.pool = BlockPool(num_blocks)
        self.cache = PrefixCache(self.pool, block_size_tokens=block_size, enabled=True)
        self.size = block_size

    def store(self, chain: array[int], root: bytes = ROOT) -> list[CachedBlock]:
        """Own new blocks for `chain`, store them, let them go."""
        hashes = block_hashes(root, chain)
        per = self.size // 16
        entries: list[CachedBlock] = []
        blocks = self.pool.allocate(len(chain) // self.size)
        for index, block_id in enumerate(blocks):
            before = hashes[index * per - 1] if index else root
            entry = self.cache.store(
                entries[-1] if entries else None,
                before,
                tuple(hashes[index * per : (index + 1) * per]),
                chain[index * self.size : (index + 1) * self.size],
                block_id,
            )
            assert entry is not None
            entries.append(entry)
        for block_id in reversed(blocks):
            self.pool.disown(block_id)
        return entries

    def match(self, chain: array[int], root: bytes = ROOT, most: int = 1 << 30) -> list[int]:
        return [e.block_id for e in self.cache.match(root, block_hashes(root, chain), chain, most)]


def test_longest_common_run_of_blocks_is_found() -> None:
    chains = Chains()
    stored = [e.block_id for e in chains.store(tokens(1, 2, 3))]
    assert chains.match(tokens(1, 2, 3)) == stored
    assert chains.match(tokens(1, 2, 9)) == stored[:2]
    assert chains.match(tokens(9, 2, 3)) == []
    assert chains.match(tokens(1, 2, 3), most=47) == stored[:2], "whole blocks within the limit"


def test_another_root_finds_nothing() -> None:
    """Blocks of one tenant are never read for another (law I4)."""
    chains = Chains()
    chains.store(tokens(1, 2))
    assert chains.match(tokens(1, 2), root=OTHER_ROOT) == []


def test_a_hash_never_decides_alone() -> None:
    """Equal names, other tokens: refused both when looked up and when stored. Seen to fail without the comparison of token ids."""
    chains = Chains()
    (entry,) = chains.store(tokens(1))
    forged = [entry.name]
    assert chains.cache.match(ROOT, forged, tokens(7), 16) == []
    (block_id,) = chains.pool.allocate(1)
    assert chains.cache.store(None, ROOT, (entry.name,), tokens(7), block_id) is None


def test_a_parents_name_does_not_stand_for_the_parent() -> None:
    """A child hangs on its parent's entry, so a forged parent with the same hash has no children. Seen to fail comparing `before` only."""
    chains = Chains()
    parent, child = chains.store(tokens(1, 2))
    forged = CachedBlock(block_id=99, before=ROOT, hashes=parent.hashes, token_ids=tokens(7).tobytes(), parent=None)
    assert not chains.cache._is_child(child, forged, parent.name, child.token_ids)
    assert chains.cache._is_child(child, parent, parent.name, child.token_ids)


def test_an_equal_block_is_handed_back_instead_of_stored_twice() -> None:
    chains = Chains()
    (first,) = chains.store(tokens(1))
    (second,) = chains.store(tokens(1))
    assert second is first and len(chains.cache) == 1
    assert chains.pool.num_cached == 1


def test_children_are_evicted_before_their_parents() -> None:
    """Seen to fail with blocks given back root first."""
    chains = Chains(num_blocks=4)
    stored = chains.store(tokens(1, 2, 3))
    chains.pool.allocate(2)
    assert chains.match(tokens(1, 2, 3)) == [stored[0].block_id, stored[1].block_id]


def test_events_are_numbered_and_follow_the_chain() -> None:
    chains = Chains(num_blocks=3)
    names = block_hashes(ROOT, tokens(1, 2))
    chains.store(tokens(1, 2))
    assert chains.cache.log.take() == (BlocksStored(number=1, parent=ROOT, hashes=tuple(names)),)
    chains.pool.allocate(3)
    assert chains.cache.log.take() == (BlocksRemoved(number=2, hashes=(names[1], names[0])),)
    assert chains.cache.log.take() == () and chains.cache.log.last_number == 2


def test_hash_blocks_inside_larger_blocks_are_told_once_and_taken_back_with_their_last_holder() -> None:
    """Two blocks of 32 tokens share their first 16. Seen to fail without counting holders: the first eviction took the shared name back."""
    chains = Chains(num_blocks=2, block_size=32)
    chains.store(tokens(1, 2))
    chains.store(tokens(1, 3))
    shared = block_hashes(ROOT, tokens(1))[0]
    first, second = chains.cache.log.take()
    assert isinstance(first, BlocksStored) and isinstance(second, BlocksStored)
    assert len(first.hashes) == 2 and second.parent == shared and len(second.hashes) == 1
    chains.pool.allocate(1)
    assert chains.cache.log.take() == (BlocksRemoved(number=3, hashes=(first.hashes[1],)),)
    assert set(chains.cache.log.listing(Tier.DEVICE)[0]) == {shared, second.hashes[0]}
    chains.pool.allocate(1)
    assert chains.cache.log.take() == (BlocksRemoved(number=4, hashes=(second.hashes[0], shared)),)


def test_switched_off_it_keeps_and_tells_nothing() -> None:
    pool = BlockPool(2)
    cache = PrefixCache(pool, block_size_tokens=16, enabled=False)
    (block_id,) = pool.allocate(1)
    assert cache.store(None, ROOT, (b"x" * 16,), tokens(1), block_id) is None
    assert cache.match(ROOT, block_hashes(ROOT, tokens(1)), tokens(1), 16) == [] and cache.log.take() == ()
