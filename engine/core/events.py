"""What happens to a worker core, and what it asks its driver to do.

`WorkerCore.on(event, now) -> list[Command]`. A driver performs commands in order; it never decides. The same events and
commands cross the live driver (cluster/worker_host.py) and the simulator.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from engine.core.executor import BatchPlan, StepResult
from protocol.kv import KVHandoff, KVPeer, Outcome
from protocol.kv_messages import PrefixOffered, PrefixRefused, RequestPrefix
from protocol.messages import NO_TOKENS, AttemptFailed, HandoffDone, OfferCompleted, Submit, TokenColumns, TokenRun, TransferFailed
from protocol.worker import KvEvent, Role

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitReceived:
    gateway: str  # name of the connection's peer; output goes back there
    submit: Submit


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelReceived:
    request_id: str
    attempt: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayLost:
    """The gateway stayed away longer than the reconnection grace (2 s): cancel what is its."""

    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    result: StepResult


@dataclass(frozen=True, slots=True, kw_only=True)
class PullDone:
    """A transfer asked for by StartPull came to an end, well or not. The copy has stopped either way."""

    handoff_id: str
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadDone:
    """A copy asked for by LoadBlocks came to an end. `error` empty: the blocks hold what the slots held."""

    load_id: int
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerAcked:
    """A target has verified its copy of our blocks."""

    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDropped:
    """A target will not take our blocks."""

    handoff_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRenewed:
    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferCompletedReceived:
    """What an early offer to us could not say."""

    completed: OfferCompleted


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSaid:
    """Another worker asks for a prefix, or answers what we asked. `worker_id`: who said it, as its connection proved."""

    worker_id: str
    message: RequestPrefix | PrefixOffered | PrefixRefused


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleChanged:
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainStarted:
    """Admit nothing new; the snapshot says DRAINING."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCleared:
    """Drop every cached block that nobody uses, in host memory too; requests go on with theirs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """All commands up to Settle were performed: now is the time for what nobody waits for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed: leases, pull deadlines and parked requests are looked at. At least every 50 ms."""


Event = (
    SubmitReceived
    | CancelReceived
    | GatewayLost
    | StepDone
    | PullDone
    | LoadDone
    | PeerAcked
    | PeerDropped
    | LeaseRenewed
    | OfferCompletedReceived
    | PeerSaid
    | RoleChanged
    | DrainStarted
    | CacheCleared
    | Settled
    | Tick
)

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveBlocks:
    """Copy these blocks of the pool into slots of the host tier before any later command: they are about to be written anew.

    A pool in device memory may order the copies before the steps on its stream instead of waiting for them.
    """

    block_ids: array[int]
    slots: array[int]
    generations: array[int]  # of the slots, from now on


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadBlocks:
    """Copy slots of the host tier into blocks of the pool; LoadDone must follow.

    The slots keep the generations they had when they were saved until then; the blocks are nobody else's.
    """

    load_id: int
    slots: array[int]
    generations: array[int]
    block_ids: array[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RaiseGenerations:
    """Write these generation words before any later command: the blocks are about to be written anew."""

    block_ids: array[int]
    generations: array[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStep:
    plan: BatchPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Emit:
    """All tokens one step made for one gateway; becomes one StepOutput frame."""

    gateway: str
    step_id: int
    runs: tuple[TokenRun, ...]
    tokens: TokenColumns = NO_TOKENS

    def each(self) -> Iterator[TokenRun]:
        """All of them as runs."""
        yield from self.tokens
        yield from self.runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """A fact about an attempt, for the gateway that submitted it."""

    gateway: str
    message: HandoffDone | TransferFailed | AttemptFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferKv:
    """Fill in endpoint, epoch, region and digests of the shard, then send Offered to the gateway.

    The core has put block_ids and generations in place and keeps the blocks until the hand-off ends. An early offer has no digests yet.
    """

    gateway: str
    handoff: KVHandoff


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteOffer:
    """The prefill of an early offer is done: digest its blocks and send OfferCompleted to the gateway.

    handoff: the offer as it was made, with its first tokens now. is_kept: False when the blocks are not kept any more; then there
    are no digests.
    """

    gateway: str
    handoff: KVHandoff
    is_kept: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPull:
    """Copy the offered blocks into ours; PullDone must follow, also after CancelPull and at the deadline.

    Pairs (source_indices[i], target_block_ids[i]): the source index counts in the hand-off's block order, so that
    blocks which the target already has are skipped. With another block size at the source the lists are not pairs: the target blocks
    begin at token `target_start_tokens`. Of an early offer only a failure is told before CompletePull.
    """

    handoff: KVHandoff
    source_indices: array[int]
    target_block_ids: array[int]
    target_start_tokens: int
    deadline_s: float  # a duration from now


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletePull:
    """The early offer that is being pulled is complete."""

    handoff: KVHandoff
    deadline_s: float  # a duration from now


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelPull:
    handoff_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AckSource:
    """Tell the source its blocks are free (after verification)."""

    handoff: KVHandoff


@dataclass(frozen=True, slots=True, kw_only=True)
class DropSource:
    """Tell the source we will not take them."""

    handoff: KVHandoff
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RenewSource:
    """Tell the source we still want them."""

    handoff: KVHandoff


@dataclass(frozen=True, slots=True, kw_only=True)
class AskPrefix:
    """Send RequestPrefix to the peer, with our own address as the requester's."""

    peer: KVPeer
    pull_id: str
    request_id: str
    attempt: int
    cache_root: bytes
    token_ids: array[int]
    num_held_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferPrefix:
    """As OfferKv, for the peer that asked: it is sent PrefixOffered."""

    peer: KVPeer
    pull_id: str
    handoff: KVHandoff


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusePrefix:
    """Send the peer PrefixRefused."""

    peer: KVPeer
    pull_id: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Settle:
    """Come back with Settled once the steps are under way; the last command of a turn. Asked again until then: one Settled will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishKvEvents:
    events: tuple[KvEvent, ...]


Command = (
    SaveBlocks
    | LoadBlocks
    | RaiseGenerations
    | RunStep
    | Emit
    | Tell
    | OfferKv
    | CompleteOffer
    | StartPull
    | CompletePull
    | CancelPull
    | AckSource
    | DropSource
    | RenewSource
    | AskPrefix
    | OfferPrefix
    | RefusePrefix
    | PublishKvEvents
    | Settle
)
