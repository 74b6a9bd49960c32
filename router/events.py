"""What happens to the router core, and what it asks its driver to do.

`RouterCore.on(event, now) -> list[Command]`. The same events and commands cross the live driver (service.py) and the simulator.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.messages import (
    Assigned,
    Done,
    KvEvents,
    KvSnapshot,
    Membership,
    Place,
    PlaceAck,
    PrefillDone,
    Reassigned,
    Refused,
    SnapshotFrame,
    Subscribe,
)
from protocol.peering import AskBookings, BookingNews, BookingSet, RouterReadiness
from protocol.worker import WorkerId
from router.policies.api import PolicyOverran

# --- events -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class FromGateway:
    gateway: str
    message: Place | PrefillDone | Done


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayUp:
    """Its connection is open. Another epoch is another process, which knows nothing of the bookings of the one before."""

    gateway: str
    epoch: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayDown:
    """Its queued requests are dropped now; its bookings end after the grace the workers give it too."""

    gateway: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipChanged:
    membership: Membership


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerUp:
    """The link to a worker of the membership is open."""

    worker_id: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDown:
    worker_id: WorkerId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FromWorker:
    worker_id: WorkerId
    epoch: int
    message: SnapshotFrame | KvEvents | KvSnapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerUp:
    """The link over which another router tells us its bookings is open."""

    peer: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerDown:
    peer: str
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FromPeer:
    """AskBookings came over the link the peer opened to hear us, the others over the one we opened to hear it."""

    peer: str
    epoch: int
    message: AskBookings | BookingSet | BookingNews


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerHungUp:
    """The peer does not hear us any more."""

    peer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDue:
    """The time of a `BatchBegun` is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time passed. At least every 50 ms."""


FromNetwork = FromGateway | GatewayUp | GatewayDown | MembershipChanged | WorkerUp | WorkerDown | FromWorker
FromRouters = PeerUp | PeerDown | FromPeer | PeerHungUp | BatchDue
Event = FromNetwork | FromRouters | Tick | PolicyOverran

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToGateway:
    gateway: str
    message: PlaceAck | Assigned | Reassigned | Refused | RouterReadiness


@dataclass(frozen=True, slots=True, kw_only=True)
class ToWorker:
    worker_id: WorkerId
    message: Subscribe


@dataclass(frozen=True, slots=True, kw_only=True)
class ToPeers:
    """AskBookings goes over the links we opened, the others over those that the peers opened to hear us."""

    peers: tuple[str, ...]
    message: AskBookings | BookingSet | BookingNews


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchBegun:
    """Something is to be told to peers: come back with a BatchDue within this time."""

    within_s: float


Command = ToGateway | ToWorker | ToPeers | BatchBegun
