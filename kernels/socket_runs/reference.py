"""One view a run, in lists small enough for one system call."""

from __future__ import annotations

import socket

import numpy as np
import numpy.typing as npt

_BURST_BYTES = 1 << 20  # of one system call: more than a socket buffer holds would be listed twice
_BURST_VIEWS = 1024  # IOV_MAX


def send_runs_reference(sock: socket.socket, buffer: memoryview, runs: npt.NDArray[np.int64], cursor: npt.NDArray[np.int64]) -> bool:
    """Shapes as in the package's contract."""
    while burst := _burst(buffer, runs, cursor):
        try:
            sent = sock.sendmsg(burst, (), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        _move(runs, cursor, sent)
    return True


def receive_runs_reference(sock: socket.socket, buffer: memoryview, runs: npt.NDArray[np.int64], cursor: npt.NDArray[np.int64]) -> bool:
    """Shapes as in the package's contract."""
    while burst := _burst(buffer, runs, cursor):
        try:
            received, *_ = sock.recvmsg_into(burst, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        if not received:
            raise EOFError("the peer closed the connection")
        _move(runs, cursor, received)
    return True


def _burst(buffer: memoryview, runs: npt.NDArray[np.int64], cursor: npt.NDArray[np.int64]) -> list[memoryview]:
    """Views from the cursor on; empty runs are dropped."""
    burst: list[memoryview] = []
    room = _BURST_BYTES
    first, done = cursor.tolist()
    for run in range(first, len(runs)):
        start, size = runs[run].tolist()
        if start < 0 or size < 0 or start + size > len(buffer):
            raise IndexError(f"a run from run {first} on of {len(runs)} leaves a buffer of {len(buffer)} bytes")
        if len(burst) == _BURST_VIEWS or room <= 0:
            break
        if size > done:
            burst.append(buffer[start + done : start + min(size, done + room)])
            room -= len(burst[-1])
        done = 0
    return burst


def _move(runs: npt.NDArray[np.int64], cursor: npt.NDArray[np.int64], num_bytes: int) -> None:
    run, done = cursor.tolist()
    while num_bytes:
        left = int(runs[run, 1]) - done
        if num_bytes < left:
            done += num_bytes
            break
        num_bytes -= left
        run, done = run + 1, 0
    cursor[:] = (run, done)
