"""Pulling from many peers at once: one lane a peer, one thread a lane, pulls of one lane in order.

A peer that hangs stops its own lane and no other; a lane ends when its peer is gone or was not pulled from for a while. What
carries the bytes is left to the backend (`PeerTransport.connect` and `copy`); here live queues, deadlines, cancellation and
the rule that each pull ends in exactly one outcome, after which nothing writes its target blocks.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import threading
import time
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Callable
from typing import Protocol

import numpy as np

from kvtransfer.config import TransportConfig
from kvtransfer.session import Pause, Session
from kvtransfer.transport import Region, Ticket, Transfer
from protocol.errors import HandshakeRefused, LayoutMismatch, WireError
from protocol.kv import Endpoint, HandoffShard, Outcome, TransferError
from protocol.wire import Identity


class PullFailed(Exception):
    """Unwinds a lane to the place where it becomes an Outcome; never leaves this package."""

    def __init__(self, error: TransferError, detail: str) -> None:
        super().__init__(detail)
        self.error = error


class Link(Protocol):
    """A connection to one peer. Not `in_step`: a pull stopped in the middle of the conversation, so it cannot be used again."""

    session: Session

    @property
    def in_step(self) -> bool: ...

    def close(self) -> None: ...


class Pull:
    """One transfer on its way. Times are of time.monotonic."""

    def __init__(self, ticket: Ticket, transfer: Transfer, target: Region) -> None:
        self.ticket = ticket
        self.transfer = transfer
        self.target = target
        self.refusal = _refusal(transfer, target)  # not empty: nobody can carry this
        indices = array("I") if self.refusal else transfer.source_indices
        self.source_block_ids = _taken(transfer.source.block_ids, indices)
        self.generations = _taken(transfer.source.generations, indices)
        self.started = time.monotonic()
        self.deadline = self.started + transfer.deadline_s
        self.cancelled = False  # set by the owner's thread, read by the lane

    def check(self) -> None:
        """Raise when there is no reason to go on."""
        if self.cancelled:
            raise PullFailed(TransferError.CANCELLED, "cancelled")
        if time.monotonic() >= self.deadline:
            raise PullFailed(TransferError.DEADLINE, f"not done after {self.transfer.deadline_s} s")

    def outcome(self, path: str, error: TransferError | None, detail: str) -> Outcome:
        num_blocks = 0 if error else len(self.source_block_ids)
        size_bytes = num_blocks * self.target.layout.block_bytes
        duration_s = time.monotonic() - self.started
        return Outcome(num_blocks=num_blocks, size_bytes=size_bytes, duration_s=duration_s, path=path, error=error, detail=detail)


class PeerTransport(ABC):
    """The verbs of KVTransport for backends that talk to another process over a socket."""

    name: str
    here_bytes_max = 0  # pulls of at most this much are copied by `start` itself while their lane is idle: copies that never wait

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig) -> None:
        self._identity = identity
        self._secret = secret
        self._config = config
        self._regions: dict[int, Region] = {}
        self._tickets = itertools.count(1)
        self._pulls: dict[Ticket, tuple[Pull, Lane | None]] = {}
        self._lanes: dict[Endpoint, Lane] = {}
        self._outcomes: deque[tuple[Ticket, Outcome]] = deque()
        self._wakeup_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @abstractmethod
    def connect(self, source: HandoffShard, pause: Pause) -> Link:
        """An authenticated link to the peer that made the offer. Runs on a lane's thread."""

    @abstractmethod
    def copy(self, link: Link, pull: Pull, rest: Callable[[float], None]) -> None:
        """Fill the target blocks, or raise PullFailed, OSError or WireError. Runs on a lane's thread.

        `rest(seconds)` waits so long, and raises PullFailed when there is no reason to go on.
        """

    def register(self, region: Region) -> None:
        self._regions[region.region_id] = region

    def forget(self, region_id: int) -> None:
        del self._regions[region_id]

    def start(self, transfer: Transfer) -> Ticket:
        target = self._regions[transfer.target_region_id]
        pull = Pull(next(self._tickets), transfer, target)
        if pull.refusal:
            self._pulls[pull.ticket] = (pull, None)
            self.report(pull, TransferError.REFUSED, pull.refusal)
            return pull.ticket
        key = transfer.source.endpoint
        lane = self._lanes.get(key)
        if lane is not None and self._is_small(pull) and lane.carry_here(pull):
            self._pulls[pull.ticket] = (pull, lane)
            return pull.ticket
        if lane is None or not lane.push(pull):
            self._lanes = {k: live for k, live in self._lanes.items() if not live.has_ended}
            if len(self._lanes) >= self._config.max_peers:
                self._pulls[pull.ticket] = (pull, None)
                self.report(pull, TransferError.REFUSED, f"pulling from {len(self._lanes)} peers already; the limit is max_peers")
                return pull.ticket
            lane = Lane(self, self._identity, self._config, first=pull)
            self._lanes[key] = lane
        self._pulls[pull.ticket] = (pull, lane)
        return pull.ticket

    def poll(self) -> list[tuple[Ticket, Outcome]]:
        if self._wakeup_fd >= 0:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wakeup_fd)
        done = []
        while self._outcomes:
            ticket, outcome = self._outcomes.popleft()
            del self._pulls[ticket]
            done.append((ticket, outcome))
        return done

    def cancel(self, ticket: Ticket) -> None:
        pull, lane = self._pulls.get(ticket, (None, None))
        if pull is not None and lane is not None:
            lane.cancel(pull)

    def wakeup_fd(self) -> int:
        return self._wakeup_fd

    def close(self) -> None:
        for lane in self._lanes.values():
            lane.stop()
        for lane in self._lanes.values():
            lane.join()
        self._lanes.clear()
        if self._wakeup_fd >= 0:
            os.close(self._wakeup_fd)
            self._wakeup_fd = -1

    def _is_small(self, pull: Pull) -> bool:
        """And nothing to be waited for."""
        return not pull.transfer.source.layer_clock and len(pull.source_block_ids) * pull.target.layout.block_bytes <= self.here_bytes_max

    def report(self, pull: Pull, error: TransferError | None, detail: str) -> None:
        """Called once a pull, from its lane or from `start`. Appending to a deque needs no lock."""
        self._outcomes.append((pull.ticket, pull.outcome(self.name, error, detail)))
        os.eventfd_write(self._wakeup_fd, 1)


