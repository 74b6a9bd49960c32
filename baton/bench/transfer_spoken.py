"""What every subject of `baton bench transfer` does alike, ours and others: which blocks a transfer moves, and what they hold.

    load      {chunk_bytes, pool_bytes, layout}                ->  {subject, ...}       two processes, a pool in each
    prepare   {path, total_bytes, seed, repeats}               ->  {}
    run       {}                                               ->  {seconds: [s, ...]}  one a repeat, from the call to the last byte placed
    quit      {}                                                   the processes end

The words are those of baton/bench/spoken.py. A repeat moves `total_bytes // chunk_bytes` blocks, drawn at random for it on either side,
from one process into the other. Before the first repeat one more is done and not timed: a subject that stood still wakes up in it.
What came is compared with what was sent.

Standard library and numpy only: peers, whose Pythons know nothing of Baton, load this file by its path.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
import numpy.typing as npt

FACTOR = 0x9E3779B97F4A7C15  # odd, so that no two blocks hold the same word
WARM_UP = -1  # the repeat that is not timed
ALIGNMENT = 2 << 20

Blocks = list[tuple[list[int], list[int]]]
Bytes = npt.NDArray[np.uint8]


def draw_repeats(seed: str, repeats: int, *, num_blocks: int, count: int) -> Blocks:
    """Block ids at the source and at the target of each repeat, in the order of the transfer; the first is the one that is not timed."""
    drawn = []
    for repeat in range(WARM_UP, repeats):
        rng = Random(f"{seed} {repeat}")
        drawn.append((rng.sample(range(num_blocks), count), rng.sample(range(num_blocks), count)))
    return drawn


def make_pool(chunk_bytes: int, pool_bytes: int) -> Bytes:
    """Whole blocks, all of them memory, from where a huge page may stand."""
    size = pool_bytes // chunk_bytes * chunk_bytes
    spare = np.empty(size + ALIGNMENT, dtype=np.uint8)
    start = -spare.ctypes.data % ALIGNMENT
    pool = spare[start : start + size]
    pool[:] = 0
    return pool


def mark(pool: Bytes, chunk_bytes: int) -> None:
    """Fill each block with a 64-bit word of its own, none of them zero."""
    rows = pool.view(np.uint64).reshape(-1, chunk_bytes // 8)
    rows[:] = _words_of(range(len(rows)))[:, None]


def check(pool: Bytes, chunk_bytes: int, sources: Sequence[int], targets: Sequence[int]) -> None:
    """Every word is the source's; then the targets are wiped, so that a transfer that does nothing is seen.

    Raises:
        RuntimeError: a block is not what was sent.
    """
    rows = pool.view(np.uint64).reshape(-1, chunk_bytes // 8)
    wrong = int((rows[targets] != _words_of(sources)[:, None]).any(axis=1).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {len(targets)} blocks are not what was sent")
    rows[targets, 0] = 0


def _words_of(block_ids: Sequence[int]) -> npt.NDArray[np.uint64]:
    return (np.asarray(block_ids).astype(np.uint64) + np.uint64(1)) * np.uint64(FACTOR)
