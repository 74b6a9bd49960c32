"""`-m pure` runs as if neither torch nor Ray were installed: their import fails, and tests not marked so are not even read."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

HEAVY = frozenset({"torch", "ray", "transformers", "triton"})


class AsIfNotInstalled:
    """A finder that knows the heavy packages only to deny them."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HEAVY:
            raise ModuleNotFoundError(f"No module named {name!r} (-m pure)", name=name)
        return None


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == "pure":
        sys.meta_path.insert(0, AsIfNotInstalled())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.option.markexpr == "pure" and collection_path.name.startswith("test_"):
        return True if "pytest.mark.pure" not in collection_path.read_text() else None
    return None
