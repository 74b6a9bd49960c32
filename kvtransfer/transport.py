"""The verbs every backend speaks: register, connect, start, poll, cancel, close, and a descriptor to wait on.

A lost transfer is a value (Outcome.error), not an exception; retries, leases and order belong to handoff.py. The conformance
suite (tests/conformance/test_transport.py) holds every backend to this page.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from protocol.kv import Endpoint, HandoffShard, KVLayout, Outcome

if TYPE_CHECKING:
    from kvtransfer.device_pool import DeviceBlocks


class RegionKind(Enum):
    MEMFD = "memfd"
    PRIVATE = "private"
    CUDA_IPC = "cuda_ipc"
    CUDA = "cuda"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Region:
    """A pool's memory as a backend sees it. The pool owns the memory and outlives every transfer."""

    region_id: int
    kind: RegionKind
    layout: KVLayout
    num_blocks: int
    fd: int  # memfd of [generation words | clock word | blocks], with CUDA_IPC of the words alone; -1 for other kinds
    blocks: memoryview  # uint8, num_blocks * layout.block_bytes; empty with CUDA_IPC
    generations: memoryview  # uint64 words, one a block, readable by peers
    clock: memoryview  # one uint64: how far the steps that write the pool have come (kvtransfer.layer_clock)
    device: DeviceBlocks | None = None  # None: the blocks are in host memory

    @property
    def size_bytes(self) -> int:
        return self.num_blocks * self.layout.block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Read blocks of one shard into ours. Generations are checked before and after each copy (a seqlock)."""

    source: HandoffShard
    source_indices: array[int]  # which entries of source.block_ids
    target_region_id: int
    target_block_ids: array[int]
    deadline_s: float  # a duration from start


Ticket = int


class KVTransport(Protocol):
    """One backend of one process. Not thread-safe: one thread calls it, copies may run on others."""

    name: str

    def register(self, region: Region) -> None:
        """Make `region` known, as a target of our transfers and readable by peers."""
        ...

    def forget(self, region_id: int) -> None:
        """The region goes away. No transfer into it may be under way; peers that mapped it keep their view until they leave."""
        ...

    def endpoint(self) -> Endpoint:
        """Where peers reach our regions through this backend (only its own fields are filled)."""
        ...

    def start(self, transfer: Transfer) -> Ticket:
        """Begin; never blocks (connecting included). Exactly one outcome follows in `poll`."""
        ...

    def poll(self) -> list[tuple[Ticket, Outcome]]:
        """Outcomes since the last call. After an outcome nothing writes the target blocks any more."""
        ...

    def cancel(self, ticket: Ticket) -> None:
        """Stop soon; the outcome (CANCELLED, or whatever was first) still comes."""
        ...

    def wakeup_fd(self) -> int:
        """A descriptor that is readable while outcomes wait; -1 for a backend whose transfers end inside `start`."""
        ...

    def close(self) -> None:
        """Stop everything, join threads, close sockets, unmap peers' regions."""
        ...
