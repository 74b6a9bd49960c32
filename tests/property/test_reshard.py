"""The planner against a reference that moves one token of one head at a time, over drawn layouts, shards and block sizes."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtransfer.reshard import block_runs, check_coverage, pair_blocks, plan_reshard
from protocol.errors import LayoutMismatch
from protocol.kv import KVLayout, LayerGroup, LayerKind, ShardRectangle

pytestmark = pytest.mark.pure

DIM = 2
Pool = npt.NDArray[np.uint32]  # [block][layer][2][head][token][dim], flat, one word an element
Ends = tuple[int, int]


def make_layout(block_size: int, heads: Ends, layers: Ends, split: int | None = None) -> KVLayout:
    """One group, or two (full, then window) when `split` is a layer inside."""
    cuts = [layers[0], *([split] if split is not None and layers[0] < split < layers[1] else []), layers[1]]
    groups = tuple(
        LayerGroup(
            kind=LayerKind.FULL if first < (split if split is not None else 10**9) else LayerKind.WINDOW,
            first_layer=first,
            num_layers=last - first,
            num_kv_heads=heads[1] - heads[0],
            head_dim=DIM,
            dtype="float32",
            window_tokens=None if first < (split if split is not None else 10**9) else 64,
        )
        for first, last in itertools.pairwise(cuts)
    )
    shard = ShardRectangle(first_head=heads[0], last_head=heads[1], first_layer=layers[0], last_layer=layers[1])
    return KVLayout(block_size_tokens=block_size, groups=groups, shard=shard)


def shaped(pool: Pool, layout: KVLayout) -> Pool:
    heads = layout.shard.last_head - layout.shard.first_head
    return pool.reshape(-1, layout.num_layers, 2, heads, layout.block_size_tokens, DIM)


def element(position: int, layer: int, kv: int, head: int, dim: int) -> int:
    """Names one number of the model's whole KV."""
    return 1 + dim + DIM * (kv + 2 * (head + 16 * (layer + 16 * position)))


