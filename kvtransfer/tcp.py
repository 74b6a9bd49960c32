"""Blocks over a data socket of their own: the target asks for pieces, the source streams them straight out of its pool.

Nothing is staged: the socket's calls gather from the blocks and scatter into the blocks (kernels.socket_runs).
The conversation is that of kvtransfer.pieces.
"""

from __future__ import annotations

import sys

import numpy as np

from kernels.copy_runs import Runs
from kvtransfer.config import TransportConfig
from kvtransfer.pieces import Channel, PiecewiseTransport
from kvtransfer.session import Session
from protocol.kv import Endpoint
from protocol.wire import Identity


class TcpTransport(PiecewiseTransport):
    """Listens on `config.host`:`config.port`."""

    name = "tcp"

    def __init__(self, identity: Identity, secret: bytes, config: TransportConfig) -> None:
        super().__init__(identity, secret, config, port=config.port)

    def endpoint(self) -> Endpoint:
        return Endpoint(host=self._config.advertise_host or self._config.host, port=self.port)

    def port_of(self, endpoint: Endpoint) -> int:
        return endpoint.port

    def open_channel(self, session: Session, *, dialed: bool) -> Channel:
        return _Inline(session)


class _Inline:
    """The bytes go on the connection itself, between the head and the trailer."""

    piece_bytes_max = sys.maxsize
    pieces_ahead = 2
    pieces_under_way = 1

    def __init__(self, session: Session) -> None:
        self._session = session

    def expect(self, size_bytes: int) -> None:
        """The stream says itself when it comes."""

    def forgo(self) -> bool:
        return True  # nothing was begun

    def send(self, blocks: memoryview, runs: Runs) -> None:
        self._session.send_runs(blocks, np.ascontiguousarray(runs))

    def flush(self, *, or_input: bool) -> bool:
        return True  # `send` has given everything to the kernel

    def receive(self, blocks: memoryview, runs: Runs) -> None:
        self._session.receive_runs(blocks, np.ascontiguousarray(runs))

    def close(self) -> None:
        """The connection is closed by whoever opened it."""
