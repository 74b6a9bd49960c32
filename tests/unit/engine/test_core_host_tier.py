"""The host tier as a table of slots: what is found, what goes first, and what the router is told."""

from __future__ import annotations

from array import array

import pytest

from engine.core.host_tier import HostTier
from engine.core.kv_log import KvLog
from engine.core.landing import Prefix
from engine.core.prefix_cache import CachedBlock
from protocol.block_hash import block_hashes
from protocol.worker import BlocksRemoved, BlocksStored, Tier

pytestmark = pytest.mark.pure

ROOT = b"r" * 16
SIZE = 16


def tokens(num_blocks: int, first: int = 0) -> array[int]:
    return array("I", range(first, first + num_blocks * SIZE))


def prefix(token_ids: array[int], root: bytes = ROOT) -> Prefix:
    return Prefix(cache_root=root, token_ids=token_ids, hashes=block_hashes(root, token_ids))


def chain(token_ids: array[int], root: bytes = ROOT) -> list[CachedBlock]:
    """The blocks of a prompt as the pool held them."""
    blocks: list[CachedBlock] = []
    before = root
    for index, name in enumerate(block_hashes(root, token_ids)):
        raw = token_ids[index * SIZE : (index + 1) * SIZE].tobytes()
        parent = blocks[-1] if blocks else None
        blocks.append(CachedBlock(block_id=10 + index, before=before, hashes=(name,), token_ids=raw, parent=parent))
        before = name
    return blocks


def tier_with(*blocks: CachedBlock, num_slots: int = 4, num_saves_max: int = 100) -> tuple[HostTier, KvLog]:
    """As eviction does it: the deepest first."""
    log = KvLog()
    tier = HostTier(num_slots, log, block_size_tokens=SIZE, num_saves_max=num_saves_max)
    for block in reversed(blocks):
        tier.save(block)
    return tier, log


def test_slots_continue_what_the_pool_has() -> None:
    """Seen to fail with `find` starting at the first block: the pool's own blocks are asked for again."""
    text = tokens(4)
    blocks = chain(text)
    tier, _ = tier_with(*blocks[2:])
    assert [entry.block for entry in tier.find(prefix(text), blocks[:2])] == blocks[2:]
    assert tier.find(prefix(text), blocks[:1]) == [] and tier.find(prefix(text), []) == []


def test_a_chain_stored_anew_is_the_same_chain() -> None:
    """The pool computed the first blocks again: other entries, equal tokens."""
    text = tokens(4)
    tier, _ = tier_with(*chain(text)[2:])
    assert len(tier.find(prefix(text), chain(text)[:2])) == 2


@pytest.mark.parametrize("forged", ["own tokens", "parent's tokens", "root"])
def test_tokens_decide_not_names(forged: str) -> None:
    """A slot under the right name with other content somewhere before its end. Seen to fail, each, with its comparison left out."""
    text = tokens(3)
    blocks = chain(text)
    other = tokens(1, first=900).tobytes()
    root = b"x" * 16 if forged == "root" else ROOT
    first = CachedBlock(block_id=1, before=root, hashes=blocks[0].hashes, token_ids=blocks[0].token_ids, parent=None)
    raw = other if forged == "parent's tokens" else blocks[1].token_ids
    second = CachedBlock(block_id=2, before=blocks[0].name, hashes=blocks[1].hashes, token_ids=raw, parent=first)
    raw = other if forged == "own tokens" else blocks[2].token_ids
    third = CachedBlock(block_id=3, before=blocks[1].name, hashes=blocks[2].hashes, token_ids=raw, parent=second)
    tier, _ = tier_with(third)
    assert tier.find(prefix(text), blocks[:2]) == []
    tier, _ = tier_with(blocks[2])
    assert len(tier.find(prefix(text), chain(text)[:2])) == 1


def test_a_first_block_of_another_root_is_not_found() -> None:
    text = tokens(1)
    (mine,) = chain(text)
    forged = CachedBlock(block_id=1, before=b"x" * 16, hashes=mine.hashes, token_ids=mine.token_ids, parent=None)
    tier, _ = tier_with(forged)
    assert tier.find(prefix(text), []) == []


def test_the_least_recently_used_slot_goes_first_children_before_parents() -> None:
    """Seen to fail with `popitem` at the other end."""
    old, new = tokens(2), tokens(2, first=500)
    tier, _ = tier_with(*chain(old), num_slots=3)
    for block in reversed(chain(new)):
        tier.save(block)
    assert len(tier.find(prefix(old), [])) == 1 and len(tier.find(prefix(new), [])) == 2
    tier.check(num_readers=0)


def test_a_slot_that_is_read_is_not_reused() -> None:
    """Seen to fail with readers not looked at: the slot under the copy gets other content."""
    old = tokens(2)
    tier, _ = tier_with(*chain(old), num_slots=2)
    run = tier.find(prefix(old), [])
    tier.hold(run)
    tier.take_saves()
    tier.save(chain(tokens(1, first=500))[0])
    assert tier.take_saves() is None
    tier.check(num_readers=2)
    tier.let_go(run)
    tier.save(chain(tokens(1, first=500))[0])
    saves = tier.take_saves()
    assert saves is not None and list(saves.generations) == [2]


def test_what_lies_there_already_is_not_copied_again() -> None:
    """Seen to fail with `_is_same` always False."""
    text = tokens(2)
    tier, _ = tier_with(*chain(text))
    tier.take_saves()
    for block in reversed(chain(text)):
        tier.save(block)
    assert tier.take_saves() is None and tier.num_saved == 2


def test_events_tell_parents_first_and_their_tier() -> None:
    """One event a chain, and none of what came and went between two. Seen to fail with every save told at once."""
    text = tokens(3)
    names = block_hashes(ROOT, text)
    tier, log = tier_with(*chain(text), num_slots=3)
    tier.take_saves()
    assert log.take() == (BlocksStored(number=1, parent=ROOT, hashes=tuple(names), tier=Tier.HOST),)
    tier.save(chain(tokens(1, first=500))[0])
    tier.take_saves()
    removed, stored = log.take()
    assert removed == BlocksRemoved(number=2, hashes=(names[2],), tier=Tier.HOST)
    assert isinstance(stored, BlocksStored) and stored.number == 3
    for first in (600, 700, 800, 900):
        tier.save(chain(tokens(1, first=first))[0])
    tier.take_saves()
    told = [name for event in log.take() if isinstance(event, BlocksStored) for name in event.hashes]
    assert len(told) == 3, "the first of four had gone before it was told of"


def test_a_turn_saves_so_much_and_no_more() -> None:
    """What is beyond is let go, and not told of. Seen to fail with the bound left out."""
    text = tokens(4)
    tier, log = tier_with(*chain(text), num_saves_max=3)
    saves = tier.take_saves()
    assert saves is not None and len(saves.slots) == 3 == len(tier)
    assert [len(event.hashes) for event in log.take() if isinstance(event, BlocksStored)] == [3]
    tier.save(chain(text)[0])
    assert tier.take_saves() is not None and len(tier.find(prefix(text), [])) == 4
