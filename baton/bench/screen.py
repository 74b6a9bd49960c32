"""What a bench shows while it runs and at its end, the same for each: one line of progress, one table, who was left out and why."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

TABLE_COLUMNS = 130


def sayer(began_s: float) -> Callable[[str], None]:
    """What is being done now: one line that is written over on a terminal, elsewhere a line each."""
    is_terminal = sys.stderr.isatty()

    def say(text: str) -> None:
        line = f"{time.monotonic() - began_s:6.0f} s  {text}"
        sys.stderr.write(f"\r\x1b[K{line}" if is_terminal else f"{line}\n")
        sys.stderr.flush()

    return say


def show(table: Table, absent: Mapping[str, str]) -> None:
    """The table, and each peer that was left out with the reason."""
    from rich.console import Console

    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=TABLE_COLUMNS)
    console.print(table)
    for name, reason in absent.items():
        console.print(f"{name} was left out: {reason}", style="yellow", markup=False)
