"""One shared cluster for the tests that only talk to one; and `-m pure`.

`-m pure` runs as if neither torch nor Ray were installed: their import fails, and tests not marked so are not even read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from tests.checkpoints import make_checkpoint
from tests.serving import KILLED_ON_PURPOSE, Serving, end, start

HEAVY = frozenset({"torch", "ray", "transformers", "triton"})
SHARED_CLUSTER = {
    # In torch a phase lasts until a worker is killed in it; golden, kernels and property tests hold the native kernels.
    "model": {"path": "demo", "kernels": "torch", "numerics": "reference"},
    "workers": {"prefill_workers": 2, "decode_workers": 2},
    "router": {"disaggregate": "always"},
    "supervisor": KILLED_ON_PURPOSE,
}


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


@pytest.fixture(scope="session")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """One cluster for every test that only talks to it: the demo model, 2 prefill and 2 decode workers."""
    server = start(tmp_path_factory.mktemp("serving"), config=SHARED_CLUSTER)
    yield server
    end(server)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_checkpoint(arch, **overrides)`: the directory of a small random checkpoint (tests/checkpoints.py), made once a session."""
    parent = tmp_path_factory.mktemp("checkpoints")

    def make(arch: str, **overrides: object) -> Path:
        return make_checkpoint(parent, arch, **overrides)

    return make
