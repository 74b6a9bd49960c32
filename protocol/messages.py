"""Every frame our sockets carry, by who says it to whom (what routers say of themselves: protocol/peering.py).

    gateway -> worker      Submit, Cancel
    worker  -> gateway     StepOutput (one a step), Offered, HandoffDone, TransferFailed, AttemptFailed, SnapshotFrame
    gateway -> router      Place, PrefillDone, Done, ExplainRequest
    router  -> gateway     PlaceAck, Assigned, Reassigned, Refused
    worker  -> router      SnapshotFrame, KvEvents, KvSnapshot        (gateway and router dial and send Subscribe)
    anyone  -> directory   Register, RegisterService, Watch
    directory -> watcher   Membership
    worker  -> worker      Pull, PullTrailer, AckHandoff, RenewLease, DropHandoff,
                           RequestPrefix, PrefixOffered, PrefixRefused              (protocol.kv_messages)
    anyone  -> anyone      Ping, Pong, StatusRequest, StatusReply
    operator -> router     UsePolicy      (protocol.control; answered with PolicyInUse)
    operator -> worker     ResetCache     (answered with CacheReset)

Facts about an attempt are fenced by (request_id, attempt); facts about a worker by its epoch.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from protocol.control import CacheReset, PolicyInUse, ResetCache, UsePolicy
from protocol.kv import HandoffCompletion, KVHandoff, KVPeer
from protocol.kv_messages import (
    AckHandoff,
    DropHandoff,
    PrefixOffered,
    PrefixRefused,
    Pull,
    PullTrailer,
    RenewLease,
    RequestPrefix,
)
from protocol.lifecycle import AttemptState
from protocol.request import Attempt, FinishReason
from protocol.worker import KvEvent, WorkerAddress, WorkerSnapshot

# --- gateway -> worker ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixPull:
    """Another worker is believed to hold the KV of the first `num_tokens` tokens: pulling it is cheaper than computing it."""

    peer: KVPeer
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Compute this attempt here.

    prefill_only: stop after sampling the next token of each live choice, keep the blocks and offer them.
    handoff: the KV is offered by another worker: pull it instead of computing it; recompute here if that fails.
    Neither: compute the prompt and decode here.
    prefix_pull: where more of the prompt can be had than lies here; a hint, without `handoff` only.
    """

    attempt: Attempt
    prefill_only: bool
    handoff: KVHandoff | None
    prefix_pull: PrefixPull | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    request_id: str
    attempt: int


# --- worker -> gateway ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprobs:
    """Of one token: its own logprob and the k most likely, most likely first."""

    logprob: float
    rank: int  # 1 is the most likely
    top_token_ids: array[int]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRun:
    """Tokens of one choice from one step. `position` is the output position of the first, from the original boundary."""

    request_id: str
    attempt: int
    choice: int
    position: int
    token_ids: array[int]
    logprobs: tuple[TokenLogprobs, ...]  # empty, or one a token
    finish_reason: FinishReason | None  # of the choice, after these tokens
    num_cached_tokens: int = 0  # of the prompt, told with position == first of the attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenColumns:
    """One more token of each of many choices and nothing else to tell of it, column by column: what a decode step mostly makes."""

    request_ids: tuple[str, ...]
    attempts: array[int]
    choices: array[int]
    positions: array[int]
    token_ids: array[int]

    def __post_init__(self) -> None:
        assert len(self.request_ids) == len(self.attempts) == len(self.choices) == len(self.positions) == len(self.token_ids), (
            "columns of one length"
        )

    def __len__(self) -> int:
        return len(self.request_ids)

    def __iter__(self) -> Iterator[TokenRun]:
        for index, request_id in enumerate(self.request_ids):
            yield TokenRun(
                request_id=request_id,
                attempt=self.attempts[index],
                choice=self.choices[index],
                position=self.positions[index],
                token_ids=self.token_ids[index : index + 1],
                logprobs=(),
                finish_reason=None,
            )


NO_TOKENS = TokenColumns(request_ids=(), attempts=array("I"), choices=array("I"), positions=array("I"), token_ids=array("I"))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """Everything one step made for one gateway: one framed message per worker and step. A choice is named once."""

    worker_id: str
    epoch: int
    step: int
    runs: tuple[TokenRun, ...]  # of choices with more to tell: an end, logprobs, several tokens, a prompt just computed
    tokens: TokenColumns = NO_TOKENS  # of all others

    def each(self) -> Iterator[TokenRun]:
        """All of it as runs."""
        yield from self.tokens
        yield from self.runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """Here is the KV. Prefill is done (its tokens were in the StepOutput before), or in its last step: then OfferCompleted follows."""

    handoff: KVHandoff


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferCompleted:
    """An offer that was made early is complete. From its source to the gateway, and on to the target that has the offer."""

    request_id: str
    attempt: int
    completion: HandoffCompletion


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffDone:
    """The target verified the KV and decodes from it."""

    request_id: str
    attempt: int
    size_bytes: int
    duration_s: float
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferFailed:
    """The target could not take the KV and recomputes it: WAITING_KV -> PREFILLING on the decode worker."""

    request_id: str
    attempt: int
    error: str  # protocol.kv.TransferError value
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptFailed:
    """This worker gives the attempt up. `retryable`: another worker may do better."""

    request_id: str
    attempt: int
    reason: str
    retryable: bool


