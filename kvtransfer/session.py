"""Authenticated sockets for threads that move blocks: what protocol.wire is to the event loop, with descriptors and scatter.

    opening = Hello both ways, then Proof both ways (HMAC-SHA256 of both Hellos under the cluster secret), then the listener's
              Announcement: the regions it offers; over a Unix socket with their descriptors
    frame   = uint32-LE length ‖ body, as in protocol.wire

Sockets never block: a session that has to wait calls its `pause`, which belongs to whoever owns the thread and gives up there
at a deadline, a cancellation or a shutdown.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kernels.socket_runs import Spans, new_cursor, receive_runs, send_runs
from protocol.codec import from_wire, pack, to_wire, unpack
from protocol.errors import ConfigError, FrameTooLarge, HandshakeRefused, MalformedFrame, WireError
from protocol.kv import KVLayout
from protocol.wire import HANDSHAKE_TIMEOUT_S, WIRE_VERSION, Hello, Identity

log = logging.getLogger(__name__)

MAX_FRAME_BYTES = 16 << 20  # a Pull of a million blocks
_HANDSHAKE_FRAME_BYTES = 64 << 10
_MAX_REGIONS = 16
_BACKLOG = 128
_BURST_BYTES = 1 << 20  # of one system call: more than the socket buffer holds would be looked at twice
_BURST_VIEWS = 1024  # IOV_MAX
_MAX_UNIX_PATH_BYTES = 107  # sun_path, less its final zero
_LENGTH = struct.Struct("<I")

Pause = Callable[[int, int], None]  # (descriptor, poll events): returns once it is ready, raises to give up
View = bytes | memoryview


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionCard:
    region_id: int
    num_blocks: int
    layout: KVLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """What a source says after the handshake; Hello has said its epoch and fingerprint."""

    regions: tuple[RegionCard, ...]


class Session:
    """One connected socket. Used by one thread at a time; raises OSError when the peer is gone, WireError when it is confused."""

    def __init__(self, sock: socket.socket, pause: Pause) -> None:
        sock.setblocking(False)
        self.peer = Identity(name="", kind="", epoch=0)
        self.pause = pause
        self.rest: Callable[[float], None] = time.sleep  # a short wait for something else than the socket; may raise to give up
        self._socket = sock

    def fileno(self) -> int:
        return self._socket.fileno()

    def handshake(self, identity: Identity, secret: bytes, *, dialed: bool) -> None:
        """Prove to each other that both know the cluster secret.

        Raises:
            HandshakeRefused: another wire version, or another secret.
        """
        hello = Hello(
            version=WIRE_VERSION,
            nonce=secrets.token_bytes(32),
            name=identity.name,
            kind=identity.kind,
            epoch=identity.epoch,
            fingerprint=identity.fingerprint,
        )
        mine = pack(to_wire(hello))
        self.send_frame(mine)
        theirs = self.receive_frame(_HANDSHAKE_FRAME_BYTES)
        said = from_wire(Hello, unpack(theirs))
        if said.version != WIRE_VERSION:
            raise HandshakeRefused(f"peer speaks wire version {said.version}, we speak {WIRE_VERSION}; run one Baton version cluster-wide")
        first, second = (mine, theirs) if dialed else (theirs, mine)
        self.send_frame(_proof(secret, first, second, of_dialer=dialed))
        if not hmac.compare_digest(self.receive_frame(_HANDSHAKE_FRAME_BYTES), _proof(secret, first, second, of_dialer=not dialed)):
            raise HandshakeRefused(f"{said.name} does not know the cluster secret")
        self.peer = Identity(name=said.name, kind=said.kind, epoch=said.epoch, fingerprint=said.fingerprint)

    def announce(self, announcement: Announcement, fds: Sequence[int] = ()) -> None:
        self.send_frame(pack(to_wire(announcement)), fds)

    def receive_announcement(self, *, with_fds: bool) -> tuple[Announcement, list[int]]:
        """The caller owns the descriptors: one a region, or none."""
        fds: list[int] = []
        try:
            body = self.receive_frame(_HANDSHAKE_FRAME_BYTES, fds if with_fds else None)
            announcement = from_wire(Announcement, unpack(body))
            if with_fds and len(fds) != len(announcement.regions):
                raise MalformedFrame(f"{len(announcement.regions)} regions announced, {len(fds)} descriptors received")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return announcement, fds

    def send_frame(self, body: bytes, fds: Sequence[int] = ()) -> None:
        frame = memoryview(_LENGTH.pack(len(body)) + body)
        if fds:
            self._until_ready(select.POLLOUT)
            frame = frame[socket.send_fds(self._socket, [frame], list(fds)) :]
        self.send([frame])

    def receive_frame(self, limit_bytes: int = MAX_FRAME_BYTES, fds: list[int] | None = None) -> bytes:
        """The body of the next frame; descriptors that came with it are appended to `fds`."""
        head = bytearray(_LENGTH.size)
        self.receive_into([memoryview(head)], fds)
        (length,) = _LENGTH.unpack(head)
        if length > limit_bytes:
            raise FrameTooLarge(f"{self.peer.name or 'peer'} announces a frame of {length} bytes; the limit is {limit_bytes}")
        body = bytearray(length)
        self.receive_into([memoryview(body)], fds)
        return bytes(body)

    def send(self, views: Sequence[View]) -> None:
        """All bytes of `views`, gathered straight from where they lie."""
        for burst in _bursts(views):
            while burst:
                try:
                    sent = self._socket.sendmsg(burst)
                except BlockingIOError:
                    self._until_ready(select.POLLOUT)
                    continue
                burst = _after(burst, sent)

    def receive_into(self, views: Sequence[memoryview], fds: list[int] | None = None) -> None:
        """Fill `views`, scattering straight to where the bytes belong."""
        ancillary_bytes = 0 if fds is None else socket.CMSG_SPACE(4 * _MAX_REGIONS)
        for burst in _bursts(views):
            while burst:
                try:
                    received, ancillary, flags, _ = self._socket.recvmsg_into(burst, ancillary_bytes, socket.MSG_CMSG_CLOEXEC)
                except BlockingIOError:
                    self._until_ready(select.POLLIN)
                    continue
                if fds is not None:
                    fds += _descriptors(ancillary)
                if flags & socket.MSG_CTRUNC and fds is not None:
                    raise MalformedFrame(f"more than {_MAX_REGIONS} descriptors came with one frame")
                if not received:
                    raise ConnectionResetError(f"{self.peer.name or 'the peer'} closed the connection")
                burst = _after(burst, received)

    def send_runs(self, blocks: memoryview, runs: Spans) -> None:
        """Runs (offset, size) of `blocks`, gathered straight from where they lie."""
        cursor = new_cursor()
        while not send_runs(self._socket, blocks, runs, cursor):
            self._until_ready(select.POLLOUT)

    def receive_runs(self, blocks: memoryview, runs: Spans) -> None:
        """Fill runs (offset, size) of `blocks`, straight where the bytes belong."""
        cursor = new_cursor()
        try:
            while not receive_runs(self._socket, blocks, runs, cursor):
                self._until_ready(select.POLLIN)
        except EOFError:
            raise ConnectionResetError(f"{self.peer.name or 'the peer'} closed the connection") from None

    def has_ended(self) -> bool:
        """True when the peer hung up, or says something while nothing is due: either way this session is of no more use."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def has_hung_up(self) -> bool:
        """True when the peer is gone, whatever it said before and we have not read."""
        poller = select.poll()
        poller.register(self._socket, select.POLLRDHUP)
        return bool(poller.poll(0))

    def close(self) -> None:
        self._socket.close()

    def _until_ready(self, events: int) -> None:
        self.pause(self._socket.fileno(), events)


