"""The rules of the house that no tool holds: what a room may import, what a file looks like, what the wheel carries."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

ROOT = Path(__file__).resolve().parents[2]
ROOMS = (
    "protocol", "kernels", "kvtransfer", "engine", "prefill_workers", "decode_workers",
    "router", "gateway", "control", "cluster", "simulator", "baton",
)  # fmt: skip
BESIDE = ("tests", "benchmarks", "examples", "deploy")
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))

# What decides: `now` and `rng` are arguments there. The drivers that live in the same rooms are named after them.
PURE = (
    "protocol", "router", "control", "engine/core", "prefill_workers", "decode_workers",
    "gateway/session.py", "kvtransfer/handoff.py", "kvtransfer/reshard.py",
)  # fmt: skip
DRIVERS = {"protocol/wire.py", "protocol/links.py", "router/service.py"}
OUTSIDE_WORLD = {"time", "random", "secrets", "socket", "asyncio", "threading", "subprocess", "multiprocessing"}
# Installed for another package's sake: uvicorn finds these by itself.
FOUND_BY_OTHERS = {"uvloop", "httptools"}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def imports(path: Path) -> tuple[tuple[str, str | None], ...]:
    """(module, name imported from it or None) of every import in the file, inside functions too."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            assert node.level == 0, f"{name_of(path)}: relative import; the house imports by full name"
            found += [(node.module, alias.name) for alias in node.names]
    return tuple(found)


def pure_files() -> list[Path]:
    named = [ROOT / entry for entry in PURE]
    files = [file for entry in named for file in (entry.rglob("*.py") if entry.is_dir() else [entry])]
    return sorted(file for file in files if name_of(file) not in DRIVERS)


def test_what_decides_reads_no_clock_and_draws_no_number() -> None:
    """Seen to fail with `import time` added to protocol/lifecycle.py."""
    found = []
    for path in pure_files():
        taken = {module for module, _ in imports(path) if module.partition(".")[0] in OUTSIDE_WORLD}
        if all(name == "Random" for module, name in imports(path) if module == "random"):
            taken.discard("random")  # the type of an `rng` argument
        found += [f"{name_of(path)} imports {module}; take it as an argument" for module in sorted(taken)]
    assert not found


def test_product_imports_nothing_that_stands_beside_it() -> None:
    """tests, benchmarks, examples and deploy are not in the wheel. Seen to fail with `import examples` in a room."""
    assert not [(name_of(path), module) for path in FILES for module, _ in imports(path) if module.partition(".")[0] in BESIDE]


def test_private_names_stay_in_their_room() -> None:
    """Seen to fail with `from protocol.lifecycle import _A` in kvtransfer/config.py."""
    found = []
    for path in FILES:
        others = set(ROOMS) - {path.relative_to(ROOT).parts[0]}
        for module, name in imports(path):
            if module.partition(".")[0] in others and any(part.startswith("_") for part in [*module.split("."), name or ""]):
                found.append(f"{name_of(path)} imports {module}.{name}")
    assert not found


def test_nothing_is_unpickled() -> None:
    """No frame, file or weight is ever unpickled. Seen to fail with `import pickle` in protocol/codec.py."""
    formats = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert not [name_of(path) for path in FILES if {module for module, _ in imports(path)} & formats or "torch.load(" in path.read_text()]


def test_file_opens_with_its_reason_and_fits_a_reader() -> None:
    """Seen to fail with a docstring taken away, and with a TODO."""
    found = [fault for path in FILES for fault in faults_of(path)]
    assert not found, "\n".join(found)


def faults_of(path: Path) -> Iterator[str]:
    source, name = path.read_text(), name_of(path)
    if not ast.get_docstring(ast.parse(source)) and path != ROOT / "kernels" / "__init__.py":
        yield f"{name} opens without a sentence on why it exists"
    if source.count("\n") >= 500:
        yield f"{name} has {source.count(chr(10))} lines; the limit is 500"
    if re.search(r"\bNotImplementedError\b|\bTODO(?!\(#\d+\))", source):
        yield f"{name} holds a stub"
    if re.search(r"except( Exception| BaseException)?:\s*\n\s*pass\b", source):
        yield f"{name} swallows every error"
    if re.fullmatch(r"(utils?|common|helpers?|misc|manager|handler)", path.stem):
        yield f"{name}: name the file for what it holds"


