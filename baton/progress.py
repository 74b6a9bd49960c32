"""What is being done now, on stderr: one line, written over, on a terminal; silence elsewhere. What must be seen is a line anywhere."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Now; empty clears the line."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{text}")
        sys.stderr.flush()


def say_line(text: str) -> None:
    sys.stderr.write(f"\r\x1b[K{text}\n" if sys.stderr.isatty() else f"{text}\n")
