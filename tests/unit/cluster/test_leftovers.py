"""What is found of a run that did not clean up, and that a living run is left out."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import leftovers, run_directory
from cluster.leftovers import Traces, take
from cluster.run_directory import RunDirectory

pytestmark = pytest.mark.pure

PLANT = """
import socket, subprocess, sys
from pathlib import Path
from cluster.run_directory import RunDirectory
run = RunDirectory(Path(sys.argv[1]))
unix = socket.socket(socket.AF_UNIX); unix.bind(str(run.kv / "left.sock")); unix.listen()
tcp = socket.socket(); tcp.bind(("127.0.0.1", 0)); tcp.listen(); tcp.set_inheritable(True); unix.set_inheritable(True)
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=run.cwd, close_fds=False, stdout=-3, stderr=-3)
print(run.path, left.pid, tcp.getsockname()[1], flush=True)
"""


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bt-") as directory:
        root = Path(directory) / "root"
        monkeypatch.setattr(run_directory, "default_root", lambda: root)
        monkeypatch.setattr(leftovers, "default_root", lambda: root)
        yield root


def _take(root: Path) -> Traces:
    return take({"XDG_RUNTIME_DIR": str(root.parent)})


def test_process_port_socket_and_files_of_a_dead_run_are_listed(root: Path) -> None:
    """A run's process dies and leaves a child. Fails when any of the four is not looked for."""
    before = _take(root)
    planted = subprocess.run([sys.executable, "-c", PLANT, str(root)], capture_output=True, text=True, check=True, timeout=60)
    path, pid, port = planted.stdout.split()
    try:
        left = _take(root).since(before)
        assert any(line.startswith(f"processes: {pid} ") for line in left)
        assert any(f"127.0.0.1:{port}" in line for line in left)
        assert f"unix sockets: {path}/kv/left.sock" in left
        assert f"files: {path}" in left
    finally:
        os.kill(int(pid), 9)


def test_a_run_that_lives_is_no_leftover(root: Path) -> None:
    """Ours, with a socket. Fails when every run is counted."""
    before = _take(root)
    run = RunDirectory(root)
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(run.kv / "s"))
        unix.listen()
        assert _take(root).since(before) == []
    run.close()


def test_what_was_there_before_does_not_count() -> None:
    """Fails when `since` compares kinds with each other."""
    before = Traces(processes=("1 2 a",), ports=(), unix_sockets=(), shared_memory=(), files=("/x",))
    after = Traces(processes=("1 2 a",), ports=("/x",), unix_sockets=(), shared_memory=("/dev/shm/y",), files=())
    assert after.since(before) == ["ports: /x", "shared memory: /dev/shm/y"]
