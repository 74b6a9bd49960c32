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
class Tick:
    """Time passed. At least every 50 ms."""


Event = FromGateway | GatewayUp | GatewayDown | MembershipChanged | WorkerUp | WorkerDown | FromWorker | Tick | PolicyOverran

# --- commands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ToGateway:
    gateway: str
    message: PlaceAck | Assigned | Reassigned | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class ToWorker:
    worker_id: WorkerId
    message: Subscribe


Command = ToGateway | ToWorker