def fill(layout: KVLayout, block_ids: list[int], num_blocks: int, num_tokens: int) -> Pool:
    pool = np.zeros(num_blocks * layout.block_bytes // 4, dtype=np.uint32)
    view = shaped(pool, layout)
    shard = layout.shard
    for position in range(num_tokens):
        block, token = block_ids[position // layout.block_size_tokens], position % layout.block_size_tokens
        for layer in range(shard.first_layer, shard.last_layer):
            for kv in (0, 1):
                for head in range(shard.first_head, shard.last_head):
                    for dim in range(DIM):
                        value = element(position, layer, kv, head, dim)
                        view[block, layer - shard.first_layer, kv, head - shard.first_head, token, dim] = value
    return pool


ranges = st.tuples(st.integers(0, 3), st.integers(1, 4)).map(lambda t: (t[0], t[0] + t[1]))


@settings(max_examples=60, deadline=None)
@given(
    source_size=st.sampled_from([4, 8, 16]),
    target_size=st.sampled_from([4, 8, 16]),
    source_heads=ranges,
    target_heads=ranges,
    source_layers=ranges,
    target_layers=ranges,
    split=st.none() | st.integers(1, 5),
    num_tokens=st.integers(1, 45),
    skipped_blocks=st.integers(0, 3),
    data=st.data(),
)
def test_plan_equals_moving_one_token_at_a_time(
    source_size: int,
    target_size: int,
    source_heads: Ends,
    target_heads: Ends,
    source_layers: Ends,
    target_layers: Ends,
    split: int | None,
    num_tokens: int,
    skipped_blocks: int,
    data: st.DataObject,
) -> None:
    """Fails when _Row.offset forgets `- first_head`, when K and V swap strides, or when `end` does not cut (each planted)."""
    source = make_layout(source_size, source_heads, source_layers, split)
    target = make_layout(target_size, target_heads, target_layers, split)
    source_ids = data.draw(st.permutations(range(12)))[: -(-num_tokens // source_size)]
    start = min(skipped_blocks * target_size, num_tokens)
    target_ids = data.draw(st.permutations(range(12)))[: -(-(num_tokens - start) // target_size)]
    before = fill(source, list(source_ids), 12, num_tokens)
    after = np.zeros(12 * target.block_bytes // 4, dtype=np.uint32)

    pairs = pair_blocks(source_size, target_size, source_ids, target_ids, source_start=0, target_start=start, end=num_tokens)
    chunks = plan_reshard(source, target, pairs)
    raw_before, raw_after = before.view(np.uint8), after.view(np.uint8)
    written = np.zeros(len(raw_after), dtype=bool)
    for source_offset, target_offset, size in chunks.tolist():
        assert size > 0 and not written[target_offset : target_offset + size].any(), "a byte is written twice"
        written[target_offset : target_offset + size] = True
        raw_after[target_offset : target_offset + size] = raw_before[source_offset : source_offset + size]

    expected = np.zeros_like(after)
    view = shaped(expected, target)
    for position in range(start, num_tokens):
        block, token = target_ids[(position - start) // target_size], (position - start) % target_size
        for layer in range(max(source_layers[0], target_layers[0]), min(source_layers[1], target_layers[1])):
            for kv in (0, 1):
                for head in range(max(source_heads[0], target_heads[0]), min(source_heads[1], target_heads[1])):
                    for dim in range(DIM):
                        value = element(position, layer, kv, head, dim)
                        view[block, layer - target_layers[0], kv, head - target_heads[0], token, dim] = value
    assert np.array_equal(after, expected)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 20), unique=True, max_size=12), st.data())
def test_equal_layouts_move_whole_blocks_in_the_fewest_runs(source_ids: list[int], data: st.DataObject) -> None:
    target_ids = data.draw(st.permutations(range(21)))[: len(source_ids)]
    kv = make_layout(16, (0, 2), (0, 3))
    pairs = pair_blocks(16, 16, source_ids, target_ids, source_start=0, target_start=0, end=16 * len(source_ids))
    size = kv.block_bytes
    runs = block_runs(source_ids, target_ids).tolist()
    assert plan_reshard(kv, kv, pairs).tolist() == [[s * size, t * size, n * size] for s, t, n in runs]
    joints = itertools.pairwise(zip(source_ids, target_ids, strict=True))
    assert len(runs) == len(source_ids) - sum(a[0] + 1 == b[0] and a[1] + 1 == b[1] for a, b in joints)


@pytest.mark.parametrize("source_size", [16, 32])
@pytest.mark.parametrize("target_size", [16, 32])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 33, 100])
def test_pairs_cover_each_token_once(source_size: int, target_size: int, num_tokens: int) -> None:
    source_ids, target_ids = list(range(-(-num_tokens // source_size))), list(range(-(-num_tokens // target_size)))
    pairs = pair_blocks(source_size, target_size, source_ids, target_ids, source_start=0, target_start=0, end=num_tokens)
    covered = [(p.source_block * source_size + p.source_token + k) for p in pairs for k in range(p.num_tokens)]
    landed = [(p.target_block * target_size + p.target_token + k) for p in pairs for k in range(p.num_tokens)]
    assert covered == landed == list(range(num_tokens))


def test_what_cannot_be_expressed_is_refused_by_name() -> None:
    base = make_layout(16, (0, 2), (0, 2))
    other = KVLayout(
        block_size_tokens=16,
        groups=(LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=2, num_kv_heads=2, head_dim=DIM, dtype="bfloat16"),),
        shard=base.shard,
    )
    pairs = pair_blocks(16, 16, [0], [0], source_start=0, target_start=0, end=16)
    with pytest.raises(LayoutMismatch, match="layer 0: dtype is float32 at the source, bfloat16 at the target"):
        plan_reshard(base, other, pairs)
    with pytest.raises(LayoutMismatch, match="layer 0: kind is full at the source, window at the target"):
        plan_reshard(base, make_layout(16, (0, 2), (0, 2), split=0), pairs)
    torn = KVLayout(block_size_tokens=16, groups=base.groups, shard=ShardRectangle(first_head=0, last_head=3, first_layer=0, last_layer=2))
    with pytest.raises(LayoutMismatch, match="hold 2 KV heads, their shard says 3"):
        plan_reshard(torn, base, pairs)
    with pytest.raises(LayoutMismatch, match="do not reach token 17"):
        pair_blocks(16, 16, [0], [0, 1], source_start=0, target_start=0, end=17)


def test_coverage_names_what_no_shard_holds() -> None:
    whole = make_layout(16, (0, 4), (0, 3))
    check_coverage(whole, [make_layout(16, (0, 2), (0, 3)), make_layout(32, (2, 4), (0, 3))])
    check_coverage(whole, [make_layout(16, (0, 4), (0, 1)), make_layout(16, (0, 4), (1, 3))])
    with pytest.raises(LayoutMismatch, match=r"KV heads \[3\] of layer 2"):
        check_coverage(whole, [make_layout(16, (0, 3), (0, 3)), make_layout(16, (0, 4), (0, 2))])
