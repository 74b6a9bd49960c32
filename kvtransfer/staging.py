"""A channel over a library that moves one contiguous buffer at a time, and that nobody can stop: gather, carry, scatter.

    source   blocks ── copy_runs ──► staging ══ library ══► staging ── copy_runs ──► blocks   target

    piece k            gather   carry   scatter
    piece k + 1                 gather   carry   scatter            three stagings a side, one for each of the three

The library writes staging memory only, never a pool: a carry that was given up may still end later, and then it spoils nothing but a
buffer that is thrown away with the channel. While one waits for the library, the connection of the conversation is watched: the
peer's death, a cancellation or a deadline ends the wait whatever the library does.
"""

from __future__ import annotations

import os
import select
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import Runs, copy_runs
from kvtransfer.session import Session

Staging = npt.NDArray[np.uint8]
Finish = Callable[[], None]  # raises OSError if the carry failed
Done = Callable[[], None]  # says from any thread that a carry has ended

_NUM_STAGINGS = 3


class StagedChannel(ABC):
    """`Channel` of kvtransfer.pieces. Used by the one thread that serves the session; `carry_*` may run their work on others."""

    pieces_ahead = _NUM_STAGINGS
    pieces_under_way = _NUM_STAGINGS

    def __init__(self, session: Session, *, piece_bytes_max: int) -> None:
        self.piece_bytes_max = piece_bytes_max
        self._session = session
        self._idle: list[Staging] = []
        self._carries: deque[_Carry] = deque()  # begun and not finished, in order
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = threading.Lock()  # a carry that ends late must not write to a descriptor that is another's by now
        self._either = select.epoll()  # readable once a carry is done or the peer is gone
        self._either.register(self._done_fd, select.EPOLLIN)
        self._either.register(session.fileno(), select.EPOLLRDHUP)

    @abstractmethod
    def carry_out(self, staging: Staging, done: Done) -> Finish:
        """Begin to send all of `staging`, and call `done` when it has ended; what is returned is called then.

        Several carries are begun before the first has ended; the peer begins its own in the same order.
        """

    @abstractmethod
    def carry_in(self, staging: Staging, done: Done) -> Finish:
        """Begin to fill all of `staging`; the rest as in `carry_out`."""

    @abstractmethod
    def give_up(self) -> None:
        """The channel ends, perhaps in the middle of carries, whose stagings must live until the library lets go of them."""

    def expect(self, size_bytes: int) -> None:
        self._begin(self.carry_in, self._room(size_bytes))

    def forgo(self) -> bool:
        return False  # the library waits for these bytes, and would take the next piece for them

    def send(self, blocks: memoryview, runs: Runs) -> None:
        carry = self._room(int(runs[:, 1].sum()))  # also for one run: a second process reads what is in the cache twice as fast
        copy_runs(blocks, carry.staging.data, _beside(runs, source=True))
        self._begin(self.carry_out, carry)

    def flush(self, *, or_input: bool) -> bool:
        # POLLOUT, as for a socket: a peer that takes nothing is not waited for without end.
        if not self._until_first_ended(select.POLLIN | select.POLLOUT, or_input=or_input):
            return False
        self._finish_first()
        return True

    def receive(self, blocks: memoryview, runs: Runs) -> None:
        self._until_first_ended(select.POLLIN)
        carry = self._carries[0]
        copy_runs(carry.staging.data, blocks, _beside(runs, source=False))
        self._finish_first()

    def close(self) -> None:
        if self._done_fd < 0:
            return
        self.give_up()
        self._either.close()
        with self._closing:
            os.close(self._done_fd)
            self._done_fd = -1

    def _room(self, size_bytes: int) -> _Carry:
        whole = self._idle.pop() if self._idle else np.empty(0, dtype=np.uint8)
        if len(whole) < size_bytes:
            whole = np.empty(size_bytes, dtype=np.uint8)
        return _Carry(whole, size_bytes)

    def _begin(self, carry_on: Callable[[Staging, Done], Finish], carry: _Carry) -> None:
        self._carries.append(carry)
        carry.finish = carry_on(carry.staging, lambda: self._ended(carry))

    def _until_first_ended(self, events: int, *, or_input: bool = False) -> bool:
        """Wait for the oldest carry. `events` are those told to the session's pause.

        Raises:
            ConnectionResetError: it failed, or the peer is gone.
        """
        peer_fd, carry = self._session.fileno(), self._carries[0]
        self._either.modify(peer_fd, select.EPOLLRDHUP | (select.EPOLLIN if or_input else 0))
        while not carry.has_ended:
            self._session.pause(self._either.fileno(), events)
            ready = dict(self._either.poll(0))
            if self._done_fd in ready:
                os.eventfd_read(self._done_fd)
            elif ready.get(peer_fd) == select.EPOLLIN:
                return False
            elif peer_fd in ready:
                raise ConnectionResetError(f"{self._session.peer.name or 'the peer'} went away while a piece was carried")
        carry.finish()
        return True

    def _finish_first(self) -> None:
        self._idle.append(self._carries.popleft().whole)

    def _ended(self, carry: _Carry) -> None:
        carry.has_ended = True
        with self._closing:
            if self._done_fd >= 0:
                os.eventfd_write(self._done_fd, 1)


class _Carry:
    """A staging in the library's hands."""

    def __init__(self, whole: Staging, size_bytes: int) -> None:
        self.whole = whole  # at least as large as what is carried in it
        self.staging = whole[:size_bytes]
        self.has_ended = False  # set by the library's thread
        self.finish: Finish


def _beside(runs: Runs, *, source: bool) -> Runs:
    """(offset, size) on the blocks' side, with the contiguous staging on the other: what copy_runs takes."""
    sizes = runs[:, 1]
    staged = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    columns = (runs[:, 0], staged) if source else (staged, runs[:, 0])
    return np.stack((*columns, sizes), axis=1)
