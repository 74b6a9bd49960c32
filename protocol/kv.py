"""Records of the KV hand-off: how blocks lie in memory, who offers which, and what a copy saw.

A *block* is the KV of `block_size_tokens` tokens over all layers; a *chunk* is one contiguous run of a transfer.
Default memory order of a pool is [block][layer][2][kv_head][token][dim], so one block is one contiguous run.
Clocks of two hosts are never compared: a lease is a duration, counted by its holder.
"""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass
from enum import Enum

DTYPE_SIZE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class LayerKind(Enum):
    FULL = "full"
    WINDOW = "window"
    LATENT = "latent"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGroup:
    """A run of layers whose KV has one shape."""

    kind: LayerKind
    first_layer: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: str  # a key of DTYPE_SIZE_BYTES
    window_tokens: int | None = None  # None unless kind is WINDOW

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token in all layers of the group."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_SIZE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardRectangle:
    """Which part of the whole model's KV one rank holds (half-open ranges)."""

    first_head: int
    last_head: int
    first_layer: int
    last_layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVLayout:
    """How one rank's pool lies in memory."""

    block_size_tokens: int
    groups: tuple[LayerGroup, ...]
    shard: ShardRectangle

    @property
    def num_layers(self) -> int:
        return sum(g.num_layers for g in self.groups)

    @property
    def token_bytes(self) -> int:
        return sum(g.token_bytes for g in self.groups)

    @property
    def block_bytes(self) -> int:
        return self.block_size_tokens * self.token_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFingerprint:
    """What must be equal before two workers exchange KV: two checkpoints of one shape never do."""

    weights: str  # hex digest over the safetensors headers and a fixed sample of the tensor bytes
    config: str  # hex digest of the architecture's fields
    rope: str
    dtype: str
    quantization: str
    numerics: str  # "fast", or "reference/" and whose bits they are: "fused", "portable", "torch"

    @property
    def digest(self) -> bytes:
        """16 bytes; equal exactly when every field is."""
        text = "\0".join((self.weights, self.config, self.rope, self.dtype, self.quantization, self.numerics))
        return hashlib.blake2b(text.encode(), digest_size=16).digest()


class HandoffKind(Enum):
    PREFILL = "prefill"
    MIGRATION = "migration"
    PREFIX = "prefix"


class FailurePolicy(Enum):
    """What a target does about KV that did not come, or not as it was offered."""

    RECOMPUTE = "recompute"  # computes the prompt itself
    RETRY = "retry"  # pulls once more, then computes it itself
    FAIL = "fail"  # ends the request, with the reason


class DigestMode(Enum):
    """What of a block's content is checked after the copy; epoch, lease and generation are checked always."""

    OFF = "off"
    SAMPLED = "sampled"  # one layer a block, rotating with the block's place and the hand-off
    FULL = "full"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a worker's pool can be reached; empty string or 0: not offered."""

    unix_path: str = ""  # control socket that passes the pool's memfd (same host)
    host: str = ""
    port: int = 0
    host_nonce: str = ""  # a path whose readability with this content proves one host; see kvtransfer.auto
    control_path: str = ""  # Unix socket for AckHandoff, RenewLease, DropHandoff (protocol.wire)
    control_port: int = 0  # the same on `host`
    ucx_port: int = 0  # on `host`: the conversation of pulls whose bytes go by UCX
    nccl_port: int = 0  # the same, by NCCL
    cuda_path: str = ""  # control socket that passes a handle to the pool in device memory (same host, same device)
    cuda_device: str = ""  # the device it lies on; equal on one host exactly for one device


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPeer:
    """One incarnation of a worker, and where its pool can be reached."""

    worker_id: str
    epoch: int
    endpoint: Endpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """A promise to keep blocks for a duration, renewed by heartbeats; ends at acknowledgement or expiry, whichever is first."""

    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffShard:
    """One rank's part of an offer. Entry i of every array speaks of the i-th block of the sequence."""

    worker_id: str
    rank: int
    epoch: int
    endpoint: Endpoint
    region_id: int
    layout: KVLayout
    block_ids: array[int]  # uint32
    generations: array[int]  # uint64
    digest_mode: DigestMode
    digests: bytes  # 8 bytes a block (xxh3_64, seeded by generation and layer); empty when the mode is OFF, or the offer is early
    # An offer made before its last step is done: layer l of the blocks from `num_whole_blocks` on is ready once the region's clock
    # (kvtransfer.layer_clock) is at layer_clock + l + 1, those before once it is at layer_clock. Nothing to wait for: 0.
    layer_clock: int = 0
    num_whole_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    """The token (with its logprobs) the source sampled for one choice, for the target to continue from."""

    choice: int
    token_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KVHandoff:
    """The offer a source makes; travels source -> gateway -> target."""

    handoff_id: str  # 32 hex digits
    kind: HandoffKind
    request_id: str
    attempt: int
    fingerprint: bytes  # ModelFingerprint.digest of the source
    token_ids: array[int]  # the tokens whose KV is offered; the target compares them with its own before it reads
    layer_watermark: int  # layers ready when it was made; less than num_layers: an early offer, and a HandoffCompletion follows
    first_tokens: tuple[FirstToken, ...]
    lease: Lease
    shards: tuple[HandoffShard, ...]

    @property
    def num_valid_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def is_complete(self) -> bool:
        return all(self.layer_watermark == shard.layout.num_layers for shard in self.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffCompletion:
    """What an early offer could not say yet: the source has computed everything."""

    handoff_id: str
    first_tokens: tuple[FirstToken, ...]
    digests: tuple[bytes, ...]  # of each shard of the offer; none: the source does not keep the blocks any more


class TransferError(Enum):
    """Why a transfer did not deliver; a value, never an exception."""

    PEER_LOST = "peer_lost"
    STALE_EPOCH = "stale_epoch"
    STALE_GENERATION = "stale_generation"
    LEASE_EXPIRED = "lease_expired"
    DIGEST_MISMATCH = "digest_mismatch"
    TRUNCATED = "truncated"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    REFUSED = "refused"  # fingerprint, layout or tokens differ
    NO_BLOCKS = "no_blocks"  # the target has no room


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one transfer saw. Delivered when `error` is None."""

    num_blocks: int
    size_bytes: int
    duration_s: float
    path: str  # backend that carried it: "local" | "shm" | "cuda_ipc" | "tcp" | "ucx" | "nccl"
    error: TransferError | None = None
    detail: str = ""
