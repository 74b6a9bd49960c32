"""Whatever is evicted, found, read and let go in whatever order: a slot that is found holds the bytes of the block it is found for.

How: the tier and, beside it, what a driver does with its commands, a dictionary of slots whose bytes name the whole chain up to a block.
Prompts share beginnings and roots; each found run is compared with the chain of the prompt itself.
Seen to fail with readers not looked at, with a block saved under the next one that is evicted, and with a dropped slot not told of.
"""

from __future__ import annotations

from array import array
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.host_tier import HostTier, SlotEntry
from engine.core.kv_log import KvLog
from engine.core.landing import Prefix
from engine.core.prefix_cache import CachedBlock
from protocol.block_hash import block_hashes
from protocol.worker import BlocksStored, Tier

pytestmark = pytest.mark.pure

SIZE = 16
DEPTH = 4
ROOTS = (b"r" * 16, b"s" * 16)
Chain = tuple[int, tuple[int, ...]]  # (root, the kind of each block)


def prefix_of(chain: Chain) -> Prefix:
    root, kinds = chain
    tokens = array("I", [kind * 1000 + i for kind in kinds for i in range(SIZE)])
    return Prefix(cache_root=ROOTS[root], token_ids=tokens, hashes=block_hashes(ROOTS[root], tokens))


def blocks_of(chain: Chain) -> list[CachedBlock]:
    """Fresh entries, as a pool that computed the prompt anew has them; block ids are drawn by the caller."""
    prefix, made = prefix_of(chain), list[CachedBlock]()
    for index, name in enumerate(prefix.hashes):
        raw = prefix.token_ids[index * SIZE : (index + 1) * SIZE].tobytes()
        before = prefix.hashes[index - 1] if index else prefix.cache_root
        made.append(CachedBlock(block_id=index, before=before, hashes=(name,), token_ids=raw, parent=made[-1] if made else None))
    return made


CHAINS = st.sampled_from([(0, (0, 0, 0, 0)), (0, (0, 0, 1, 1)), (0, (1, 1, 1)), (1, (0, 0, 0, 0))])  # beginnings and tenants shared
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("evict"), CHAINS, st.integers(0, DEPTH)),
        st.tuples(st.just("read"), CHAINS, st.integers(0, DEPTH)),
        st.tuples(st.just("let go"), st.integers(0, 3)),
        st.tuples(st.just("turn ends")),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(num_slots=st.integers(1, 6), acts=ACTS)
def test_a_slot_holds_what_it_is_found_for(num_slots: int, acts: list[Any]) -> None:
    log = KvLog()
    tier = HostTier(num_slots, log, block_size_tokens=SIZE, num_saves_max=5)
    pool: dict[int, Chain] = {}  # block id -> what lies there; an id is reused by later evictions
    slots: dict[int, tuple[int, Chain]] = {}  # slot -> (generation, what lies there)
    reading: list[tuple[list[SlotEntry], list[Chain]]] = []
    told: set[bytes] = set()

    def end_turn() -> None:
        saves = tier.take_saves()
        for block_id, slot, generation in zip(saves.block_ids, saves.slots, saves.generations, strict=True) if saves else ():
            slots[slot] = (generation, pool[block_id])
        for event in log.take():
            assert not isinstance(event, BlocksStored) or not told & set(event.hashes)
            told.symmetric_difference_update(event.hashes)  # type: ignore[union-attr]
        assert told == set(tier._entries) == set(log.listing(Tier.HOST)[0])

    next_block_id = 0
    for act in [*acts, ("turn ends",)]:
        if act[0] == "evict":
            _, chain, num_kept = act
            for index, block in reversed(list(enumerate(blocks_of(chain)))[num_kept:]):
                block.block_id = next_block_id
                pool[next_block_id] = (chain[0], chain[1][: index + 1])
                next_block_id += 1
                tier.save(block)
        elif act[0] == "read":
            _, chain, num_found = act
            end_turn()
            found = blocks_of(chain)[:num_found]
            run = tier.find(prefix_of(chain), found)
            tier.hold(run)
            reading.append((run, [(chain[0], chain[1][: len(found) + i + 1]) for i in range(len(run))]))
        elif act[0] == "let go" and act[1] < len(reading):
            tier.let_go(reading.pop(act[1])[0])
        elif act[0] == "turn ends":
            end_turn()
        tier.check(num_readers=sum(len(run) for run, _ in reading))
        for run, wanted in reading:
            assert [slots[entry.slot] for entry in run] == [(e.generation, chain) for e, chain in zip(run, wanted, strict=True)]
