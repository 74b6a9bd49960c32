"""Framing, handshake and bounds of every socket between our processes.

    frame   = uint32-LE length ‖ msgpack [message number, fields]            (protocol.messages, protocol.codec)
    opening = Hello both ways, then Proof both ways: HMAC-SHA256 of both Hellos under the cluster secret

Nothing is unpickled: a frame is a size-capped msgpack list checked against the message's type hints. A peer that stops reading
is cut off once `max_unsent_bytes` wait for it (its credit), so a slow reader costs bounded memory. Each message is one write
with TCP_NODELAY: 15 us a round trip on loopback, where a Ray call takes 700.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from protocol.codec import from_wire, pack, to_wire, unpack
from protocol.errors import FrameTooLarge, HandshakeRefused, MalformedFrame, WireError
from protocol.messages import MESSAGES
from protocol.peering import PEERING_MESSAGES

WIRE_VERSION = 1
MAX_FRAME_BYTES = 64 << 20
MAX_UNSENT_BYTES = 256 << 20
HANDSHAKE_TIMEOUT_S = 5.0
_HANDSHAKE_FRAME_BYTES = 64 << 10

_LENGTH = struct.Struct("<I")
ALL_MESSAGES = MESSAGES + PEERING_MESSAGES
_NUMBER_OF = {cls: number for number, cls in enumerate(ALL_MESSAGES)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """Who speaks: said in HELLO, covered by the proof."""

    name: str  # worker id, "router", "gateway-0", "directory", ...
    kind: str  # "worker" | "router" | "gateway" | "directory" | "supervisor" | "client"
    epoch: int
    fingerprint: bytes = b""  # ModelFingerprint.digest where workers speak


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    version: int
    nonce: bytes
    name: str
    kind: str
    epoch: int
    fingerprint: bytes


def encode(message: object) -> bytes:
    """One frame, length included."""
    body = pack([_NUMBER_OF[type(message)], to_wire(message)])
    if len(body) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"{type(message).__name__} of {len(body)} bytes exceeds the frame limit {MAX_FRAME_BYTES}; split it")
    return _LENGTH.pack(len(body)) + body


def decode(body: bytes | memoryview) -> Any:
    """The message of one frame's body (without its length)."""
    value = unpack(body)
    if not isinstance(value, list) or len(value) != 2 or type(value[0]) is not int or not 0 <= value[0] < len(ALL_MESSAGES):
        raise MalformedFrame("a frame is [message number, fields]")
    return from_wire(ALL_MESSAGES[value[0]], value[1])


MessageCallback = Callable[["Connection", Any], None]
CloseCallback = Callable[["Connection", Exception | None], None]


class Connection(asyncio.Protocol):
    """One authenticated, ordered, message-wise connection. Everything runs on its event loop's thread.

    `on_message` is called once a frame and must not block; an exception in it closes the connection.
    `on_close` is called exactly once.
    """

    def __init__(
        self,
        identity: Identity,
        secret: bytes,
        *,
        dialed: bool,
        on_ready: Callable[[Connection], None] | None = None,
        max_unsent_bytes: int = MAX_UNSENT_BYTES,
    ) -> None:
        self.identity = identity
        self.peer = Identity(name="", kind="", epoch=0)
        self.on_message: MessageCallback | None = None
        self.on_close: CloseCallback | None = None
        self.ready: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._secret = secret
        self._dialed = dialed
        self._on_ready = on_ready
        self._max_unsent_bytes = max_unsent_bytes
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._my_hello = b""
        self._peer_hello: bytes | None = None
        self._error: Exception | None = None
        self._closed = False

    # --- what callers use ---

    def send(self, message: object) -> None:
        """Queue one message; silently dropped when the connection is already closed (on_close has told or will tell)."""
        self.send_encoded(encode(message))

    def send_encoded(self, frame: bytes) -> None:
        """Queue frames made by `encode`: to several peers without encoding again, or several messages in one write."""
        transport = self._transport
        if transport is None or self._closed or transport.is_closing():
            return
        transport.write(frame)
        if transport.get_write_buffer_size() > self._max_unsent_bytes:
            self._fail(WireError(f"{self.peer.name or 'peer'} left more than {self._max_unsent_bytes} bytes unread"))

    @property
    def unsent_bytes(self) -> int:
        return self._transport.get_write_buffer_size() if self._transport else 0

    @property
    def is_open(self) -> bool:
        return not self._closed and self._transport is not None and self.ready.done()

    def close(self) -> None:
        """Flush what is queued, then close."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close now and drop what is queued."""
        if self._transport is not None:
            self._transport.abort()

    def socket(self) -> socket.socket | None:
        return self._transport.get_extra_info("socket") if self._transport else None

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's transports do not inherit from it
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        hello = Hello(
            version=WIRE_VERSION,
            nonce=secrets.token_bytes(32),
            name=self.identity.name,
            kind=self.identity.kind,
            epoch=self.identity.epoch,
            fingerprint=self.identity.fingerprint,
        )
        self._my_hello = pack(to_wire(hello))
        self._transport.write(_LENGTH.pack(len(self._my_hello)) + self._my_hello)

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        start = 0
        try:
            while len(received) - start >= 4:
                (length,) = _LENGTH.unpack_from(received, start)
                limit = MAX_FRAME_BYTES if self.ready.done() else _HANDSHAKE_FRAME_BYTES
                if length > limit:
                    raise FrameTooLarge(f"{self.peer.name or 'peer'} announces a frame of {length} bytes; the limit is {limit}")
                if len(received) - start - 4 < length:
                    break
                body = bytes(memoryview(received)[start + 4 : start + 4 + length])
                start += 4 + length
                if self.ready.done():
                    message = decode(body)
                    if self.on_message is not None:
                        self.on_message(self, message)
                else:
                    self._handshake(body)
                if self._closed or (self._transport is not None and self._transport.is_closing()):
                    break
        except Exception as error:  # a confused peer or a bug of ours: either way this connection is over
            if not isinstance(error, WireError):
                asyncio.get_running_loop().call_exception_handler(
                    {"message": f"while reading from {self.peer.name or 'a peer'}", "exception": error}
                )
            self._fail(error)
        del received[:start]

    def connection_lost(self, exc: Exception | None) -> None:
        if self._closed:
            return
        self._closed = True
        error = self._error or exc
        if not self.ready.done():
            self.ready.set_exception(error or HandshakeRefused("the peer closed the connection during the handshake"))
            self.ready.exception()  # mark as seen: a listener has nobody awaiting it
        if self.on_close is not None:
            self.on_close(self, error)

    # --- handshake ---

    def _handshake(self, body: bytes) -> None:
        if self._peer_hello is None:
            hello = from_wire(Hello, unpack(body))
            if hello.version != WIRE_VERSION:
                raise HandshakeRefused(
                    f"peer speaks wire version {hello.version}, we speak {WIRE_VERSION}; run one Baton version cluster-wide"
                )
            self._peer_hello = body
            self.peer = Identity(name=hello.name, kind=hello.kind, epoch=hello.epoch, fingerprint=hello.fingerprint)
            proof = self._proof(of_dialer=self._dialed)
            assert self._transport is not None
            self._transport.write(_LENGTH.pack(len(proof)) + proof)
            return
        if not hmac.compare_digest(body, self._proof(of_dialer=not self._dialed)):
            raise HandshakeRefused(f"{self.peer.name} does not know the cluster secret")
        self.ready.set_result(self)
        if self._on_ready is not None:
            self._on_ready(self)  # before the next frame of the same segment is read

    def _proof(self, *, of_dialer: bool) -> bytes:
        assert self._peer_hello is not None
        first, second = (self._my_hello, self._peer_hello) if self._dialed else (self._peer_hello, self._my_hello)
        side = b"dialer" if of_dialer else b"listener"
        return hmac.new(self._secret, side + hashlib.sha256(first).digest() + hashlib.sha256(second).digest(), "sha256").digest()

    def _fail(self, error: Exception) -> None:
        self._error = self._error or error
        if self._transport is not None:
            self._transport.abort()


