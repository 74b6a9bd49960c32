"""Blocks between two processes of one GPU: the source passes a handle to its pool once, targets copy out of it on the device.

    target ── connect, prove ──► source's Unix socket
    target ◄── regions, memfds of generation words, handles ── source      once a pair of processes
    target: words? copies of runs on a stream of its own ... event. words still?       for each pull; the source does nothing

What kvtransfer.shm does with a mapping, on a device: copies are begun by the host and end later. So a pull that is given up waits for
the copies it has begun before it says so; a few slices at once are under way, which bounds that wait. What makes the copy safe is the
seqlock of kvtransfer.copying, with the event between its two looks. The source makes an offer only once the kernels that wrote the
blocks have ended, and raises a generation before it launches one that writes them anew.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kernels.copy_runs import Runs
from kvtransfer.attached import AttachedTransport, attach_all, while_alive
from kvtransfer.config import TransportConfig
from kvtransfer.copying import check_generations, follow, slices
from kvtransfer.cuda_runtime import HANDLE_BYTES, DeviceError, DeviceRuntime
from kvtransfer.device_pool import WORDS_ONLY
from kvtransfer.lanes import Link, Pull, PullFailed
from kvtransfer.region import PoolMemory
from kvtransfer.session import Announcement, Pause, RegionCard, Session, dial_unix
from kvtransfer.transport import Region, RegionKind
from protocol.codec import from_wire, pack, to_wire, unpack
from protocol.errors import MalformedFrame
from protocol.kv import Endpoint, HandoffShard, TransferError
from protocol.wire import Identity

log = logging.getLogger(__name__)

_SLICES_UNDER_WAY = 3  # a pull that is given up waits for these; more would not be faster, since one already fills the device
_CARDS_BYTES_MAX = 64 << 10
_FIRST_LOOK_S = 20e-6
_LOOK_S_MAX = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCard:
    """Where the blocks of the region of the same place in the Announcement lie."""

    device_id: str
    handle: bytes  # opens an allocation
    offset_bytes: int  # of block 0 in it


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCards:
    cards: tuple[DeviceCard, ...]


class CudaIpcTransport(AttachedTransport):
    """Passes handles. Our pools are of `runtime`'s device."""

    name = "cuda_ipc"

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig, *, unix_path: str, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._handles = OpenHandles(runtime)
        super().__init__(identity, secret, config, unix_path=unix_path)

    def endpoint(self) -> Endpoint:
        return Endpoint(cuda_path=self._unix_path, cuda_device=self._runtime.device_id)

    def hand_over(self, session: Session) -> None:
        shared = [(r, r.device) for r in self._regions.values() if r.kind is RegionKind.CUDA_IPC and r.device is not None]
        regions = tuple(RegionCard(region_id=r.region_id, num_blocks=r.num_blocks, layout=r.layout) for r, _ in shared)
        session.announce(Announcement(regions=regions), [r.fd for r, _ in shared])
        cards = tuple(DeviceCard(device_id=d.runtime.device_id, handle=d.handle, offset_bytes=d.offset_bytes) for _, d in shared)
        session.send_frame(pack(to_wire(DeviceCards(cards=cards))))
        session.receive_frame(0)  # raises when the peer leaves: it has nothing to say

    def connect(self, source: HandoffShard, pause: Pause) -> Link:
        path = source.endpoint.cuda_path
        if not path:
            raise PullFailed(TransferError.REFUSED, f"{source.worker_id} offers no device memory")
        session = dial_unix(path, pause)
        try:
            session.handshake(self._identity, self._secret, dialed=True)
            announcement, fds = session.receive_announcement(with_fds=True)
            words = attach_all(announcement, fds, layout=WORDS_ONLY)
            try:
                cards = from_wire(DeviceCards, unpack(session.receive_frame(_CARDS_BYTES_MAX))).cards
                if len(cards) != len(words) or any(len(c.handle) != HANDLE_BYTES or c.offset_bytes < 0 for c in cards):
                    raise MalformedFrame(
                        f"{session.peer.name} announced {len(words)} regions and {len(cards)} cards, or a card is no handle"
                    )
                self._runtime.enter()
                return _Attached(session, self._runtime, self._handles, announcement, words, cards)
            except BaseException:
                for memory in words:
                    memory.close()
                raise
        except DeviceError as error:
            session.close()
            raise PullFailed(TransferError.PEER_LOST, f"the memory of {source.worker_id} cannot be opened: {error}") from error
        except BaseException:
            session.close()
            raise

    def copy(self, link: Link, pull: Pull, rest: Callable[[float], None]) -> None:
        assert isinstance(link, _Attached)
        source = pull.transfer.source
        pool = link.pools.get(source.region_id)
        if pool is None or pool.card.layout != source.layout:
            raise PullFailed(TransferError.REFUSED, f"region {source.region_id} is not there, or not of the layout offered")
        target = pull.target.device
        if target is None:  # staging of kvtransfer.pulls, which is host memory
            raise PullFailed(TransferError.REFUSED, "blocks in device memory are not laid out anew: equal layouts are needed on both sides")
        if {pool.device_id, target.runtime.device_id} != {self._runtime.device_id}:
            detail = f"blocks of {pool.device_id} for a pool on {target.runtime.device_id}: one device is needed"
            raise PullFailed(TransferError.REFUSED, detail)

        look_up = while_alive(link, rest)
        self._runtime.enter()
        try:
            _copy_verified(pool, pull, target.address, link.copies, look_up, self._config.copy_slice_bytes)
        except DeviceError as error:
            raise PullFailed(TransferError.PEER_LOST, f"the device gave up the copy: {error}") from error


