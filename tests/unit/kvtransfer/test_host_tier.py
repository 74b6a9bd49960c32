"""The host tier's bytes: what is loaded is what was saved, and a slot that was reused is not taken for it.

How: a small pool with recognisable bytes; the native copy and, where there is none, its reference.
"""

from __future__ import annotations

from array import array
from random import Random

import pytest

from kvtransfer.host_tier import CpuHostTier
from kvtransfer.region import PoolMemory
from tests.sim_cluster import layout

pytestmark = pytest.mark.pure

NUM_BLOCKS, NUM_SLOTS = 12, 5


@pytest.fixture
def pool() -> PoolMemory:
    return PoolMemory.create(layout(), NUM_BLOCKS)


def fill(pool: PoolMemory, block_id: int, value: int) -> None:
    size = pool.region.layout.block_bytes
    pool.region.blocks[block_id * size : (block_id + 1) * size] = bytes([value % 256]) * size


def read(pool: PoolMemory, block_id: int) -> bytes:
    size = pool.region.layout.block_bytes
    return bytes(pool.region.blocks[block_id * size : (block_id + 1) * size])


def test_what_comes_back_is_what_was_saved(pool: PoolMemory) -> None:
    """Any blocks to any slots and back to any others, 200 times. Seen to fail with slots and blocks exchanged in `load`."""
    rng = Random(5)
    tier = CpuHostTier(pool.region, NUM_SLOTS)
    generations = [0] * NUM_SLOTS
    content: dict[int, bytes] = {}
    for turn in range(200):
        slots = array("I", rng.sample(range(NUM_SLOTS), rng.randint(1, NUM_SLOTS)))
        sources = array("I", rng.sample(range(NUM_BLOCKS), len(slots)))
        for slot, source in zip(slots, sources, strict=True):
            fill(pool, source, turn * 31 + source)
            generations[slot] += 1
            content[slot] = read(pool, source)
        tier.save(sources, slots, array("Q", [generations[s] for s in slots]))
        for source in sources:
            fill(pool, source, 0)
        wanted = array("I", rng.sample(sorted(content), rng.randint(1, len(content))))
        targets = array("I", rng.sample(range(NUM_BLOCKS), len(wanted)))
        assert tier.load(wanted, array("Q", [generations[s] for s in wanted]), targets) == ""
        assert [read(pool, t) for t in targets] == [content[s] for s in wanted]
    tier.close()
    pool.close()


def test_a_reused_slot_is_not_loaded(pool: PoolMemory) -> None:
    """Seen to fail with generations not compared: the new content would pass for the old."""
    tier = CpuHostTier(pool.region, NUM_SLOTS)
    fill(pool, 0, 1)
    tier.save(array("I", [0]), array("I", [3]), array("Q", [1]))
    fill(pool, 1, 2)
    tier.save(array("I", [1]), array("I", [3]), array("Q", [2]))
    before = read(pool, 7)
    assert tier.load(array("I", [3]), array("Q", [1]), array("I", [7])) == "slot 3 has generation 2, 1 was saved"
    assert read(pool, 7) == before
    tier.close()
    pool.close()


def test_generations_of_slots_only_grow(pool: PoolMemory) -> None:
    tier = CpuHostTier(pool.region, NUM_SLOTS)
    tier.save(array("I", [0]), array("I", [3]), array("Q", [2]))
    with pytest.raises(AssertionError, match="would fall from 2 to 1"):
        tier.save(array("I", [0]), array("I", [3]), array("Q", [1]))
    tier.close()
    pool.close()
