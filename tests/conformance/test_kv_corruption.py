"""No damaged KV block passes for the one that was offered: slices of the corruption campaign (`python -m tests.kv_campaign`).

How: every injection is a whole pull through real transports, and is shown to be one by what arrives when nothing is checked.
Seen to fail, each planted: `digest.verify` that answers that all is well; `copy_verified` without its look after the copy; the trailer's
generations not compared; digests of layers summed up without their order; a seed without the generation. The looks *before* a copy can be
left out without an escape, for words only grow: they save the copy of what is stale already.
"""

from __future__ import annotations

import itertools
from array import array

import numpy as np
import pytest

from kvtransfer import digest
from kvtransfer.region import PoolMemory
from protocol.kv import DigestMode
from tests.kv_campaign.cases import Kind, draw
from tests.kv_campaign.corruption import run_bulk, run_live_part
from tests.kv_campaign.layouts import LAYOUTS, CampaignLayout
from tests.kv_campaign.tally import CONTENT, STALENESS, Tally, interval

pytestmark = [pytest.mark.conformance]
IN_PROCESS = ("local", "shm", "tcp")


def judge(tally: Tally) -> None:
    assert tally.num_escaped(DigestMode.FULL) == 0, tally.cells()
    for mode in DigestMode:
        assert tally.num_escaped(mode, STALENESS) == 0, (mode, tally.cells())
    # What makes the zeros mean something: unchecked, all of it arrives, and a decode step that reads it says another token.
    assert tally.num_escaped(DigestMode.OFF, CONTENT) == tally.num_injected(CONTENT)
    assert sum(tally.wrong.values()) >= 0.9 * sum(tally.reaching.values())
    assert sum(tally.reaching.values()) >= 0.9 * tally.num_injected()


@pytest.mark.pure
def test_a_few_hundred_injections_are_caught() -> None:
    tally = run_bulk(360, 11, IN_PROCESS, jobs=1)
    judge(tally)
    assert {kind for _, kind, _ in tally.injected} == set(Kind)
    assert len(tally.injected) == len(Kind) * len(IN_PROCESS) * len(LAYOUTS), "every cell has its share"
    assert max(tally.injected.values()) == min(tally.injected.values())


@pytest.mark.slow
def test_twenty_thousand_injections_are_caught() -> None:
    tally = run_bulk(20_000, 12, IN_PROCESS, jobs=1)
    judge(tally)
    for index, layout in enumerate(LAYOUTS):
        assert min(tally.by_layer[index, layer] for layer in range(len(layout.spans))) > 50
    # Sampled looks at one layer a block: of flips it finds one in so many, of wrong blocks all.
    assert tally.num_escaped(DigestMode.SAMPLED, [Kind.WRONG_BLOCK]) == 0
    for index, layout in enumerate(LAYOUTS):
        flips = {b: tally.injected[b, Kind.BIT_FLIP, index] for b in IN_PROCESS}
        escaped = sum(tally.escaped[b, Kind.BIT_FLIP, index, DigestMode.SAMPLED] for b in IN_PROCESS)
        low, high = interval(escaped, sum(flips.values()))
        expected = 1 - 1 / len(layout.spans)
        assert low - 0.02 < expected < high + 0.02, (layout.name, expected, low, high)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["shm", "tcp"])
def test_two_processes_catch_what_one_does(backend: str) -> None:
    judge(run_live_part(240, 13, [backend]))


@pytest.mark.slow
def test_gloo_carries_no_damage_past_the_checks() -> None:
    judge(run_bulk(240, 14, ["nccl"], jobs=1))


@pytest.mark.pure
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_full_tells_any_two_layers_and_any_two_blocks_apart(layout: CampaignLayout) -> None:
    """Not by chance: every pair of layers exchanged, every pair of blocks, and every block under another generation, is found.

    Fails when a block's layers are digested one by one and the digests are combined without their order (planted: a sum).
    """
    num_blocks = 5
    with_pool = PoolMemory.create(layout.layout, num_blocks)
    region, size = with_pool.region, layout.layout.block_bytes
    values = np.frombuffer(region.blocks, dtype=np.uint8)
    values[:] = np.random.default_rng(1).integers(0, 256, len(values), dtype=np.uint8)
    ids, generations = array("I", range(num_blocks)), array("Q", [3] * num_blocks)
    digests = digest.compute(region, ids, generations, DigestMode.FULL, "a" * 32)

    def bad() -> list[int]:
        return digest.verify(region, ids, generations, ids, DigestMode.FULL, "a" * 32, digests)

    assert bad() == []
    for (a, a_size), (b, b_size) in itertools.combinations(layout.spans, 2):
        assert a_size == b_size
        for expected in ([0], []):  # there and back
            mine = values[a : a + a_size].copy()
            values[a : a + a_size] = values[b : b + b_size]
            values[b : b + b_size] = mine
            assert bad() == expected
    for one, other in itertools.combinations(range(num_blocks), 2):
        exchanged = array("I", ids)
        exchanged[one], exchanged[other] = other, one
        assert digest.verify(region, exchanged, generations, ids, DigestMode.FULL, "a" * 32, digests) == [one, other]
    later = array("Q", [3, 3, 4, 3, 3])
    assert digest.verify(region, ids, later, ids, DigestMode.FULL, "a" * 32, digests) == [2]
    assert size * num_blocks == len(values)
    del values
    with_pool.close()


@pytest.mark.pure
def test_cases_are_spread_evenly_and_can_be_drawn_alone() -> None:
    """Each by its number, so that one that fails can be looked at: `draw(number, seed, backends)`."""
    backends = ("local", "shm", "tcp", "ucx", "nccl")
    num_cells = len(Kind) * len(backends) * len(LAYOUTS)
    drawn = [draw(number, 5, backends) for number in range(2 * num_cells)]
    assert len({(c.kind, c.backend, c.layout_index) for c in drawn[:num_cells]}) == num_cells
    assert {c.layer for c in drawn[:num_cells]} == {0} and {c.layer for c in drawn[num_cells:]} == {1}
    assert drawn[77] == draw(77, 5, backends)
