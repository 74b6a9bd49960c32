"""What happens to a request at the gateway, and what its session asks the driver to do.

`Session.on(event, now) -> list[Command]`. A driver performs the commands in order; it never decides. Facts of workers and
router are the wire's own records (protocol.messages), with the name of who said it where the record has none.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from protocol.errors import BatonError
from protocol.lifecycle import AttemptState
from protocol.messages import (
    Assigned,
    Assignment,
    AttemptFailed,
    Cancel,
    Done,
    HandoffDone,
    OfferCompleted,
    Offered,
    Place,
    PlaceAck,
    PrefillDone,
    PrefixSource,
    Reassigned,
    Refused,
    Submit,
    TokenLogprobs,
    TokenRun,
    TransferFailed,
)
from protocol.request import FinishReason

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """The request was accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSaid:
    """A fact about an attempt, as the worker told it."""

    worker_id: str
    fact: TokenRun | Offered | OfferCompleted | HandoffDone | TransferFailed | AttemptFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLost:
    """The worker's socket ended, or it could not be reached when it was needed."""

    worker_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterAway:
    """There is no connection to a router right now: what was asked of it must go on without."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterLost:
    """The connection to the router ended, and with it the router's queue; it may be back in a moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterUp:
    """A router can be asked again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoPlace:
    """PlaceWithoutRouter found no worker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceStopped:
    """A stop string ended this choice; `num_tokens` of its output count (the one that completed the string is the last)."""

    choice: int
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientGone:
    """Nobody reads the answer any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """The driver ends the request with this error (drain deadline, client too slow)."""

    error: BatonError


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed; due when `Session.wake_s` is."""


Event = (
    Start
    | PlaceAck
    | Assigned
    | Reassigned
    | Refused
    | NoPlace
    | RouterAway
    | RouterLost
    | RouterUp
    | WorkerSaid
    | WorkerLost
    | ChoiceStopped
    | ClientGone
    | Abort
    | Tick
)

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SendPlace:
    """Ask the router. With no connection to one, answer with RouterAway."""

    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceWithoutRouter:
    """Choose by least_work over the last snapshots; answer with Assigned or NoPlace. Counted as a fallback."""

    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class TellRouter:
    message: PrefillDone | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitTo:
    """Send to the worker; answer with WorkerLost when it cannot be reached.

    prefix_source: another worker holds more of the prompt; the driver, who knows addresses, tells the worker where.
    """

    worker_id: str
    submit: Submit
    prefix_source: PrefixSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteAt:
    """Send on to the worker that has the early offer."""

    worker_id: str
    completed: OfferCompleted


@dataclass(frozen=True, slots=True, kw_only=True)
class CancelAt:
    worker_id: str
    cancel: Cancel


@dataclass(frozen=True, slots=True, kw_only=True)
class Deliver:
    """The next tokens of a choice: in order, without gap, each position once."""

    choice: int
    position: int
    token_ids: array[int]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptEnded:
    """For the log and the metrics: attempt `number` left state `during` for the final `state`."""

    number: int
    during: AttemptState
    state: AttemptState
    reason: str
    assignment: Assignment | None = None  # None: it never found a place
    found_tokens: int | None = None  # cached, as its worker said
    handoff: HandoffDone | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """Every choice is complete: the one good end of a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fail:
    """The request ends with this error."""

    error: BatonError


@dataclass(frozen=True, slots=True, kw_only=True)
class Abandon:
    """The client went away; the request ends without an answer."""


End = Finish | Fail | Abandon
Command = SendPlace | PlaceWithoutRouter | TellRouter | SubmitTo | CompleteAt | CancelAt | Deliver | AttemptEnded | End
