"""What an operator may tell a running router or worker, over the sockets everybody uses: whoever holds the cluster secret may say it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class UsePolicy:
    """Place by this policy from now on. `module:Class` is imported by the router."""

    reply_id: int
    policy: str  # NAME[:k=v,...] or module:Class[:k=v,...]
    decode_policy: str = ""  # of the decode pool; empty: the one above serves both
    forget: bool = False  # fitted cost models, hit rates and guesses at caches too: the next choices are those of a router just started


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInUse:
    """The policy in force. `error` not empty: it is the one that was there before, and why."""

    reply_id: int
    policy: str
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResetCache:
    """Drop every cached block that nobody uses, in host memory too. Requests go on with the blocks they hold."""

    reply_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheReset:
    """Done. Blocks that somebody holds were kept, and are cached again when they are let go."""

    reply_id: int
    num_blocks_kept: int
