"""The agreement over KV blocks, seen from both sides: pure state machines over protocol.lifecycle.HANDOFF_MOVES.

    source   OFFERED ──(target renews: RESERVED)──(target acknowledges)──► RELEASED       or FAILED (dropped), EXPIRED (lease ran out)
    target   OFFERED ─► RESERVED ─► PULLING ─► VERIFIED ─► ACKED ─► RELEASED              or FAILED(reason)
                           ▲──────────┘ a pull that broke off, under the policy "retry", once

An offer may come before the end of the prefill's last step (`KVHandoff.is_complete` is false): its target reserves and pulls behind the
source's layers, and is VERIFIED only after the HandoffCompletion, which brings first tokens and digests.

Both sides keep time with their own clock: a lease is a duration. The source keeps the blocks until acknowledged, dropped or expired,
whichever is first, and raises their generations before it reuses them; so a target that comes too late is told by its copy.
Whoever owns blocks and sockets acts on these moves (engine/core/offers.py, engine/core/intake.py).
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace

from kvtransfer.reshard import check_compatible
from protocol.errors import LayoutMismatch
from protocol.kv import FailurePolicy, HandoffCompletion, KVHandoff, KVLayout, Outcome, TransferError
from protocol.lifecycle import HandoffState, advance, is_final

_WAY = (
    HandoffState.OFFERED,
    HandoffState.RESERVED,
    HandoffState.PULLING,
    HandoffState.VERIFIED,
    HandoffState.ACKED,
    HandoffState.RELEASED,
)


_WORTH_ANOTHER_PULL = (TransferError.PEER_LOST, TransferError.TRUNCATED, TransferError.DIGEST_MISMATCH, TransferError.DEADLINE)


def recourse(policy: FailurePolicy, error: TransferError, *, num_pulls: int) -> FailurePolicy:
    """What `policy` comes to after `num_pulls` pulls of one offer, the last of which met `error`.

    RETRY only once, and only where the source may have the blocks still: one that lost, freed or refuses them says so again.
    """
    if policy is FailurePolicy.RETRY and (num_pulls != 1 or error not in _WORTH_ANOTHER_PULL):
        return FailurePolicy.RECOMPUTE
    return policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why a target will not, or could not, take an offer."""

    error: TransferError
    detail: str


@dataclass(slots=True, kw_only=True, eq=False)
class SourceHandoff:
    """An offer of ours. The source sees only the target's messages, so one of them may stand for several moves."""

    handoff_id: str
    block_ids: array[int]
    size_bytes: int
    lease_s: float
    expires_s: float  # on our clock
    state: HandoffState = HandoffState.OFFERED

    @property
    def is_open(self) -> bool:
        return not is_final(self.state)

    def renew(self, now: float) -> None:
        """The target still wants it."""
        if self.state is HandoffState.OFFERED:
            self.state = advance(self.state, HandoffState.RESERVED)
        self.expires_s = now + self.lease_s

    def acknowledge(self) -> None:
        """The target has verified its copy: every move up to RELEASED."""
        if not self.is_open:
            self.state = advance(self.state, HandoffState.ACKED)  # raises
        for to in _WAY[_WAY.index(self.state) + 1 :]:
            self.state = advance(self.state, to)

    def drop(self) -> None:
        """The target, or whoever asked for it, does not want it any more."""
        self.state = advance(self.state, HandoffState.FAILED)

    def expire_if_due(self, now: float) -> bool:
        """True when the lease has run out just now."""
        if now < self.expires_s:
            return False
        self.state = advance(self.state, HandoffState.EXPIRED)
        return True


