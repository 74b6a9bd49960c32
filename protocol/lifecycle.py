"""The three small state machines as tables; `advance` is the only way to move in them.

Metrics, retries, the simulator's checkers and the docs all read these tables. Who moves what:

    Attempt    one try of a request           gateway/session.py
    Handoff    one agreement over KV blocks   kvtransfer/handoff.py, on both sides
    Sequence   one choice on one worker       engine/core/worker_core.py; never leaves the worker
"""

from __future__ import annotations

from enum import Enum
from typing import TypeVar

from protocol.errors import IllegalMove


class AttemptState(Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    WAITING_KV = "waiting_kv"
    DECODING = "decoding"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"  # its worker went away; the session starts a new attempt
    REJECTED = "rejected"


class HandoffState(Enum):
    OFFERED = "offered"
    RESERVED = "reserved"
    PULLING = "pulling"
    VERIFIED = "verified"
    ACKED = "acked"
    RELEASED = "released"
    FAILED = "failed"
    EXPIRED = "expired"


class SequenceState(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    DONE = "done"


_A, _H, _S = AttemptState, HandoffState, SequenceState

_ATTEMPT_ENDS = (_A.CANCELLED, _A.FAILED, _A.LOST)

# QUEUED ─► PREFILLING ─► WAITING_KV ─► DECODING ─► FINISHED
#               │  ▲───────────┘ (transfer failed: recompute on the decode worker)
#               └──────────────────────► DECODING (same worker) and FINISHED (one token, EOS)
ATTEMPT_MOVES: dict[AttemptState, tuple[AttemptState, ...]] = {
    _A.QUEUED: (_A.PREFILLING, _A.REJECTED, *_ATTEMPT_ENDS),
    _A.PREFILLING: (_A.WAITING_KV, _A.DECODING, _A.FINISHED, *_ATTEMPT_ENDS),
    _A.WAITING_KV: (_A.DECODING, _A.PREFILLING, _A.FINISHED, *_ATTEMPT_ENDS),
    _A.DECODING: (_A.DECODING, _A.FINISHED, *_ATTEMPT_ENDS),
    _A.FINISHED: (),
    _A.CANCELLED: (),
    _A.FAILED: (),
    _A.LOST: (),
    _A.REJECTED: (),
}

_HANDOFF_ENDS = (_H.FAILED, _H.EXPIRED)

# OFFERED ─► RESERVED ─► PULLING ─► VERIFIED ─► ACKED ─► RELEASED
HANDOFF_MOVES: dict[HandoffState, tuple[HandoffState, ...]] = {
    _H.OFFERED: (_H.RESERVED, *_HANDOFF_ENDS),
    _H.RESERVED: (_H.PULLING, *_HANDOFF_ENDS),
    _H.PULLING: (_H.VERIFIED, _H.RESERVED, *_HANDOFF_ENDS),  # RESERVED: it broke off and is pulled once more
    _H.VERIFIED: (_H.ACKED, *_HANDOFF_ENDS),
    _H.ACKED: (_H.RELEASED, *_HANDOFF_ENDS),
    _H.RELEASED: (),
    _H.FAILED: (),
    _H.EXPIRED: (),
}

# WAITING ⇄ RUNNING ─► PREEMPTED ─► WAITING; any ─► DONE
SEQUENCE_MOVES: dict[SequenceState, tuple[SequenceState, ...]] = {
    _S.WAITING: (_S.RUNNING, _S.DONE),
    _S.RUNNING: (_S.WAITING, _S.PREEMPTED, _S.DONE),
    _S.PREEMPTED: (_S.WAITING, _S.DONE),
    _S.DONE: (),
}

State = TypeVar("State", AttemptState, HandoffState, SequenceState)


def advance(state: State, to: State) -> State:
    """Return `to` when the table allows the move; raise IllegalMove otherwise."""
    allowed: tuple[Enum, ...]
    if isinstance(state, AttemptState):
        allowed = ATTEMPT_MOVES[state]
    elif isinstance(state, HandoffState):
        allowed = HANDOFF_MOVES[state]
    else:
        allowed = SEQUENCE_MOVES[state]
    if to not in allowed:
        names = ", ".join(s.name for s in allowed) or "nothing: it is final"
        raise IllegalMove(f"{type(state).__name__} {state.name} -> {to.name}; allowed: {names}")
    return to


def is_final(state: AttemptState | HandoffState | SequenceState) -> bool:
    """True when no move leads out of `state`."""
    if isinstance(state, AttemptState):
        return not ATTEMPT_MOVES[state]
    if isinstance(state, HandoffState):
        return not HANDOFF_MOVES[state]
    return not SEQUENCE_MOVES[state]
