"""Tensor-parallel ranks of one number pull from ranks of another, over real sockets and shared memory: byte-equal to the unsharded pool.

How: one random array is the whole model's KV, [position][layer][2][head][dim]; every source rank's pool is cut out of it, and every
target rank's pool is compared with what is cut out of it for that rank.
Seen to fail with the planner's offsets without `- first_head`, and with the target's start taken for the source's (each planted).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from tests.conformance.test_transport_endpoint import NUM_BLOCKS, Make, Worker, layout, make, offer, pull, run_dir

pytestmark = [pytest.mark.conformance, pytest.mark.pure]
__all__ = ["make", "run_dir"]  # fixtures

LAYERS, DIM = 3, 8  # as `layout` makes them
NUM_TOKENS = 5 * 16 - 6
Whole = npt.NDArray[np.uint32]


def heads_of(rank: int, num_ranks: int, num_heads: int) -> tuple[int, int]:
    first = rank * num_heads // num_ranks
    return first, max(first + 1, (rank + 1) * num_heads // num_ranks)


def cut(whole: Whole, block_size: int, heads: tuple[int, int], block_ids: list[int], start: int) -> Whole:
    """A rank's pool that holds the tokens from `start` on in `block_ids`, zeros elsewhere: [block][layer][2][head][token][dim]."""
    pool = np.zeros((NUM_BLOCKS, LAYERS, 2, heads[1] - heads[0], block_size, DIM), dtype=np.uint32)
    for position in range(start, len(whole)):
        index, token = divmod(position - start, block_size)
        pool[block_ids[index], :, :, :, token] = whole[position, :, :, heads[0] : heads[1]]
    return pool


def content(worker: Worker) -> Whole:
    return np.frombuffer(worker.pool.region.blocks, dtype=np.uint32)


@pytest.mark.parametrize("path", ["shm", "tcp"])
@pytest.mark.parametrize(("target_size", "start"), [(16, 0), (16, 32), (32, 32)])
@pytest.mark.parametrize(
    ("num_sources", "num_targets", "num_heads"),
    [(2, 1, 4), (1, 2, 4), (4, 2, 4), (4, 2, 2), (2, 4, 2), (4, 1, 1)],  # the last three: heads replicated over ranks
)
async def test_ranks_of_any_number_meet(
    make: Make, path: str, target_size: int, start: int, num_sources: int, num_targets: int, num_heads: int
) -> None:
    whole = np.random.default_rng(num_sources * 10 + num_heads).integers(1, 1 << 32, (NUM_TOKENS, LAYERS, 2, num_heads, DIM), np.uint32)
    source_ids, target_ids = [7, 3, 11, 20, 2], [9, 4, 30, 31, 5][: -(-(NUM_TOKENS - start) // target_size)]
    shards = []
    for rank in range(num_sources):
        heads = heads_of(rank, num_sources, num_heads)
        worker = make(f"prefill-0-{rank}", path, kv_layout=layout(16, heads=heads))
        await worker.kv.start()
        content(worker)[:] = cut(whole, 16, heads, source_ids, 0).ravel()
        handoff = offer(worker, source_ids)
        shards.append(replace(handoff.shards[0], rank=rank))
    handoff = replace(handoff, shards=tuple(shards), token_ids=handoff.token_ids[:NUM_TOKENS])
    for rank in range(num_targets):
        heads = heads_of(rank, num_targets, num_heads)
        target = make(f"decode-0-{rank}", path, kv_layout=layout(target_size, heads=heads))
        await target.kv.start()
        is_alike = target_size == 16 and heads in [heads_of(r, num_sources, num_heads) for r in range(num_sources)]
        first = start // 16 if is_alike else 0  # blocks the target does not need do no harm where layouts differ
        outcome = await pull(target, handoff, target_ids, target_start_tokens=start, first=first)
        assert outcome.error is None and outcome.path == path, outcome
        got, expected = content(target), cut(whole, target_size, heads, target_ids, start)
        assert np.array_equal(got, expected.ravel()), f"target rank {rank} of {num_targets}"
