"""A run whose process is killed with SIGKILL is ended by its reaper."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.processes import process_id, wait_gone
from cluster.reaper import Reaper
from cluster.run_directory import RunDirectory

pytestmark = pytest.mark.pure

RUN = """
import os, signal, subprocess, sys
from pathlib import Path
from cluster.port import ReservedPort
from cluster.reaper import Reaper
from cluster.run_directory import RunDirectory
os.setsid()
root = Path(sys.argv[1])
run = RunDirectory(root)
reaper = Reaper(run)
(root / f"{os.getpid()}.json").write_text("{}")
port = ReservedPort("127.0.0.1", 0, locks=root)
(root / f"port-{port.port}.lock").write_text(str(os.getpid()))
nothing = subprocess.DEVNULL
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], cwd=run.cwd, stdout=nothing, stderr=nothing, process_group=0)
print(left.pid, reaper._process.pid, flush=True)
os.killpg(0, signal.SIGKILL)
"""


def test_processes_and_files_of_a_killed_run_are_gone() -> None:
    """A child, the directory, a lock and the announcement; then the reaper itself. Fails when the reaper is in the run's own group
    or waits for its parent's pid instead of the pipe."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bt-") as directory:
        root = Path(directory) / "root"
        ran = subprocess.run([sys.executable, "-c", RUN, str(root)], capture_output=True, text=True, timeout=60, check=False)
        found = [process_id(int(pid)) for pid in ran.stdout.split()]
        assert len(found) == 2, ran.stderr
        assert wait_gone([p for p in found if p is not None], timeout_s=20.0) == []
        assert not root.exists()


def test_a_run_that_ended_in_order_needs_no_reaper() -> None:
    """Fails when close does not wait: its process would be a leftover for a moment."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="bt-") as directory:
        run = RunDirectory(Path(directory) / "root")
        reaper = Reaper(run)
        run.close()
        reaper.close()
        assert reaper._process.returncode == 0