async def dial(
    identity: Identity,
    secret: bytes,
    *,
    host: str = "",
    port: int = 0,
    unix_path: str = "",
    on_message: MessageCallback,
    on_close: CloseCallback,
    timeout_s: float = HANDSHAKE_TIMEOUT_S,
) -> Connection:
    """An authenticated connection to a listener; `on_close` is called only if this returned.

    Raises:
        OSError: nobody listens there. WireError: the handshake failed. TimeoutError: it took longer than `timeout_s`.
    """
    loop = asyncio.get_running_loop()

    def make() -> Connection:
        return Connection(identity, secret, dialed=True)

    async with asyncio.timeout(timeout_s):
        if unix_path:
            _, connection = await loop.create_unix_connection(make, unix_path)
        else:
            _, connection = await loop.create_connection(make, host, port)
        connection.on_message = on_message
        try:
            await connection.ready
        except BaseException:
            connection.abort()
            raise
    connection.on_close = on_close
    if not connection.is_open:  # lost between the proof and this line
        raise WireError(f"{connection.peer.name} closed the connection right after the handshake")
    return connection


class Listener:
    """A listening socket; `accept` is called with each connection once it is authenticated and sets its callbacks."""

    def __init__(self, identity: Identity, secret: bytes, accept: Callable[[Connection], None]) -> None:
        self._identity = identity
        self._secret = secret
        self._accept = accept
        self._server: asyncio.AbstractServer | None = None
        self._connections: set[Connection] = set()
        self.host = ""
        self.port = 0
        self.unix_path = ""

    async def start(self, *, host: str = "127.0.0.1", port: int = 0, unix_path: str = "") -> None:
        """Listen on a TCP port (0: any free one, then in `self.port`) or on a Unix socket.

        Raises:
            HandshakeRefused: a bind outside loopback without a cluster secret.
        """
        loop = asyncio.get_running_loop()
        if unix_path:
            self._server = await loop.create_unix_server(self._make, unix_path)
            os.chmod(unix_path, 0o600)
            self.unix_path = unix_path
            return
        if not self._secret and not is_loopback(host):
            raise HandshakeRefused(f"refusing to listen on {host} without a cluster secret; set one or bind to 127.0.0.1")
        self._server = await loop.create_server(self._make, host, port)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]

    def close(self) -> None:
        """Stop listening and drop every connection; callbacks `on_close` still come."""
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.abort()
        if self.unix_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.unix_path)

    def _make(self) -> Connection:
        connection = Connection(self._identity, self._secret, dialed=False, on_ready=self._welcome)
        self._connections.add(connection)
        connection.on_close = lambda c, _: self._connections.discard(c)
        asyncio.get_running_loop().call_later(HANDSHAKE_TIMEOUT_S, self._expect_ready, connection)
        return connection

    def _welcome(self, connection: Connection) -> None:
        self._accept(connection)
        told = connection.on_close

        def on_close(c: Connection, error: Exception | None) -> None:
            self._connections.discard(c)
            if told is not None:
                told(c, error)

        connection.on_close = on_close

    @staticmethod
    def _expect_ready(connection: Connection) -> None:
        if not connection.ready.done():
            connection.abort()


def is_loopback(host: str) -> bool:
    """True for 127.0.0.0/8, ::1 and localhost."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