class Lane:
    """The pulls from one peer. `push`, `cancel`, `stop` and `join` are the owner's; everything else runs on the lane's thread."""

    def __init__(self, backend: PeerTransport, identity: Identity, config: TransportConfig, *, first: Pull) -> None:
        self._backend = backend
        self._identity = identity
        self._config = config
        self._lock = threading.Lock()
        self._queue: deque[Pull] = deque([first])  # guarded by the lock, as are the next two
        self._stopping = False
        self.has_ended = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._current: Pull | None = None
        self._idle_link: Link | None = None  # while the lane waits for a pull; guarded by the lock
        self._connect_by = 0.0
        self._thread = threading.Thread(target=self._run, name=f"kv-{backend.name}-pull", daemon=True)
        self._thread.start()

    def push(self, pull: Pull) -> bool:
        """False when the lane has ended: nothing will look at its queue any more."""
        with self._lock:
            if self.has_ended:
                return False
            full = len(self._queue) >= self._config.max_queued_pulls
            if not full:
                self._queue.append(pull)
                os.eventfd_write(self._wake_fd, 1)
        if full:
            self._backend.report(
                pull, TransferError.REFUSED, f"{self._config.max_queued_pulls} pulls wait for this peer; the limit is max_queued_pulls"
            )
        return True

    def carry_here(self, pull: Pull) -> bool:
        """On the owner's thread, and done when this returns: two wake-ups cost more than copying a few megabytes. False: not now.

        The lane's thread, should it wake up, waits for the lock meanwhile; so nobody closes the link.
        """
        with self._lock:
            link = self._idle_link
            if link is None or self._queue or self._stopping or self.has_ended or link.session.has_ended():
                return False
            error, detail = self._attempt(link, pull, lambda _: pull.check())
        self._backend.report(pull, error, detail)
        return True

    def cancel(self, pull: Pull) -> None:
        pull.cancelled = True
        with self._lock:
            if not self.has_ended:
                os.eventfd_write(self._wake_fd, 1)

    def stop(self) -> None:
        """Cancel everything and end."""
        with self._lock:
            self._stopping = True
            for pull in self._queue:
                pull.cancelled = True
            if self._current is not None:
                self._current.cancelled = True
            if not self.has_ended:
                os.eventfd_write(self._wake_fd, 1)

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        link: Link | None = None
        try:
            while self._next(link):
                link = self._carry(link)
                self._current = None
        finally:
            if link is not None:
                link.close()
            self._end()

    def _next(self, link: Link | None) -> bool:
        """Wait for a pull and make it current. False: none came, or the peer left, and the lane has ended."""
        idle_until = time.monotonic() + self._config.idle_close_s
        while True:
            with self._lock:
                self._idle_link = None
                self._current = self._queue.popleft() if self._queue else None
                if self._current is not None:
                    return True
                if self._stopping or link is None or link.session.has_ended() or time.monotonic() >= idle_until:
                    self.has_ended = True
                    return False
                self._idle_link = link
            self._poll(link.session.fileno(), select.POLLIN, idle_until)

    def _end(self) -> None:
        """Nothing is left behind unreported, also when a bug of ours ends the thread."""
        with self._lock:
            self.has_ended = True
            unreported = [p for p in (self._current, *self._queue) if p is not None]
            self._queue.clear()
        os.close(self._wake_fd)
        for pull in unreported:
            self._backend.report(pull, TransferError.PEER_LOST, "the lane to this peer broke down")

    def _carry(self, link: Link | None) -> Link | None:
        """Do the current pull and report it. Returns the link to go on with."""
        pull = self._current
        assert pull is not None
        if link is not None and link.session.has_ended():
            link.close()
            link = None
        error: TransferError | None = None
        detail = ""
        if link is None:
            link, error, detail = self._open(pull)
        if link is not None:
            error, detail = self._attempt(link, pull, self._rest)
        if link is not None and error is not None and not link.in_step:
            link.close()
            link = None
        self._backend.report(pull, error, detail)
        return link

    def _open(self, pull: Pull) -> tuple[Link | None, TransferError | None, str]:
        self._connect_by = time.monotonic() + self._config.connect_timeout_s
        try:
            pull.check()
            return self._backend.connect(pull.transfer.source, self._pause), None, ""
        except (PullFailed, WireError, LayoutMismatch, OSError) as failure:
            return (None, *_told(failure))
        finally:
            self._connect_by = 0.0

    def _attempt(self, link: Link, pull: Pull, rest: Callable[[float], None]) -> tuple[TransferError | None, str]:
        try:
            pull.check()
            _check_peer(link.session.peer, pull.transfer.source, self._identity.fingerprint)
            self._backend.copy(link, pull, rest)
        except (PullFailed, WireError, LayoutMismatch, OSError) as failure:
            return _told(failure)
        return None, ""

    def _pause(self, fd: int, events: int) -> None:
        """Wait for the current pull's socket; meanwhile pulls that wait behind it may be cancelled or run out of time."""
        pull = self._current
        assert pull is not None
        while True:
            pull.check()
            if self._connect_by and time.monotonic() >= self._connect_by:
                raise ConnectionError(f"no answer to the handshake in {self._config.connect_timeout_s} s")
            earliest = min(pull.deadline, self._connect_by or pull.deadline, self._drop_ended())
            if self._poll(fd, events, earliest):
                return

    def _rest(self, seconds: float) -> None:
        """Look around, also at the pulls that wait behind this one, and wait."""
        assert self._current is not None
        self._current.check()
        if seconds:
            self._drop_ended()
            time.sleep(seconds)

    def _drop_ended(self) -> float:
        """Report pulls of the queue that were cancelled or are too late; the next deadline among the rest."""
        now = time.monotonic()
        with self._lock:
            ended = [p for p in self._queue if p.cancelled or p.deadline <= now]
            for pull in ended:
                self._queue.remove(pull)
            next_deadline = min((p.deadline for p in self._queue), default=float("inf"))
        for pull in ended:
            try:
                pull.check()
            except PullFailed as failed:
                self._backend.report(pull, failed.error, str(failed))
        return next_deadline

    def _poll(self, fd: int, events: int, until: float) -> bool:
        """True when `fd` is ready; False when woken, or at `until`."""
        poller = select.poll()
        poller.register(fd, events)
        poller.register(self._wake_fd, select.POLLIN)
        ready = [f for f, _ in poller.poll(max(0.0, until - time.monotonic()) * 1000 + 1)]
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        return fd in ready


