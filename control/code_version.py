"""Which code this is: its version, and a digest of its sources where they are not those of the version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]


def code_version(rooms: Sequence[str]) -> str:
    """ "0.1.0 5f3a..." of the sources of `rooms`, such as "router": equal for equal sources, wherever they are installed."""
    digest = hashlib.sha256()
    for room in rooms:
        for path in sorted((TREE / room).rglob("*.py")):
            digest.update(f"{path.relative_to(TREE)}\n".encode() + path.read_bytes())
    try:
        told = version("baton-serve")
    except PackageNotFoundError:
        told = "not installed"
    return f"{told} {digest.hexdigest()[:16]}"


__all__ = ["code_version"]
