"""The planner: which bytes of which source block become which bytes of which target block. Pure arithmetic.

A block lies in memory as [layer][2][kv_head][token][dim], so what moves as one piece is a run of tokens of one head. Runs are
merged wherever both sides are contiguous: with one layout on both sides a whole row of adjacent blocks is one chunk.

    heads  source ranks  |0 1 2 3|4 5 6 7|        tokens  source  |----16----|----16----|
           target rank   |0 1 2 3 4 5 6 7|                target  |---------32----------|
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.errors import LayoutMismatch
from protocol.kv import DTYPE_SIZE_BYTES, KVLayout, LayerGroup, LayerKind


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPair:
    """Tokens [source_token, source_token + num_tokens) of a source block go to the same number from target_token on."""

    source_block: int
    source_token: int
    target_block: int
    target_token: int
    num_tokens: int


Chunks = npt.NDArray[np.int64]  # [num_chunks, 3]: source offset, target offset, size in bytes from the first block of either pool


def plan_reshard(source: KVLayout, target: KVLayout, pairs: Sequence[BlockPair]) -> Chunks:
    """Byte chunks that turn blocks laid out for `source` into blocks laid out for `target`, as kernels.copy_runs takes them.

    Covers the heads and layers both shards hold: with TP 4 -> TP 2 each target rank calls this for two source ranks, and
    `check_coverage` says whether the sources make up the whole target.

    Raises:
        LayoutMismatch: a layer both hold differs in kind, head_dim, dtype or window, or the heads of a layer are not those of its shard.
    """
    rows = _shared_rows(source, target)
    table = np.array(
        [(p.source_block, p.target_block, p.source_token, p.target_token, p.num_tokens) for p in pairs], dtype=np.int64
    ).reshape(-1, 5)
    for tokens, size, side in ((table[:, 2], source.block_size_tokens, "source"), (table[:, 3], target.block_size_tokens, "target")):
        assert ((tokens >= 0) & (table[:, 4] >= 0) & (tokens + table[:, 4] <= size)).all(), f"a pair leaves its {side} block"
    # Pairs of one shape (which tokens of the block go where) have one pattern of chunks; a prompt has few shapes.
    shapes, shape_of = np.unique(table[:, 2:], axis=0, return_inverse=True)
    shape_of = shape_of.reshape(-1)  # numpy 2.0 gives it another shape
    patterns = [_merge(np.array(list(_token_runs(rows, *shape)), dtype=np.int64).reshape(-1, 3)) for shape in shapes.tolist()]
    starts = table[:, :2] * (source.block_bytes, target.block_bytes)
    counts = np.array([len(pattern) for pattern in patterns], dtype=np.int64)[shape_of]
    first = np.cumsum(counts) - counts  # of each pair's chunks, which stay in the order of the pairs
    chunks = np.empty((int(counts.sum()), 3), dtype=np.int64)
    for number, pattern in enumerate(patterns):
        mine = np.flatnonzero(shape_of == number)
        places = first[mine, None] + np.arange(len(pattern))
        chunks[places] = pattern
        chunks[places, :2] += starts[mine, None]
    return _merge(chunks)


def pair_blocks(
    source_size: int,
    target_size: int,
    source_blocks: Sequence[int],
    target_blocks: Sequence[int],
    *,
    source_start: int,
    target_start: int,
    end: int,
) -> list[BlockPair]:
    """Pairs that carry tokens [max of the starts, end) between blocks of unequal size.

    `source_start` and `target_start` are the sequence positions of the first token of either list of consecutive blocks; a
    prefix the target already has is skipped by a later `target_start`. `end` cuts the last, partial block.

    Raises:
        LayoutMismatch: one of the lists ends before `end`.
    """
    position = max(source_start, target_start)
    for side, start, size, blocks in (
        ("source", source_start, source_size, source_blocks),
        ("target", target_start, target_size, target_blocks),
    ):
        if start + size * len(blocks) < end:
            raise LayoutMismatch(f"{len(blocks)} {side} blocks of {size} tokens from token {start} on do not reach token {end}")
    pairs = []
    while position < end:
        source_index, source_token = divmod(position - source_start, source_size)
        target_index, target_token = divmod(position - target_start, target_size)
        num_tokens = min(source_size - source_token, target_size - target_token, end - position)
        pairs.append(
            BlockPair(
                source_block=source_blocks[source_index],
                source_token=source_token,
                target_block=target_blocks[target_index],
                target_token=target_token,
                num_tokens=num_tokens,
            )
        )
        position += num_tokens
    return pairs


def block_runs(source_blocks: npt.ArrayLike, target_blocks: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Rows of (source block, target block, count), one for each run in which both sides are adjacent; for equal layouts."""
    sources, targets = np.asarray(source_blocks, dtype=np.int64), np.asarray(target_blocks, dtype=np.int64)
    joined = (np.diff(sources) == 1) & (np.diff(targets) == 1)
    starts = np.flatnonzero(np.concatenate(([True] * min(1, len(sources)), ~joined)))
    counts = np.diff(np.append(starts, len(sources)))
    return np.stack((sources[starts], targets[starts], counts), axis=1)


