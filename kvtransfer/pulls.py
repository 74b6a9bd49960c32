"""One pull over all shards of an offer: which part comes from where, whether it is what was offered, and where it goes.

A shard of our own layout is copied straight into our blocks. A shard of another layout is copied whole into staging, verified
there as the source laid it out, and only then spread over our blocks by the planner.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from kernels.copy_runs import copy_runs
from kvtransfer import digest
from kvtransfer.lanes import largest
from kvtransfer.region import PoolMemory
from kvtransfer.reshard import Chunks, check_coverage, pair_blocks, plan_reshard
from kvtransfer.transport import Region
from protocol.errors import LayoutMismatch
from protocol.kv import HandoffShard, KVHandoff, KVLayout, Outcome, ShardRectangle, TransferError


@dataclass(slots=True, kw_only=True)
class Part:
    """What one shard contributes."""

    shard: HandoffShard
    source_indices: array[int]
    block_ids: array[int]  # in `region`
    region: Region  # our pool's, or the staging's
    staging: PoolMemory | None = None
    chunks: Chunks | None = None  # from staging to our pool
    target: Region | None = None  # our pool's, when staged
    path: str = ""  # backend of the current try
    ours: bytes | None = None  # digests of what arrived; None: not looked at yet


@dataclass(slots=True, kw_only=True, eq=False)
class PullState:
    """A pull between start and its one outcome. Times are of the event loop's clock."""

    handoff: KVHandoff
    started: float
    deadline: float
    on_done: Callable[[Outcome], None]
    parts: list[Part] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)  # of the current try
    tried: set[str] = field(default_factory=set)
    stopped: TransferError | None = None  # why nothing more is to come of it, whatever the backend says
    stop_detail: str = ""
    checking: bool = False  # the checking thread has it
    expiry: asyncio.TimerHandle | None = None  # of an early offer; else the backend keeps the deadline

    @property
    def has_arrived(self) -> bool:
        return len(self.outcomes) == len(self.parts)

    def combined(self, *, error: TransferError | None, detail: str, now: float) -> Outcome:
        """One outcome for all parts; the path is that of the first."""
        return Outcome(
            num_blocks=sum(o.num_blocks for o in self.outcomes),
            size_bytes=sum(o.size_bytes for o in self.outcomes),
            duration_s=now - self.started,
            path=self.outcomes[0].path if self.outcomes else "",
            error=error,
            detail=detail,
        )


def plan_parts(
    handoff: KVHandoff,
    source_indices: array[int],
    target_block_ids: array[int],
    pool: Region,
    *,
    target_start_tokens: int | None,
    staging_bytes_max: int,
    first_region_id: int,
) -> list[Part]:
    """The parts that fill `target_block_ids` of `pool`; see KVEndpoint.start_pull for what the arguments mean.

    Staging, where one is needed, is made here and owned by the parts: call `release_staging` at the end.

    Raises:
        LayoutMismatch: the offer cannot be turned into our blocks, contradicts itself, or needs more staging than allowed.
    """
    shards = _needed(handoff.shards, pool.layout)
    for shard in shards:
        check_shard(shard, source_indices, is_complete=handoff.is_complete)
    if len(shards) == 1 and shards[0].layout == pool.layout:
        return [Part(shard=shards[0], source_indices=source_indices, block_ids=target_block_ids, region=pool)]
    check_coverage(pool.layout, [shard.layout for shard in shards])
    needed = sum(len(source_indices) * shard.layout.block_bytes for shard in shards)
    if needed > staging_bytes_max:
        raise LayoutMismatch(f"blocks of another layout need {needed} bytes of staging, max_staging_bytes is {staging_bytes_max}")
    if list(source_indices) != list(range(source_indices[0], source_indices[0] + len(source_indices))):
        raise LayoutMismatch("blocks of another layout can be taken only as one consecutive range")
    if len(sizes := {shard.layout.block_size_tokens for shard in shards}) > 1:
        raise LayoutMismatch(f"the shards of the offer have blocks of {' and '.join(map(str, sorted(sizes)))} tokens; one number is needed")
    parts: list[Part] = []
    try:
        for shard in shards:
            chunks = _chunks(shard, source_indices, target_block_ids, pool, target_start_tokens, handoff.num_valid_tokens)
            staging = PoolMemory.private(shard.layout, len(source_indices), first_region_id + len(parts))
            parts.append(
                Part(
                    shard=shard,
                    source_indices=source_indices,
                    block_ids=array("I", range(len(source_indices))),
                    region=staging.region,
                    staging=staging,
                    chunks=chunks,
                    target=pool,
                )
            )
    except BaseException:
        release_staging(parts)
        raise
    return parts


