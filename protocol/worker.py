"""What workers say of themselves: who they are, how they are, and which prefixes they hold."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from protocol.kv import Endpoint

WorkerId = str  # "prefill-0", "decode-3": unique for the life of the cluster; a respawned worker has a new one


class Role(Enum):
    """State of a worker, not its class: which behaviours its core has loaded."""

    PREFILL = "prefill"
    DECODE = "decode"
    BOTH = "both"

    @property
    def prefills(self) -> bool:
        return self is not Role.DECODE

    @property
    def decodes(self) -> bool:
        return self is not Role.PREFILL


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    LOST = "lost"


class Tier(Enum):
    """Where a cached block lies."""

    DEVICE = "device"
    HOST = "host"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAddress:
    """One row of the directory: how to reach a worker, and which incarnation of it."""

    worker_id: WorkerId
    role: Role
    epoch: int  # process incarnation: never reused, greater for a later process
    host: str
    port: int  # control socket (protocol.wire)
    pid: int
    hostname: str
    kv_endpoint: Endpoint
    model_id: str
    fingerprint: bytes
    block_size_tokens: int
    num_kv_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    kv_token_bytes: int = 0  # KV of one token on this worker; 0: not told


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSnapshot:
    """How a worker is. A snapshot always carries its own age (the sender's), step counter and event sequence number."""

    worker_id: WorkerId
    epoch: int
    role: Role
    state: WorkerState
    age_s: float  # seconds between the reading of the figures and the sending of this frame
    step_count: int  # grows while work is queued, or the worker is stuck
    last_event_number: int  # of the newest KV event already sent
    num_waiting: int
    num_running: int
    waiting_tokens: int  # prompt tokens not computed yet, waiting or running
    running_kv_tokens: int  # tokens of KV held by running sequences
    # The conservation law I3: free + owned + leased + cached = total, where cached counts blocks only the prefix cache holds.
    num_blocks_total: int
    num_blocks_free: int
    num_blocks_owned: int
    num_blocks_leased: int
    num_blocks_cached: int
    num_preemptions: int
    step_time_ewma_s: float
    counters: dict[str, int]  # monotonic counters by metric name (engine.core.counters); see gateway/metrics
    notes: tuple[str, ...] = ()  # fallbacks in force, for `baton status`
    num_pulling: int = 0  # of num_waiting: their KV is on its way

    @property
    def num_blocks_unaccounted(self) -> int:
        held = self.num_blocks_free + self.num_blocks_owned + self.num_blocks_leased + self.num_blocks_cached
        return self.num_blocks_total - held


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksStored:
    """Hash blocks (16 tokens each, protocol.block_hash) that can now be hit on this worker.

    `parent` is the hash before the first of `hashes`, or the chain's root.
    """

    number: int
    parent: bytes
    hashes: tuple[bytes, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class BlocksRemoved:
    number: int
    hashes: tuple[bytes, ...]
    tier: Tier = Tier.DEVICE


@dataclass(frozen=True, slots=True, kw_only=True)
class AllBlocksCleared:
    number: int


KvEvent = BlocksStored | BlocksRemoved | AllBlocksCleared
