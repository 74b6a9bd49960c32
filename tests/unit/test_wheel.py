"""The wheel holds the rooms with what they read, and nothing that stands beside them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = {
    "protocol", "kernels", "kvtransfer", "engine", "prefill_workers", "decode_workers",
    "router", "gateway", "control", "cluster", "simulator", "baton",
}  # fmt: skip


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the tree, so that nothing is written into it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, folder / "tree", ignore=ignored)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--quiet",
        "-w",
        str(folder),
        str(folder / "tree"),
    ]
    subprocess.run(command, check=True, timeout=100, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_wheel_holds_the_rooms_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    """Seen to fail with `tests*` among the packages, and without the demo model among the package data."""
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == ROOMS
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {f"{room}/py.typed" for room in ROOMS} <= set(names)
    read_at_run_time = {
        str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in {".html", ".jinja", ".yaml"}
    }
    read_at_run_time |= {str(p.relative_to(ROOT)) for p in (ROOT / "engine" / "demo_model").iterdir()}
    assert read_at_run_time <= set(names)


def test_wheel_runs_from_a_folder_that_has_our_names(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """The `baton` script does not put the working directory on the path, so another `router` there is not ours."""
    wheel.extractall(tmp_path / "installed")
    (tmp_path / "work" / "router").mkdir(parents=True)
    (tmp_path / "work" / "router" / "__init__.py").write_text("raise RuntimeError('the wrong router')")
    script = "import router, baton.__main__; print(router.__file__); baton.__main__.main()"
    outcome = subprocess.run(
        [sys.executable, "-P", "-c", script, "--help"],
        cwd=tmp_path / "work",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert str(tmp_path / "installed") in outcome.stdout and "serve" in outcome.stdout
