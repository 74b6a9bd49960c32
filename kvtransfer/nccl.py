"""Blocks by NCCL between two GPUs' workers; by gloo where there is no NVIDIA GPU, which is how this file is tested.

Each conversation has a process group of its own of two ranks (the source is 0), so that one pair that hangs can be aborted and no
other. NCCL's and gloo's rendezvous goes over the conversation's connection, which is authenticated: no store listens anywhere.
NCCL cannot cancel one operation; a deadline aborts the group (ncclCommAbort) and with it the conversation.
"""

from __future__ import annotations

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
from protocol.errors import ConfigError, MalformedFrame
from protocol.kv import Endpoint
from protocol.wire import Identity

_ENTRY_BYTES_MAX = 64 << 10  # a key and its value; NCCL's unique id has 128 bytes, gloo's addresses some hundred
_KEY_SIZE = struct.Struct("<I")


class NcclTransport(PiecewiseTransport):
    """Listens on `config.host`:`config.nccl_port` for the conversation; the library's own sockets are bound to the same host."""

    name = "nccl"

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig) -> None:
        if not dist.is_available():
            raise ConfigError("kv_transport nccl needs a torch with torch.distributed; choose auto, shm or tcp")
        super().__init__(identity, secret, config, port=config.nccl_port)

    def endpoint(self) -> Endpoint:
        return Endpoint(host=self._config.advertise_host or self._config.host, nccl_port=self.port)

    def port_of(self, endpoint: Endpoint) -> int:
        return endpoint.nccl_port

    def open_channel(self, session: Session, *, dialed: bool) -> Channel:
        rank = 1 if dialed else 0
        timeout = timedelta(seconds=self._config.stall_timeout_s)
        group, device = _make_group(_SessionStore(session), rank, timeout, self._config.host)
        return _GroupChannel(session, group, 1 - rank, device, self._config.channel_bytes)


class _GroupChannel(StagedChannel):
    def __init__(self, session: Session, group: Any, peer: int, device: torch.device, piece_bytes_max: int) -> None:
        super().__init__(session, piece_bytes_max=piece_bytes_max)
        self._group = group
        self._peer = peer
        self._device = device

    def carry_out(self, staging: Staging, done: Done) -> Finish:
        tensor = torch.from_numpy(staging).to(self._device)
        return self._carry(lambda: self._group.send([tensor], self._peer, 0), lambda: None, done)

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
        return ConnectionResetError(f"{'NCCL' if self._device.type == 'cuda' else 'gloo'}: {failure}")


class _SessionStore(Store):
    """What torch calls a store, between two ranks: a key set on one side is sent to the other. Used while the group is made."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session
        self._entries: dict[str, bytes] = {}

    def set(self, key: str, value: bytes | str) -> None:
        content = value.encode() if isinstance(value, str) else bytes(value)
        self._entries[key] = content
        self._session.send_frame(_KEY_SIZE.pack(len(key.encode())) + key.encode() + content)

    def get(self, key: str) -> bytes:
        while key not in self._entries:
            frame = self._session.receive_frame(_ENTRY_BYTES_MAX)
            if len(frame) < _KEY_SIZE.size:
                raise MalformedFrame("an entry of the rendezvous has no key")
            end = _KEY_SIZE.size + _KEY_SIZE.unpack_from(frame)[0]
            self._entries[frame[_KEY_SIZE.size : end].decode(errors="replace")] = frame[end:]
        return self._entries[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        """The session's pause ends it at the deadline of whoever waits."""
        for key in keys:
            self.get(key)


def _make_group(store: Store, rank: int, timeout: timedelta, host: str) -> tuple[Any, torch.device]:
    if torch.cuda.is_available() and dist.is_nccl_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, 2, options), torch.device("cuda", torch.cuda.current_device())
    gloo = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    gloo._devices = [ProcessGroupGloo.create_device(hostname=host)]
    gloo._timeout = timeout
    return ProcessGroupGloo(store, rank, 2, gloo), torch.device("cpu")
