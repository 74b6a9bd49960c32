"""A channel over a library that moves one contiguous buffer at a time, and that nobody can stop: gather, carry, scatter.

    source   blocks ── copy_runs ──► staging ══ library ══► staging ── copy_runs ──► blocks   target

The library writes staging memory only, never a pool: a carry that was given up may still end later, and then it spoils nothing but a
buffer that is thrown away with the channel. While one waits for the library, the connection of the conversation is watched: the
peer's death, a cancellation or a deadline ends the wait whatever the library does.
"""

from __future__ import annotations

import os
import select
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kernels.copy_runs import Runs, copy_runs
from kvtransfer.session import Session

Staging = npt.NDArray[np.uint8]


class StagedChannel(ABC):
    """`Channel` of kvtransfer.pieces. Used by the one thread that serves the session; `carry_*` may run their work on others."""

    def __init__(self, session: Session, *, piece_bytes_max: int) -> None:
        self.piece_bytes_max = piece_bytes_max
        self._session = session
        self._staging: Staging = np.empty(0, dtype=np.uint8)
        self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = threading.Lock()  # a carry that ends late must not write to a descriptor that is another's by now
        self._either = select.epoll()  # readable once the carry is done or the peer is gone
        self._either.register(self._done_fd, select.EPOLLIN)
        self._either.register(session.fileno(), select.EPOLLRDHUP)

    @abstractmethod
    def carry_out(self, staging: Staging, done: Callable[[], None]) -> Callable[[], None]:
        """Begin to send all of `staging`, and call `done` from any thread when it has ended.

        Returns what is called then; it raises OSError if the carry failed.
        """

    @abstractmethod
    def carry_in(self, staging: Staging, done: Callable[[], None]) -> Callable[[], None]:
        """Begin to fill all of `staging`; the rest as in `carry_out`."""

    @abstractmethod
    def give_up(self) -> None:
        """The channel ends, perhaps in the middle of a carry, whose staging must live until the library lets go of it."""

    def send(self, blocks: memoryview, runs: Runs) -> None:
        staging = self._room(int(runs[:, 1].sum()))
        copy_runs(blocks, staging.data, _beside(runs, source=True))
        self._wait(self.carry_out, staging)

    def receive(self, blocks: memoryview, runs: Runs) -> None:
        staging = self._room(int(runs[:, 1].sum()))
        self._wait(self.carry_in, staging)
        copy_runs(staging.data, blocks, _beside(runs, source=False))

    def close(self) -> None:
        if self._done_fd < 0:
            return
        self.give_up()
        self._either.close()
        with self._closing:
            os.close(self._done_fd)
            self._done_fd = -1

    def _room(self, size_bytes: int) -> Staging:
        if len(self._staging) < size_bytes:
            self._staging = np.empty(size_bytes, dtype=np.uint8)
        return self._staging[:size_bytes]

    def _wait(self, begin: Callable[[Staging, Callable[[], None]], Callable[[], None]], staging: Staging) -> None:
        finish = begin(staging, self._done)
        while True:
            self._session.pause(self._either.fileno(), select.POLLIN)
            ready = dict(self._either.poll(0))
            if self._done_fd in ready:
                os.eventfd_read(self._done_fd)
                finish()
                return
            if self._session.fileno() in ready:
                raise ConnectionResetError(f"{self._session.peer.name or 'the peer'} went away while a piece was carried")

    def _done(self) -> None:
        with self._closing:
            if self._done_fd >= 0:
                os.eventfd_write(self._done_fd, 1)


def _beside(runs: Runs, *, source: bool) -> Runs:
    """(offset, size) on the blocks' side, with the contiguous staging on the other: what copy_runs takes."""
    sizes = runs[:, 1]
    staged = np.concatenate(([0], np.cumsum(sizes)[:-1]))
    columns = (runs[:, 0], staged) if source else (staged, runs[:, 0])
    return np.stack((*columns, sizes), axis=1)
