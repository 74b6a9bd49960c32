"""Talking to one engine in a process of its own: started, asked, held still while others are measured, ended.

An idle engine would go on spinning (OpenMP's and ggml's threads wait busily), so all processes of its session are stopped by signal and go
on when it is its turn.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from baton.bench.processor_time import pids_of, resident_bytes
from baton.bench.workloads import AskedRequest
from protocol.timeline import Timeline

LOAD_TIMEOUT_S = 600.0
RUN_TIMEOUT_S = 600.0
END_TIMEOUT_S = 5.0
END_POLL_S = 0.01
_READ_BYTES = 1 << 20
_REASON_CHARACTERS = 300

Json = dict[str, Any]


class EngineLost(Exception):
    """The engine's process ended, or did not answer in time; the text is the reason."""


class WorkUnsupported(Exception):
    """The engine does not do what was asked; the text is its own."""


class EngineProcess:
    """One engine. Whoever made it ends it; used as a context manager it ends with the block."""

    def __init__(self, name: str, command: Sequence[str], *, environment: Mapping[str, str], log: Path) -> None:
        """`log` takes what it writes to stderr; it is new."""
        self.name = name
        self._log = log
        self._unread = b""
        with log.open("wb") as errors:
            self._process = subprocess.Popen(  # noqa: S603
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                start_new_session=True,
                bufsize=0,
            )

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def session(self) -> int:
        return self._process.pid

    # --- what it is asked ---

    def load(self, model_dir: Path, *, dtype: str, num_threads: int, max_model_len: int, num_kv_tokens: int, max_num_seqs: int) -> Json:
        """Once. Its answer names the engine and its version.

        Raises:
            EngineLost: its process ended. WorkUnsupported: it does not serve this checkpoint, or not in this dtype.
        """
        return self.ask(
            {
                "verb": "load",
                "model": str(model_dir),
                "dtype": dtype,
                "num_threads": num_threads,
                "max_model_len": max_model_len,
                "num_kv_tokens": num_kv_tokens,
                "max_num_seqs": max_num_seqs,
            },
            LOAD_TIMEOUT_S,
        )

    def generate(self, requests: Sequence[AskedRequest], *, is_streamed: bool) -> tuple[list[Timeline], list[list[int]]]:
        """Run `requests` to their end: when their tokens came, on a clock that starts with the run, and which they were."""
        asked = [{"prompt": request.prompt, "num_tokens": request.num_tokens, "at_s": request.at_s} for request in requests]
        self.ask({"verb": "prepare", "requests": asked, "is_streamed": is_streamed}, RUN_TIMEOUT_S)
        answered = self.ask({"verb": "run"}, RUN_TIMEOUT_S)
        timelines = []
        for request, deliveries, token_ids in zip(requests, answered["deliveries"], answered["token_ids"], strict=True):
            timeline = Timeline(arrival_s=request.at_s)
            for at_s, count in deliveries:
                timeline.add_tokens(at_s, count)
            if timeline.num_tokens != request.num_tokens or len(token_ids) != request.num_tokens:
                raise EngineLost(f"{self.name} gave {timeline.num_tokens} tokens where {request.num_tokens} were asked for")
            timelines.append(timeline)
        return timelines, answered["token_ids"]

    def resident_bytes(self, *, without: str) -> int:
        return resident_bytes(self.session, without=without)

    # --- stillness ---

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def close(self) -> None:
        """It ends now, with all it started."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self.resume()
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.write(b'{"verb": "quit"}\n')
                self._process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(END_TIMEOUT_S)
        deadline_s = time.monotonic() + END_TIMEOUT_S
        while pids_of([self.session]) and time.monotonic() < deadline_s:  # again: a process may be born between listing and signal
            self._signal(signal.SIGKILL)
            time.sleep(END_POLL_S)
        self._process.wait(END_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _signal(self, number: signal.Signals) -> None:
        for pid in pids_of([self.session]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    # --- lines ---

    def ask(self, message: Json, timeout_s: float) -> Json:
        """One message (see baton/bench/spoken.py) and its answer.

        Raises:
            EngineLost: its process ended, or gave no answer in time. WorkUnsupported: it does not do this.
        """
        assert self._process.stdin is not None
        try:
            _write_all(self._process.stdin.fileno(), json.dumps(message).encode() + b"\n")
            reply = json.loads(self._read_line(timeout_s))
        except BrokenPipeError:
            raise EngineLost(self._last_words()) from None
        if "unsupported" in reply:
            raise WorkUnsupported(reply["unsupported"])
        assert isinstance(reply, dict)
        return reply

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._unread:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([self._process.stdout], [], [], left_s)[0]:
                raise EngineLost(f"{self.name} gave no answer within {timeout_s:.0f} s; its log ends: {self._last_words()}")
            read = os.read(self._process.stdout.fileno(), _READ_BYTES)
            if not read:
                raise EngineLost(self._last_words())
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _last_words(self) -> str:
        lines = [line.strip() for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:_REASON_CHARACTERS] if lines else "it ended without a word"


def _write_all(fd: int, message: bytes) -> None:
    view = memoryview(message)
    while view:
        view = view[os.write(fd, view) :]