class PeerServer:
    """Accepts peers on one listening socket; authenticates and serves each on a thread of its own.

    `serve(session)` runs until the peer leaves. More than `max_peers` at once are turned away.
    """

    def __init__(
        self,
        listener: socket.socket,
        identity: Identity,
        secret: bytes,
        *,
        name: str,
        serve: Callable[[Session], None],
        max_peers: int,
        stall_timeout_s: float,
    ) -> None:
        self._listener = listener
        self._identity = identity
        self._secret = secret
        self._serve = serve
        self._max_peers = max_peers
        self._stall_timeout_s = stall_timeout_s
        self._closing = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)  # written once, at close; never read
        self._peers: set[threading.Thread] = set()  # touched by the accepting thread alone
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._thread = threading.Thread(target=self._accept_all, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening, hang up on every peer, join all threads. A second call does nothing."""
        if self._closing < 0:
            return
        os.eventfd_write(self._closing, 1)
        self._thread.join()
        os.close(self._closing)
        self._closing = -1

    def _accept_all(self) -> None:
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        poller.register(self._closing, select.POLLIN)
        with self._listener:
            while self._closing not in [fd for fd, _ in poller.poll()]:
                self._peers = {p for p in self._peers if p.is_alive()}
                try:
                    sock, _ = self._listener.accept()
                except OSError:  # it left before we looked, or we are out of descriptors
                    self._closed_within(0.01)
                    continue
                if len(self._peers) >= self._max_peers:
                    log.warning("kv peer turned away", extra={"max_peers": self._max_peers})
                    sock.close()
                    continue
                peer = threading.Thread(target=self._serve_one, args=(sock,), name=f"{self._thread.name}-peer", daemon=True)
                self._peers.add(peer)
                peer.start()
        for peer in self._peers:
            peer.join()

    def _serve_one(self, sock: socket.socket) -> None:
        session = Session(sock, lambda fd, events: self._pause(fd, events, HANDSHAKE_TIMEOUT_S))
        try:
            session.handshake(self._identity, self._secret, dialed=False)
            session.pause = self._serving_pause
            session.rest = self._rest
            self._serve(session)
        except (OSError, WireError, _ServerClosed) as error:
            log.debug("kv peer left", extra={"peer": session.peer.name, "reason": str(error)})
        finally:
            session.close()

    def _serving_pause(self, fd: int, events: int) -> None:
        """Between two requests a peer may be silent as long as it likes; while it is sent something it must read."""
        self._pause(fd, events, self._stall_timeout_s if events & select.POLLOUT else None)

    def _pause(self, fd: int, events: int, timeout_s: float | None) -> None:
        poller = select.poll()
        poller.register(fd, events)
        poller.register(self._closing, select.POLLIN)
        ready = poller.poll(None if timeout_s is None else timeout_s * 1000)
        if self._closing in [f for f, _ in ready]:
            raise _ServerClosed
        if not ready:
            raise TimeoutError(f"peer stalled for {timeout_s} s")

    def _rest(self, seconds: float) -> None:
        if self._closed_within(seconds):
            raise _ServerClosed

    def _closed_within(self, timeout_s: float) -> bool:
        return bool(select.select([self._closing], [], [], timeout_s)[0])


class _ServerClosed(Exception):
    """Unwinds a serving thread."""


def listen_unix(path: str) -> socket.socket:
    """A socket bound to `path`, readable by us alone.

    Raises:
        ConfigError: the path is longer than the system takes. OSError: it is taken.
    """
    if len(os.fsencode(path)) > _MAX_UNIX_PATH_BYTES:
        raise ConfigError(f"the socket path {path} is longer than {_MAX_UNIX_PATH_BYTES} bytes; choose a shorter run directory")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
    except BaseException:
        listener.close()
        raise
    return listener


def dial_unix(path: str, pause: Pause) -> Session:
    """Connected, not yet authenticated.

    Raises:
        OSError: nobody listens there.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return Session(sock, pause)


def _proof(secret: bytes, first: bytes, second: bytes, *, of_dialer: bool) -> bytes:
    side = b"kv-dialer" if of_dialer else b"kv-listener"
    return hmac.new(secret, side + hashlib.sha256(first).digest() + hashlib.sha256(second).digest(), "sha256").digest()


def _bursts(views: Sequence[View]) -> list[list[memoryview]]:
    """`views` in order, in lists small enough for one system call; empty views are dropped."""
    bursts: list[list[memoryview]] = []
    room = 0
    for view in views:
        left = memoryview(view)
        while len(left):
            if room <= 0 or len(bursts[-1]) == _BURST_VIEWS:
                bursts.append([])
                room = _BURST_BYTES
            piece = left[:room]
            bursts[-1].append(piece)
            room -= len(piece)
            left = left[len(piece) :]
    return bursts


def _after(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What is left of `views` once `num_bytes` of them are done."""
    for index, view in enumerate(views):
        if num_bytes < len(view):
            return [view[num_bytes:], *views[index + 1 :]]
        num_bytes -= len(view)
    return []


def _descriptors(ancillary: Sequence[tuple[int, int, bytes]]) -> list[int]:
    fds: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds += struct.unpack(f"{len(content) // 4}i", content[: len(content) // 4 * 4])
    return fds
