"""What workers tell each other about KV that moves between them: offers and their leases, prefixes asked for, copies over a socket."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from protocol.kv import KVHandoff, KVPeer


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewLease:
    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AckHandoff:
    """The target has verified its copy: the source may reuse the blocks."""

    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class DropHandoff:
    """The target does not want it (any more)."""

    handoff_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPrefix:
    """Offer me the KV of the longest run of whole blocks you hold of these tokens, if it is longer than `num_held_tokens`.

    The source compares the tokens themselves, in the chain that starts at `cache_root`: tenants never meet.
    """

    pull_id: str  # 32 hex digits
    requester: KVPeer
    request_id: str
    attempt: int
    cache_root: bytes
    token_ids: array[int]
    num_held_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixOffered:
    """The blocks are leased to the requester: an offer like that of a computed prompt, of kind PREFIX."""

    pull_id: str
    handoff: KVHandoff


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRefused:
    """Nothing to be had here; the requester computes."""

    pull_id: str
    reason: str


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
