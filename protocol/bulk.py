"""What frames the bytes of KV blocks on a data socket, where they do not pass through shared memory or a library of its own."""

from __future__ import annotations

from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """Send these blocks over the data socket (TCP); shared memory needs no Pull."""

    ticket: int
    epoch: int
    region_id: int
    block_ids: array[int]
    generations: array[int]
    clock: int = 0  # once the region's clock is there; 0: now
    first_layer: int = 0
    num_layers: int = 0  # from first_layer on; 0: whole blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class PullTrailer:
    """After the last byte: the generations seen after the copy was sent."""

    ticket: int
    generations: array[int]
    error: str  # "" or a protocol.kv.TransferError value
