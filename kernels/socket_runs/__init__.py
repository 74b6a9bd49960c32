"""Send many runs of a buffer over a socket, or fill them from it, without waiting and without the interpreter lock.

Contract: runs [num_runs, 2] int64 holds (offset, size) in bytes of `buffer`; they are sent, or filled, in order. `cursor` [2] int64 is
(run, bytes done of it), zeros at first; a call moves it as far as the socket goes. True: all is done; False: the socket takes or has no
more now, so wait for it and call again. Where the native kernels are not built the reference serves: the same bytes, microseconds a run
more.
"""

from __future__ import annotations

import errno
import os
import socket

import numpy as np
import numpy.typing as npt

from kernels.native.library import NativeLibrary, load_library
from kernels.socket_runs.reference import receive_runs_reference, send_runs_reference

__all__ = ["Cursor", "Spans", "new_cursor", "receive_runs", "receive_runs_reference", "send_runs", "send_runs_reference"]

Spans = npt.NDArray[np.int64]
Cursor = npt.NDArray[np.int64]

_WOULD_BLOCK, _CARRIED, _PEER_ENDED = range(3)  # of kernels/native/src/baton_native.h


def new_cursor() -> Cursor:
    return np.zeros(2, dtype=np.int64)


def send_runs(sock: socket.socket, buffer: memoryview, runs: Spans, cursor: Cursor) -> bool:
    """Shapes as in the package's contract.

    Raises:
        IndexError: a run lies outside the buffer. OSError: the peer is gone.
    """
    library = load_library()
    if not isinstance(library, NativeLibrary):
        return send_runs_reference(sock, buffer, runs, cursor)
    return _carried(library.calls.baton_send_runs(*_arguments(sock, buffer, runs, cursor)), runs, cursor, buffer)


def receive_runs(sock: socket.socket, buffer: memoryview, runs: Spans, cursor: Cursor) -> bool:
    """Shapes as in the package's contract; `buffer` is writable.

    Raises:
        IndexError: a run lies outside the buffer. EOFError: the peer closed its side. OSError: it is gone.
    """
    assert not buffer.readonly
    library = load_library()
    if not isinstance(library, NativeLibrary):
        return receive_runs_reference(sock, buffer, runs, cursor)
    return _carried(library.calls.baton_receive_runs(*_arguments(sock, buffer, runs, cursor)), runs, cursor, buffer)


def _arguments(sock: socket.socket, buffer: memoryview, runs: Spans, cursor: Cursor) -> tuple[int, int, int, int, int, int]:
    assert runs.dtype == np.int64 and runs.flags.c_contiguous and cursor.dtype == np.int64, "as in the contract"
    address = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
    return sock.fileno(), address, len(buffer), runs.ctypes.data, len(runs), cursor.ctypes.data


def _carried(result: int, runs: Spans, cursor: Cursor, buffer: memoryview) -> bool:
    if result == _PEER_ENDED:
        raise EOFError("the peer closed the connection")
    if result == -errno.EFAULT:
        raise IndexError(f"a run from run {cursor[0]} on of {len(runs)} leaves a buffer of {len(buffer)} bytes")
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result == _CARRIED
