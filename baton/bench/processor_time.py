"""How much of the processors others used while something was measured: from /proc, with nothing installed.

`others` = (busy time of all cores, with what a hypervisor took - that of our own sessions) / time passed, in cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_IDLE_FIELDS = (3, 4)  # idle and iowait, of /proc/stat's first line
_ENDED = "ZX"  # states of a process that only waits for its parent to notice
_NUM_FIELDS = 8  # user nice system idle iowait irq softirq steal; guests are counted in user


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorTime:
    """Seconds since some moment; only differences mean anything."""

    wall_s: float
    busy_s: float  # of all cores
    own_s: float


def processor_time(sessions: Collection[int]) -> ProcessorTime:
    """Now, with this process and the processes of `sessions` as our own."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1 : 1 + _NUM_FIELDS]]
    busy = sum(ticks for i, ticks in enumerate(fields) if i not in _IDLE_FIELDS)
    own = _ticks_of(os.getpid()) + sum(_ticks_of(pid) for pid in pids_of(sessions))
    return ProcessorTime(wall_s=time.monotonic(), busy_s=busy / _TICKS_PER_S, own_s=own / _TICKS_PER_S)


def others_between(before: ProcessorTime, after: ProcessorTime) -> float:
    """Cores that others used, on average; 0 where the counters' steps (10 ms) say less than nothing."""
    busy_s, own_s = after.busy_s - before.busy_s, after.own_s - before.own_s
    return max(0.0, (busy_s - own_s) / (after.wall_s - before.wall_s))


def pids_of(sessions: Collection[int]) -> list[int]:
    """Every living process of these sessions, whatever its process group: a subject's own children too."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdecimal() and (fields := _stat(int(entry.name))) is not None:
            state, session = fields[0], int(fields[3])
            if session in sessions and state not in _ENDED:
                found.append(int(entry.name))
    return found


def _ticks_of(pid: int) -> int:
    """Its own, and those of its children that have ended."""
    fields = _stat(pid)
    return 0 if fields is None else sum(int(field) for field in fields[11:15])


def _stat(pid: int) -> list[str] | None:
    """/proc/PID/stat from the state on: the name before it may hold spaces. None: it has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def resident_bytes(session: int, *, without: str | None = None) -> int:
    """Proportional set size of a session's processes, mappings of files whose name holds `without` left out; None: of all."""
    total = 0
    for pid in pids_of([session]):
        try:
            lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        is_counted = True
        for line in lines:
            name, _, value = line.partition(":")
            if name == "Pss":
                total += int(value.split()[0]) * 1024 if is_counted else 0
            elif "-" in line.split(" ", 1)[0]:  # "7f00-7f01 rw-p ... name": the head of the next mapping
                is_counted = without is None or without not in line
    return total
