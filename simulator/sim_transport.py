"""Moving blocks and messages between simulated workers, with a seed for everything that can go wrong on the way.

A copy is a seqlock read, as on every real backend: generations are compared before it begins and after it ended, and what was
read in between counts only when both held. Outcomes are values; the core decides what becomes of them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from random import Random
from typing import TYPE_CHECKING

from engine.core.events import CompletePull, Event, LeaseRenewed, PeerAcked, PeerDropped, PeerSaid, StartPull
from kvtransfer.handoff import step_begin
from protocol.kv import HandoffShard, KVHandoff, KVPeer, Outcome, TransferError
from simulator.links import Copy, SharedLinks
from simulator.loop import VirtualLoop

if TYPE_CHECKING:
    from simulator.sim_worker import SimWorker

_FOLLOW_S = 0.0005  # until a copy sees that its source has computed more


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkFaults:
    """Probabilities, and the longest delay. The defaults are a network without faults."""

    lose_message: float = 0.0  # of any word between workers
    repeat_message: float = 0.0
    fail_pull: float = 0.0  # the peer is gone, or the digest does not match
    hang_pull: float = 0.0  # nothing comes; the deadline ends it
    delay_s_max: float = 0.0
    deaf_pull: float = 0.0  # hears neither deadline nor cancellation: writes and ends `deaf_s` after its deadline
    deaf_s: float = 3.0
    corrupt_pull: float = 0.0  # a copied block is not what the source holds; its digest says so


class TransferFault(Enum):
    """What came to pass of NetworkFaults, or of a network that was cut."""

    WORD_LOST = "a word about a hand-off is lost"
    HUNG = "nothing of a copy comes, or its end comes late"
    FAILED = "a copy breaks off"
    CORRUPT = "what was copied is not what the source holds"
    CUT = "the two workers do not reach each other"


class SimTransport:
    """All links between the workers of one simulation. `bytes_per_s`: of each worker's, in each direction."""

    def __init__(
        self, loop: VirtualLoop, rng: Random, *, faults: NetworkFaults, latency_s: float = 0.0005, bytes_per_s: float = 5e6
    ) -> None:
        self.workers: dict[str, SimWorker] = {}
        self.num_stale = 0  # copies that saw a block reused
        self.faults = faults
        self.is_reachable: Callable[[str, str], bool] = lambda one, other: True  # of two workers, now
        self.on_fault: Callable[[TransferFault, KVHandoff], None] = lambda fault, handoff: None  # one came to pass
        self._loop = loop
        self._rng = rng
        self._latency_s = latency_s
        self._links = SharedLinks(loop, bytes_per_s=bytes_per_s)
        self._cancels: dict[tuple[str, str], Callable[[], None]] = {}  # (target worker, handoff id) of each copy under way
        self._completions: dict[tuple[str, str], Callable[[CompletePull], None]] = {}
        self._followers: dict[str, list[Callable[[], None]]] = {}  # copies that wait for a worker's next step

    def look_again(self, worker_id: str) -> None:
        """This worker has computed more, or is gone."""
        for begin in self._followers.pop(worker_id, ()):
            self._loop.call_later(_FOLLOW_S, begin)

    def send(self, sender: SimWorker, handoff: KVHandoff, event: PeerAcked | PeerDropped | LeaseRenewed) -> None:
        """To the source of `handoff`: later, perhaps never, perhaps twice."""
        if not self.send_to_peer(sender, handoff.shards[0], event):
            self.on_fault(TransferFault.WORD_LOST, handoff)

    def send_to_peer(
        self, sender: SimWorker, peer: KVPeer | HandoffShard, event: PeerAcked | PeerDropped | LeaseRenewed | PeerSaid
    ) -> bool:
        """To one incarnation of a worker: later, perhaps never, perhaps twice. False: it is lost."""
        if self._rng.random() < self.faults.lose_message or not self.is_reachable(sender.worker_id, peer.worker_id):
            return False
        for _ in range(2 if self._rng.random() < self.faults.repeat_message else 1):
            self._loop.call_later(self._delay_s(), lambda: self._deliver(peer, event))
        return True

    def _deliver(self, peer: KVPeer | HandoffShard, event: Event) -> None:
        worker = self._incarnation(peer)
        if worker is not None:
            worker.take(event)

    def start_pull(self, target: SimWorker, command: StartPull, on_done: Callable[[Outcome], None]) -> None:
        """Exactly one outcome follows, at the deadline at the latest (but for a deaf one); after it nothing writes the target blocks."""
        handoff = command.handoff
        key = (target.worker_id, handoff.handoff_id)
        began_s = self._loop.now
        num_blocks = len(command.source_indices)
        size_bytes = num_blocks * handoff.shards[0].layout.block_bytes
        on_link: Copy | None = None
        is_open = True
        is_complete = handoff.is_complete
        is_copied = is_corrupt = False
        deadline = self._loop.call_later(command.deadline_s, lambda: end(TransferError.DEADLINE))

        def end(error: TransferError | None) -> None:
            nonlocal is_open
            if not is_open:
                return
            is_open = False
            if is_corrupt and error is None:
                error = TransferError.DIGEST_MISMATCH
            deadline.cancel()
            if on_link is not None:
                self._links.stop(on_link)
            del self._cancels[key], self._completions[key]
            moved = 0 if error is not None else num_blocks
            on_done(
                Outcome(
                    num_blocks=moved,
                    size_bytes=moved * handoff.shards[0].layout.block_bytes,
                    duration_s=self._loop.now - began_s,
                    path="sim",
                    error=error,
                )
            )

        def begin() -> None:
            if not is_open:
                return
            if not self._is_fresh(command):
                end(self._why_stale(command))
            elif self._is_cut(target, handoff):
                end(TransferError.PEER_LOST)
            elif not self._is_computed(command):
                self._followers.setdefault(handoff.shards[0].worker_id, []).append(begin)
            elif self._rng.random() < self.faults.hang_pull:
                self.on_fault(TransferFault.HUNG, handoff)
            else:
                delay_s = self._delay_s()
                self._loop.call_later((delay_s + self._links.alone_s(size_bytes)) * self._rng.random(), copy)
                self._loop.call_later(delay_s, cross)

        def cross() -> None:
            nonlocal on_link
            if is_open:
                on_link = self._links.start(handoff.shards[0].worker_id, target.worker_id, size_bytes, verify)

        def copy() -> None:
            nonlocal is_corrupt
            source = self._source(handoff)
            if is_open and source is not None and target.pool.holds_words:
                for index, block_id in zip(command.source_indices, command.target_block_ids, strict=True):
                    target.pool.write_block(block_id, source.pool.read_block(handoff.shards[0].block_ids[index]))
                if self.faults.corrupt_pull and self._rng.random() < self.faults.corrupt_pull:
                    is_corrupt = True
                    self.on_fault(TransferFault.CORRUPT, handoff)
                    spoilt = command.target_block_ids[self._rng.randrange(len(command.target_block_ids))]
                    target.pool.write_block(spoilt, array("Q", [word ^ 1 for word in target.pool.read_block(spoilt)]))

        def verify() -> None:
            nonlocal is_copied
            if not is_open:
                return
            if not self._is_fresh(command):
                end(self._why_stale(command))
            elif self._is_cut(target, handoff):
                end(TransferError.PEER_LOST)
            elif self._rng.random() < self.faults.fail_pull:
                self.on_fault(TransferFault.FAILED, handoff)
                end(self._rng.choice((TransferError.PEER_LOST, TransferError.DIGEST_MISMATCH)))
            elif is_complete:
                end(None)
            is_copied = True

        def complete(completed: CompletePull) -> None:
            """An early offer's copy counts only with its digests; none: the source did not keep the blocks."""
            nonlocal is_complete, deadline
            is_complete = True
            deadline.cancel()
            deadline = self._loop.call_later(completed.deadline_s, lambda: end(TransferError.DEADLINE))
            if is_copied:
                self._loop.call_later(self._delay_s(), lambda: end(None))

        def come_late() -> None:
            copy()
            end(TransferError.DEADLINE)

        if self.faults.deaf_pull and self._rng.random() < self.faults.deaf_pull:
            deadline.cancel()
            self.on_fault(TransferFault.HUNG, handoff)
            deadline = self._loop.call_later(command.deadline_s + self.faults.deaf_s, come_late)
            self._cancels[key] = lambda: None
            self._completions[key] = lambda _: None
            return
        self._completions[key] = complete
        self._cancels[key] = lambda: end(TransferError.CANCELLED)
        self._loop.call_later(self._delay_s(), begin)

    def complete_pull(self, target: SimWorker, command: CompletePull) -> None:
        complete = self._completions.get((target.worker_id, command.handoff.handoff_id))
        if complete is not None:
            complete(command)

    def cancel_pull(self, target: SimWorker, handoff_id: str) -> None:
        """The outcome still comes, a moment later."""
        cancel = self._cancels.get((target.worker_id, handoff_id))
        if cancel is not None:
            self._loop.call_later(self._delay_s(), cancel)

    def _source(self, handoff: KVHandoff) -> SimWorker | None:
        """The live worker that made the offer; None when it is gone, or came back as another."""
        return self._incarnation(handoff.shards[0])

    def _incarnation(self, peer: KVPeer | HandoffShard) -> SimWorker | None:
        worker = self.workers.get(peer.worker_id)
        return worker if worker is not None and worker.is_alive and worker.epoch == peer.epoch else None

    def _is_cut(self, target: SimWorker, handoff: KVHandoff) -> bool:
        is_cut = not self.is_reachable(target.worker_id, handoff.shards[0].worker_id)
        if is_cut:
            self.on_fault(TransferFault.CUT, handoff)
        return is_cut

    def _is_computed(self, command: StartPull) -> bool:
        """Steps are computed at their end; that of an early offer has to be over. Of a source that is gone `_is_fresh` tells."""
        source, shard = self._source(command.handoff), command.handoff.shards[0]
        return source is None or step_begin(source.pool.num_steps_done, shard.layout.num_layers) > shard.layer_clock

    def _is_fresh(self, command: StartPull) -> bool:
        source = self._source(command.handoff)
        if source is None:
            return False
        shard = command.handoff.shards[0]
        found, wanted = source.pool.generations, shard.generations
        if len(command.source_indices) == len(wanted):
            return [found[block_id] for block_id in shard.block_ids] == list(wanted)
        return all(found[shard.block_ids[i]] == wanted[i] for i in command.source_indices)

    def _why_stale(self, command: StartPull) -> TransferError:
        if self._source(command.handoff) is None:
            return TransferError.PEER_LOST
        self.num_stale += 1
        return TransferError.STALE_GENERATION

    def _delay_s(self) -> float:
        return self._latency_s + self._rng.random() * self.faults.delay_s_max
