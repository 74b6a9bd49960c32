"""What a worker tells of its cache is prefix-closed after every single event: the router searches instead of walking because of this.

How: a pool with its prefix cache under random prompts that share beginnings, held and let go in random order, evicted by each other,
with KV blocks of one and of two hash blocks. What a listener holds is kept as a plain set; each event's blocks must follow a block that
is in it or a root, parents first, and none may go before its children.
Seen to fail with the newest block evicted first, and with `remove` telling the hash blocks of a block in the order of `store`.
"""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.block_pool import BlockPool
from engine.core.prefix_cache import CachedBlock, PrefixCache
from protocol.block_hash import block_hashes
from protocol.worker import BlocksRemoved, BlocksStored, KvEvent

pytestmark = pytest.mark.pure

ROOTS = (b"r" * 16, b"s" * 16)
NUM_BLOCKS = 5
BEGINNINGS = ((0, 0, 0, 0), (0, 0, 1, 1), (0, 1, 1), (1, 1, 1, 1))  # the kind of each hash block

ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("prompt"), st.integers(0, 1), st.sampled_from(BEGINNINGS), st.integers(1, 4)),
        st.tuples(st.just("let go"), st.integers(0, 5)),
        st.tuples(st.just("let go"), st.integers(0, 5)),
        st.tuples(st.just("tell")),
    ),
    min_size=20,
    max_size=60,
)


class Told:
    """A listener's plain set, and the parent each block was told with."""

    def __init__(self) -> None:
        self.held: set[bytes] = set()
        self.parents: dict[bytes, bytes] = {}

    def hear(self, event: KvEvent) -> None:
        if isinstance(event, BlocksStored):
            before = event.parent
            for name in event.hashes:
                assert before in ROOTS or before in self.held, "a block was told before its parent"
                self.held.add(name)
                self.parents[name] = before
                before = name
        elif isinstance(event, BlocksRemoved):
            for name in event.hashes:
                self.held.remove(name)
                assert name not in {self.parents[h] for h in self.held}, "a block went before its children"


@settings(max_examples=300, deadline=None)
@given(block_size=st.sampled_from((16, 32)), acts=ACTS)
def test_no_block_is_told_of_without_its_parents(block_size: int, acts: list[tuple[object, ...]]) -> None:
    pool = BlockPool(NUM_BLOCKS)
    cache = PrefixCache(pool, block_size_tokens=block_size, enabled=True)
    running: list[list[int]] = []
    told = Told()
    for act in [*acts, ("tell",)]:
        match act:
            case ("prompt", int(root), tuple(kinds), int(length)):
                tokens = array("I", [kind * 100 + i for kind in kinds[:length] for i in range(16)])
                held = compute(pool, cache, ROOTS[root], tokens)
                if held:
                    running.append(held)
            case ("let go", int(index)) if running:
                for block_id in reversed(running.pop(index % len(running))):  # the deepest first, as the scheduler does
                    pool.disown(block_id)
            case ("tell",):
                for event in cache.log.take():
                    told.hear(event)
                assert told.held == {name for entry in cache._by_name.values() for name in entry.hashes}


def compute(pool: BlockPool, cache: PrefixCache, root: bytes, tokens: array[int]) -> list[int]:
    """Hold the cached beginning, compute the rest, swap what somebody computed meanwhile; nothing when the pool is full."""
    size, hashes = cache.block_size_tokens, block_hashes(root, tokens)
    per = size // 16
    found = cache.match(root, hashes, tokens, len(tokens))
    held = [entry.block_id for entry in found]
    for block_id in held:
        pool.own(block_id)
    num_new = len(tokens) // size - len(held)
    if num_new > pool.num_available:
        for block_id in reversed(held):
            pool.disown(block_id)
        return []
    parent: CachedBlock | None = found[-1] if found else None
    for index, block_id in enumerate(pool.allocate(num_new), len(held)):
        before = hashes[index * per - 1] if index else root
        names = tuple(hashes[index * per : (index + 1) * per])
        parent = cache.store(parent, before, names, tokens[index * size : (index + 1) * size], block_id)
        assert parent is not None and parent.block_id == block_id
        held.append(block_id)
    return held
