"""The private directory of a run."""

from __future__ import annotations

import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.run_directory import RunDirectory, default_root, live_runs, private_root, prune
from protocol.errors import ConfigError

pytestmark = pytest.mark.pure


@pytest.fixture
def root() -> Iterator[Path]:
    """Short enough for Unix sockets, as pytest's tmp_path is not."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bt-") as directory:
        yield Path(directory) / "root"


def test_closing_a_run_leaves_nothing(root: Path) -> None:
    """Root and run are gone with the last run. Fails when the root stays."""
    first, second = RunDirectory(root), RunDirectory(root)
    assert first.path != second.path and sorted(live_runs(root)) == sorted([first.path, second.path])
    first.close()
    assert second.path.is_dir() and not first.path.exists()
    second.close()
    assert not root.exists()


def test_only_its_user_reads_a_run(root: Path) -> None:
    """Modes of root, run and token. Fails when the token is written with the default mode."""
    run = RunDirectory(root)
    token = run.write_token()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (root, run.path, run.cwd, token)] == [0o700, 0o700, 0o700, 0o600]
    assert len(token.read_text()) == 64
    run.close()


def test_a_killed_run_is_pruned_by_the_next(root: Path) -> None:
    """A run whose owner has ended goes, ours stays. Fails when prune keeps what has no living owner."""
    made = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from cluster.run_directory import RunDirectory; print(RunDirectory(__import__('pathlib').Path({str(root)!r})).path)",
        ],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    dead = Path(made.stdout.strip())
    assert dead.is_dir() and live_runs(root) == []
    ours = RunDirectory(root)
    assert not dead.exists() and ours.path.is_dir()
    assert prune(root) == []
    ours.close()


def test_a_root_of_somebody_else_is_refused(root: Path, tmp_path: Path) -> None:
    """A link, planted where our root would be, is not followed. Fails when is_symlink is not asked."""
    tmp_path.chmod(0o755)
    root.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="link"):
        RunDirectory(root)


def test_a_root_too_long_for_unix_sockets_is_refused(tmp_path: Path) -> None:
    """The text has the size and the limit. Fails when Ray is left to find out."""
    with pytest.raises(ConfigError, match="bytes"):
        private_root(tmp_path / ("x" * 40))


def test_the_default_root_fits_a_long_temporary_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails when TMPDIR is followed whatever its length."""
    long = tmp_path / ("y" * 60)
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    assert str(default_root()).startswith("/tmp/baton-")