class OpenHandles:
    """Allocations of peers that are open in this process. A runtime opens each once; two links to one peer may live for a moment."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._lock = threading.Lock()
        self._open: dict[bytes, tuple[int, int]] = {}  # address, number of users

    def open(self, handle: bytes) -> int:
        with self._lock:
            address, num_users = self._open.get(handle, (0, 0))
            if not num_users:
                address = self._runtime.open(handle)
            self._open[handle] = (address, num_users + 1)
            return address

    def close(self, handle: bytes) -> None:
        with self._lock:
            address, num_users = self._open.pop(handle)
            if num_users > 1:
                self._open[handle] = (address, num_users - 1)
            else:
                self._runtime.close(address)


class Copies:
    """Slices under way on a stream of their own. Used by one thread."""

    def __init__(self, runtime: DeviceRuntime) -> None:
        self._runtime = runtime
        self._stream = runtime.create_stream()
        self._events: deque[int] = deque()

    def begin(self, source: int, target: int, runs: Runs) -> None:
        self._runtime.copy_on_device(source, target, runs, self._stream)
        self._events.append(self._runtime.record(self._stream))

    def wait(self, look_up: Callable[[float], None], *, num_left: int) -> None:
        """Until at most `num_left` slices are under way; `look_up(seconds)` waits meanwhile and may raise."""
        pause_s = _FIRST_LOOK_S
        while len(self._events) > num_left:
            if self._runtime.is_done(self._events[0]):
                self._runtime.destroy_event(self._events.popleft())
                pause_s = _FIRST_LOOK_S
                continue
            look_up(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S_MAX)

    def drain(self) -> None:
        """Nothing is written any more when it returns. A device that hangs holds us here: to go on would be to lie."""
        self._runtime.synchronize(self._stream)
        while self._events:
            self._runtime.destroy_event(self._events.popleft())

    def close(self) -> None:
        self.drain()
        self._runtime.destroy_stream(self._stream)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PeerPool:
    card: RegionCard
    words: Region  # its generations
    device_id: str
    address: int  # of block 0


class _Attached:
    """A peer's pools as we see them, for as long as it lives."""

    def __init__(
        self,
        session: Session,
        runtime: DeviceRuntime,
        handles: OpenHandles,
        announcement: Announcement,
        words: list[PoolMemory],
        cards: tuple[DeviceCard, ...],
    ) -> None:
        self.session = session
        self.copies = Copies(runtime)
        self.pools: dict[int, _PeerPool] = {}
        self._runtime = runtime
        self._handles = handles
        self._words = words
        self._opened: list[bytes] = []
        try:
            for region, memory, card in zip(announcement.regions, words, cards, strict=True):
                address = 0
                if card.device_id == runtime.device_id:  # that of another device is refused when it is pulled from
                    address = handles.open(card.handle) + card.offset_bytes
                    self._opened.append(card.handle)
                self.pools[region.region_id] = _PeerPool(card=region, words=memory.region, device_id=card.device_id, address=address)
        except BaseException:
            self._close_device()
            raise

    @property
    def in_step(self) -> bool:
        return not self.session.has_ended()

    def close(self) -> None:
        self.session.close()
        try:
            self._runtime.enter()
            self._close_device()
        except DeviceError as error:  # whoever computes on this device is told by it; the lane goes on to report what it has left
            log.error("kv device memory not closed", extra={"peer": self.session.peer.name, "reason": str(error)})
        for memory in self._words:
            memory.close()

    def _close_device(self) -> None:
        self.copies.close()
        for handle in self._opened:
            self._handles.close(handle)
        self._opened.clear()


def _copy_verified(
    pool: _PeerPool, pull: Pull, target_address: int, copies: Copies, look_up: Callable[[float], None], slice_bytes: int
) -> None:
    """Copy the pull's blocks; raise PullFailed unless all generations are the expected ones before and after.

    However it ends, nothing is under way any more.
    """
    block_ids = np.frombuffer(pull.source_block_ids, dtype=np.uint32)
    if len(block_ids) and int(block_ids.max()) >= pool.card.num_blocks:
        raise PullFailed(TransferError.REFUSED, f"block {int(block_ids.max())} of a pool of {pool.card.num_blocks}")
    expected = np.frombuffer(pull.generations, dtype=np.uint64)
    check_generations(pool.words, block_ids, expected, "before")
    try:
        for layers in follow(pool.words, pull, look_up):
            for runs in slices(pull, layers, slice_bytes):
                look_up(0.0)
                copies.begin(pool.address, target_address, runs)
                copies.wait(look_up, num_left=_SLICES_UNDER_WAY - 1)
        copies.wait(look_up, num_left=0)
    except BaseException:
        copies.drain()
        raise
    look_up(0.0)
    check_generations(pool.words, block_ids, expected, "after")
