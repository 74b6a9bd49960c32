"""Which processes there are, read from /proc: trees, listeners, memory, and ends that cannot hit a stranger.

A pid alone is no name, since the kernel reuses it: a process is (pid, start time), and it is killed only while both match.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.02
_LISTEN = "0A"  # TCP_LISTEN in /proc/net/tcp


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ProcessId:
    """One incarnation of a pid. `start_ticks` is field 22 of /proc/PID/stat: clock ticks since boot."""

    pid: int
    start_ticks: int

    @property
    def is_alive(self) -> bool:
        """False for a zombie: it has ended and waits for its parent to look."""
        stat = _stat(self.pid)
        return stat is not None and stat.start_ticks == self.start_ticks and stat.state not in "ZX"

    @property
    def title(self) -> str:
        """The command line; empty once the process has ended."""
        with contextlib.suppress(OSError):
            return Path(f"/proc/{self.pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        return ""

    def signal(self, number: int) -> None:
        """Deliver a signal to this incarnation only; nothing happens once it has ended or is not ours."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            descriptor = os.pidfd_open(self.pid)
            try:
                if self.is_alive:
                    signal.pidfd_send_signal(descriptor, number)
            finally:
                os.close(descriptor)


@dataclass(frozen=True, slots=True)
class _Stat:
    parent: int
    state: str
    start_ticks: int


def process_id(pid: int) -> ProcessId | None:
    """The incarnation that has this pid now; None when there is none."""
    stat = _stat(pid)
    return None if stat is None else ProcessId(pid=pid, start_ticks=stat.start_ticks)


def all_processes() -> list[ProcessId]:
    found = (process_id(int(entry)) for entry in os.listdir("/proc") if entry.isdigit())
    return sorted(p for p in found if p is not None)


def descendants(pid: int) -> list[ProcessId]:
    """Children, their children and so on, zombies left out. What was reparented away is not found: take the list in time."""
    children: dict[int, list[int]] = {}
    stats: dict[int, _Stat] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit() and (stat := _stat(int(entry))) is not None:
            stats[int(entry)] = stat
            children.setdefault(stat.parent, []).append(int(entry))
    found: list[ProcessId] = []
    queue = list(children.get(pid, ()))
    while queue:
        child = queue.pop()
        queue.extend(children.get(child, ()))
        if stats[child].state not in "ZX":
            found.append(ProcessId(pid=child, start_ticks=stats[child].start_ticks))
    return sorted(found)


def working_under(directory: Path) -> list[ProcessId]:
    """Processes whose working directory is `directory` or below it, also after it was removed."""
    prefix = str(directory)
    found = []
    for process in all_processes():
        with contextlib.suppress(OSError):
            cwd = os.readlink(f"/proc/{process.pid}/cwd").removesuffix(" (deleted)")
            if (cwd == prefix or cwd.startswith(prefix + "/")) and process.is_alive:
                found.append(process)
    return found


def kill_all(processes: Iterable[ProcessId], *, grace_s: float, deadline_s: float) -> list[ProcessId]:
    """SIGTERM, `grace_s` later SIGKILL to who is left; returns who still lives `deadline_s` after the start."""
    wanted = list(processes)
    started_s = time.monotonic()
    if grace_s > 0:
        for process in wanted:
            process.signal(signal.SIGTERM)
        wanted = wait_gone(wanted, timeout_s=grace_s)
    for process in wanted:
        process.signal(signal.SIGKILL)
    return wait_gone(wanted, timeout_s=max(0.0, deadline_s - (time.monotonic() - started_s)))


def wait_gone(processes: Iterable[ProcessId], *, timeout_s: float) -> list[ProcessId]:
    """Waits until all have ended, at most `timeout_s`; returns who has not."""
    deadline_s = time.monotonic() + timeout_s
    left = [p for p in processes if p.is_alive]
    while left and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
        left = [p for p in left if p.is_alive]
    return left


# --- sockets ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ListeningSocket:
    """A TCP port that is open, and who holds it (empty when that is another user's process)."""

    host: str
    port: int
    pids: tuple[int, ...]

    @property
    def is_loopback(self) -> bool:
        return self.host.startswith("127.") or self.host in ("::1",) or self.host.startswith("::ffff:127.")


def listeners(pids: Iterable[int] | None = None) -> list[ListeningSocket]:
    """Listening TCP sockets of this network namespace: of `pids`, or all of them."""
    wanted = None if pids is None else set(pids)
    holders: dict[str, list[int]] = {}
    for pid in wanted if wanted is not None else (p.pid for p in all_processes()):
        for inode in _socket_inodes(pid):
            holders.setdefault(inode, []).append(pid)
    found = []
    for family, path in ((socket.AF_INET, "/proc/net/tcp"), (socket.AF_INET6, "/proc/net/tcp6")):
        for line in _lines(path):
            words = line.split()
            if words[3] != _LISTEN or (wanted is not None and words[9] not in holders):
                continue
            address, port = words[1].split(":")
            host = _host(family, address)
            found.append(ListeningSocket(host=host, port=int(port, 16), pids=tuple(sorted(holders.get(words[9], ())))))
    return found


def _socket_inodes(pid: int) -> list[str]:
    inodes = []
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(f"/proc/{pid}/fd/{name}")
                if target.startswith("socket:["):
                    inodes.append(target[8:-1])
    return inodes


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()[1:]
    return []


def _host(family: socket.AddressFamily, address: str) -> str:
    """An address of /proc/net/tcp{,6}: host-endian words of 4 bytes in hex."""
    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
    return socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words))


# --- memory -----------------------------------------------------------------------------------------------------------


def pss_bytes(pids: Iterable[int]) -> int:
    """Proportional set size of all of them: shared pages are counted once. What has ended counts 0."""
    total_kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total_kib += int(line.split()[1])
    return total_kib * 1024


def _stat(pid: int) -> _Stat | None:
    try:
        raw = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    words = raw[raw.rindex(")") + 2 :].split()  # the name in parentheses may hold spaces and parentheses
    return _Stat(parent=int(words[1]), state=words[0], start_ticks=int(words[19]))
