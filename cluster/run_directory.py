"""Where one run keeps its files: a private, short path that is gone when the run is.

<root>/               /tmp/baton-UID, mode 0700, ours
  port-8000.lock      held (flock) by the run that has the port, removed with it
  <id>/               one run; a run whose process is gone is pruned by the next one
    owner             pid and start time of the process that runs it
    cwd/              empty; the working directory of every process of the run
    ray/              Ray's session: logs, sockets (a Unix socket's path has at most 107 bytes, hence short)
    kv/               sockets of the KV transports
    token             Ray's authentication token, mode 0600
    access            where the directory listens, and the cluster secret, mode 0600 (control/access.py)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from cluster.processes import ProcessId, process_id
from protocol.errors import ConfigError

_ROOT_BYTES_MAX = 32  # leaves room for /<id>/ray/session_<26 digits>_<pid>/sockets/plasma_store within 107 bytes


class RunDirectory:
    """One run's directory. `close` removes it; a killed run leaves it to `prune`."""

    def __init__(self, root: Path | None = None) -> None:
        """Raises ConfigError when the root belongs to somebody else or its path is too long."""
        self.root = private_root(root or default_root())
        prune(self.root)
        self.id = secrets.token_hex(4)
        self.path = self.root / self.id
        self.path.mkdir(mode=0o700)
        for directory in (self.cwd, self.ray, self.kv):
            directory.mkdir(mode=0o700)
        me = process_id(os.getpid())
        assert me is not None
        (self.path / "owner").write_text(f"{me.pid} {me.start_ticks}")

    @property
    def cwd(self) -> Path:
        return self.path / "cwd"

    @property
    def ray(self) -> Path:
        return self.path / "ray"

    @property
    def kv(self) -> Path:
        return self.path / "kv"

    @property
    def access(self) -> Path:
        return self.path / "access"

    def write_token(self) -> Path:
        """A fresh secret for Ray's token authentication, readable by us only."""
        path = self.path / "token"
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        return path

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):  # another run, or its announcement, is still there
            self.root.rmdir()


def default_root() -> Path:
    """Below the temporary directory, or below /tmp when that path is too long for Unix sockets."""
    name = f"baton-{os.getuid()}"
    root = Path(tempfile.gettempdir()) / name
    return root if len(os.fsencode(root)) <= _ROOT_BYTES_MAX else Path("/tmp") / name  # noqa: S108 - made private below


def private_root(root: Path) -> Path:
    """`root`, made if needed, ours and closed to others.

    Raises:
        ConfigError: it is somebody else's, a link, or its path is too long.
    """
    size = len(os.fsencode(root))
    if size > _ROOT_BYTES_MAX:
        raise ConfigError(
            f"the run directory {root} has {size} bytes; at most {_ROOT_BYTES_MAX} leave room for Unix sockets; choose a shorter one"
        )
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.lstat()
    if root.is_symlink() or status.st_uid != os.getuid():
        raise ConfigError(f"{root} belongs to user {status.st_uid} or is a link; remove it or set TMPDIR to a directory of yours")
    if status.st_mode & 0o077:
        root.chmod(0o700)
    return root


def prune(root: Path) -> list[Path]:
    """Remove directories of runs, and locks of ports, whose process is gone (ended by SIGKILL); returns the directories."""
    removed = [run for run, owner in _owners(root) if not owner.is_alive]
    for run in removed:
        shutil.rmtree(run, ignore_errors=True)
    for lock in root.glob("port-*.lock"):
        with contextlib.suppress(OSError, ValueError):  # an empty one is being taken right now
            if process_id(int(lock.read_text())) is None:
                lock.unlink()
    return removed


def live_runs(root: Path) -> list[Path]:
    """Directories of runs whose process lives."""
    return [run for run, owner in _owners(root) if owner.is_alive]


def _owners(root: Path) -> list[tuple[Path, ProcessId]]:
    found = []
    for path in sorted(root.glob("*/owner")):
        with contextlib.suppress(OSError, ValueError):
            pid, start_ticks = (int(word) for word in path.read_text().split())
            found.append((path.parent, ProcessId(pid=pid, start_ticks=start_ticks)))
    return found