def check_compatible(target: KVLayout, sources: Sequence[KVLayout]) -> None:
    """Blocks of `sources` together can be turned into blocks of `target`.

    Raises:
        LayoutMismatch: says what differs, or what nobody holds.
    """
    if len(sources) == 1 and sources[0] == target:
        return
    for source in sources:
        _shared_rows(source, target)
    check_coverage(target, sources)


def check_coverage(target: KVLayout, sources: Sequence[KVLayout]) -> None:
    """Every (layer, head) of `target` is held by a source.

    Raises:
        LayoutMismatch: names the first layer and heads that nobody holds.
    """
    held: dict[int, set[int]] = {}
    for source in sources:
        for layer, row in _rows(source).items():
            held.setdefault(layer, set()).update(range(row.first_head, row.last_head))
    for layer, row in _rows(target).items():
        missing = set(range(row.first_head, row.last_head)) - held.get(layer, set())
        if missing:
            raise LayoutMismatch(f"no shard of the offer holds KV heads {sorted(missing)} of layer {layer}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """Where one layer lies in a block, and which heads of the model it holds."""

    group: LayerGroup
    start: int  # bytes from the start of the block
    first_head: int
    last_head: int
    block_size_tokens: int

    def offset(self, kv: int, head: int, token: int) -> int:
        num_heads = self.last_head - self.first_head
        return self.start + ((kv * num_heads + head - self.first_head) * self.block_size_tokens + token) * self.token_bytes

    @property
    def token_bytes(self) -> int:
        """Of K (or V) of one token of one head."""
        return self.group.head_dim * DTYPE_SIZE_BYTES[self.group.dtype]


def _rows(layout: KVLayout) -> dict[int, _Row]:
    """Layers of a layout by their number in the model."""
    rows = {}
    start = 0
    shard = layout.shard
    for group in layout.groups:
        # A latent is not split over heads: each rank has the whole of it.
        first, last = (0, group.num_kv_heads) if group.kind is LayerKind.LATENT else (shard.first_head, shard.last_head)
        if last - first != group.num_kv_heads:
            raise LayoutMismatch(f"layers from {group.first_layer} on hold {group.num_kv_heads} KV heads, their shard says {last - first}")
        for layer in range(group.first_layer, group.first_layer + group.num_layers):
            rows[layer] = _Row(group=group, start=start, first_head=first, last_head=last, block_size_tokens=layout.block_size_tokens)
            start += layout.block_size_tokens * group.token_bytes // group.num_layers
    return rows


def _shared_rows(source: KVLayout, target: KVLayout) -> list[tuple[_Row, _Row]]:
    source_rows, target_rows = _rows(source), _rows(target)
    shared = []
    for layer, ours in target_rows.items():
        theirs = source_rows.get(layer)
        if theirs is None:
            continue
        _check_alike(layer, theirs.group, ours.group)
        shared.append((theirs, ours))
    return shared


def _check_alike(layer: int, theirs: LayerGroup, ours: LayerGroup) -> None:
    for name, a, b in (
        ("kind", theirs.kind.value, ours.kind.value),
        ("head_dim", theirs.head_dim, ours.head_dim),
        ("dtype", theirs.dtype, ours.dtype),
        ("window_tokens", theirs.window_tokens, ours.window_tokens),
    ):
        if a != b:
            raise LayoutMismatch(f"layer {layer}: {name} is {a} at the source, {b} at the target")


def _token_runs(rows: Sequence[tuple[_Row, _Row]], source_token: int, target_token: int, num_tokens: int) -> Iterator[tuple[int, int, int]]:
    for theirs, ours in rows:
        size = num_tokens * ours.token_bytes
        for kv in (0, 1):
            for head in range(max(theirs.first_head, ours.first_head), min(theirs.last_head, ours.last_head)):
                yield theirs.offset(kv, head, source_token), ours.offset(kv, head, target_token), size


def _merge(chunks: Chunks) -> Chunks:
    """Join neighbours that are contiguous on both sides; the order stays."""
    sources, targets, sizes = chunks.T
    if len(chunks) and not sizes.all():
        return _merge(chunks[sizes > 0])
    joined = (sources[:-1] + sizes[:-1] == sources[1:]) & (targets[:-1] + sizes[:-1] == targets[1:])
    if not joined.any():
        return chunks
    begins = np.flatnonzero(np.concatenate(([True], ~joined)))
    merged = chunks[begins]
    merged[:, 2] = np.add.reduceat(sizes, begins)
    return merged
