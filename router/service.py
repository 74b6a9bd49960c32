"""The router's process: sockets around the core, and no decision. Gateways dial it, it dials workers, other routers and the directory.

gateways ──Place, PrefillDone, Done──►│ RouterService ─on()─► core │──Assigned, Refused, RouterReadiness──► gateways
workers  ──snapshots, KV events──────►│                            │──Subscribe──────────► workers
routers  ──their bookings────────────►│                            │──AskBookings, our bookings──► routers
directory ──Membership───────────────►│                            │
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
from collections import deque
from dataclasses import asdict
from random import Random
from time import perf_counter
from typing import Any

from protocol.control import PolicyInUse, UsePolicy
from protocol.errors import ConfigError
from protocol.links import Links, MembershipWatch, Target
from protocol.messages import (
    Done,
    ExplainRequest,
    KvEvents,
    KvSnapshot,
    Membership,
    Ping,
    Place,
    Pong,
    PrefillDone,
    RegisterService,
    ServiceAddress,
    SnapshotFrame,
    StatusReply,
    StatusRequest,
)
from protocol.peering import AskBookings, BookingNews, BookingSet
from protocol.wire import Connection, Identity, Listener, encode
from protocol.worker import WorkerId
from router import explanations, policies
from router.config import RouterConfig
from router.core import RouterCore
from router.events import (
    BatchBegun,
    BatchDue,
    Event,
    FromGateway,
    FromPeer,
    FromWorker,
    GatewayDown,
    GatewayUp,
    MembershipChanged,
    PeerDown,
    PeerHungUp,
    PeerUp,
    Tick,
    ToGateway,
    ToPeers,
    ToWorker,
    WorkerDown,
    WorkerUp,
)
from router.policies.api import (
    Cost,
    PlacementPolicy,
    PlacementView,
    PolicyCommand,
    PolicyEvent,
    PolicyOverran,
    Pool,
    PoolPolicy,
    PoolPrices,
)
from router.recording import PolicySwitched, Recorder, Turn

log = logging.getLogger("baton.router")

TICK_S = 0.05
NUM_DECISIONS_TIMED = 1024


class RouterService:
    """One router on one event loop. `seed` decides ties; the same seed and events give the same assignments.

    notes: of whoever started it, told beside its own until the policy is switched.

    Raises (constructor):
        ConfigError: `config.policy` or `config.decode_policy` names no policy.
    """

    def __init__(
        self,
        config: RouterConfig,
        *,
        directory_host: str,
        directory_port: int,
        secret: bytes,
        epoch: int,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int = 0,
        notes: tuple[str, ...] = (),
        name: str = "router-0",
        recorder: Recorder | None = None,
    ) -> None:
        """name: unique among the routers of the directory. recorder: takes all that decides, if it is to be run again."""
        self._name = name
        self._timed = _timed(config.policy, config.decode_policy)
        self._core = RouterCore(
            config, policy=self._timed[Pool.PREFILL], decode_policy=self._timed.get(Pool.DECODE), rng=Random(seed), name=name
        )
        self._recorder = recorder
        self._limit_s = config.policy_time_limit_s
        self._is_behind = False  # the core has work that waits until the answers are out
        self._notes = list(notes)
        self._epoch = epoch
        self._bind = (host, port)
        identity = Identity(name=name, kind="router", epoch=epoch)
        self._listener = Listener(identity, secret, self._accept)
        self._directory = MembershipWatch(identity, secret, host=directory_host, port=directory_port, on_change=self._membership_changed)
        self._links = Links(identity, secret, on_up=self._worker_up, on_down=self._worker_down, on_message=self._receive_from_worker)
        self._routers = Links(identity, secret, on_up=self._peer_up, on_down=self._peer_down, on_message=self._receive_from_peer)
        self._listeners: dict[str, Connection] = {}  # routers that dialed us
        self._gateways: dict[str, Connection] = {}
        self._epochs: dict[WorkerId, int] = {}  # of the open links
        self._ticker: asyncio.Task[None] | None = None
        self._noted: list[str] = []
        self._decision_s: deque[float] = deque(maxlen=NUM_DECISIONS_TIMED)

    # --- life ---

    async def start(self) -> ServiceAddress:
        """Listen, register, follow the directory; returns the address that gateways dial."""
        host, port = self._bind
        await self._listener.start(host=host, port=port)
        address = ServiceAddress(
            name=self._name, kind="router", epoch=self._epoch, host=self._listener.host, port=self._listener.port, pid=os.getpid()
        )
        self._directory.register(RegisterService(service=address))
        self._directory.start()
        self._ticker = asyncio.create_task(self._tick())
        return address

    async def close(self) -> None:
        """Stop at once. Gateways place by themselves until another router answers."""
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        await self._directory.close()
        await self._links.close()
        await self._routers.close()
        self._listener.close()
        if self._recorder is not None:
            self._recorder.close()

    @property
    def port(self) -> int:
        return self._listener.port

    def status(self) -> dict[str, object]:
        """The core's document, and how long the latest turns with a Place took."""
        taken_s = sorted(self._decision_s)
        timing = {f"p{q}_s": round(taken_s[len(taken_s) * q // 100], 7) for q in (50, 99)} if taken_s else {}
        return self._core.status(self._now()) | {"decision_time": timing, "notes": self._all_notes()}

    def _all_notes(self) -> list[str]:
        notes = self._notes + self._core.notes(self._now())
        if self._recorder is not None and self._recorder.note is not None:
            notes.append(self._recorder.note)
        return notes

    # --- the turn: one event in, commands out ---

    def _turn(self, event: Event) -> None:
        now = self._now()
        self._run(event, now)
        for pool, policy in self._timed.items():
            slowest_s = policy.take_slowest_s()
            if slowest_s > self._limit_s:
                self._run(PolicyOverran(duration_s=slowest_s, limit_s=self._limit_s, pool=pool), now)
                policy.take_slowest_s()
        if not self._is_behind:
            self._is_behind = True
            asyncio.get_running_loop().call_soon(self._catch_up)

    def _catch_up(self) -> None:
        """In the loop's next round: uvloop sends what was written in this one at its end."""
        self._is_behind = False
        self._core.catch_up()
        if self._recorder is not None:
            self._recorder.settle()

    def _run(self, event: Event, now: float) -> None:
        frames: dict[str, list[bytes]] = {}  # by gateway: one write for all it is told, since a write costs more than what is in it
        commands = self._core.on(event, now)
        if self._recorder is not None:
            self._recorder.take(Turn(now=now, event=event, commands=tuple(commands)))
        for command in commands:
            if isinstance(command, ToGateway):
                if command.gateway in self._gateways:
                    frames.setdefault(command.gateway, []).append(encode(command.message))
            else:
                self._perform(command)
        for gateway, told in frames.items():
            self._gateways[gateway].send_encoded(b"".join(told))

    def _perform(self, command: ToWorker | ToPeers | BatchBegun) -> None:
        if isinstance(command, ToWorker):
            self._links.send(command.worker_id, command.message)
        elif isinstance(command, ToPeers):
            self._send_to_peers(command)
        else:
            asyncio.get_running_loop().call_later(command.within_s, self._turn, BatchDue())

    def _send_to_peers(self, command: ToPeers) -> None:
        if isinstance(command.message, AskBookings):
            for peer in command.peers:
                self._routers.send(peer, command.message)
            return
        frame = encode(command.message)
        for peer in command.peers:
            listener = self._listeners.get(peer)
            if listener is not None:
                listener.send_encoded(frame)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._turn(Tick())
            self._log_notes()
            self._log_missed_overlap()

    def _log_missed_overlap(self) -> None:
        missed = self._core.overlap.take_warning(self._now())
        if missed is not None:
            log.warning("less cached than expected", extra=asdict(missed))

    def _log_notes(self) -> None:
        """A fallback is also a log line, once each time it begins."""
        notes = self._all_notes()
        kinds = [note.split(" ", 1)[0] for note in notes]
        for kind, note in zip(kinds, notes, strict=True):
            if kind not in self._noted:
                log.warning("fallback", extra={"note": note})
        self._noted = kinds

    # --- gateways ---

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive
        name = connection.peer.name
        if connection.peer.kind == "router":
            self._listeners[name] = connection
            connection.on_close = lambda c, _: self._listener_closed(c)
        if connection.peer.kind != "gateway":
            return
        earlier = self._gateways.get(name)
        self._gateways[name] = connection
        if earlier is not None:
            earlier.abort()
        connection.on_close = lambda c, _: self._gateway_closed(c)
        self._turn(GatewayUp(gateway=name, epoch=connection.peer.epoch))

    def _receive(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Place):
            start_s = perf_counter()
            self._turn(FromGateway(gateway=connection.peer.name, message=message))
            self._decision_s.append(perf_counter() - start_s)
        elif isinstance(message, (PrefillDone, Done)):
            self._turn(FromGateway(gateway=connection.peer.name, message=message))
        elif isinstance(message, UsePolicy):
            self._use_policy(connection, message)
        elif isinstance(message, AskBookings) and connection.peer.kind == "router":
            self._turn(FromPeer(peer=connection.peer.name, epoch=connection.peer.epoch, message=message))
        elif isinstance(message, StatusRequest):
            connection.send(StatusReply(reply_id=message.reply_id, json=json.dumps(self.status())))
        elif isinstance(message, ExplainRequest):
            self._core.catch_up()  # its placement may have been answered in this very round
            found = explanations.answer(self._core.explanations, message.name, message.tenant, self._now(), by="router")
            connection.send(StatusReply(reply_id=message.reply_id, json=json.dumps(found)))
        elif isinstance(message, Ping):
            connection.send(Pong(nonce=message.nonce))

    def _use_policy(self, connection: Connection, message: UsePolicy) -> None:
        """Load, then switch between two turns; a text that names nothing changes nothing."""
        error = ""
        try:
            timed = _timed(message.policy, message.decode_policy)
        except Exception as failure:  # whatever a user's module raises when it is imported
            error = str(failure) if isinstance(failure, ConfigError) else f"{type(failure).__name__}: {failure}"
        else:
            log.info("policy changes", extra={"policy": message.policy, "asked_by": connection.peer.name})
            self._timed = timed
            self._notes.clear()
            self._decision_s.clear()
            now = self._now()
            if self._recorder is not None:
                told = PolicySwitched(now=now, policy=message.policy, decode_policy=message.decode_policy, forget=message.forget)
                self._recorder.take(told)
            self._core.use_policy(
                timed[Pool.PREFILL],
                message.policy,
                now,
                forget=message.forget,
                decode_policy=timed.get(Pool.DECODE),
                decode_spec=message.decode_policy,
            )
        connection.send(PolicyInUse(reply_id=message.reply_id, policy=self._core.config.policy, error=error))

    def _gateway_closed(self, connection: Connection) -> None:
        name = connection.peer.name
        if self._gateways.get(name) is connection:
            del self._gateways[name]
            self._turn(GatewayDown(gateway=name))

    # --- other routers ---

    def _listener_closed(self, connection: Connection) -> None:
        name = connection.peer.name
        if self._listeners.get(name) is connection:
            del self._listeners[name]
            self._turn(PeerHungUp(peer=name))

    def _peer_up(self, name: str, connection: Connection) -> None:
        self._turn(PeerUp(peer=name, epoch=connection.peer.epoch))

    def _peer_down(self, name: str, epoch: int) -> None:
        log.info("router link down", extra={"router": name, "epoch": epoch})
        self._turn(PeerDown(peer=name, epoch=epoch))

    def _receive_from_peer(self, name: str, message: Any) -> None:
        connection = self._routers.get(name)
        if connection is not None and isinstance(message, (BookingSet, BookingNews)):
            self._turn(FromPeer(peer=name, epoch=connection.peer.epoch, message=message))

    # --- workers and directory ---

    def _membership_changed(self, membership: Membership) -> None:
        self._turn(MembershipChanged(membership=membership))
        routers = [s for s in membership.services if s.kind == "router" and s.name != self._name]
        self._routers.set_targets([Target(name=r.name, epoch=r.epoch, host=r.host, port=r.port) for r in routers])
        self._links.set_targets([Target(name=a.worker_id, epoch=a.epoch, host=a.host, port=a.port) for a in membership.workers])

    def _worker_up(self, worker_id: str, connection: Connection) -> None:
        self._epochs[worker_id] = connection.peer.epoch
        self._turn(WorkerUp(worker_id=worker_id, epoch=connection.peer.epoch))

    def _worker_down(self, worker_id: str, epoch: int) -> None:
        log.info("worker link down", extra={"worker_id": worker_id, "epoch": epoch})
        if self._epochs.get(worker_id) == epoch:
            del self._epochs[worker_id]
        self._turn(WorkerDown(worker_id=worker_id, epoch=epoch))

    def _receive_from_worker(self, worker_id: str, message: Any) -> None:
        epoch = self._epochs.get(worker_id)
        if epoch is not None and isinstance(message, (SnapshotFrame, KvEvents, KvSnapshot)):
            self._turn(FromWorker(worker_id=worker_id, epoch=epoch, message=message))


def _timed(policy: str, decode_policy: str) -> dict[Pool, TimedPolicy]:
    """The policies these texts name; no DECODE: one serves both pools.

    Raises:
        ConfigError: a text names no policy.
    """
    specs = {Pool.PREFILL: policy} | ({Pool.DECODE: decode_policy} if decode_policy else {})
    return {pool: timed(policies.load(spec)) for pool, spec in specs.items()}


def timed(policy: PlacementPolicy) -> TimedPolicy:
    """With the stopwatch around `price_pool` too, where it has one."""
    return TimedPoolPolicy(policy, policy) if isinstance(policy, PoolPolicy) else TimedPolicy(policy)


class TimedPolicy:
    """A policy with a stopwatch around its calls: a slow one is an event to the core, which has no clock."""

    def __init__(self, policy: PlacementPolicy) -> None:
        self._policy = policy
        self._slowest_s = 0.0

    def take_slowest_s(self) -> float:
        """Of the calls since it was last asked."""
        slowest_s, self._slowest_s = self._slowest_s, 0.0
        return slowest_s

    def score(self, view: PlacementView, request: Place, now: float, rng: Random) -> dict[WorkerId, Cost]:
        start_s = perf_counter()
        try:
            return self._policy.score(view, request, now, rng)
        finally:
            self._slowest_s = max(self._slowest_s, perf_counter() - start_s)

    def observe(self, event: PolicyEvent, now: float) -> None:
        start_s = perf_counter()
        try:
            self._policy.observe(event, now)
        finally:
            self._slowest_s = max(self._slowest_s, perf_counter() - start_s)

    def commands(self, now: float) -> tuple[PolicyCommand, ...]:
        return self._policy.commands(now)

    def snapshot(self) -> bytes:
        return self._policy.snapshot()

    def restore(self, state: bytes) -> None:
        self._policy.restore(state)


class TimedPoolPolicy(TimedPolicy):
    """A policy that prices whole pools; asked in that way only."""

    def __init__(self, policy: PlacementPolicy, pool_policy: PoolPolicy) -> None:
        super().__init__(policy)
        self._pool_policy = pool_policy

    def price_pool(self, view: PlacementView, request: Place, now: float, rng: Random) -> PoolPrices:
        start_s = perf_counter()
        try:
            return self._pool_policy.price_pool(view, request, now, rng)
        finally:
            self._slowest_s = max(self._slowest_s, perf_counter() - start_s)
