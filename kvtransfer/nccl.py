"""Blocks by NCCL between two GPUs' workers; by gloo where there is no NVIDIA GPU, which is how this file is tested.

Each conversation has a process group of its own of two ranks (the source is 0), so that one pair that hangs can be aborted and no
other. NCCL's and gloo's rendezvous goes over the conversation's connection, which is authenticated: no store listens anywhere.
Neither has an end to its waiting that is ours, so both work on threads beside the conversation's, which watches the clock and the
peer: a rendezvous that takes too long is left alone, a carry is freed by aborting the group (ncclCommAbort), and with it the
conversation ends. Pools are in host memory: a piece goes through staging on the host and, by NCCL, through the device.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroupGloo, Store

from kvtransfer.config import TransportConfig
from kvtransfer.pieces import Channel, PiecewiseTransport
from kvtransfer.session import Session
from kvtransfer.staging import Done, Finish, StagedChannel, Staging
from protocol.errors import ConfigError, HandshakeRefused, MalformedFrame
from protocol.kv import Endpoint
from protocol.wire import Identity

_ENTRY_BYTES_MAX = 64 << 10  # a key and its value; NCCL's unique id has 128 bytes, gloo's addresses some hundred
_NAME_BYTES_MAX = 64
_KEY_SIZE = struct.Struct("<I")


class NcclTransport(PiecewiseTransport):
    """Listens on `config.host`:`config.nccl_port` for the conversation; the library's own sockets are bound to the same host."""

    name = "nccl"

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig, *, device: torch.device | None = None) -> None:
        """`device`: the GPU that carries our side, or the CPU for gloo; None: the current GPU where there is one.

        Raises:
            ConfigError: this torch cannot.
        """
        if not dist.is_available():
            raise ConfigError("kv_transport nccl needs a torch with torch.distributed; choose auto, shm or tcp")
        if device is None:
            device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        if device.type == "cuda" and not dist.is_nccl_available():
            raise ConfigError("kv_transport nccl on a GPU needs a torch built with NCCL; choose auto, shm or tcp")
        self._device = device
        super().__init__(identity, secret, config, port=config.nccl_port)

    def endpoint(self) -> Endpoint:
        return Endpoint(host=self._config.advertise_host or self._config.host, nccl_port=self.port)

    def port_of(self, endpoint: Endpoint) -> int:
        return endpoint.nccl_port

    def open_channel(self, session: Session, *, dialed: bool) -> Channel:
        """Both sides say what carries their end, since NCCL and gloo do not meet; then the group is made."""
        ours = _library(self._device)
        session.send_frame(ours.encode())
        theirs = session.receive_frame(_NAME_BYTES_MAX).decode(errors="replace")
        if theirs != ours:
            raise HandshakeRefused(f"{session.peer.name} carries blocks by {theirs[:16]}, we do by {ours}: both need a GPU, or neither")
        group = _Rendezvous(session, self._device, rank=1 if dialed else 0, config=self._config).run()
        return _GroupChannel(session, group, 0 if dialed else 1, self._device, self._config.channel_bytes)


class _GroupChannel(StagedChannel):
    def __init__(self, session: Session, group: Any, peer: int, device: torch.device, piece_bytes_max: int) -> None:
        super().__init__(session, piece_bytes_max=piece_bytes_max)
        self._group = group
        self._peer = peer
        self._device = device

    def carry_out(self, staging: Staging, done: Done) -> Finish:
        tensor = torch.from_numpy(staging).to(self._device)
        return self._carry(lambda: self._group.send([tensor], self._peer, 0), lambda: tensor, done)  # which lives until then

    def carry_in(self, staging: Staging, done: Done) -> Finish:
        ours = torch.from_numpy(staging)
        arriving = torch.empty_like(ours, device=self._device) if self._device.type == "cuda" else ours
        return self._carry(lambda: self._group.recv([arriving], self._peer, 0), lambda: ours.copy_(arriving), done)

    def give_up(self) -> None:
        self._group.abort()

    def _carry(self, start: Callable[[], Any], afterwards: Callable[[], object], done: Done) -> Finish:
        """Begun here, since the order is what tells one carry from the next; awaited on a thread of its own, which an abort frees."""
        failures: list[Exception] = []
        try:
            work = start()
        except RuntimeError as failure:  # torch has no narrower one for what its collectives meet
            raise self._lost(failure) from failure

        def run() -> None:
            try:
                work.wait()
                if self._device.type == "cuda":
                    torch.cuda.current_stream(self._device).synchronize()
                afterwards()
            except RuntimeError as failure:
                failures.append(failure)
            done()

        threading.Thread(target=run, name="kv-nccl-carry", daemon=True).start()

        def finish() -> None:
            if failures:
                raise self._lost(failures[0]) from failures[0]

        return finish

    def _lost(self, failure: Exception) -> ConnectionResetError:
        return ConnectionResetError(f"{_library(self._device)}: {failure}")


