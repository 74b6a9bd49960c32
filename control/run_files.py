"""One small file for each running server, so that `baton status` and `baton chat` find it without being told where it is.

They lie in $XDG_RUNTIME_DIR/baton, or /tmp/baton-<uid> where there is none, as <pid>.json; directory 0700, files 0600. The
server writes its file when it is ready and removes it at its end; one that a killed server left behind is ignored, and swept at
the next start.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from protocol.errors import ConfigError

SCHEMA = "baton.run.v1"
FILE_BYTES_MAX = 64 << 10
CLOCK_SLACK_S = 2.0  # a process's start is known to a clock tick, and boot time is estimated


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFile:
    """A server that is, or was, ready."""

    pid: int
    url: str  # "http://127.0.0.1:8000"
    namespace: str  # of its actors in Ray
    started: float  # seconds since 1970, after the process began
    model_id: str = ""
    access: str = ""  # path of its access file (control/access.py)


def runtime_dir(environ: Mapping[str, str]) -> Path:
    """Our private directory of this user on this machine, made if need be.

    Raises:
        ConfigError: somebody else owns it or may write to it.
    """
    base = environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "baton" if base and Path(base).is_dir() else Path(f"/tmp/baton-{os.getuid()}")  # noqa: S108 - owner and mode are checked below
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"cannot make {path}: {error.strerror}; set XDG_RUNTIME_DIR to a directory of yours") from None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise ConfigError(f"{path} must be a directory of yours with mode 0700; remove it, or set XDG_RUNTIME_DIR elsewhere")
    return path


def write_run_file(run: RunFile, environ: Mapping[str, str]) -> Path:
    """Announce a ready server, in one atomic move; sweeps what dead ones left."""
    directory = runtime_dir(environ)
    for path in directory.glob("*.json"):
        known = _read(path)
        if known is None or not _is_alive(known):
            path.unlink(missing_ok=True)
    path = directory / f"{run.pid}.json"
    draft = directory / f".{run.pid}.draft"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"schema": SCHEMA, **asdict(run)}, file)
    draft.rename(path)
    return path


def remove_run_file(pid: int, environ: Mapping[str, str]) -> None:
    """Take the announcement back; none there is fine."""
    (runtime_dir(environ) / f"{pid}.json").unlink(missing_ok=True)


def read_run_files(environ: Mapping[str, str]) -> list[RunFile]:
    """The servers of this user that are alive, newest first."""
    found = [run for path in runtime_dir(environ).glob("*.json") if (run := _read(path)) is not None and _is_alive(run)]
    return sorted(found, key=lambda run: run.started, reverse=True)


def _read(path: Path) -> RunFile | None:
    """None for a file that is not ours to understand."""
    try:
        if path.stat().st_size > FILE_BYTES_MAX:
            return None
        tree = json.loads(path.read_text())
        if tree.pop("schema", None) != SCHEMA:
            return None
        return RunFile(
            pid=int(tree["pid"]),
            url=str(tree["url"]),
            namespace=str(tree["namespace"]),
            started=float(tree["started"]),
            model_id=str(tree.get("model_id", "")),
            access=str(tree.get("access", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_alive(run: RunFile) -> bool:
    """The process exists and is the one that wrote the file, not a later one with its number."""
    try:
        process = psutil.Process(run.pid)
        return process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= run.started + CLOCK_SLACK_S
    except psutil.Error:
        return False
