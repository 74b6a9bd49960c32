"""How much memory this machine, or the container we are in, has left."""

from __future__ import annotations

from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


def available_memory_bytes(cgroup: Path = CGROUP) -> int:
    """Free now without swapping: the machine's, or what the container's limit (cgroup v2) leaves of it if that is less."""
    available = int(psutil.virtual_memory().available)
    limit, used = _number(cgroup / "memory.max"), _number(cgroup / "memory.current")
    if limit is None or used is None:
        return available
    return min(available, max(0, limit - used + _reclaimable_bytes(cgroup)))


def _reclaimable_bytes(cgroup: Path) -> int:
    """Cached files the kernel gives back when asked; they count as used."""
    try:
        rows = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        return int(rows.get("inactive_file", 0))
    except (OSError, ValueError):
        return 0


def _number(path: Path) -> int | None:
    """None for "max", and where there is no such file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