# --- worker -> gateway and router -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotFrame:
    snapshot: WorkerSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Subscribe:
    """Send me snapshots, and KV events from `next_event_number` on (a KvSnapshot first when that is not kept any more)."""

    snapshots: bool
    kv_events: bool
    next_event_number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvEvents:
    worker_id: str
    epoch: int
    events: tuple[KvEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSnapshot:
    """All hash blocks that can be hit on this worker right now; events go on with `next_event_number`."""

    worker_id: str
    epoch: int
    next_event_number: int
    hashes: tuple[bytes, ...]
    parents: tuple[bytes, ...]  # parent of each hash
    host_hashes: tuple[bytes, ...] = ()  # of the host tier, in any order


# --- gateway <-> router -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Find workers for an attempt. Hashes and counts only: the router never sees token ids."""

    request_id: str
    attempt: int
    model_id: str
    num_tokens: int  # prompt + delivered of the longest choice
    expected_output_tokens: int  # what is left of max_tokens, at most
    num_choices: int
    block_hashes: tuple[bytes, ...]
    tenant: str
    priority: int
    slo_ttft_s: float | None
    slo_tpot_s: float | None
    excluded: tuple[str, ...]  # workers that already failed this request
    local_only: bool  # prefill must run where it decodes (several choices that already differ)
    session: str = ""  # the same for requests of one conversation, never the same for two tenants; "": the client did not say
    known_as: tuple[str, ...] = ()  # other names its client may ask for it by; for explaining only


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceAck:
    """The router holds the request now; an Assigned or Refused follows."""

    request_id: str
    attempt: int
    queue_position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateScore:
    """One worker as the policy saw it; `terms` are seconds by name, in the order the policy lists them."""

    worker_id: str
    seconds: float
    cached_tokens: int
    signal_age_s: float
    term_names: tuple[str, ...]
    term_seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSource:
    """Who the prefill worker pulls a prefix from, and what was expected of it."""

    worker_id: str
    num_tokens: int  # leading tokens of the prompt it holds
    pull_s: float  # to bring over those that the prefill worker lacks
    compute_s: float  # to compute the same tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Where an attempt runs and why. prefill_worker == decode_worker: prefilled where it decodes."""

    request_id: str
    attempt: int
    prefill_worker: str
    decode_worker: str
    cached_tokens: int  # expected on the prefill worker
    policy: str
    reason: str
    waited_s: float
    prefix_source: PrefixSource | None = None  # None: the prefill worker computes what it lacks
    confirmed_tokens: int = 0  # of cached_tokens: those the worker itself has told of; the rest is expected from bookings
    predicted_ttft_s: float | None = None  # waited_s and what prefill was believed to take; None: whoever placed it predicts nothing
    predicted_handoff_s: float = 0.0  # comes after the first token, which the prefill worker sends itself
    # Best first, at most 8. An answer does not wait for them: whoever placed the attempt writes them down afterwards, to explain it.
    prefill_scores: tuple[CandidateScore, ...] = ()
    decode_scores: tuple[CandidateScore, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Assigned:
    assignment: Assignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Reassigned:
    """Another worker is to decode an attempt whose prompt is still being computed. Too late once its Submit to the first one is out."""

    request_id: str
    attempt: int
    decode_worker: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """No place: `status` is the HTTP status to answer with."""

    request_id: str
    attempt: int
    status: int
    message: str
    retry_after_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDone:
    """The first token was delivered: prefill's booking ends, decode's begins to grow."""

    request_id: str
    attempt: int
    num_cached_tokens: int | None = None  # as its worker found them; None: not placed by the router, so no answer to what it expected
    decode_worker: str | None = None  # who decodes, after any Reassigned; None: as it was assigned


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The attempt ended: free its bookings and correct what its tenant was charged; the rest is for explaining."""

    request_id: str
    attempt: int
    num_output_tokens: int  # that it added to its longest choice
    state: AttemptState = AttemptState.FINISHED
    handoff: HandoffDone | None = None
    transfer_error: str = ""  # why the decode worker had to compute the prompt itself


# --- directory --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Register:
    address: WorkerAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Send me the membership now and whenever it changes."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceAddress:
    """A service that is not a worker: the router (role "router") or a gateway replica (role "gateway")."""

    name: str
    kind: str  # "router" | "gateway"
    epoch: int
    host: str
    port: int
    pid: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterService:
    service: ServiceAddress


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """Who is in the cluster. A cached copy keeps everybody going while the directory is away."""

    version: int
    workers: tuple[WorkerAddress, ...]
    services: tuple[ServiceAddress, ...]


# --- both ways --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    nonce: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusRequest:
    """Ask a router or directory for its live state as one JSON document (for `baton status`)."""

    reply_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReply:
    reply_id: int
    json: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRequest:
    """Ask a router what it remembers of a request, by its id or another name it is known as; answered with a StatusReply."""

    reply_id: int
    name: str
    tenant: str | None  # whose requests may be told of; None: everybody's


MESSAGES: tuple[type, ...] = (
    Submit, Cancel, StepOutput, Offered, OfferCompleted, HandoffDone, TransferFailed, AttemptFailed,
    SnapshotFrame, Subscribe, KvEvents, KvSnapshot,
    Place, PlaceAck, Assigned, Reassigned, Refused, PrefillDone, Done,
    Register, RegisterService, Watch, Membership,
    Ping, Pong, StatusRequest, StatusReply, ExplainRequest,
    RenewLease, AckHandoff, DropHandoff, Pull, PullTrailer,
    RequestPrefix, PrefixOffered, PrefixRefused,
    UsePolicy, PolicyInUse, ResetCache, CacheReset,
)  # fmt: skip
