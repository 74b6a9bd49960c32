"""The seqlock around a copy, step by step, with the owner acting between two slices."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from kvtransfer.copying import copy_verified
from kvtransfer.lanes import Pull, PullFailed
from kvtransfer.region import PoolMemory
from kvtransfer.transport import Transfer
from protocol.kv import DigestMode, Endpoint, HandoffShard, KVLayout, LayerGroup, LayerKind, ShardRectangle, TransferError

pytestmark = pytest.mark.pure

GROUP = LayerGroup(kind=LayerKind.FULL, first_layer=0, num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32")
LAYOUT = KVLayout(block_size_tokens=16, groups=(GROUP,), shard=ShardRectangle(first_head=0, last_head=1, first_layer=0, last_layer=1))
SIZE = LAYOUT.block_bytes


@pytest.fixture
def pools() -> Iterator[tuple[PoolMemory, PoolMemory]]:
    source, target = PoolMemory.create(LAYOUT, 16), PoolMemory.create(LAYOUT, 16)
    values = np.frombuffer(source.region.blocks, dtype=np.uint8)
    values[:] = np.arange(len(values)) % 251
    del values
    yield source, target
    source.close()
    target.close()


def pull_of(target: PoolMemory, ids: list[int], *, generation: int = 0) -> Pull:
    shard = HandoffShard(
        worker_id="w",
        rank=0,
        epoch=1,
        endpoint=Endpoint(),
        region_id=0,
        layout=LAYOUT,
        block_ids=array("I", ids),
        generations=array("Q", [generation] * len(ids)),
        digest_mode=DigestMode.OFF,
        digests=b"",
    )
    everywhere = array("I", range(len(ids)))
    return Pull(
        1, Transfer(source=shard, source_indices=everywhere, target_region_id=0, target_block_ids=everywhere, deadline_s=9), target.region
    )


def at_call(number: int, act: Callable[[], None]) -> Callable[[float], None]:
    calls = iter(range(10**6))

    def look_up(_: float) -> None:
        if next(calls) == number:
            act()

    return look_up


@pytest.mark.parametrize("moment", [0, 1, 5, 8])  # before the first slice ... after the last
@pytest.mark.parametrize("victim", [3, 10])
def test_generation_raised_at_any_moment_of_the_copy_is_seen(pools: tuple[PoolMemory, PoolMemory], moment: int, victim: int) -> None:
    """Fails when the check after the copy is left out (planted: delivered)."""
    source, target = pools
    ids = [3, 4, 5, 6, 7, 8, 9, 10]
    reuse = at_call(moment, lambda: source.raise_generations(array("I", [victim]), array("Q", [1])))
    with pytest.raises(PullFailed) as failed:
        copy_verified(source.region, pull_of(target, ids), reuse, slice_bytes=SIZE)
    assert failed.value.error is TransferError.STALE_GENERATION
    assert f"block {victim} has generation 1 after the copy, 0 was offered" in str(failed.value)


def test_block_that_was_not_offered_may_be_reused(pools: tuple[PoolMemory, PoolMemory]) -> None:
    source, target = pools
    reuse = at_call(1, lambda: source.raise_generations(array("I", [2]), array("Q", [1])))
    copy_verified(source.region, pull_of(target, [3, 4, 5]), reuse, slice_bytes=SIZE)
    assert target.region.blocks[: 3 * SIZE] == source.region.blocks[3 * SIZE : 6 * SIZE]


def test_stale_before_the_copy_writes_nothing(pools: tuple[PoolMemory, PoolMemory]) -> None:
    source, target = pools
    with pytest.raises(PullFailed, match="before the copy"):
        copy_verified(source.region, pull_of(target, [3, 4], generation=9), lambda _: None, slice_bytes=SIZE)
    assert bytes(target.region.blocks) == bytes(16 * SIZE)


def test_giving_up_between_two_slices_stops_the_writing(pools: tuple[PoolMemory, PoolMemory]) -> None:
    """Fails when look_up is called once instead of before each slice (planted: all written)."""
    source, target = pools

    def give_up() -> None:
        raise PullFailed(TransferError.CANCELLED, "cancelled")

    with pytest.raises(PullFailed):
        copy_verified(source.region, pull_of(target, [0, 1, 2, 3]), at_call(2, give_up), slice_bytes=SIZE)
    assert target.region.blocks[: 2 * SIZE] == source.region.blocks[: 2 * SIZE]
    assert bytes(target.region.blocks[2 * SIZE :]) == bytes(14 * SIZE)


@pytest.mark.parametrize("slice_bytes", [1, SIZE, 3 * SIZE, 100 * SIZE])
def test_slices_of_any_size_copy_everything(pools: tuple[PoolMemory, PoolMemory], slice_bytes: int) -> None:
    source, target = pools
    ids = [5, 6, 7, 1, 2, 0, 15, 14]
    copy_verified(source.region, pull_of(target, ids), lambda _: None, slice_bytes=slice_bytes)
    for place, block_id in enumerate(ids):
        assert target.region.blocks[place * SIZE : (place + 1) * SIZE] == source.region.blocks[block_id * SIZE : (block_id + 1) * SIZE]