def _told(failure: Exception) -> tuple[TransferError, str]:
    """What an outcome says of it."""
    if isinstance(failure, PullFailed):
        return failure.error, str(failure)
    if isinstance(failure, (HandshakeRefused, LayoutMismatch)):
        return TransferError.REFUSED, str(failure)
    return TransferError.TRUNCATED if isinstance(failure, WireError) else TransferError.PEER_LOST, str(failure)


def _check_peer(peer: Identity, source: HandoffShard, fingerprint: bytes) -> None:
    """The process at the other end is the one that made the offer, and holds the same weights."""
    if (peer.name, peer.epoch) != (source.worker_id, source.epoch):
        detail = f"offered by {source.worker_id} epoch {source.epoch}, there is {peer.name} epoch {peer.epoch} now"
        raise PullFailed(TransferError.STALE_EPOCH, detail)
    if peer.fingerprint != fingerprint:
        raise PullFailed(TransferError.REFUSED, f"{peer.name} serves other weights: {peer.fingerprint.hex()}, ours are {fingerprint.hex()}")


def _refusal(transfer: Transfer, target: Region) -> str:
    source, indices = transfer.source, transfer.source_indices
    if source.layout != target.layout:
        return "source and target layouts differ; the planner has to come between"
    if len(source.block_ids) != len(source.generations) or largest(indices) >= len(source.block_ids):
        return f"the offer names {len(source.block_ids)} blocks and {len(source.generations)} generations, not all that were asked for"
    if len(indices) != len(transfer.target_block_ids):
        return f"{len(indices)} source blocks for {len(transfer.target_block_ids)} target blocks"
    last = largest(transfer.target_block_ids)
    return f"target block {last} of a pool of {target.num_blocks}" if last >= target.num_blocks else ""


def _taken(words: array[int], indices: array[int]) -> array[int]:
    """words[i] for each index; through numpy, since this runs on the event loop's thread for thousands of blocks."""
    return array(words.typecode, np.frombuffer(words, dtype=words.typecode)[np.frombuffer(indices, dtype=np.uint32)].tobytes())


def largest(indices: array[int]) -> int:
    """-1 of none; through numpy, as in _taken."""
    return int(np.frombuffer(indices, dtype=np.uint32).max()) if indices else -1
