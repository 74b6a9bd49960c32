"""Blocks by UCX: shared memory, InfiniBand or TCP, whatever UCX finds between two workers.

The package is ucxx; its archived predecessor ucx-py has the same names and serves where that is installed. Endpoints are made from
worker addresses, with UCX's error handling: without it UCX aborts the process that reads from a peer that was killed. With it UCX
takes neither shared memory nor CMA unless told to (_ENVIRONMENT), and carries loopback over TCP at a tenth of the speed
(rapidsai/rapidsmpf#140). It may tell late or never of a peer's end, which is what the conversation's connection is for
(kvtransfer.staging). Neither package offers one-sided reads, so pieces are gathered into staging on one side.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import secrets
import struct
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

from kvtransfer.config import TransportConfig
from kvtransfer.pieces import Channel, PiecewiseTransport
from kvtransfer.session import Session
from kvtransfer.staging import Done, Finish, StagedChannel, Staging
from protocol import wire
from protocol.errors import ConfigError, MalformedFrame
from protocol.kv import Endpoint
from protocol.wire import Identity

_MODULES = ("ucxx", "ucp")
# Set before the import where the user has not.
_ENVIRONMENT = {
    # UCX's choices on a machine without a GPU, and silence about them.
    "UCX_MEMTYPE_CACHE": "n",
    "UCX_RNDV_FRAG_MEM_TYPES": "host",
    "UCX_WARN_UNUSED_ENV_VARS": "n",
    "UCX_LOG_FILE": "stderr",  # instead of stdout, which is not UCX's
    # Completion wakes the event loop; without it the loop spins while a piece is carried, and takes the interpreter from our threads.
    "UCXPY_ENABLE_PYTHON_FUTURE": "1",
    # Shared memory and CMA together with error handling. CMA cannot take a peer's leave to read back, which UCX asks for then: a source
    # that gave up may be read by a target still. What it reads so has no trailer and counts for nothing (kvtransfer.pieces).
    "UCX_MM_ERROR_HANDLING": "y",
    "UCX_CMA_MEMORY_INVALIDATE": "y",
}
_ADDRESS_BYTES_MAX = 16 << 10
_CALL_TIMEOUT_S = 10.0  # of making an endpoint: no byte moves, but UCX opens devices
_SEQUENCE_BITS = 24
_TAG = struct.Struct("<Q")


class UcxTransport(PiecewiseTransport):
    """One a process, since UCX is. Listens on `config.host`:`config.ucx_port` for the conversation; UCX's own sockets are its own."""

    name = "ucx"

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig) -> None:
        if wire.is_loopback(config.host):
            os.environ.setdefault("UCX_NET_DEVICES", "lo")
        self._ucx = _UcxThread()
        try:
            super().__init__(identity, secret, config, port=config.ucx_port)
        except BaseException:
            self._ucx.close()
            raise

    def endpoint(self) -> Endpoint:
        return Endpoint(host=self._config.advertise_host or self._config.host, ucx_port=self.port)

    def port_of(self, endpoint: Endpoint) -> int:
        return endpoint.ucx_port

    def open_channel(self, session: Session, *, dialed: bool) -> Channel:
        """Both say their worker address; the dialer says the tag that its pieces will have."""
        tag = secrets.randbits(64 - _SEQUENCE_BITS) << _SEQUENCE_BITS
        session.send_frame(_TAG.pack(tag) + self._ucx.address)
        frame = session.receive_frame(_ADDRESS_BYTES_MAX)
        if len(frame) <= _TAG.size:
            raise MalformedFrame(f"{session.peer.name} gave no UCX address")
        (theirs,) = _TAG.unpack_from(frame)
        return _UcxChannel(session, self._ucx, frame[_TAG.size :], tag if dialed else theirs, self._config.channel_bytes)

    def close(self) -> None:
        super().close()
        self._ucx.close()


class _UcxChannel(StagedChannel):
    def __init__(self, session: Session, ucx: _UcxThread, address: bytes, tag: int, piece_bytes_max: int) -> None:
        self._ucx = ucx
        self._endpoint = ucx.connect(address)
        self._next_tag = tag
        super().__init__(session, piece_bytes_max=piece_bytes_max)

    def carry_out(self, staging: Staging, done: Done) -> Finish:
        return self._carry(self._endpoint.send, staging, done)

    def carry_in(self, staging: Staging, done: Done) -> Finish:
        return self._carry(self._endpoint.recv, staging, done)

    def give_up(self) -> None:
        self._ucx.soon(self._endpoint.abort)

    def _carry(self, verb: Callable[..., Coroutine[Any, Any, Any]], staging: Staging, done: Done) -> Finish:
        future = self._ucx.call(verb(staging, tag=self._next_tag, force_tag=True))
        self._next_tag += 1
        future.add_done_callback(lambda _: done())

        def finish() -> None:
            failure = future.exception(0)
            if failure is not None:
                raise ConnectionResetError(f"UCX: {failure!r}") from failure

        return finish


class _UcxThread:
    """UCX's event loop and everything that must run on it."""

    def __init__(self) -> None:
        self._module = import_ucx()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="kv-ucx", daemon=True)
        self._thread.start()
        try:
            self.address: bytes = self.call(self._open()).result(_CALL_TIMEOUT_S)
        except RuntimeError as error:
            self._stop()
            raise ConfigError(f"UCX is in use in this process already ({error}); a process has one ucx transport") from None

    def connect(self, address: bytes) -> Any:
        """An endpoint of the module.

        Raises:
            ConnectionResetError: UCX finds no way there, or takes longer than it may.
        """
        connecting = self.call(self._connect(address))
        failure = connecting.exception(_CALL_TIMEOUT_S)
        if failure is not None:
            raise ConnectionResetError(f"UCX: {failure!r}") from failure
        return connecting.result()

    async def _connect(self, address: bytes) -> Any:
        parsed = self._module.get_ucx_address_from_buffer(address)
        return await self._module.create_endpoint_from_worker_address(parsed, endpoint_error_handling=True)

    def call(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def soon(self, act: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(act)

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self.call(self._reset()).result(_CALL_TIMEOUT_S)
        self._stop()

    async def _open(self) -> bytes:
        self._module.init()
        return bytes(self._module.get_worker_address())

    async def _reset(self) -> None:
        self._module.reset()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def is_installed() -> bool:
    return any(importlib.util.find_spec(name) is not None for name in _MODULES)


def import_ucx() -> Any:
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _MODULES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise ConfigError(
        "kv_transport ucx needs the package ucxx: pip install 'baton-serve[ucx]' (ucxx-cu12 needs no GPU); or choose auto, shm or tcp"
    )
