"""The user's directory as the last place to import from: for policies given as module:Class, never for a name that is ours.

The end of `sys.path` is not last: packages installed in editable mode are found by a finder of their own, which comes after it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class LastResort:
    """Finds top-level modules in one directory, when nobody else does."""

    def __init__(self, directory: str) -> None:
        self.directory = directory

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [self.directory], target) if path is None else None


def import_last_from(directory: str) -> None:
    """Once a process and directory."""
    if not any(isinstance(finder, LastResort) and finder.directory == directory for finder in sys.meta_path):
        sys.meta_path.append(LastResort(directory))


__all__ = ["LastResort", "import_last_from"]
