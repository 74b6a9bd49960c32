"""What of a block's content is compared after the copy: xxh3_64 over (bytes, layer, generation), 8 bytes a block.

    off      nothing; epoch, lease and generation still are
    sampled  one layer a block; which one rotates with the block's place and the hand-off, so every layer is looked at over
             time. Finds a wrong block, a truncated or shifted transfer; misses a flipped bit in most layers of that block
    full     every byte. Finds a flipped bit anywhere; about 40 GB/s in cache, 8 GB/s from memory on one core

A last partial block is digested whole, as it lies: nobody writes a block while it is offered.
"""

from __future__ import annotations

from array import array

import numpy as np
import xxhash

from kvtransfer.device_pool import DeviceBlocks
from kvtransfer.layers import layer_spans
from kvtransfer.transport import Region
from protocol.kv import DigestMode, KVLayout

DIGEST_SIZE_BYTES = 8
_EVERY_LAYER = 0xFFFF


def compute(
    region: Region, block_ids: array[int], generations: array[int], mode: DigestMode, handoff_id: str, places: range | None = None
) -> bytes:
    """Digests of the blocks of one hand-off in its order; empty when `mode` is OFF. Safe to call from any thread.

    places: of those blocks only; None: of all.
    """
    places = range(len(block_ids)) if places is None else places
    chosen = slice(places.start, places.stop)
    return _digests(region, block_ids[chosen], generations[chosen], places, mode, handoff_id)


def of_copies(
    region: Region, block_ids: array[int], generations: array[int], places: array[int], mode: DigestMode, handoff_id: str
) -> bytes:
    """Digests of copies: block i is one of the hand-off's block `places[i]`; `generations` (the source's) cover the whole hand-off."""
    if mode is DigestMode.OFF:
        return b""
    return _digests(region, block_ids, array("Q", [generations[p] for p in places]), places, mode, handoff_id)


def verify(
    region: Region,
    block_ids: array[int],
    generations: array[int],
    places: array[int],
    mode: DigestMode,
    handoff_id: str,
    digests: bytes,
    ours: bytes | None = None,
) -> list[int]:
    """Positions in `block_ids` whose content is not what the source digested; empty when all is well.

    Block i is a copy of the hand-off's block `places[i]`; `generations` (the source's) and `digests` cover the whole hand-off. ours: what
    `of_copies` made of them before; None: they are read now.
    """
    if mode is DigestMode.OFF:
        return []
    if ours is None:
        ours = of_copies(region, block_ids, generations, places, mode, handoff_id)
    size = DIGEST_SIZE_BYTES
    return [i for i, p in enumerate(places) if ours[i * size : (i + 1) * size] != digests[p * size : (p + 1) * size]]


def digests_fit(num_blocks: int, mode: DigestMode, digests: bytes) -> bool:
    """True when there is one digest a block, or none where none is made."""
    return len(digests) == (0 if mode is DigestMode.OFF else num_blocks * DIGEST_SIZE_BYTES)


def read_bytes(layout: KVLayout, mode: DigestMode) -> int:
    """Of one block, on average over many."""
    if mode is DigestMode.OFF:
        return 0
    return layout.block_bytes if mode is DigestMode.FULL else layout.block_bytes // len(layer_spans(layout))


def _digests(
    region: Region, block_ids: array[int], generations: array[int], places: range | array[int], mode: DigestMode, handoff_id: str
) -> bytes:
    if mode is DigestMode.OFF:
        return b""
    if region.device is not None:
        return _device_digests(region, region.device, block_ids, generations, places, mode, handoff_id)
    blocks, block_bytes, digest = region.blocks, region.layout.block_bytes, xxhash.xxh3_64_digest
    if mode is DigestMode.FULL:
        return b"".join(
            [
                digest(blocks[block_id * block_bytes : (block_id + 1) * block_bytes], _seed(generation, _EVERY_LAYER))
                for block_id, generation in zip(block_ids, generations, strict=True)
            ]
        )
    spans = layer_spans(region.layout)
    turn = xxhash.xxh3_64_intdigest(handoff_id.encode())
    parts = []
    for block_id, generation, place in zip(block_ids, generations, places, strict=True):
        layer = (place + turn) % len(spans)
        start, size = spans[layer]
        start += block_id * block_bytes
        parts.append(digest(blocks[start : start + size], _seed(generation, layer)))
    return b"".join(parts)


def _device_digests(
    region: Region,
    device: DeviceBlocks,
    block_ids: array[int],
    generations: array[int],
    places: range | array[int],
    mode: DigestMode,
    handoff_id: str,
) -> bytes:
    """The same of blocks that must be copied to the host first: only what is digested is."""
    layout = region.layout
    bases = np.frombuffer(block_ids, dtype=np.uint32).astype(np.int64) * layout.block_bytes
    if mode is DigestMode.FULL:
        layers = np.full(len(bases), _EVERY_LAYER)
        spans = np.stack((bases, np.full_like(bases, layout.block_bytes)), axis=1)
    else:
        of_layers = np.array(layer_spans(layout), dtype=np.int64)
        turn = xxhash.xxh3_64_intdigest(handoff_id.encode()) % len(of_layers)
        layers = (np.asarray(places, dtype=np.int64) + turn) % len(of_layers)
        spans = of_layers[layers]
        spans[:, 0] += bases
    seeds = [_seed(generation, layer) for generation, layer in zip(generations, layers.tolist(), strict=True)]
    return b"".join([xxhash.xxh3_64_digest(view, seed) for view, seed in zip(device.read(spans), seeds, strict=True)])


def _seed(generation: int, layer: int) -> int:
    return (generation << 16 | layer) & 0xFFFF_FFFF_FFFF_FFFF
