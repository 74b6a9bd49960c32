"""Ends what a run leaves when its own process is killed: it waits for the end of a pipe that only that process holds.

Ray's servers go with their parent, but its two agents stay for good, trying to tell a GCS that is gone. 10 MB, asleep.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.processes import descendants, kill_all, working_under
from cluster.run_directory import RunDirectory

DEADLINE_S = 5.0


class Reaper:
    """The process, from the side of the run. `close` after the run's directory was removed."""

    def __init__(self, run: RunDirectory) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - our interpreter, our module, our paths
            [sys.executable, "-m", "cluster.reaper", str(run.path), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            process_group=0,  # `kill -- -PGID` is not meant for it
        )

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def reap(run: Path, owner_pid: int) -> None:
    """Kill every process of the run and remove its files, the lock of its port and its announcement."""
    if not run.is_dir():
        return  # it has ended in order
    found = {p for p in working_under(run) if p.pid != os.getpid()}
    for process in list(found):
        found.update(descendants(process.pid))
    kill_all(found, grace_s=0.0, deadline_s=DEADLINE_S)
    shutil.rmtree(run, ignore_errors=True)
    root = run.parent
    for lock in root.glob("port-*.lock"):
        with contextlib.suppress(OSError):
            if lock.read_text() == str(owner_pid):
                lock.unlink()
    (root / f"{owner_pid}.json").unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # another run is there
        root.rmdir()


if __name__ == "__main__":
    sys.stdin.buffer.read()
    reap(Path(sys.argv[1]), int(sys.argv[2]))
