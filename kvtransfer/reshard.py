"""The planner: which bytes of which source block become which bytes of which target block. Pure arithmetic.

A block lies in memory as [layer][2][kv_head][token][dim], so what moves as one piece is a run of tokens of one head. Runs are
merged wherever both sides are contiguous: with one layout on both sides a whole row of adjacent blocks is one chunk.

    heads  source ranks  |0 1 2 3|4 5 6 7|        tokens  source  |----16----|----16----|
           target rank   |0 1 2 3 4 5 6 7|                target  |---------32----------|
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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


Chunk = tuple[int, int, int]  # (source offset, target offset, size) in bytes from the first block of either pool


def plan_reshard(source: KVLayout, target: KVLayout, pairs: Sequence[BlockPair]) -> list[Chunk]:
    """Byte chunks that turn blocks laid out for `source` into blocks laid out for `target`.

    Covers the heads and layers both shards hold: with TP 4 -> TP 2 each target rank calls this for two source ranks, and
    `check_coverage` says whether the sources make up the whole target.

    Raises:
        LayoutMismatch: a layer both hold differs in kind, head_dim, dtype or window, or the heads of a layer are not those of its shard.
    """
    rows = _shared_rows(source, target)
    patterns: dict[tuple[int, int, int], list[Chunk]] = {}
    chunks: list[Chunk] = []
    for pair in pairs:
        assert 0 <= pair.source_token <= pair.source_token + pair.num_tokens <= source.block_size_tokens, pair
        assert 0 <= pair.target_token <= pair.target_token + pair.num_tokens <= target.block_size_tokens, pair
        shape = (pair.source_token, pair.target_token, pair.num_tokens)
        if shape not in patterns:
            patterns[shape] = _merge(_token_runs(rows, *shape))
        source_start, target_start = pair.source_block * source.block_bytes, pair.target_block * target.block_bytes
        chunks += [(source_start + s, target_start + t, size) for s, t, size in patterns[shape]]
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


def _token_runs(rows: Sequence[tuple[_Row, _Row]], source_token: int, target_token: int, num_tokens: int) -> Iterable[Chunk]:
    for theirs, ours in rows:
        size = num_tokens * ours.token_bytes
        for kv in (0, 1):
            for head in range(max(theirs.first_head, ours.first_head), min(theirs.last_head, ours.last_head)):
                yield theirs.offset(kv, head, source_token), ours.offset(kv, head, target_token), size


def _merge(chunks: Iterable[Chunk]) -> list[Chunk]:
    """Join neighbours that are contiguous on both sides; the order stays."""
    merged: list[Chunk] = []
    for source, target, size in chunks:
        if not size:
            continue
        if merged:
            last_source, last_target, last_size = merged[-1]
            if last_source + last_size == source and last_target + last_size == target:
                merged[-1] = (last_source, last_target, last_size + size)
                continue
        merged.append((source, target, size))
    return merged
