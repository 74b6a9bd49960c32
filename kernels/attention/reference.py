"""The attention of reference numerics: matrix products of one fixed shape, summed in one fixed order.

A sequence is cut into query tiles and key tiles at fixed positions, so the token at position p is always row p mod QUERY_TILE of
its tile, whoever computed the rows beside it. Each pair (query tile, key tile) is one product of the same shape:

    position       0         32        64        96
    keys           |--tile 0-|--tile 1-|--tile 2-|
    query tile 5   |  pair   |  pair   |            positions 40 to 47: tile 2 lies in their future, no pair
    query tile 8   |  pair   |  pair   |  pair   |  positions 64 to 71

A token's sums run over its key tiles in ascending order. A tile it does not see adds exactly +0, so it does not matter whether
the rows beside it asked for that tile; the maximum is exact in any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import gcd

import numpy as np
import torch

from kernels.attention.span import AttentionSpan

# Decode computes whole query tiles and wants few rows, prefill wants many. One layer of 12 heads, torch 2.13, 1 thread, for 4, 8
# and 16 rows: 512 tokens of prefill 75, 40 and 29 ms, 8 sequences of decode 5, 7 and 9 ms.
QUERY_TILE = 8
KEY_TILE = 32
MAX_PAIRS = 128  # of one slab: its scores, MAX_PAIRS x num_heads x query tile x KEY_TILE floats, should stay in the cache
_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True, kw_only=True)
class Slab:
    """Some query tiles with all their pairs. Q tiles, K tiles and P pairs are counted within the slab."""

    rows: torch.Tensor  # [num_tokens] row of q ...
    tiles: torch.Tensor  # [num_tokens] ... its query tile ...
    places: torch.Tensor  # [num_tokens] ... and its row in the tile
    num_query_tiles: int
    run_blocks: torch.Tensor  # [K * KEY_TILE / run_tokens] block of each run of keys
    run_parts: torch.Tensor  # [like run_blocks] which run of that block
    run_tokens: int
    pair_queries: torch.Tensor  # [P] ascending
    pair_keys: torch.Tensor | None  # [P] ascending within a query tile; None: pair i has key tile i, as in decode
    hidden: torch.Tensor  # [P, 1, query_tile, 1, KEY_TILE] bool: this row does not see this key
    tail_keys: torch.Tensor  # [T] key tiles that reach beyond their sequence
    tail_unused: torch.Tensor  # [T, 1, KEY_TILE, 1] bool: this slot does


def plan_slabs(
    spans: Sequence[AttentionSpan], *, block_size: int, window: int | None, device: torch.device, query_tile: int = QUERY_TILE
) -> tuple[Slab, ...]:
    """Cut `spans` into tiles, and the tiles into slabs of at most MAX_PAIRS pairs (or one query tile)."""
    assert block_size % 16 == 0, "blocks hold a multiple of 16 tokens"
    slabs: list[Slab] = []
    draft = _Draft(block_size=block_size, query_tile=query_tile)
    for span in spans:
        part_start = span.start
        while part_start < span.context_len:
            part_end = min(span.context_len, (part_start // query_tile + 1) * query_tile)
            first_key = 0 if window is None else max(0, part_start - window + 1) // KEY_TILE
            last_key = (part_end - 1) // KEY_TILE
            if draft.num_pairs and draft.num_pairs + last_key + 1 - first_key > MAX_PAIRS:
                slabs.append(draft.finish(window, device))
                draft = _Draft(block_size=block_size, query_tile=query_tile)
            draft.add(span, part_start, part_end, first_key, last_key)
            part_start = part_end
    if draft.num_pairs:
        slabs.append(draft.finish(window, device))
    return tuple(slabs)


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A slab being filled."""

    block_size: int
    query_tile: int
    rows: list[np.ndarray] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)
    tile_sizes: list[int] = field(default_factory=list)
    run_blocks: list[np.ndarray] = field(default_factory=list)
    run_parts: list[np.ndarray] = field(default_factory=list)
    pair_queries: list[np.ndarray] = field(default_factory=list)
    pair_keys: list[np.ndarray] = field(default_factory=list)
    pair_key_starts: list[np.ndarray] = field(default_factory=list)
    tails: dict[int, int] = field(default_factory=dict)  # key tile -> slots in use
    span: AttentionSpan | None = None  # of the key tiles added last ...
    next_key: int = 0  # ... which end before this tile of that sequence
    num_key_tiles: int = 0
    num_pairs: int = 0

    def add(self, span: AttentionSpan, start: int, end: int, first_key: int, last_key: int) -> None:
        """One query tile: positions [start, end) of `span`, looking at key tiles [first_key, last_key]."""
        if span is not self.span:
            self.span, self.next_key = span, first_key
        self._add_keys(span, last_key + 1)
        num_pairs = last_key + 1 - first_key
        keys = np.arange(first_key, last_key + 1)
        self.pair_queries.append(np.full(num_pairs, len(self.tile_sizes)))
        self.pair_keys.append(keys - self.next_key + self.num_key_tiles)
        self.pair_key_starts.append(keys * KEY_TILE)
        self.positions.append(np.arange(start, end))
        self.rows.append(np.arange(start, end) - span.start + span.first_row)
        self.tile_sizes.append(end - start)
        self.num_pairs += num_pairs

    def _add_keys(self, span: AttentionSpan, end_key: int) -> None:
        """Gather the key tiles of `span` up to `end_key` that the slab does not hold yet."""
        if end_key <= self.next_key:
            return
        run = gcd(KEY_TILE, self.block_size)
        run_starts = np.arange(self.next_key * KEY_TILE, end_key * KEY_TILE, run)
        table = np.frombuffer(span.block_table, dtype=np.uint32).astype(np.int64)
        self.run_blocks.append(table[np.minimum(run_starts // self.block_size, len(table) - 1)])  # beyond the table: any block
        self.run_parts.append(run_starts % self.block_size // run)
        self.num_key_tiles += end_key - self.next_key
        self.next_key = end_key
        if end_key * KEY_TILE > span.context_len:
            self.tails[self.num_key_tiles - 1] = span.context_len - (end_key - 1) * KEY_TILE

    def finish(self, window: int | None, device: torch.device) -> Slab:
        num_tiles = len(self.tile_sizes)
        positions = np.concatenate(self.positions)
        tiles = np.repeat(np.arange(num_tiles), self.tile_sizes)
        places = positions % self.query_tile
        position_of = np.full((num_tiles, self.query_tile), -1)  # -1: a row nobody asked for, which sees nothing
        position_of[tiles, places] = positions
        pair_queries = np.concatenate(self.pair_queries)
        queries = position_of[pair_queries][:, :, None]
        keys = np.concatenate(self.pair_key_starts)[:, None, None] + np.arange(KEY_TILE)
        hidden = keys > queries
        if window is not None:
            hidden |= keys <= queries - window
        tail_sizes = np.array(list(self.tails.values()), dtype=np.int64)
        unused = np.arange(KEY_TILE) >= tail_sizes[:, None]
        pair_keys = np.concatenate(self.pair_keys)
        is_identity = len(pair_keys) == self.num_key_tiles and bool((pair_keys == np.arange(self.num_key_tiles)).all())

        def tensor(values: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(values).to(device)

        return Slab(
            rows=tensor(np.concatenate(self.rows)),
            tiles=tensor(tiles),
            places=tensor(places),
            num_query_tiles=num_tiles,
            run_blocks=tensor(np.concatenate(self.run_blocks)),
            run_parts=tensor(np.concatenate(self.run_parts)),
            run_tokens=gcd(KEY_TILE, self.block_size),
            pair_queries=tensor(pair_queries),
            pair_keys=None if is_identity else tensor(pair_keys),
            hidden=tensor(hidden[:, None, :, None, :]),
            tail_keys=tensor(np.array(list(self.tails), dtype=np.int64)),
            tail_unused=tensor(unused[:, None, :, None]),
        )


def attend_slab(q: torch.Tensor, kv: torch.Tensor, slab: Slab, *, scale: float, out: torch.Tensor) -> None:
    """Write the slab's rows of `out`, computed in float32; shapes as in the package's contract."""
    num_kv_heads, head_dim = kv.shape[2], kv.shape[4]
    group = q.shape[1] // num_kv_heads  # query heads that share one KV head
    num_tiles, num_pairs, query_tile = slab.num_query_tiles, slab.pair_queries.shape[0], slab.hidden.shape[2]
    pair_queries = slab.pair_queries

    queries = torch.zeros((num_tiles, num_kv_heads, query_tile, group, head_dim), dtype=torch.float32, device=q.device)
    queries[slab.tiles, :, slab.places] = (q.index_select(0, slab.rows).float() * scale).view(-1, num_kv_heads, group, head_dim)
    keys, values = _key_tiles(kv[:, 0], slab), _key_tiles(kv[:, 1], slab)
    values[slab.tail_keys] = values[slab.tail_keys].masked_fill(slab.tail_unused, 0.0)  # 0 x NaN would be NaN

    products = (num_pairs * num_kv_heads, query_tile * group)  # number of matrix products, rows of each
    pair_query_rows = queries.index_select(0, pair_queries).view(*products, head_dim)
    if slab.pair_keys is not None:
        keys, values = keys.index_select(0, slab.pair_keys), values.index_select(0, slab.pair_keys)
    scores = torch.bmm(pair_query_rows, keys.view(-1, KEY_TILE, head_dim).transpose(1, 2)).view(num_pairs, *queries.shape[1:4], KEY_TILE)
    scores.masked_fill_(slab.hidden, float("-inf"))
    highest = queries.new_full(queries.shape[:4], _LOWEST)
    of_pairs = scores.amax(-1)
    highest.scatter_reduce_(0, pair_queries.view(-1, 1, 1, 1).expand_as(of_pairs), of_pairs, "amax")
    weights = scores.sub_(highest.index_select(0, pair_queries).unsqueeze(-1)).exp_()
    totals = torch.zeros_like(highest).index_add_(0, pair_queries, weights.sum(-1))
    weighted = torch.bmm(weights.view(*products, KEY_TILE), values.view(-1, KEY_TILE, head_dim)).view(num_pairs, *queries.shape[1:])
    sums = torch.zeros_like(queries).index_add_(0, pair_queries, weighted)

    totals = totals[slab.tiles, :, slab.places].unsqueeze(-1)
    out[slab.rows] = (sums[slab.tiles, :, slab.places] / totals).view(-1, q.shape[1], head_dim).to(out.dtype)


def _key_tiles(blocks: torch.Tensor, slab: Slab) -> torch.Tensor:
    """blocks [num_blocks, num_kv_heads, block_size, head_dim] -> float32 copies [K, num_kv_heads, KEY_TILE, head_dim]."""
    num_blocks, num_kv_heads, block_size, head_dim = blocks.shape
    runs_per_block, runs_per_tile = block_size // slab.run_tokens, KEY_TILE // slab.run_tokens
    if runs_per_block == 1:
        runs = blocks.index_select(0, slab.run_blocks)
    else:
        runs = blocks.view(num_blocks, num_kv_heads, runs_per_block, slab.run_tokens, head_dim)[slab.run_blocks, :, slab.run_parts]
    runs = runs.float()
    if runs_per_tile == 1:
        return runs
    tiles = runs.view(-1, runs_per_tile, num_kv_heads, slab.run_tokens, head_dim)
    return tiles.transpose(1, 2).reshape(-1, num_kv_heads, KEY_TILE, head_dim)
