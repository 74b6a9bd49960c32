"""A pull over all shards of an offer leaves in the target's blocks what the unsharded model has there, token by token.

How: models of full, window and latent layers, their heads split (or replicated) over m source ranks and n target ranks, unequal block
sizes, a skipped prefix, a partial last block. Each rank's pool is written one number at a time by its place in the whole model; what
`plan_parts` and `place_staged` make of it is read back the same way. Seen to fail with `- first_head` left out of `_Row.offset`, with
`source_start` taken for 0 in `_chunks`, and with latent layers split over heads like others (each planted).
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.pulls import place_staged, plan_parts, release_staging
from kvtransfer.region import PoolMemory
from protocol.errors import LayoutMismatch
from protocol.kv import (
    DigestMode,
    Endpoint,
    HandoffKind,
    HandoffShard,
    KVHandoff,
    KVLayout,
    LayerGroup,
    LayerKind,
    Lease,
    ShardRectangle,
)

pytestmark = pytest.mark.pure

DIM = 2  # numbers a head, of 4 bytes
NUM_BLOCKS = 10


@dataclass(frozen=True)
class Model:
    kinds: tuple[LayerKind, ...]  # by layer
    num_heads: int

    def layout(self, block_size: int, rank: int, num_ranks: int) -> KVLayout:
        """Of one rank of `num_ranks`: its share of the heads; with more ranks than heads several hold the same one."""
        first = rank * self.num_heads // num_ranks
        last = max(first + 1, (rank + 1) * self.num_heads // num_ranks)
        groups = []
        for kind, layers in itertools.groupby(range(len(self.kinds)), key=lambda layer: self.kinds[layer]):
            numbers = list(layers)
            groups.append(
                LayerGroup(
                    kind=kind,
                    first_layer=numbers[0],
                    num_layers=len(numbers),
                    num_kv_heads=1 if kind is LayerKind.LATENT else last - first,
                    head_dim=DIM,
                    dtype="float32",
                    window_tokens=64 if kind is LayerKind.WINDOW else None,
                )
            )
        shard = ShardRectangle(first_head=first, last_head=last, first_layer=0, last_layer=len(self.kinds))
        return KVLayout(block_size_tokens=block_size, groups=tuple(groups), shard=shard)

    def words(self, layout: KVLayout, token: int, position: int) -> Iterator[tuple[int, int]]:
        """(place in a block, number) of all that one rank keeps of the sequence's token `position`, `token`th of its block."""
        start = 0
        for layer, kind in enumerate(self.kinds):
            heads = [0] if kind is LayerKind.LATENT else list(range(layout.shard.first_head, layout.shard.last_head))
            for kv, (row, head), dim in itertools.product((0, 1), enumerate(heads), range(DIM)):
                place = start + ((kv * len(heads) + row) * layout.block_size_tokens + token) * DIM + dim
                yield place, 1 + dim + DIM * (kv + 2 * (head + 8 * (layer + 8 * position)))
            start += 2 * len(heads) * layout.block_size_tokens * DIM

    def fill(self, layout: KVLayout, block_ids: list[int], first: int, last: int, *, start: int = 0) -> np.ndarray:
        """A pool in which `block_ids` hold the tokens [first, last) of a sequence whose token `start` is the first of the first block."""
        pool = np.zeros((NUM_BLOCKS, layout.block_bytes // 4), dtype=np.uint32)
        for position in range(first, last):
            index, token = divmod(position - start, layout.block_size_tokens)
            for place, number in self.words(layout, token, position):
                pool[block_ids[index], place] = number
        return pool


def offer_of(layouts: list[KVLayout], block_ids: list[int], num_tokens: int) -> KVHandoff:
    shards = tuple(
        HandoffShard(
            worker_id="prefill-0",
            rank=rank,
            epoch=1,
            endpoint=Endpoint(),
            region_id=0,
            layout=layout,
            block_ids=array("I", block_ids),
            generations=array("Q", [0] * len(block_ids)),
            digest_mode=DigestMode.OFF,
            digests=b"",
        )
        for rank, layout in enumerate(layouts)
    )
    return KVHandoff(
        handoff_id="a" * 32,
        kind=HandoffKind.PREFILL,
        request_id="b" * 32,
        attempt=0,
        fingerprint=b"f" * 16,
        token_ids=array("I", range(num_tokens)),
        layer_watermark=layouts[0].num_layers,
        first_tokens=(),
        lease=Lease(duration_s=30),
        shards=shards,
    )


def pulled(
    handoff: KVHandoff, pools: list[np.ndarray], indices: list[int], target_ids: list[int], into: KVLayout, start: int
) -> np.ndarray:
    """The target's pool after the pull; the transport is one assignment a block."""
    pool = PoolMemory.create(into, NUM_BLOCKS)
    with contextlib.closing(pool):
        parts = plan_parts(
            handoff,
            array("I", indices),
            array("I", target_ids),
            pool.region,
            target_start_tokens=start,
            staging_bytes_max=1 << 30,
            first_region_id=1,
        )
        for part in parts:
            size = part.shard.layout.block_bytes
            for index, block_id in zip(part.source_indices, part.block_ids, strict=True):
                content = pools[part.shard.rank][part.shard.block_ids[index]].tobytes()
                part.region.blocks[block_id * size : (block_id + 1) * size] = content
        place_staged(parts)
        release_staging(parts)
        return np.frombuffer(bytes(pool.region.blocks), dtype=np.uint32).reshape(NUM_BLOCKS, -1)


@settings(max_examples=120, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(list(LayerKind)), min_size=1, max_size=4),
    num_heads=st.sampled_from([1, 2, 4, 8]),
    ranks=st.sampled_from([(2, 1), (1, 2), (4, 2), (2, 4), (1, 1), (4, 1)]),
    sizes=st.sampled_from([(4, 4), (4, 8), (8, 4), (8, 8), (4, 12), (12, 8)]),
    num_tokens=st.integers(1, 38),
    skipped=st.integers(0, 3),
    spare=st.integers(0, 2),
    data=st.data(),
)
def test_any_split_meets_any_other_byte_for_byte(
    kinds: list[LayerKind],
    num_heads: int,
    ranks: tuple[int, int],
    sizes: tuple[int, int],
    num_tokens: int,
    skipped: int,
    spare: int,
    data: st.DataObject,
) -> None:
    model, (m, n), (source_size, target_size) = Model(tuple(kinds), num_heads), ranks, sizes
    layouts = [model.layout(source_size, rank, m) for rank in range(m)]
    source_ids = list(data.draw(st.permutations(range(NUM_BLOCKS))))[: -(-num_tokens // source_size)]
    pools = [model.fill(layout, source_ids, 0, num_tokens) for layout in layouts]
    start = min(skipped, (num_tokens - 1) // target_size) * target_size  # what the target has already, in whole blocks of its own
    target_ids = list(data.draw(st.permutations(range(NUM_BLOCKS))))[: -(-(num_tokens - start) // target_size)]
    handoff = offer_of(layouts, source_ids, num_tokens)
    for rank in range(n):
        into = model.layout(target_size, rank, n)
        first_index = start // source_size
        if into not in layouts:
            first_index = max(0, first_index - spare)  # more blocks than are needed do no harm where layouts differ
        indices = list(range(first_index, len(source_ids)))
        got = pulled(handoff, pools, indices, target_ids, into, start)
        assert np.array_equal(got, model.fill(into, target_ids, start, num_tokens, start=start)), f"target rank {rank} of {n}"


LLAMA = Model((LayerKind.FULL,) * 2, 4)


@pytest.mark.parametrize(
    ("indices", "target_ids", "start", "told"),
    [
        ([2, 3], [0, 1], 0, "from token 0 on are to be filled with tokens 8 to 16"),  # nobody brings tokens 0 to 7
        ([0, 1], [0, 1], 0, "2 blocks of 8 tokens from token 0 on are to be filled with tokens 0 to 8"),  # nor 8 to 15
        ([0, 2], [0], 0, "only as one consecutive range"),
        ([0, 4], [0], 0, "not all of them in it"),
    ],
)
def test_blocks_that_would_stay_empty_are_refused(indices: list[int], target_ids: list[int], start: int, told: str) -> None:
    """Fails when `_chunks` cuts the range to what there is and says nothing (seen: a pull that succeeds and leaves tokens unwritten)."""
    layouts = [LLAMA.layout(4, rank, 2) for rank in range(2)]
    with pytest.raises(LayoutMismatch, match=told):
        pulled(offer_of(layouts, [0, 1, 2, 3], 16), [], indices, target_ids, LLAMA.layout(8, 0, 1), start)


@pytest.mark.parametrize(("num_ranks", "from_ranks"), [(4, [0]), (2, [0]), (1, [0, 2])])
def test_only_ranks_that_hold_heads_of_ours_are_pulled_from(num_ranks: int, from_ranks: list[int]) -> None:
    """Fails when plan_parts takes every shard (seen: a rank of TP 4 pulls the KV of all four)."""
    model = Model((LayerKind.FULL, LayerKind.LATENT), 2)  # of 4 source ranks, 0 and 1 hold head 0, 2 and 3 head 1
    handoff = offer_of([model.layout(4, rank, 4) for rank in range(4)], [0, 1], 8)
    pool = PoolMemory.create(model.layout(4, 0, num_ranks), NUM_BLOCKS)
    with contextlib.closing(pool):
        parts = plan_parts(
            handoff,
            array("I", [0, 1]),
            array("I", [0, 1]),
            pool.region,
            target_start_tokens=None,
            staging_bytes_max=1 << 20,
            first_region_id=1,
        )
        assert [part.shard.rank for part in parts] == from_ranks
        assert all((part.staging is None) == (num_ranks > 1) for part in parts), "one layout on both sides needs no staging"
        release_staging(parts)


def test_shards_of_unequal_block_sizes_are_refused() -> None:
    """Index 1 would mean other tokens at each. Fails when plan_parts does not compare the sizes (seen: some heads stay unwritten)."""
    layouts = [LLAMA.layout(4, 0, 2), LLAMA.layout(8, 1, 2)]
    with pytest.raises(LayoutMismatch, match="blocks of 4 and 8 tokens"):
        pulled(offer_of(layouts, [0, 1], 8), [], [0, 1], [0], LLAMA.layout(8, 0, 1), 0)


@pytest.mark.parametrize(
    ("source", "target", "told"),
    [
        (Model((LayerKind.FULL,), 2), Model((LayerKind.LATENT,), 2), "layer 0: kind is full at the source, latent at the target"),
        (Model((LayerKind.WINDOW,), 2), Model((LayerKind.FULL,), 2), "layer 0: kind is window at the source, full at the target"),
        (Model((LayerKind.FULL,), 2), Model((LayerKind.FULL,), 4), r"no shard of the offer holds KV heads \[2, 3\] of layer 0"),
        (Model((LayerKind.FULL,), 2), Model((LayerKind.FULL,) * 2, 2), r"no shard of the offer holds KV heads \[0, 1\] of layer 1"),
    ],
)
def test_what_the_planner_cannot_express_is_refused_before_a_byte_moves(source: Model, target: Model, told: str) -> None:
    with pytest.raises(LayoutMismatch, match=told):
        pulled(offer_of([source.layout(4, 0, 1)], [0, 1], 8), [], [0, 1], [0], target.layout(8, 0, 1), 0)


def test_staging_has_its_limit() -> None:
    layouts = [LLAMA.layout(4, rank, 2) for rank in range(2)]
    pool = PoolMemory.create(LLAMA.layout(8, 0, 1), NUM_BLOCKS)
    with contextlib.closing(pool), pytest.raises(LayoutMismatch, match="need 1024 bytes of staging, max_staging_bytes is 1000"):
        plan_parts(
            offer_of(layouts, [0, 1], 8),
            array("I", [0, 1]),
            array("I", [0]),
            pool.region,
            target_start_tokens=0,
            staging_bytes_max=1000,
            first_region_id=1,
        )
