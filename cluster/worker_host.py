"""The live driver of one worker: an event loop with its sockets around the worker core, a compute thread behind the executor.

Everything but the forward pass runs on the loop's thread: the core is called there only, so it needs no lock. A step's end
crosses from the compute thread by `call_soon_threadsafe`. Performing a command never blocks.

    gateway ──Submit, Cancel──►┐                          ┌──RunStep──► executor (compute thread)
    router  ──Subscribe───────►│ WorkerHost ─on()─► core ─┤──StartPull─► kvtransfer endpoint
    peers   ──AckHandoff──────►┘                          └──Emit, Tell, OfferKv──► the gateway's connection
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

from cluster.digesting import when_read
from cluster.prefix_post import PrefixPost
from cluster.tier_copies import TierCopies
from engine.core.events import (
    AckSource,
    CacheCleared,
    CancelPull,
    CancelReceived,
    Command,
    CompleteOffer,
    CompletePull,
    DrainStarted,
    DropSource,
    Emit,
    Event,
    GatewayLost,
    LeaseRenewed,
    OfferCompletedReceived,
    OfferKv,
    PeerAcked,
    PeerDropped,
    PeerSaid,
    PublishKvEvents,
    PullDone,
    RaiseGenerations,
    RenewSource,
    RunStep,
    Settle,
    Settled,
    StartPull,
    StepDone,
    SubmitReceived,
    Tell,
    Tick,
)
from engine.core.executor import Executor, StepResult
from engine.core.worker_core import WorkerCore
from kvtransfer.endpoint import KVEndpoint
from kvtransfer.host_tier import HostTierMemory
from kvtransfer.peers import OnPeerMessage
from protocol.control import CacheReset, ResetCache
from protocol.kv import HandoffCompletion, KVHandoff, Outcome
from protocol.kv_messages import AckHandoff, DropHandoff, PrefixOffered, PrefixRefused, RenewLease, RequestPrefix
from protocol.links import MembershipWatch
from protocol.messages import Cancel, KvEvents, OfferCompleted, Offered, Ping, Pong, Register, SnapshotFrame, StepOutput, Submit, Subscribe
from protocol.wire import Connection, Identity, Listener, encode
from protocol.worker import KvEvent, WorkerAddress, WorkerSnapshot

log = logging.getLogger("baton.worker")

TICK_S = 0.05
SNAPSHOT_INTERVAL_S = 0.05  # at most one snapshot in this time while the core is busy
SNAPSHOT_IDLE_INTERVAL_S = 0.5  # and at least one in this time when it is not
GATEWAY_GRACE_S = 2.0
SETTLE_S = 0.001
MAX_KEPT_KV_EVENTS = 8192


@dataclass(slots=True)
class _Gateway:
    connection: Connection | None
    lost_timer: asyncio.TimerHandle | None = None


class WorkerHost:
    """Owns a worker's loop-side state. `clock` is the loop's monotonic time; the core never reads one itself."""

    def __init__(
        self,
        *,
        core: WorkerCore,
        executor: Executor,
        make_endpoint: Callable[[OnPeerMessage], KVEndpoint],
        address: WorkerAddress,
        secret: bytes,
        directory_host: str,
        directory_port: int,
        counters: Mapping[str, int] = MappingProxyType({}),
        notes: tuple[str, ...] = (),
        host_tier: HostTierMemory | None = None,
    ) -> None:
        self._core = core
        self._executor = executor
        self._endpoint = make_endpoint(self._receive_from_peer)
        self._address = address
        self._counters = dict(counters)
        self._notes = notes
        self._prefix_post = PrefixPost(self._endpoint, worker_id=address.worker_id, epoch=address.epoch)
        identity = Identity(name=address.worker_id, kind="worker", epoch=address.epoch, fingerprint=address.fingerprint)
        self._listener = Listener(identity, secret, self._accept)
        self._directory = MembershipWatch(identity, secret, host=directory_host, port=directory_port, on_change=lambda _: None)
        self._gateways: dict[str, _Gateway] = {}
        self._subscribers: dict[Connection, Subscribe] = {}
        self._kept_kv_events: deque[KvEvent] = deque(maxlen=MAX_KEPT_KV_EVENTS)
        self._last_snapshot_s = 0.0
        self._ticker: asyncio.Task[None] | None = None
        self._settling: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._perform: dict[type, Callable[[Any], None]] = {
            RaiseGenerations: lambda c: self._endpoint.raise_generations(c.block_ids, c.generations),
            RunStep: lambda c: self._executor.submit(c.plan),
            Emit: self._emit,
            Tell: lambda c: self._send(c.gateway, c.message),
            OfferKv: self._offer,
            CompleteOffer: self._complete_offer,
            StartPull: self._start_pull,
            CompletePull: lambda c: self._endpoint.complete_pull(c.handoff, c.deadline_s),
            CancelPull: lambda c: self._endpoint.cancel(c.handoff_id),
            AckSource: lambda c: self._endpoint.send_to_source(c.handoff, AckHandoff(handoff_id=c.handoff.handoff_id)),
            DropSource: lambda c: self._endpoint.send_to_source(c.handoff, DropHandoff(handoff_id=c.handoff.handoff_id, reason=c.reason)),
            RenewSource: lambda c: self._endpoint.send_to_source(c.handoff, RenewLease(handoff_id=c.handoff.handoff_id)),
            PublishKvEvents: self._publish,
            Settle: lambda _: self._settle(),
        }
        self._perform |= self._prefix_post.performers
        self._tier_copies = TierCopies(host_tier, self._turn) if host_tier is not None else None
        if self._tier_copies is not None:
            self._perform |= self._tier_copies.performers

    # --- life ---

    async def start(self) -> WorkerAddress:
        """Listen, start computing, register; returns the address with its ports filled in."""
        self._loop = asyncio.get_running_loop()
        await self._endpoint.start()
        await self._listener.start(host=self._address.host)
        self._address = replace(self._address, port=self._listener.port, kv_endpoint=self._endpoint.endpoint())
        self._executor.start(self._step_done_elsewhere)
        self._directory.register(Register(address=self._address))
        self._directory.start()
        self._ticker = asyncio.create_task(self._tick())
        return self._address

    def drain(self) -> None:
        """Admit nothing new; running requests go on."""
        self._turn(DrainStarted())
        self._send_snapshot()

    async def close(self) -> None:
        """Stop at once; what still runs is lost to its gateways, which place it elsewhere."""
        if self._settling is not None:
            self._settling.cancel()
        if self._ticker is not None:
            self._ticker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._ticker
        await self._directory.close()
        self._listener.close()
        await asyncio.to_thread(self._executor.close)
        await self._endpoint.close()
        if self._tier_copies is not None:
            await self._tier_copies.close()

    def snapshot(self) -> WorkerSnapshot:
        core = self._core.snapshot(self._now())
        return replace(core, counters=core.counters | self._endpoint.counters | self._counters, notes=core.notes + self._notes)

    # --- the turn: one event in, commands out ---

    def _turn(self, event: Event) -> None:
        for command in self._core.on(event, self._now()):
            self._run(command)

    def _run(self, command: Command) -> None:
        self._perform[type(command)](command)

    def _now(self) -> float:
        assert self._loop is not None
        return self._loop.time()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._turn(Tick())
            if self._now() - self._last_snapshot_s >= SNAPSHOT_IDLE_INTERVAL_S:
                self._send_snapshot()

    def _step_done_elsewhere(self, result: StepResult) -> None:
        """Called on the compute thread."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop was closed while the last step ran
            self._loop.call_soon_threadsafe(self._step_done, result)

    def _step_done(self, result: StepResult) -> None:
        if result.error is not None:
            log.error("step failed", extra={"worker_id": self._address.worker_id, "step": result.step_id, "error": result.error})
        self._turn(StepDone(result=result))
        if self._now() - self._last_snapshot_s >= SNAPSHOT_INTERVAL_S:
            self._send_snapshot()

    # --- commands ---

    def _settle(self) -> None:
        """A moment later: what is put off is Python, and the compute thread needs the interpreter's lock to begin its step."""
        assert self._loop is not None
        if self._settling is None:
            self._settling = self._loop.call_later(SETTLE_S, self._settled)

    def _settled(self) -> None:
        self._settling = None
        self._turn(Settled())

    def _emit(self, command: Emit) -> None:
        self._send(
            command.gateway,
            StepOutput(
                worker_id=self._address.worker_id,
                epoch=self._address.epoch,
                step=command.step_id,
                runs=command.runs,
                tokens=command.tokens,
            ),
        )

    def _send(self, gateway: str, message: object) -> None:
        """To a gateway; dropped while it is away: it takes the end of its socket for our loss and starts new attempts."""
        known = self._gateways.get(gateway)
        if known is not None and known.connection is not None:
            known.connection.send(message)

    def _offer(self, command: OfferKv) -> None:
        handoff = command.handoff
        if handoff.is_complete:
            when_read(
                self._endpoint, handoff, self._endpoint.fill_offer, lambda filled: self._send(command.gateway, Offered(handoff=filled))
            )
            return
        self._send(command.gateway, Offered(handoff=self._endpoint.fill_offer(handoff)))
        if any(shard.num_whole_blocks for shard in handoff.shards):
            self._endpoint.digest_ahead(handoff)

    def _complete_offer(self, command: CompleteOffer) -> None:
        """What an early offer could not say."""
        handoff = command.handoff
        if not command.is_kept:
            self._send(command.gateway, _completed(handoff, ()))
            return
        tell = partial(self._tell_completed, command.gateway, handoff)
        when_read(self._endpoint, handoff, self._endpoint.digests_of, tell)

    def _tell_completed(self, gateway: str, handoff: KVHandoff, digests: bytes) -> None:
        self._send(gateway, _completed(handoff, (digests,)))

    def _start_pull(self, command: StartPull) -> None:
        self._endpoint.start_pull(
            command.handoff,
            command.source_indices,
            command.target_block_ids,
            command.deadline_s,
            partial(self._pull_done, command.handoff.handoff_id),
            target_start_tokens=command.target_start_tokens,
        )

    def _pull_done(self, handoff_id: str, outcome: Outcome) -> None:
        self._turn(PullDone(handoff_id=handoff_id, outcome=outcome))

    def _publish(self, command: PublishKvEvents) -> None:
        self._kept_kv_events.extend(command.events)
        frame: bytes | None = None
        for connection, wants in self._subscribers.items():
            if wants.kv_events:
                if frame is None:
                    frame = encode(KvEvents(worker_id=self._address.worker_id, epoch=self._address.epoch, events=command.events))
                connection.send_encoded(frame)

    def _send_snapshot(self) -> None:
        self._last_snapshot_s = self._now()
        if not self._subscribers:
            return
        frame = encode(SnapshotFrame(snapshot=self.snapshot()))
        for connection, wants in self._subscribers.items():
            if wants.snapshots:
                connection.send_encoded(frame)

    # --- connections ---

    def _accept(self, connection: Connection) -> None:
        connection.on_message = self._receive
        connection.on_close = lambda c, _: self._disconnected(c)
        if connection.peer.kind == "gateway":
            self._gateway_arrived(connection)

    def _receive(self, connection: Connection, message: Any) -> None:
        if isinstance(message, Submit):
            self._turn(SubmitReceived(gateway=connection.peer.name, submit=message))
        elif isinstance(message, Cancel):
            self._turn(CancelReceived(request_id=message.request_id, attempt=message.attempt))
        elif isinstance(message, OfferCompleted):
            self._turn(OfferCompletedReceived(completed=message))
        elif isinstance(message, Subscribe):
            self._subscribe(connection, message)
        elif isinstance(message, ResetCache):
            self._reset_cache(connection, message)
        elif isinstance(message, Ping):
            connection.send(Pong(nonce=message.nonce))

    def _reset_cache(self, connection: Connection, message: ResetCache) -> None:
        """KV events and a snapshot go out before the answer: whoever hears it may place at once."""
        self._turn(CacheCleared())
        self._send_snapshot()
        snapshot = self._core.snapshot(self._now())
        kept = snapshot.num_blocks_owned + snapshot.num_blocks_leased
        connection.send(CacheReset(reply_id=message.reply_id, num_blocks_kept=kept))

    def _receive_from_peer(self, worker_id: str, message: object) -> None:
        if isinstance(message, AckHandoff):
            self._turn(PeerAcked(handoff_id=message.handoff_id))
        elif isinstance(message, DropHandoff):
            self._turn(PeerDropped(handoff_id=message.handoff_id, reason=message.reason))
        elif isinstance(message, RenewLease):
            self._turn(LeaseRenewed(handoff_id=message.handoff_id))
        elif isinstance(message, (RequestPrefix, PrefixOffered, PrefixRefused)):
            self._turn(PeerSaid(worker_id=worker_id, message=message))

    def _gateway_arrived(self, connection: Connection) -> None:
        name = connection.peer.name
        known = self._gateways.get(name)
        if known is not None:
            # It took the end of its old connection for our loss and started new attempts: what it had here is orphaned.
            if known.lost_timer is not None:
                known.lost_timer.cancel()
            if known.connection is not None:
                known.connection.abort()
            self._turn(GatewayLost(gateway=name))
        self._gateways[name] = _Gateway(connection=connection)

    def _disconnected(self, connection: Connection) -> None:
        self._subscribers.pop(connection, None)
        name = connection.peer.name
        known = self._gateways.get(name)
        if known is None or known.connection is not connection:
            return
        known.connection = None
        assert self._loop is not None
        known.lost_timer = self._loop.call_later(GATEWAY_GRACE_S, self._gateway_gone, name)

    def _gateway_gone(self, name: str) -> None:
        log.info("gateway lost", extra={"worker_id": self._address.worker_id, "gateway": name})
        del self._gateways[name]
        self._turn(GatewayLost(gateway=name))

    def _subscribe(self, connection: Connection, wants: Subscribe) -> None:
        """Snapshots from now on; KV events from the number asked for, or all blocks when those events are not kept any more."""
        if wants.kv_events:
            events = [e for e in self._kept_kv_events if e.number >= wants.next_event_number]
            oldest_kept = self._kept_kv_events[0].number if self._kept_kv_events else None
            if oldest_kept is not None and wants.next_event_number >= oldest_kept:
                if events:
                    connection.send(KvEvents(worker_id=self._address.worker_id, epoch=self._address.epoch, events=tuple(events)))
            else:
                connection.send(self._core.kv_snapshot())
        self._subscribers[connection] = wants
        if wants.snapshots:
            connection.send(SnapshotFrame(snapshot=self.snapshot()))


def _completed(handoff: KVHandoff, digests: tuple[bytes, ...]) -> OfferCompleted:
    completion = HandoffCompletion(handoff_id=handoff.handoff_id, first_tokens=handoff.first_tokens, digests=digests)
    return OfferCompleted(request_id=handoff.request_id, attempt=handoff.attempt, completion=completion)
