"""The interface of a placement policy: what it sees, what it answers, what it is told.

A policy prices workers in seconds of work; the lowest price wins, exact ties go to the worker chosen least recently. `score` is pure:
it may read the policy's state and must not change it, so that it can be asked twice, replayed and explained. State changes in
`observe` only. The live router and the simulator load the same object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from protocol.messages import Place
from protocol.request import AttemptKey
from protocol.worker import KvEvent, Role, WorkerId
from router.cost_model import StepCost

POLICY_API = 1


class Pool(Enum):
    """What a worker is being chosen for."""

    PREFILL = "prefill"  # to compute the prompt and hand it off
    DECODE = "decode"  # to take the hand-off and decode
    WHOLE = "whole"  # to compute the prompt and decode


Terms = tuple[tuple[str, float], ...]
Parts = tuple[tuple[str, ...], tuple[float, ...]]  # the same in two columns


class Cost(NamedTuple):
    """Price of placing the request on one worker; `terms` are its parts by name and add up to `seconds`."""

    seconds: float
    terms: Terms


class WorkerView(Protocol):
    """A worker as a policy may read it, true at the moment of the choice. Loads include what was booked and no snapshot shows yet."""

    @property
    def worker_id(self) -> WorkerId: ...
    @property
    def epoch(self) -> int: ...
    @property
    def role(self) -> Role: ...
    @property
    def cost(self) -> StepCost:
        """Seconds of work on this worker, leaning high."""
        ...

    @property
    def last_chosen(self) -> int:
        """Number of the choice that chose it last; 0: never."""
        ...

    @property
    def hit_rate(self) -> float:
        """Running share of prompt tokens found cached here."""
        ...

    @property
    def queued_prefill_tokens(self) -> int:
        """Prompt tokens given to this worker and not computed yet."""
        ...

    @property
    def queued_prefill_s(self) -> float:
        """Seconds until a prompt given to this worker now would start."""
        ...

    @property
    def num_prefills(self) -> int:
        """Prompts given to this worker by this router and not computed yet."""
        ...

    @property
    def num_sequences(self) -> int:
        """Sequences that decode here, wait here, or will come here."""
        ...

    @property
    def kv_tokens(self) -> int:
        """KV tokens held for sequences, or that will be at the expected end of what was booked."""
        ...

    @property
    def kv_capacity_tokens(self) -> int: ...
    @property
    def free_kv_tokens(self) -> int:
        """In blocks nobody holds."""
        ...

    @property
    def reclaimable_kv_tokens(self) -> int:
        """In blocks only the prefix cache holds."""
        ...

    def signal_age_s(self, now: float) -> float:
        """Age of the worker's last word. Beyond `snapshot_stale_s` the loads are the router's own bookings."""
        ...


class Pull(NamedTuple):
    """A prefix that can be brought to a worker from another, more cheaply than computing it there."""

    source: WorkerId
    num_tokens: int  # leading tokens of the prompt the source holds
    pulled_tokens: int  # those of them that the worker lacks
    pull_s: float
    compute_s: float  # of the pulled tokens; more than pull_s


class PlacementView(NamedTuple):
    """The fleet at the moment of one choice: the candidates, all with room, and what each has cached of this prompt."""

    pool: Pool
    workers: Sequence[WorkerView]
    cached_tokens: Mapping[WorkerId, int]  # leading tokens, all tiers; a worker with none is left out
    device_tokens: Mapping[WorkerId, int]  # the part of them in device memory
    predicted_output_tokens: int  # of one choice
    kv_tokens: int  # of the request at its expected end, all choices over one prompt
    decode_worker: WorkerId | None  # chosen already, when pool is PREFILL
    transfer_s: float  # to move the prompt's missing KV to that worker; nothing when it is the same
    pulls: Mapping[WorkerId, Pull] = MappingProxyType({})  # of workers for which one is worth it; none when pool is DECODE
    loads_s: Mapping[WorkerId, float] = MappingProxyType({})  # to bring cached tokens from host memory; those with none are left out
    regret_share: float = 0.0  # of the blocks that caches pushed out, those that were asked for again: what a displaced one is worth


# --- what a policy is told --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Booked:
    """A request was placed. Comes for every assignment, also those another policy made."""

    request: Place
    prefill_worker: WorkerId
    decode_worker: WorkerId
    cached_tokens: int
    confirmed_tokens: int = 0  # of them, those the worker itself has told of; the rest is being computed for somebody before
    pulled_tokens: int = 0  # come to the prefill worker from another, beyond what it has cached
    prefill_cost: StepCost = field(default_factory=StepCost)  # seconds of work on the prefill worker at the moment of the choice
    decode_cost: StepCost = field(default_factory=StepCost)


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstToken:
    key: AttemptKey
    since_booked_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """Another worker is to decode what was Booked."""

    key: AttemptKey
    decode_worker: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Comes once for every Booked."""

    key: AttemptKey
    num_output_tokens: int | None  # None: nobody said; its gateway or its workers were lost, or it was given up


@dataclass(frozen=True, slots=True, kw_only=True)
class KvChanged:
    """KV events of one worker, in order, each once."""

    worker_id: WorkerId
    events: tuple[KvEvent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerJoined:
    worker_id: WorkerId
    role: Role
    model_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLeft:
    worker_id: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed; at least every 50 ms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOverran:
    """A call of the policy took longer than `limit_s`; least_work decides for a while."""

    duration_s: float
    limit_s: float
    pool: Pool = Pool.PREFILL  # DECODE: it is the decode pool's own policy


PolicyEvent = Booked | FirstToken | Moved | Finished | KvChanged | WorkerJoined | WorkerLeft | Tick | PolicyOverran


# --- what a policy may ask for ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicate:
    """Send the next request whose chain holds `block_hash` to `worker_id` for prefill: that copies its prefix there by recomputing.

    Dropped after `within_s` without such a request, or when the worker leaves.
    """

    block_hash: bytes
    worker_id: WorkerId
    within_s: float


PolicyCommand = Replicate


class PlacementPolicy(Protocol):
    """One way to place, made by a `PolicyClass`."""

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        """A finite price for workers of the view; one left out is not taken. Changes nothing but `rng`."""
        ...

    def observe(self, event: PolicyEvent, now: float) -> None: ...

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        """Asked after each Tick."""
        ...

    def snapshot(self) -> bytes:
        """The policy's own state, for `restore`."""
        ...

    def restore(self, state: bytes) -> None: ...


class PoolPrices(Protocol):
    """Prices of all workers of a view; their parts are made only of those that are asked for."""

    @property
    def seconds(self) -> Sequence[float]:
        """Of each of `view.workers`, in their order."""
        ...

    def parts(self, index: int) -> Parts:
        """Of the worker at `index`: names, and seconds that add up to its price. Asked before the view changes."""
        ...


@runtime_checkable
class PoolPolicy(Protocol):
    """What a policy may offer beside `score`, and is asked instead where it does: the same prices with less made of each."""

    def price_pool(self, view: PlacementView, request: Place, now: float, rng: Random) -> PoolPrices: ...


# The class of a policy. Its attribute `Config` is a frozen dataclass whose fields are its parameters, in files and on the command line.
PolicyClass = Callable[[Any], PlacementPolicy]


class Stateless:
    """The half of a policy that has nothing to remember and nothing to command."""

    def observe(self, event: PolicyEvent, now: float) -> None:
        """Nothing to learn."""

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return ()

    def snapshot(self) -> bytes:
        return b""

    def restore(self, state: bytes) -> None:
        assert not state, "state of another policy"
