"""Runs over a socket, native and reference mixed on either side: the bytes come in order and nowhere else, whatever the sizes.

Seen to fail with a run's rest sent from its start again, with the bound of a run not looked at, and with a closed peer taken for one that
has nothing to say yet.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Callable

import numpy as np
import pytest

from kernels.native.library import load_library
from kernels.socket_runs import (
    Cursor,
    Spans,
    new_cursor,
    receive_runs,
    receive_runs_reference,
    send_runs,
    send_runs_reference,
)

Carry = Callable[[socket.socket, memoryview, Spans, Cursor], bool]
SOCKET_BUFFER_BYTES = 32 << 10  # small, so that a call seldom does all


def test_the_native_calls_are_what_runs_here() -> None:
    assert not isinstance(load_library(), str), load_library()


def runs_of(rng: np.random.Generator, num_runs: int, largest: int) -> tuple[Spans, int]:
    """Spans that lie apart in a shuffled order, some of them empty, and the size of their buffer."""
    sizes = rng.integers(0, largest + 1, num_runs)
    starts = rng.permutation(num_runs) * largest
    return np.ascontiguousarray(np.stack([starts, sizes], axis=1).astype(np.int64)), max(1, num_runs * largest)


def carry_all(carry: Carry, sock: socket.socket, buffer: memoryview, runs: Spans, events: int) -> None:
    cursor = new_cursor()
    poller = select.poll()
    poller.register(sock, events)
    while not carry(sock, buffer, runs, cursor):
        assert poller.poll(10_000), "the other side stands still"


@pytest.mark.parametrize("send", [send_runs, send_runs_reference])
@pytest.mark.parametrize("receive", [receive_runs, receive_runs_reference])
@pytest.mark.parametrize(("num_runs", "largest"), [(0, 1), (1, 1), (1, 300_000), (7, 9_000), (3_000, 40), (1_500, 2_000)])
def test_bytes_arrive_in_order_and_nowhere_else(send: Carry, receive: Carry, num_runs: int, largest: int) -> None:
    """Both sides have runs of their own over the same stream: source and target sizes differ, only their sums are equal."""
    rng = np.random.default_rng(num_runs + largest)
    theirs, source_bytes = runs_of(rng, num_runs, largest)
    total = int(theirs[:, 1].sum())
    cuts = np.sort(rng.integers(0, total + 1, num_runs))
    sizes = np.diff(np.concatenate(([0], cuts, [total])))
    gaps = 3
    starts = np.cumsum(np.concatenate(([0], sizes[:-1] + gaps)))
    ours = np.ascontiguousarray(np.stack([starts, sizes], axis=1).astype(np.int64))
    source = rng.integers(1, 256, source_bytes, dtype=np.uint8)
    target = np.zeros(total + gaps * (len(ours) + 1), dtype=np.uint8)
    sender, receiver = socket.socketpair()
    with sender, receiver:
        for sock in (sender, receiver):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        thread = threading.Thread(target=carry_all, args=(send, sender, memoryview(source).toreadonly(), theirs, select.POLLOUT))
        thread.start()
        carry_all(receive, receiver, memoryview(target), ours, select.POLLIN)
        thread.join()
    stream = np.concatenate([source[start : start + size] for start, size in theirs.tolist()] or [source[:0]])
    expected = np.zeros_like(target)
    for (start, size), end in zip(ours.tolist(), np.cumsum(sizes).tolist(), strict=True):
        expected[start : start + size] = stream[end - size : end]
    assert (target == expected).all()


@pytest.mark.parametrize("receive", [receive_runs, receive_runs_reference])
def test_a_peer_that_closed_is_told_from_one_that_is_silent(receive: Carry) -> None:
    sender, receiver = socket.socketpair()
    target = np.zeros(8, dtype=np.uint8)
    runs, cursor = np.array([(0, 8)], dtype=np.int64), new_cursor()
    with receiver:
        sender.sendall(b"abc")
        assert not receive(receiver, memoryview(target), runs, cursor) and cursor.tolist() == [0, 3]
        sender.close()
        with pytest.raises(EOFError):
            receive(receiver, memoryview(target), runs, cursor)
    assert bytes(target) == b"abc" + bytes(5)


@pytest.mark.parametrize("send", [send_runs, send_runs_reference])
def test_a_receiver_that_is_gone_is_an_error_and_not_a_signal(send: Carry) -> None:
    sender, receiver = socket.socketpair()
    with sender:
        receiver.close()
        with pytest.raises(BrokenPipeError):
            send(sender, memoryview(bytes(8)), np.array([(0, 8)], dtype=np.int64), new_cursor())


@pytest.mark.parametrize(("send", "receive"), [(send_runs, receive_runs), (send_runs_reference, receive_runs_reference)])
@pytest.mark.parametrize("bad", [(90, 11), (-1, 1), (0, -1), (101, 0), (2**62, 2**62)])
def test_a_run_outside_its_buffer_is_refused(send: Carry, receive: Carry, bad: tuple[int, int]) -> None:
    sender, receiver = socket.socketpair()
    runs = np.array([bad], dtype=np.int64)
    with sender, receiver:
        sender.sendall(bytes(200))
        for carry, sock in ((send, receiver), (receive, receiver)):
            with pytest.raises(IndexError, match="a buffer of 100 bytes"):
                carry(sock, memoryview(bytearray(100)), runs, new_cursor())
