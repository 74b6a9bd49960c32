"""A source and a target transport of each kind in one process, real down to the socket, with hooks where a copy can be broken.

`Hooks.around_copy` runs between two looks of a one-sided copy (local, shm), `Hooks.on_send` in the source's sending thread (tcp, ucx,
nccl). Neither replaces anything: the transports, their seqlock and their conversation are those of kvtransfer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import select
from collections.abc import Callable, Iterator
from typing import Any, cast
from unittest.mock import patch

import kvtransfer.local
import kvtransfer.shm
from kernels.copy_runs import Runs
from kvtransfer import ucx
from kvtransfer.config import TransportConfig
from kvtransfer.copying import copy_verified
from kvtransfer.lanes import Pull
from kvtransfer.local import LocalExchange, LocalTransport
from kvtransfer.pieces import Channel
from kvtransfer.region import PoolMemory
from kvtransfer.session import Session
from kvtransfer.shm import ShmTransport
from kvtransfer.tcp import TcpTransport
from kvtransfer.transport import KVTransport, Region, Transfer
from protocol.kv import Outcome
from protocol.wire import Identity

SECRET = b"of this cluster"
FINGERPRINT = b"f" * 16
SOURCE, TARGET = "prefill-0", "decode-0"
OUTCOME_TIMEOUT_S = 15.0  # less than the pulls' deadline


class Hooks:
    """What the current case does to a pull while it runs. Each is called from the thread that copies or sends."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.before_copy: Callable[[Pull], None] = lambda pull: None
        self.around_copy: Callable[[int], None] = lambda call: None  # call 0: before the first slice, 1: after it, ...
        self.on_send: Callable[[Channel, memoryview, Runs], None] = lambda channel, blocks, runs: channel.send(blocks, runs)

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """One-sided copies of this process go through the hooks."""

        def hooked(source: Region, pull: Pull, look_up: Callable[[float], None], *, slice_bytes: int) -> None:
            self.before_copy(pull)
            calls = iter(range(1 << 30))

            def look(seconds: float) -> None:
                look_up(seconds)
                if not seconds:  # else it waits for layers that are not computed yet
                    self.around_copy(next(calls))

            copy_verified(source, pull, look, slice_bytes=slice_bytes)

        with patch.object(kvtransfer.local, "copy_verified", hooked), patch.object(kvtransfer.shm, "copy_verified", hooked):
            yield


class TappedChannel:
    """A source's channel whose bytes pass the hook; everything else is the channel's own."""

    def __init__(self, inner: Channel, hooks: Hooks) -> None:
        self._inner = inner
        self._hooks = hooks

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def send(self, blocks: memoryview, runs: Runs) -> None:
        self._hooks.on_send(self._inner, blocks, runs)


def tapped(transport_class: Any, hooks: Hooks) -> Any:
    """The class, with the channels of its source side tapped."""

    class Tapped(transport_class):  # type: ignore[misc]
        def open_channel(self, session: Session, *, dialed: bool) -> Channel:
            channel: Channel = super().open_channel(session, dialed=dialed)
            return channel if dialed else cast(Channel, TappedChannel(channel, hooks))

    return Tapped


def installed_backends() -> tuple[str, ...]:
    return ("local", "shm", "tcp", *(["ucx"] if ucx.is_installed() else []), "nccl")


class Pair:
    """Source and target transports of one backend, serving any number of pools; a pull is waited for."""

    def __init__(self, backend: str, run_dir: str, hooks: Hooks, *, epoch: int = 1) -> None:
        self.backend = backend
        self.epoch = epoch
        one_block = TransportConfig(copy_slice_bytes=1)  # a look between any two blocks
        source, target = (Identity(name=name, kind="worker", epoch=epoch, fingerprint=FINGERPRINT) for name in (SOURCE, TARGET))
        self.source: KVTransport
        self.target: KVTransport
        if backend == "local":
            exchange = LocalExchange()
            self.source = LocalTransport(exchange, worker_id=SOURCE, epoch=epoch)
            self.target = LocalTransport(exchange, worker_id=TARGET, epoch=epoch)
        elif backend == "shm":
            self.source = ShmTransport(source, SECRET, one_block, unix_path=f"{run_dir}/source.kv")
            self.target = ShmTransport(target, SECRET, one_block, unix_path=f"{run_dir}/target.kv")
        elif backend == "ucx":  # one a process, so it pulls from itself
            self.source = self.target = tapped(ucx.UcxTransport, hooks)(source, SECRET, TransportConfig())
        else:
            transport: Any = TcpTransport
            if backend == "nccl":
                from kvtransfer.nccl import NcclTransport

                transport = NcclTransport
            self.source = tapped(transport, hooks)(source, SECRET, TransportConfig())
            self.target = transport(target, SECRET, TransportConfig())
        self._pools: list[PoolMemory] = []

    def add(self, source: PoolMemory, target: PoolMemory) -> None:
        """Call it for all pools before the first pull: a source announces its regions once a connection."""
        self.source.register(source.region)
        self.target.register(target.region)

    def pull(self, transfer: Transfer) -> Outcome:
        ticket = self.target.start(transfer)
        while True:
            fd = self.target.wakeup_fd()
            if fd >= 0:
                ready, _, _ = select.select([fd], [], [], OUTCOME_TIMEOUT_S)
                if not ready:
                    faulthandler.dump_traceback()  # of every thread: one of them waits for what does not come
                assert ready, f"{self.backend}: no outcome in {OUTCOME_TIMEOUT_S} s"
            for done, outcome in self.target.poll():
                assert done == ticket
                return outcome

    def close(self) -> None:
        self.target.close()
        if self.source is not self.target:
            self.source.close()
