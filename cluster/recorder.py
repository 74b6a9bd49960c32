"""Writes the records of a router into a file beside its work: encoded once the answers are out, written by a thread of its own.

    turn ─► take: kept ─► answers are sent ─► settle: encoded, handed over ─► thread: written, flushed

Bounded in what waits and in what is written. What does not fit ends the record, loudly: one with a gap could not be run again.
"""

from __future__ import annotations

import os
import queue
import threading
from dataclasses import dataclass
from pathlib import Path

from control.code_version import code_version
from router.config import RouterConfig
from router.recording import ROOMS, SCHEMA, PolicySwitched, RecordingEnded, RouterBegan, Turn, declarations, frame

MAX_UNWRITTEN_BYTES = 64 << 20  # handed over and not on their way yet
JOIN_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordSpec:
    """Where a router's events are written, and how many bytes at most."""

    folder: Path
    max_bytes: int


class FileRecorder:
    """One router's record, `NAME-EPOCH.events` in a folder that is made if need be.

    Raises (constructor):
        OSError: the file cannot be made.
    """

    def __init__(self, spec: RecordSpec, *, name: str, epoch: int, seed: int, config: RouterConfig) -> None:
        spec.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path = spec.folder / f"{name}-{epoch}.events"
        self._max_bytes = spec.max_bytes
        self._num_bytes = 0  # handed over
        self._num_written = 0  # by the thread alone
        self._taken: list[Turn | PolicySwitched] = []
        self._blocks: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._is_over = False
        self._complaint = ""  # why it ended before the router did
        self._file = os.fdopen(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")
        began = RouterBegan(
            schema=SCHEMA, declarations=declarations(), code=code_version(ROOMS), name=name, epoch=epoch, seed=seed, config=config
        )
        self._hand_over(frame(began))
        self._thread = threading.Thread(target=self._write, name="baton-recorder", daemon=True)
        self._thread.start()

    def take(self, record: Turn | PolicySwitched) -> None:
        if not self._is_over:
            self._taken.append(record)

    def settle(self) -> None:
        taken, self._taken = self._taken, []
        if not taken:
            return
        block = b"".join(map(frame, taken))
        if self._num_bytes + len(block) > self._max_bytes:
            self._give_up(f"it would have grown beyond recording.max_bytes, {self._max_bytes:,}")
        elif self._num_bytes - self._num_written + len(block) > MAX_UNWRITTEN_BYTES:
            self._give_up(f"the disk is behind by more than {MAX_UNWRITTEN_BYTES:,} bytes")
        else:
            self._hand_over(block)

    def close(self) -> None:
        self.settle()
        if not self._is_over:
            self._end("the router stopped")
        self._thread.join(JOIN_TIMEOUT_S)

    @property
    def note(self) -> str | None:
        """One line for `baton status`."""
        return f"recording ended: {self._complaint}; {self.path} holds the events until then" if self._complaint else None

    def _hand_over(self, block: bytes) -> None:
        self._num_bytes += len(block)
        self._blocks.put(block)

    def _end(self, reason: str) -> None:
        self._is_over = True
        self._blocks.put(frame(RecordingEnded(reason=reason)))
        self._blocks.put(None)

    def _give_up(self, reason: str) -> None:
        self._complaint = reason
        self._end(reason)

    def _write(self) -> None:
        """On the thread."""
        try:
            with self._file:
                while (block := self._blocks.get()) is not None:
                    self._file.write(block)
                    if self._blocks.empty():
                        self._file.flush()  # a router that is killed leaves what it had handed over
                    self._num_written += len(block)
        except OSError as error:
            self._is_over, self._complaint = True, f"it cannot be written ({error.strerror})"


__all__ = ["FileRecorder", "RecordSpec"]
