"""Log lines of our processes: an event, then its fields as name=value, so that a grep for a request finds all that was said of it."""

from __future__ import annotations

import json
import logging
import sys

FORMAT = "%(asctime)s %(levelname)s %(name)s %(message)s"
INFO_LINES_PER_S = 20.0  # of a process, some 10 KB/s
INFO_BURST_LINES = 1000
_OWN = frozenset(logging.LogRecord("", 0, "", 0, "", (), None).__dict__) | {"message", "asctime", "taskName"}


class EventFormatter(logging.Formatter):
    """Appends the `extra` of our own loggers; a value with a space or a quote stands in quotes, as in JSON."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if not record.name.startswith("baton"):
            return line
        fields = {name: value for name, value in record.__dict__.items() if name not in _OWN and name[0] != "_"}  # Ray adds some of its own
        return " ".join([line, *(f"{name}={_shown(value)}" for name, value in fields.items())])


class InfoAtMost(logging.Filter):
    """Lets INFO through at `per_s` lines a second, after a burst of `burst`: nobody rotates these files. What was left out is counted
    in the next line that passes. Warnings always pass."""

    def __init__(self, *, per_s: float, burst: int) -> None:
        super().__init__()
        self._per_s, self._burst = per_s, float(burst)
        self._left, self._at_s = self._burst, 0.0
        self._num_left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno > logging.INFO:
            return True
        self._left = min(self._burst, self._left + max(0.0, record.created - self._at_s) * self._per_s)
        self._at_s = record.created
        if self._left < 1.0:
            self._num_left_out += 1
            return False
        self._left -= 1.0
        if self._num_left_out:
            record.lines_left_out, self._num_left_out = self._num_left_out, 0
        return True


def log_events() -> None:
    """Of our loggers, to the process's own stderr, from INFO on.

    Ray has set up the root logger by now and lets nothing below WARNING through, and Serve has put a logger in sys.stderr's place that
    keeps lines to itself until it has many.
    """
    handler = logging.StreamHandler(sys.__stderr__)
    handler.setFormatter(EventFormatter(FORMAT))
    handler.addFilter(InfoAtMost(per_s=INFO_LINES_PER_S, burst=INFO_BURST_LINES))
    ours = logging.getLogger("baton")
    ours.handlers[:] = [handler]
    ours.setLevel(logging.INFO)
    ours.propagate = False


def _shown(value: object) -> str:
    if value is None:
        return "-"
    text = str(value)
    is_plain = text.isprintable() and not any(c in text for c in ' "=') and text
    return text if is_plain else json.dumps(text, ensure_ascii=False)
