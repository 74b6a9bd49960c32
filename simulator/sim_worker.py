"""The simulator's driver of one worker core: performs its commands on the virtual clock, as cluster/worker_host.py does live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.core.events import (
    AckSource,
    AskPrefix,
    CancelPull,
    Command,
    CompleteOffer,
    CompletePull,
    DropSource,
    Emit,
    Event,
    LeaseRenewed,
    LoadBlocks,
    LoadDone,
    OfferKv,
    OfferPrefix,
    PeerAcked,
    PeerDropped,
    PeerSaid,
    PublishKvEvents,
    PullDone,
    RaiseGenerations,
    RefusePrefix,
    RenewSource,
    RunStep,
    SaveBlocks,
    Settle,
    Settled,
    StartPull,
    StepDone,
    Tell,
    Tick,
)
from engine.core.worker_core import WorkerCore
from protocol.kv import Endpoint, HandoffCompletion, KVPeer
from protocol.kv_messages import PrefixOffered, PrefixRefused, RequestPrefix
from protocol.messages import AttemptFailed, HandoffDone, OfferCompleted, Offered, StepOutput, TransferFailed
from protocol.worker import KvEvent, WorkerSnapshot
from simulator.loop import VirtualLoop
from simulator.sim_executor import SimExecutor, SimPool
from simulator.sim_host_tier import SimHostTier
from simulator.sim_transport import SimTransport

FromWorker = StepOutput | Offered | OfferCompleted | HandoffDone | TransferFailed | AttemptFailed


_QUIET = (StepDone, Settled, Tick, PeerAcked, LeaseRenewed)  # after these a batch goes on as it was


class SimWorker:
    """A worker core with its pool and executor. `to_gateway(gateway, message)` carries what it says."""

    def __init__(
        self,
        loop: VirtualLoop,
        transport: SimTransport,
        *,
        worker_id: str,
        epoch: int,
        core: WorkerCore,
        pool: SimPool,
        executor: SimExecutor,
        to_gateway: Callable[[str, FromWorker], None],
        tier: SimHostTier,
        tick_s: float = 0.05,
    ) -> None:
        self.worker_id = worker_id
        self.epoch = epoch
        self.core = core
        self.pool = pool
        self.executor = executor
        self.tier = tier
        self.is_alive = True
        self._held: list[Event] | None = None  # what happened while the process stood still; None: it runs
        self.kv_events: list[KvEvent] = []
        self.after_turn: Callable[[Event, list[Command]], None] = lambda _event, _commands: None  # checkers look here
        self._loop = loop
        self._transport = transport
        self._to_gateway = to_gateway
        self._tick_s = tick_s
        transport.workers[worker_id] = self
        executor.after_step = self._step_done
        executor.start(lambda result: self.take(StepDone(result=result)))
        self._tick()

    def take(self, event: Event) -> None:
        """One turn: an event in, its commands performed."""
        if not self.is_alive:
            return
        if self._held is not None:
            self._held.append(event)
            return
        commands = self.core.on(event, self._loop.now)
        if not isinstance(event, _QUIET) or (commands and isinstance(event, Tick)):
            self.executor.cut()
        for command in commands:
            self._perform(command)
        self.after_turn(event, commands)
        if commands and isinstance(commands[-1], Settle):
            self.take(Settled())

    def snapshot(self) -> WorkerSnapshot:
        """What it would tell now, steps included that are over and stand in one result with those to come."""
        snapshot, num_past = self.core.snapshot(self._loop.now), self.executor.num_steps_past
        if not num_past:
            return snapshot
        num_tokens = num_past * self.executor.num_samples
        done = {"steps": num_past, "generated_tokens": num_tokens, "busy_us": round(self.executor.past_s * 1e6)}
        counters = snapshot.counters | {name: snapshot.counters[name] + more for name, more in done.items()}
        return replace(
            snapshot,
            step_count=snapshot.step_count + num_past,
            running_kv_tokens=snapshot.running_kv_tokens + num_tokens,
            counters=counters,
        )

    def kill(self) -> None:
        """As by kill -9: nothing is said, nothing is finished."""
        self.is_alive = False
        self.executor.close()
        self._transport.look_again(self.worker_id)

    def _step_done(self, step_id: int) -> None:
        self.pool.step_done(step_id)
        self._transport.look_again(self.worker_id)

    @property
    def is_running(self) -> bool:
        """Alive, and not stopped."""
        return self.is_alive and self._held is None

    def stop(self) -> None:
        """As by SIGSTOP: what happens from now on is taken in when the process goes on."""
        if self._held is None:
            self._held = []

    def go_on(self) -> None:
        held, self._held = self._held, None
        for event in held or ():
            self.take(event)

    def _tick(self) -> None:
        if self.is_alive:
            if self._held is None and self.core.awaits_time:
                self.take(Tick())
            self._loop.call_later(self._tick_s, self._tick)

    def _perform(self, command: Command) -> None:
        match command:
            case RaiseGenerations():
                self.pool.raise_generations(command.block_ids, command.generations)
            case RunStep():
                self.executor.submit(command.plan)
            case Emit():
                output = StepOutput(
                    worker_id=self.worker_id, epoch=self.epoch, step=command.step_id, runs=command.runs, tokens=command.tokens
                )
                self._to_gateway(command.gateway, output)
            case Tell():
                self._to_gateway(command.gateway, command.message)
            case OfferKv():
                self._to_gateway(command.gateway, Offered(handoff=command.handoff))
            case CompleteOffer():
                offer = command.handoff
                digests = (b"",) * len(offer.shards) if command.is_kept else ()
                completion = HandoffCompletion(handoff_id=offer.handoff_id, first_tokens=offer.first_tokens, digests=digests)
                completed = OfferCompleted(request_id=offer.request_id, attempt=offer.attempt, completion=completion)
                self._to_gateway(command.gateway, completed)
            case StartPull():
                handoff_id = command.handoff.handoff_id
                self._transport.start_pull(self, command, lambda o: self.take(PullDone(handoff_id=handoff_id, outcome=o)))
            case CompletePull():
                self._transport.complete_pull(self, command)
            case CancelPull():
                self._transport.cancel_pull(self, command.handoff_id)
            case AckSource():
                self._transport.send(self, command.handoff, PeerAcked(handoff_id=command.handoff.handoff_id))
            case DropSource():
                self._transport.send(self, command.handoff, PeerDropped(handoff_id=command.handoff.handoff_id, reason=command.reason))
            case RenewSource():
                self._transport.send(self, command.handoff, LeaseRenewed(handoff_id=command.handoff.handoff_id))
            case AskPrefix():
                request = RequestPrefix(
                    pull_id=command.pull_id,
                    requester=KVPeer(worker_id=self.worker_id, epoch=self.epoch, endpoint=Endpoint()),
                    request_id=command.request_id,
                    attempt=command.attempt,
                    cache_root=command.cache_root,
                    token_ids=command.token_ids,
                    num_held_tokens=command.num_held_tokens,
                )
                self._transport.send_to_peer(self, command.peer, PeerSaid(worker_id=self.worker_id, message=request))
            case OfferPrefix():
                offered = PrefixOffered(pull_id=command.pull_id, handoff=command.handoff)
                self._transport.send_to_peer(self, command.peer, PeerSaid(worker_id=self.worker_id, message=offered))
            case RefusePrefix():
                refused = PrefixRefused(pull_id=command.pull_id, reason=command.reason)
                self._transport.send_to_peer(self, command.peer, PeerSaid(worker_id=self.worker_id, message=refused))
            case SaveBlocks():
                self.tier.save(command)
            case LoadBlocks():
                load_id = command.load_id
                self.tier.load(command, lambda error: self.take(LoadDone(load_id=load_id, error=error)))
            case PublishKvEvents():
                self.kv_events += command.events