@cache
def public_surfaces() -> dict[str, set[str]]:
    """The modules that state their public surface, with it."""
    stating = [path for path in FILES if re.search(r"^__all__\b", path.read_text(), re.MULTILINE)]
    return {name_of(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."): surface(path) for path in stating}


def test_public_surface_is_what_all_lists() -> None:
    """Where a module has `__all__`, every name in it exists and other rooms import nothing else from it."""
    surfaces = public_surfaces()
    found = []
    for path in FILES:
        own = path.relative_to(ROOT).parts[0]
        for module, name in imports(path):
            if module in surfaces and name is not None and module.partition(".")[0] != own and name not in surfaces[module]:
                found.append(f"{name_of(path)} imports {name}, which {module}.__all__ does not list")
    assert not found


def surface(path: Path) -> set[str]:
    """The names in `__all__` of a module, each checked to be bound at its top level."""
    tree = ast.parse(path.read_text())
    bound: set[str] = set()
    listed: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}  # `A, B = ...` too
            bound |= names
            if "__all__" in names and node.value is not None:
                listed = set(ast.literal_eval(node.value))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
    assert listed <= bound, f"{name_of(path)}: __all__ lists {listed - bound}, which it does not define"
    return listed


def pyproject() -> dict[str, dict[str, object]]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def distribution_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_import_is_a_declared_dependency_and_every_dependency_is_imported() -> None:
    """Seen to fail with `import requests` in a room, and with `attrs` added to the dependencies."""
    project = pyproject()["project"]
    required = distribution_names(project["dependencies"])  # type: ignore[arg-type]
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    optional = distribution_names([entry for extra, entries in extras.items() if extra != "dev" for entry in entries])
    distributions = packages_distributions()
    imported: set[str] = set()
    for path in FILES:
        for module in {module.partition(".")[0] for module, _ in imports(path)}:
            if module in sys.stdlib_module_names or module in ROOMS:
                continue
            owners = {owner.lower().replace("_", "-") for owner in distributions.get(module, [module])}
            assert owners & (required | optional), f"{name_of(path)} imports {module}, which pyproject.toml does not name"
            imported |= owners
    assert not required - imported - FOUND_BY_OTHERS, f"declared but never imported: {sorted(required - imported - FOUND_BY_OTHERS)}"


def test_constraints_pin_every_dependency_without_local_versions() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#"))
    assert all(re.fullmatch(r"[0-9][0-9a-zA-Z.]*", version) for version in pinned.values())
    project = pyproject()["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]  # type: ignore[assignment]
    named = distribution_names([*project["dependencies"], *extras["dev"]])  # type: ignore[misc]
    assert not named - {name.lower().replace("_", "-") for name in pinned}


def test_every_room_is_in_the_wheel_and_nothing_else_is() -> None:
    """Seen to fail with a room left out of packages.find."""
    tool = pyproject()["tool"]
    assert {pattern.rstrip("*") for pattern in tool["setuptools"]["packages"]["find"]["include"]} == set(ROOMS)  # type: ignore[index]
    assert set(tool["importlinter"]["root_packages"]) == set(ROOMS)  # type: ignore[index]
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert set(ROOMS) <= folders <= set(ROOMS) | set(BESIDE)


def test_kernels_package_stays_empty() -> None:
    """transformers imports a module named `kernels` and reads its __version__; ours must have none."""
    tree = ast.parse((ROOT / "kernels" / "__init__.py").read_text())
    assert all(isinstance(node, ast.Expr) for node in tree.body)
    version = str(pyproject()["project"]["version"])
    assert not version.startswith("0.18")


@pytest.mark.parametrize("room", ROOMS)
def test_importing_a_room_imports_neither_torch_nor_ray(room: str) -> None:
    """A package's __init__ says what belongs there and imports nothing heavy."""
    for module, _ in imports(ROOT / room / "__init__.py"):
        assert module.partition(".")[0] not in {"torch", "ray", "transformers", "triton", "fastapi"}
    importlib.import_module(room)
