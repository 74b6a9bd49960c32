"""Ctrl-C and SIGTERM: the first asks for an orderly stop wherever the start or the serving is, a later Ctrl-C ends everything."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
FORCED_EXIT_CODE = 130
ECHO_S = 1.0  # `make` passes on a SIGTERM that the whole group got already: within this time a signal is the same one again


class Interrupted(BaseException):
    """Raised on the main thread by the first signal. Not an Exception: nothing on the way out may swallow it."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Interrupts:
    """A context in which signals are ours; on a thread other than the main one it does nothing.

    The first signal raises Interrupted where the code says `with interrupts.welcome()`, so that what is being acquired elsewhere is not
    lost half-way. Ctrl-C pressed again while we stop calls `force` and ends the process there and then.
    """

    def __init__(self, *, force: Callable[[], None]) -> None:
        self._force = force
        self._reason = ""
        self._told = False
        self._welcome = False
        self._first_s = 0.0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in _NAMES:
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextlib.contextmanager
    def welcome(self) -> Iterator[None]:
        """Around what may take long: a signal raises in here, one that came before raises at once."""
        self._welcome = True
        try:
            self._tell()
            yield
        finally:
            self._welcome = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now_s = time.monotonic()
        signal.alarm(0)  # set by Ray's C++ handler when SIGTERM came within ray.init: it would abort us in 3 s
        if not self._reason:
            self._reason, self._first_s = _NAMES[signal.Signals(number)], now_s
        elif number == signal.SIGINT and now_s - self._first_s > ECHO_S:
            self._force()
            os._exit(FORCED_EXIT_CODE)
        if self._welcome:
            self._tell()

    def _tell(self) -> None:
        if self._reason and not self._told:
            self._told = True
            raise Interrupted(self._reason)


__all__ = ["Interrupted", "Interrupts"]
