"""Pulls in pieces, asked for and answered over one authenticated connection a pair of processes.

    target ── Pull(blocks, generations, clock) ───► source     a few pieces asked for ahead: the credit
    target ◄── ticket, size ── the piece's bytes ── PullTrailer ── source    beside the connection, bytes of the next are under way

How the bytes go is the backend's (`Channel`): on the connection itself (kvtransfer.tcp), or beside it (kvtransfer.ucx,
kvtransfer.nccl), where the connection is also how the death of a peer is told to a library that would wait for ever. The source
waits for its clock where the blocks are still being computed, looks at the generations before it sends and again after the last
byte has left the pool, and says in the trailer what it saw; the trailer follows when whoever carries the bytes needs no memory of the
source any more, so what it vouches for has been read intact. A pull stopped half-way ends the connection, since nothing else stops a
stream.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import time
from abc import abstractmethod
from array import array
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import Runs
from kvtransfer.config import TransportConfig
from kvtransfer.lanes import Link, PeerTransport, Pull, PullFailed
from kvtransfer.layer_clock import reached, wait_for
from kvtransfer.layers import Layers, Places, split_by_readiness
from kvtransfer.region import first_stale
from kvtransfer.session import Announcement, Pause, PeerServer, RegionCard, Session
from kvtransfer.transport import Region
from protocol import wire
from protocol.bulk import Pull as PullRequest
from protocol.bulk import PullTrailer
from protocol.errors import HandshakeRefused, MalformedFrame
from protocol.kv import Endpoint, HandoffShard, TransferError
from protocol.wire import Identity

_HEAD = struct.Struct("<QQ")  # ticket, bytes that follow (0: refused, the trailer says why)
_PIECE_BLOCKS_MAX = 8192  # so that a request fits the socket buffers while the peer is busy sending
_KEEPALIVE = (10, 5, 3)  # seconds of silence, seconds between probes, probes: a host that vanished is noticed in 25 s


class Channel(Protocol):
    """How the bytes of pieces go between two processes. Used by one thread at a time, in the order of the requests."""

    piece_bytes_max: int  # what one `send` or `receive` may carry
    pieces_ahead: int  # that a target asks for before it has the first of them
    pieces_under_way: int  # that a source may have sent and not flushed

    def expect(self, size_bytes: int) -> None:
        """A piece was asked for; `receive` follows, in the order of the requests, unless the source refuses."""
        ...

    def send(self, blocks: memoryview, runs: Runs) -> None:
        """runs [num_runs, 2] int64: (offset, size) in `blocks`. Begins to send; `flush` ends it."""
        ...

    def flush(self, *, or_input: bool) -> bool:
        """Wait until of the piece sent first, among those not flushed, nothing is read on our side any more, in the pool or elsewhere.

        With `or_input` not longer than until the peer says something; False: it did, and the piece is not flushed.
        """
        ...

    def forgo(self) -> bool:
        """The piece expected first will not come: its source refused it. False: the channel still waits for it, and is of no more use."""
        ...

    def receive(self, blocks: memoryview, runs: Runs) -> None:
        """Fill the runs with the piece expected first. Once it returned or raised, nothing writes `blocks` any more."""
        ...

    def close(self) -> None: ...


class PiecewiseTransport(PeerTransport):
    """Both sides of the conversation. Listens on `config.host`; refuses to do so outside loopback without a cluster secret."""

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig, *, port: int) -> None:
        if not secret and not wire.is_loopback(config.host):
            raise HandshakeRefused(f"refusing to listen on {config.host} without a cluster secret; set one or bind to 127.0.0.1")
        super().__init__(identity, secret, config)
        listener = _listen(config, port)
        self.port: int = listener.getsockname()[1]
        self._server = PeerServer(
            listener,
            identity,
            secret,
            name=f"kv-{self.name}-serve",
            serve=self._serve,
            max_peers=config.max_peers,
            stall_timeout_s=config.stall_timeout_s,
        )

    @abstractmethod
    def open_channel(self, session: Session, *, dialed: bool) -> Channel:
        """After the announcement; both sides call it at the same point of the conversation, on the thread that serves the session."""

    @abstractmethod
    def port_of(self, endpoint: Endpoint) -> int:
        """Where the peer listens for this backend; 0: nowhere."""

    def close(self) -> None:
        super().close()
        self._server.close()

    # --- source side, on the server's threads ---

    def _serve(self, session: Session) -> None:
        cards = tuple(RegionCard(region_id=r.region_id, num_blocks=r.num_blocks, layout=r.layout) for r in self._regions.values())
        session.announce(Announcement(regions=cards))
        channel = self.open_channel(session, dialed=False)
        owed: deque[_Sent] = deque()
        try:
            while True:
                if owed and channel.flush(or_input=len(owed) < channel.pieces_under_way):
                    _settle(session, owed)
                    continue
                request = wire.decode(session.receive_frame())
                if not isinstance(request, PullRequest) or len(request.block_ids) != len(request.generations):
                    raise MalformedFrame(f"expected a Pull with a generation a block, got {type(request).__name__}")
                self._answer(session, channel, request, owed)
        finally:
            channel.close()

    def _answer(self, session: Session, channel: Channel, request: PullRequest, owed: deque[_Sent]) -> None:
        region = self._regions.get(request.region_id)
        block_ids = np.frombuffer(request.block_ids, dtype=np.uint32)
        layers = None
        error: TransferError | None = None
        if request.epoch != self._identity.epoch:
            error = TransferError.STALE_EPOCH
        elif region is None or (layers := _asked_for(region, block_ids, request, channel.piece_bytes_max)) is None:
            error = TransferError.REFUSED
        elif not self._wait_for_clock(session, channel, region, request.clock, owed):
            error = TransferError.DEADLINE
        elif first_stale(region, block_ids, np.frombuffer(request.generations, dtype=np.uint64)) is not None:
            error = TransferError.STALE_GENERATION
        if error is not None or region is None or layers is None:
            while owed:
                channel.flush(or_input=False)
                _settle(session, owed)
            _send_trailer(session, request.ticket, array("Q"), error, _HEAD.pack(request.ticket, 0))
            return
        head = _HEAD.pack(request.ticket, len(block_ids) * layers.size_bytes)
        if not owed:
            session.send([head])
        channel.send(region.blocks, layers.runs(region.layout, block_ids, np.arange(len(block_ids)))[:, [0, 2]])
        owed.append(_Sent(ticket=request.ticket, head=head, region=region, block_ids=block_ids))

    def _wait_for_clock(self, session: Session, channel: Channel, region: Region, clock: int, owed: deque[_Sent]) -> bool:
        """True once the layers asked for are computed; False when that takes as long as a peer may stall. What is owed does not wait."""
        if reached(region) >= clock:
            return True
        while owed:
            channel.flush(or_input=False)
            _settle(session, owed)
        give_up = time.monotonic() + self._config.stall_timeout_s

        def rest(seconds: float) -> None:
            if session.has_hung_up():
                raise ConnectionResetError(f"{session.peer.name} went away while it waited for layers")
            if time.monotonic() >= give_up:
                raise TimeoutError
            session.rest(seconds)

        try:
            wait_for(region, clock, rest)
        except TimeoutError:
            return False
        return True

    # --- target side, on a lane's thread ---

    def connect(self, source: HandoffShard, pause: Pause) -> Link:
        endpoint = source.endpoint
        port = self.port_of(endpoint)
        if not port:
            raise PullFailed(TransferError.REFUSED, f"{source.worker_id} offers no {self.name} path")
        session = Session(_dial(endpoint.host, port, self._config, pause), pause)
        try:
            session.handshake(self._identity, self._secret, dialed=True)
            announcement, _ = session.receive_announcement(with_fds=False)
            return _Conversation(session, announcement, self.open_channel(session, dialed=True))
        except BaseException:
            session.close()
            raise

    def copy(self, link: Link, pull: Pull, rest: Callable[[float], None]) -> None:
        assert isinstance(link, _Conversation)
        source = pull.transfer.source
        card = link.regions.get(source.region_id)
        if card is None or card.layout != source.layout:
            raise PullFailed(TransferError.REFUSED, f"region {source.region_id} is not there, or not of the layout offered")
        piece_bytes = min(self._config.max_inflight_bytes // link.channel.pieces_ahead, link.channel.piece_bytes_max)
        asked: deque[tuple[int, _Piece]] = deque()
        for piece in _pieces(pull, piece_bytes):
            if len(asked) == link.channel.pieces_ahead:
                _receive_piece(link, pull, *asked.popleft())
            rest(0.0)
            asked.append((link.ask(pull, piece), piece))
        while asked:
            _receive_piece(link, pull, *asked.popleft())


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Sent:
    """A piece whose trailer is owed; its head was sent if it is the first of those."""

    ticket: int
    head: bytes
    region: Region
    block_ids: npt.NDArray[np.uint32]


class _Conversation:
    """A connection to one peer."""

    def __init__(self, session: Session, announcement: Announcement, channel: Channel) -> None:
        self.session = session
        self.channel = channel
        self.regions = {card.region_id: card for card in announcement.regions}
        self._last_ticket = 0
        self._num_unanswered = 0

    @property
    def in_step(self) -> bool:
        """True when every piece asked for was answered to its trailer: with blocks, or with a refusal that leaves the channel as it was."""
        return self._num_unanswered == 0

    def ask(self, pull: Pull, piece: _Piece) -> int:
        self._num_unanswered += 1
        self.channel.expect(piece.size_bytes)
        self._last_ticket += 1
        source = pull.transfer.source
        request = PullRequest(
            ticket=self._last_ticket,
            epoch=source.epoch,
            region_id=source.region_id,
            block_ids=array("I", np.frombuffer(pull.source_block_ids, dtype=np.uint32)[piece.layers.places].tobytes()),
            generations=piece.generations(pull),
            clock=piece.clock,
            first_layer=piece.first_layer,
            num_layers=piece.num_layers,
        )
        self.session.send([wire.encode(request)])
        return self._last_ticket

    def answered(self) -> None:
        self._num_unanswered -= 1

    def close(self) -> None:
        self.channel.close()
        self.session.close()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Piece:
    """Layers of some blocks of a pull, asked for and answered at once."""

    layers: Layers
    clock: int  # the source sends it when its region's clock is there
    first_layer: int = 0
    num_layers: int = 0  # 0: whole blocks

    @property
    def size_bytes(self) -> int:
        return len(self.layers.places) * self.layers.size_bytes

    def generations(self, pull: Pull) -> array[int]:
        return array("Q", np.frombuffer(pull.generations, dtype=np.uint64)[self.layers.places].tobytes())


def _receive_piece(link: _Conversation, pull: Pull, ticket: int, piece: _Piece) -> None:
    pull.check()
    session, region, places = link.session, pull.target, piece.layers.places
    head = bytearray(_HEAD.size)
    session.receive_into([memoryview(head)])
    said_ticket, said_bytes = _HEAD.unpack(head)
    if said_ticket != ticket or said_bytes not in (0, piece.size_bytes):
        raise MalformedFrame(f"asked for {piece.size_bytes} bytes as {ticket}, announced are {said_bytes} as {said_ticket}")
    if said_bytes:
        targets = np.frombuffer(pull.transfer.target_block_ids, dtype=np.uint32)[places]
        link.channel.receive(region.blocks, piece.layers.runs(region.layout, np.arange(len(places)), targets)[:, [1, 2]])
    trailer = wire.decode(session.receive_frame())
    if not isinstance(trailer, PullTrailer) or trailer.ticket != ticket:
        raise MalformedFrame(f"expected the trailer of {ticket}, got {type(trailer).__name__}")
    if bool(trailer.error) == bool(said_bytes):
        raise MalformedFrame(f"{said_bytes} bytes were sent, and the trailer says {trailer.error or 'no error'!r}")
    if said_bytes or link.channel.forgo():
        link.answered()
    if trailer.error:
        raise PullFailed(_error_named(trailer.error), f"{session.peer.name} refused: {trailer.error}")
    if trailer.generations != piece.generations(pull):
        raise PullFailed(TransferError.STALE_GENERATION, f"{session.peer.name} wrote blocks anew while they were sent")


def _asked_for(region: Region, block_ids: npt.NDArray[np.uint32], request: PullRequest, piece_bytes_max: int) -> Layers | None:
    """None: it asks for what is not there, or for more than a piece may carry."""
    first, count = request.first_layer, request.num_layers
    if first < 0 or count < 0 or first + count > region.layout.num_layers:
        return None
    layers = Layers.of(region.layout, np.arange(len(block_ids)), first, count)
    size_bytes = len(block_ids) * layers.size_bytes
    return layers if 0 < size_bytes <= piece_bytes_max and int(block_ids.max()) < region.num_blocks else None


def _pieces(pull: Pull, piece_bytes: int) -> Iterator[_Piece]:
    """In the order in which they become ready: whole blocks, then the layers of those that are still being computed, one by one."""
    layout, clock = pull.target.layout, pull.transfer.source.layer_clock
    whole, growing = split_by_readiness(pull)
    for places in _slices(whole, piece_bytes // layout.block_bytes):
        yield _Piece(layers=Layers.of(layout, places, 0, 0), clock=clock)
    for layer in range(layout.num_layers if len(growing) else 0):
        layers = Layers.of(layout, growing, layer, 1)
        for places in _slices(growing, piece_bytes // layers.size_bytes):
            yield _Piece(layers=replace(layers, places=places), clock=clock + layer + 1, first_layer=layer, num_layers=1)


def _slices(places: Places, max_blocks: int) -> Iterator[Places]:
    step = max(1, min(_PIECE_BLOCKS_MAX, max_blocks))
    return (places[start : start + step] for start in range(0, len(places), step))


def _settle(session: Session, owed: deque[_Sent]) -> None:
    """Send the trailer owed first, of a piece that was flushed, and the head after it."""
    sent = owed.popleft()
    words = np.frombuffer(sent.region.generations, dtype=np.uint64)
    _send_trailer(session, sent.ticket, array("Q", words[sent.block_ids].tobytes()), None, then=owed[0].head if owed else b"")


def _send_trailer(
    session: Session, ticket: int, generations: array[int], error: TransferError | None, head: bytes = b"", *, then: bytes = b""
) -> None:
    trailer = PullTrailer(ticket=ticket, generations=generations, error=error.value if error else "")
    session.send([head + wire.encode(trailer) + then])


def _error_named(value: str) -> TransferError:
    try:
        return TransferError(value)
    except ValueError:
        raise MalformedFrame(f"{value!r} is not a TransferError") from None


def _listen(config: TransportConfig, port: int) -> socket.socket:
    address = socket.getaddrinfo(config.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    listener = socket.socket(address[0], socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _tune(listener, config)  # accepted sockets inherit it
        listener.bind(address[4])
    except BaseException:
        listener.close()
        raise
    return listener


def _dial(host: str, port: int, config: TransportConfig, pause: Pause) -> socket.socket:
    address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(address[0], socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _tune(sock, config)
        code = sock.connect_ex(address[4])
        if code == errno.EINPROGRESS:
            pause(sock.fileno(), select.POLLOUT)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, f"{os.strerror(code)}: {host}:{port}")
    except BaseException:
        sock.close()
        raise
    return sock


def _tune(sock: socket.socket, config: TransportConfig) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, config.socket_buffer_bytes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, config.socket_buffer_bytes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in zip((socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT), _KEEPALIVE, strict=True):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)
