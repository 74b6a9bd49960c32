"""What stands around the cores of workers and router in the simulator, as cluster/worker_host.py and router/service.py do live: who is
connected, who wants to be told what, and what is sent when. No decision is made here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from engine.core.events import (
    CancelReceived,
    Command,
    Event,
    GatewayLost,
    OfferCompletedReceived,
    PublishKvEvents,
    StepDone,
    SubmitReceived,
)
from protocol.links import Link, Target
from protocol.messages import (
    Cancel,
    Done,
    KvEvents,
    KvSnapshot,
    Membership,
    OfferCompleted,
    Ping,
    Place,
    Pong,
    PrefillDone,
    SnapshotFrame,
    Submit,
    Subscribe,
)
from protocol.wire import Identity
from protocol.worker import KvEvent, WorkerAddress
from router.core import RouterCore
from router.events import Event as RouterEvent
from router.events import (
    FromGateway,
    FromWorker,
    GatewayDown,
    GatewayUp,
    MembershipChanged,
    Tick,
    ToGateway,
    ToWorker,
    WorkerDown,
    WorkerUp,
)
from simulator.estimate_error import ReportedTimes
from simulator.loop import Timer, VirtualLoop
from simulator.sim_network import SimConnection, SimNetwork
from simulator.sim_worker import SimWorker

SNAPSHOT_S, SNAPSHOT_IDLE_S = 0.05, 0.5  # as cluster/worker_host.py sends them
GATEWAY_GRACE_S = 2.0
MAX_KEPT_KV_EVENTS = 8192


class SimWorkerProcess:
    """A worker's sockets. Give `send` to its SimWorker, then call `start`.

    reported: what it says of its times. tells_gateways: of every snapshot, which they need for nothing while a router answers; else of the
    first alone.
    """

    def __init__(
        self,
        loop: VirtualLoop,
        network: SimNetwork,
        address: WorkerAddress,
        *,
        reported: ReportedTimes,
        tells_gateways: bool = False,
        max_kept_kv_events: int = MAX_KEPT_KV_EVENTS,
    ) -> None:
        self.address = address
        self.identity = Identity(name=address.worker_id, kind="worker", epoch=address.epoch)
        self.worker: SimWorker
        self.after_turn: Callable[[Event, Sequence[Command]], None] | None = None  # checkers look here
        self.carry_kv_events: Callable[[SimConnection, KvEvents], None] = SimConnection.send
        self._loop = loop
        self._network = network
        self._reported = reported
        self._tells_gateways = tells_gateways
        self._gateways: dict[str, SimConnection | None] = {}  # None: it is away
        self._given_up: dict[str, Timer] = {}  # gateways that are away: when their requests end
        self._subscribers: dict[SimConnection, Subscribe] = {}
        self._kept: deque[KvEvent] = deque(maxlen=max_kept_kv_events)
        self._snapshot_s = -SNAPSHOT_IDLE_S

    def start(self, worker: SimWorker) -> None:
        self.worker = worker
        worker.after_turn = self._look
        self._network.listen(self.identity, self._accept)

    def kill(self) -> None:
        """As by kill -9."""
        self.worker.kill()
        self._network.kill(self.identity)

    def send(self, gateway: str, message: object) -> None:
        """Dropped while it is away: it takes the end of its socket for our loss."""
        connection = self._gateways.get(gateway)
        if connection is not None:
            connection.send(message)

    def report(self, interval_s: float) -> None:
        """A snapshot, unless there was one in this time."""
        now = self._loop.now
        if now - self._snapshot_s < interval_s or not self.worker.is_running:
            return
        self._snapshot_s = now
        frame: SnapshotFrame | None = None
        for connection, wants in self._subscribers.items():
            if wants.snapshots and (self._tells_gateways or connection.peer.kind != "gateway"):
                frame = frame or SnapshotFrame(snapshot=self._reported.told(self.worker.snapshot()))
                connection.send(frame)

    def _look(self, event: Event, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, PublishKvEvents):
                self._publish(command.events)
        if isinstance(event, StepDone):
            self.report(SNAPSHOT_S)
        if self.after_turn is not None:
            self.after_turn(event, commands)

    def _publish(self, events: tuple[KvEvent, ...]) -> None:
        self._kept.extend(events)
        frame = KvEvents(worker_id=self.address.worker_id, epoch=self.address.epoch, events=events)
        for connection, wants in self._subscribers.items():
            if wants.kv_events:
                self.carry_kv_events(connection, frame)

    # --- connections ---

    def _accept(self, connection: SimConnection) -> None:
        connection.on_message = self._receive
        connection.on_close = self._closed
        name = connection.peer.name
        if connection.peer.kind != "gateway":
            return
        if name in self._gateways:  # it started new attempts when the old one ended: what it had here is orphaned
            known, timer = self._gateways[name], self._given_up.pop(name, None)
            if timer is not None:
                timer.cancel()
            if known is not None:
                known.abort()
            self.worker.take(GatewayLost(gateway=name))
        self._gateways[name] = connection

    def _closed(self, connection: SimConnection) -> None:
        self._subscribers.pop(connection, None)
        name = connection.peer.name
        if self._gateways.get(name) is connection:
            self._gateways[name] = None
            self._given_up[name] = self._loop.call_later(GATEWAY_GRACE_S, lambda: self._give_up(name))

    def _give_up(self, gateway: str) -> None:
        del self._gateways[gateway], self._given_up[gateway]
        self.worker.take(GatewayLost(gateway=gateway))

    def _receive(self, connection: SimConnection, message: object) -> None:
        if isinstance(message, Submit):
            self.worker.take(SubmitReceived(gateway=connection.peer.name, submit=message))
        elif isinstance(message, Cancel):
            self.worker.take(CancelReceived(request_id=message.request_id, attempt=message.attempt))
        elif isinstance(message, OfferCompleted):
            self.worker.take(OfferCompletedReceived(completed=message))
        elif isinstance(message, Subscribe):
            self._subscribe(connection, message)

    def _subscribe(self, connection: SimConnection, wants: Subscribe) -> None:
        """Snapshots from now on; KV events from the number asked for, or all blocks when those events are not kept any more."""
        if wants.kv_events:
            events = tuple(event for event in self._kept if event.number >= wants.next_event_number)
            if self._kept and wants.next_event_number >= self._kept[0].number:
                if events:
                    connection.send(KvEvents(worker_id=self.address.worker_id, epoch=self.address.epoch, events=events))
            else:
                connection.send(self.worker.core.kv_snapshot())
        self._subscribers[connection] = wants
        if wants.snapshots:
            connection.send(SnapshotFrame(snapshot=self._reported.told(self.worker.snapshot())))


class SimRouterProcess:
    """A router's sockets. It is told of the time by `take(Tick())`."""

    def __init__(self, loop: VirtualLoop, network: SimNetwork, core: RouterCore, *, name: str = "router-0", epoch: int = 1) -> None:
        self.core = core
        self.identity = Identity(name=name, kind="router", epoch=epoch)
        self.is_alive = True
        self.is_stopped = False  # as by SIGSTOP: no time passes for it (hold its links as well)
        self._loop = loop
        self._network = network
        self._gateways: dict[str, SimConnection] = {}
        self._epochs: dict[str, int] = {}  # of the open links
        self._links = network.links(self.identity, b"", on_up=self._up, on_down=self._down, on_message=self._from_worker)
        network.listen(self.identity, self._accept)

    def kill(self) -> None:
        self.is_alive = False
        self._network.kill(self.identity)

    def follow(self, membership: Membership) -> None:
        if self.is_alive:
            self.take(MembershipChanged(membership=membership))
            self._links.set_targets([Target(name=w.worker_id, epoch=w.epoch, host=w.host, port=w.port) for w in membership.workers])

    def tick(self) -> None:
        if not self.is_stopped:
            self.take(Tick())

    def take(self, event: RouterEvent) -> None:
        """One turn. All that one gateway is told goes out together."""
        if not self.is_alive:
            return
        told: dict[str, list[object]] = {}
        for command in self.core.on(event, self._loop.now):
            if isinstance(command, ToGateway):
                told.setdefault(command.gateway, []).append(command.message)
            else:
                assert isinstance(command, ToWorker), "one router has no peers"
                self._links.send(command.worker_id, command.message)
        for gateway, messages in told.items():
            if gateway in self._gateways:
                self._gateways[gateway].send_all(messages)
        self.core.catch_up()

    # --- connections ---

    def _accept(self, connection: SimConnection) -> None:
        connection.on_message = self._from_gateway
        connection.on_close = self._gateway_closed
        name = connection.peer.name
        earlier = self._gateways.get(name)
        self._gateways[name] = connection
        if earlier is not None:
            earlier.abort()
        self.take(GatewayUp(gateway=name, epoch=connection.peer.epoch))

    def _gateway_closed(self, connection: SimConnection) -> None:
        name = connection.peer.name
        if self._gateways.get(name) is connection:
            del self._gateways[name]
            self.take(GatewayDown(gateway=name))

    def _from_gateway(self, connection: SimConnection, message: object) -> None:
        if isinstance(message, (Place, PrefillDone, Done)):
            self.take(FromGateway(gateway=connection.peer.name, message=message))
        elif isinstance(message, Ping):
            connection.send(Pong(nonce=message.nonce))

    def _up(self, worker_id: str, connection: Link) -> None:
        self._epochs[worker_id] = connection.peer.epoch
        self.take(WorkerUp(worker_id=worker_id, epoch=connection.peer.epoch))

    def _down(self, worker_id: str, epoch: int) -> None:
        if self._epochs.get(worker_id) == epoch:
            del self._epochs[worker_id]
        self.take(WorkerDown(worker_id=worker_id, epoch=epoch))

    def _from_worker(self, worker_id: str, message: object) -> None:
        epoch = self._epochs.get(worker_id)
        if epoch is not None and isinstance(message, (SnapshotFrame, KvEvents, KvSnapshot)):
            self.take(FromWorker(worker_id=worker_id, epoch=epoch, message=message))