def complete_parts(pull: PullState, handoff: KVHandoff) -> None:
    """Put what the completed offer says of each shard in place of what the early one said.

    Raises:
        LayoutMismatch: it has not the digests that its mode calls for.
    """
    said = {(shard.worker_id, shard.rank): shard for shard in handoff.shards}
    for part in pull.parts:
        part.shard = said[part.shard.worker_id, part.shard.rank]
        check_shard(part.shard, part.source_indices, is_complete=True)
    pull.handoff = handoff


def are_checked_quickly(parts: list[Part], limit_bytes: int) -> bool:
    """True when `verify_parts` and `place_staged` together read at most so much, all of it in host memory: a device is waited for."""
    if any(p.region.device is not None for p in parts):
        return False
    digested = sum(len(p.block_ids) * digest.read_bytes(p.region.layout, p.shard.digest_mode) for p in parts if p.ours is None)
    return digested + sum(p.staging.region.size_bytes for p in parts if p.staging is not None) <= limit_bytes


def verify_parts(handoff: KVHandoff, parts: list[Part]) -> str:
    """What differs from the offered content, in words; empty when nothing does."""
    for part in parts:
        shard = part.shard
        bad = digest.verify(
            part.region,
            part.block_ids,
            shard.generations,
            part.source_indices,
            shard.digest_mode,
            handoff.handoff_id,
            shard.digests,
            part.ours,
        )
        if bad:
            first = part.source_indices[bad[0]]
            return f"{len(bad)} of {len(part.block_ids)} blocks differ from what {shard.worker_id} offered, the first is its block {first}"
    return ""


def digest_parts(handoff: KVHandoff, parts: list[Part]) -> None:
    """Read what arrived ahead of the digests it will be compared with."""
    for part in parts:
        shard, indices = part.shard, part.source_indices
        part.ours = digest.of_copies(part.region, part.block_ids, shard.generations, indices, shard.digest_mode, handoff.handoff_id)


def place_staged(parts: list[Part]) -> None:
    """Spread verified staged blocks over our own."""
    for part in parts:
        if part.staging is None or part.target is None or part.chunks is None:
            continue
        copy_runs(part.region.blocks, part.target.blocks, part.chunks)


def release_staging(parts: list[Part]) -> None:
    for part in parts:
        if part.staging is not None:
            part.staging.close()
            part.staging = None


def _chunks(
    shard: HandoffShard, source_indices: array[int], target_block_ids: array[int], pool: Region, target_start: int | None, num_tokens: int
) -> Chunks:
    source_size, target_size = shard.layout.block_size_tokens, pool.layout.block_size_tokens
    source_start = source_indices[0] * source_size
    start = source_start if target_start is None else target_start
    end = min(num_tokens, source_start + len(source_indices) * source_size, start + len(target_block_ids) * target_size)
    if start < source_start or end <= start + (len(target_block_ids) - 1) * target_size:
        raise LayoutMismatch(
            f"{len(target_block_ids)} blocks of {target_size} tokens from token {start} on are to be filled with tokens "
            f"{source_start} to {end}; ask for every source block they need"
        )
    staged = range(len(source_indices))
    pairs = pair_blocks(source_size, target_size, staged, target_block_ids, source_start=source_start, target_start=start, end=end)
    return plan_reshard(shard.layout, pool.layout, pairs)


def _needed(shards: tuple[HandoffShard, ...], target: KVLayout) -> list[HandoffShard]:
    """The shards that share heads and layers with `target`; one of each rectangle: with more ranks than KV heads several hold the same."""
    kept: dict[ShardRectangle, HandoffShard] = {}
    ours = target.shard
    for shard in shards:
        theirs = shard.layout.shard
        heads = max(theirs.first_head, ours.first_head) < min(theirs.last_head, ours.last_head)
        layers = max(theirs.first_layer, ours.first_layer) < min(theirs.last_layer, ours.last_layer)
        if heads and layers:
            kept.setdefault(theirs, shard)
    return list(kept.values())


def check_shard(shard: HandoffShard, source_indices: array[int], *, is_complete: bool) -> None:
    num_blocks = len(shard.block_ids)
    if largest(source_indices) not in range(num_blocks):
        raise LayoutMismatch(f"{len(source_indices)} blocks asked for of an offer of {num_blocks}, not all of them in it")
    has_digests = digest.digests_fit(num_blocks, shard.digest_mode, shard.digests) if is_complete else not shard.digests
    if len(shard.generations) != num_blocks or not has_digests:
        raise LayoutMismatch(
            f"the offer of {num_blocks} blocks has {len(shard.generations)} generations and {len(shard.digests)} bytes of digests"
        )