class _Rendezvous:
    """Makes a group on a thread of its own, while the conversation's thread carries the entries of the store to and fro."""

    def __init__(self, session: Session, device: torch.device, *, rank: int, config: TransportConfig) -> None:
        self._session = session
        self._device = device
        self._rank = rank
        self._timeout = timedelta(seconds=config.stall_timeout_s)
        self._host = config.host
        self._changed_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._store = _TwoRankStore(self._changed_fd)
        self._lock = threading.Lock()
        self._group: Any = None
        self._failure: Exception | None = None
        self._has_ended = False  # the thread has; guarded by the lock, as is the next
        self._given_up = False

    def run(self) -> Any:
        """The group, once both sides have sent and received a first byte.

        Raises:
            ConnectionResetError: it could not be made, or the peer is gone; whatever the session's pause raises.
        """
        threading.Thread(target=self._make, name="kv-nccl-make", daemon=True).start()
        either = select.epoll()
        either.register(self._changed_fd, select.EPOLLIN)
        either.register(self._session.fileno(), select.EPOLLIN | select.EPOLLRDHUP)
        try:
            self._exchange(either)
        except BaseException:
            self._give_up()
            raise
        finally:
            either.close()
            self._store.close()
            os.close(self._changed_fd)
        return self._group

    def _exchange(self, either: select.epoll) -> None:
        """An empty frame is the last of either side: what comes after it belongs to the conversation."""
        we_ended = they_ended = False
        while not (we_ended and they_ended):
            self._session.pause(either.fileno(), select.POLLIN | select.POLLOUT)
            ready = dict(either.poll(0))
            if self._changed_fd in ready:
                os.eventfd_read(self._changed_fd)
            with self._lock:
                has_ended, failure = self._has_ended, self._failure
            for entry in self._store.take_outgoing():
                self._session.send_frame(entry)
            if failure is not None:
                raise ConnectionResetError(f"{_library(self._device)}: {failure}") from failure
            if has_ended and not we_ended:
                self._session.send_frame(b"")
                we_ended = True
            if self._session.fileno() in ready and not they_ended:
                frame = self._session.receive_frame(_ENTRY_BYTES_MAX)
                they_ended = not frame
                if frame:
                    self._store.put_incoming(frame)
                if they_ended:
                    either.modify(self._session.fileno(), select.EPOLLRDHUP)
            elif self._session.fileno() in ready:
                raise ConnectionResetError(f"{self._session.peer.name} went away while a group was made")

    def _make(self) -> None:
        group: Any = None
        failure: Exception | None = None
        try:
            group = _make_group(self._store, self._rank, self._timeout, self._device, self._host)
            byte = torch.zeros(1, dtype=torch.uint8, device=self._device)  # NCCL looks into the store at the first use of a group
            (group.send([byte], 1, 0) if self._rank == 0 else group.recv([byte], 0, 0)).wait()
            if self._device.type == "cuda":
                torch.cuda.current_stream(self._device).synchronize()
        except (RuntimeError, OSError) as error:
            failure = error
        with self._lock:
            self._group, self._failure, self._has_ended = group, failure, True
            given_up = self._given_up
            if not given_up:
                os.eventfd_write(self._changed_fd, 1)
        if given_up and group is not None:
            group.abort()

    def _give_up(self) -> None:
        with self._lock:
            self._given_up = True
            group = self._group
        if group is not None:
            group.abort()


class _TwoRankStore(Store):
    """What torch calls a store, between two ranks: a key set on one side is sent to the other. Used while the group is made."""

    def __init__(self, changed_fd: int) -> None:
        super().__init__()
        self._changed_fd = changed_fd
        self._changed = threading.Condition()  # of all that follows
        self._entries: dict[str, bytes] = {}
        self._outgoing: list[bytes] = []
        self._is_closed = False

    def set(self, key: str, value: bytes | str) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        with self._changed:
            self._entries[key] = content
            if not self._is_closed:
                self._outgoing.append(_KEY_SIZE.pack(len(key.encode())) + key.encode() + content)
                os.eventfd_write(self._changed_fd, 1)

    def get(self, key: str) -> bytes:
        with self._changed:
            self._changed.wait_for(lambda: key in self._entries or self._is_closed)
            if key not in self._entries:
                raise ConnectionResetError("the rendezvous is over")
            return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """The conversation's thread ends it, by `close`."""
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        with self._changed:
            return all(key in self._entries for key in keys)

    def take_outgoing(self) -> list[bytes]:
        with self._changed:
            taken, self._outgoing = self._outgoing, []
            return taken

    def put_incoming(self, frame: bytes) -> None:
        end = _KEY_SIZE.size + _KEY_SIZE.unpack_from(frame)[0] if len(frame) >= _KEY_SIZE.size else 0
        if not _KEY_SIZE.size <= end <= len(frame):
            raise MalformedFrame("an entry of the rendezvous has no key")
        with self._changed:
            self._entries[frame[_KEY_SIZE.size : end].decode(errors="replace")] = frame[end:]
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is sent any more, and nobody waits any more."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def _library(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def _make_group(store: Store, rank: int, timeout: timedelta, device: torch.device, host: str) -> Any:
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread: NCCL asks for it
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timeout
    return ProcessGroupGloo(store, rank, 2, gloo)