@dataclass(slots=True, kw_only=True, eq=False)
class TargetHandoff:
    """An offer to us, from its arrival until the source is told of its end."""

    handoff: KVHandoff
    give_up_s: float  # when it has waited too long for room, or for the end of its pull; on our clock
    renew_interval_s: float
    next_renewal_s: float
    completed_s: float  # when it was complete, on our clock; of an early offer: not before `complete` is called
    state: HandoffState = HandoffState.OFFERED
    num_pulls: int = 0  # begun
    refusal: Refusal | None = None  # set by `fail`

    @property
    def handoff_id(self) -> str:
        return self.handoff.handoff_id

    @property
    def is_pulling(self) -> bool:
        return self.state is HandoffState.PULLING

    @property
    def has_failed(self) -> bool:
        return self.state is HandoffState.FAILED

    def complete(self, completion: HandoffCompletion, now: float) -> None:
        """The source has computed everything. Allowed in every state: a copy may have failed meanwhile."""
        self.handoff = complete(self.handoff, completion)
        self.completed_s = now

    def reserve(self) -> None:
        """Blocks are set aside for it."""
        self.state = advance(self.state, HandoffState.RESERVED)

    def pull(self, *, give_up_s: float) -> None:
        """give_up_s: when the outcome of this pull is not waited for any longer."""
        self.state = advance(self.state, HandoffState.PULLING)
        self.give_up_s = give_up_s
        self.num_pulls += 1
        self.give_up_s = give_up_s

    def pull_again(self, *, give_up_s: float) -> None:
        """The last pull has broken off; its blocks stay set aside for this one."""
        self.state = advance(self.state, HandoffState.RESERVED)
        self.pull(give_up_s=give_up_s)

    def finish_pull(self, outcome: Outcome) -> None:
        """The copy has stopped: VERIFIED, or FAILED with the outcome's error."""
        if outcome.error is not None:
            self.fail(Refusal(error=outcome.error, detail=outcome.detail))
        else:
            self.state = advance(self.state, HandoffState.VERIFIED)

    def release(self) -> None:
        """The source was told."""
        self.state = advance(advance(self.state, HandoffState.ACKED), HandoffState.RELEASED)

    def fail(self, refusal: Refusal) -> None:
        self.state = advance(self.state, HandoffState.FAILED)
        self.refusal = refusal

    def take_renewal(self, now: float) -> bool:
        """True when the source is to hear from us now; the next one is due an interval later."""
        if now < self.next_renewal_s:
            return False
        self.next_renewal_s = now + self.renew_interval_s
        return True


def complete(handoff: KVHandoff, completion: HandoffCompletion) -> KVHandoff:
    """The early offer with what it could not say. Digests of another number of shards than it has: none, so that no check passes."""
    assert completion.handoff_id == handoff.handoff_id and not handoff.is_complete
    shards = handoff.shards
    digests = completion.digests if len(completion.digests) == len(shards) else (b"",) * len(shards)
    return replace(
        handoff,
        layer_watermark=shards[0].layout.num_layers,
        first_tokens=completion.first_tokens,
        shards=tuple(replace(shard, digests=said) for shard, said in zip(shards, digests, strict=True)),
    )


def step_begin(step_id: int, num_layers: int) -> int:
    """A region's clock (kvtransfer.layer_clock) from the end of the step before until layer 0 of step `step_id` is written; not 0."""
    return (step_id + 1) * (num_layers + 1)


def refuse(handoff: KVHandoff, *, fingerprint: bytes, layout: KVLayout, token_ids: array[int]) -> Refusal | None:
    """Why `handoff` must not be read into a pool of `layout` for a sequence of `token_ids`; None when it may.

    The fingerprint comes first: of another model's KV not even the shape means anything.
    """
    if handoff.fingerprint != fingerprint:
        detail = f"offered by a model with fingerprint {handoff.fingerprint.hex()}, this worker's is {fingerprint.hex()}"
        return Refusal(error=TransferError.REFUSED, detail=detail)
    try:
        check_compatible(layout, [shard.layout for shard in handoff.shards])
    except LayoutMismatch as mismatch:
        return Refusal(error=TransferError.REFUSED, detail=str(mismatch))
    if handoff.token_ids != token_ids:
        detail = f"KV of {len(handoff.token_ids)} tokens is offered for a sequence of {len(token_ids)}, or the tokens differ"
        return Refusal(error=TransferError.REFUSED, detail=detail)
    if not handoff.is_complete and not all(shard.layer_clock for shard in handoff.shards):
        detail = f"{handoff.layer_watermark} of {layout.num_layers} layers are ready, and nothing says when the others will be"
        return Refusal(error=TransferError.TRUNCATED, detail=detail)
    for shard in handoff.shards:
        num_blocks = -(-len(token_ids) // shard.layout.block_size_tokens)
        if len(shard.block_ids) != num_blocks or len(shard.generations) != num_blocks:
            detail = f"{len(shard.block_ids)} blocks with {len(shard.generations)} generations are offered, the tokens need {num_blocks}"
            return Refusal(error=TransferError.TRUNCATED, detail=detail)
    return None
